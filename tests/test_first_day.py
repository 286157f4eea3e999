"""What a first day tries, and what it is told: each message whole."""

import inspect
import operator
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import errors, nnx

import jaxbn
from jaxbn import _elsewhere, calls, export, health, watch
from tests.support.compiling import as_pasted

X = jnp.ones((8, 3))
HERE = (
    "write jaxbn.linen.BatchNorm or jaxbn.nnx.BatchNorm in a Flax model, jaxbn.batch_norm in "
    "functions of your own."
)
SYNCED = (
    "write axis_name= of jaxbn.linen.BatchNorm, jaxbn.nnx.BatchNorm or jaxbn.batch_norm, which "
    "pools statistics over that axis of shard_map, pmap or vmap. Under jit on sharded arrays "
    "statistics are global without it."
)
GAP = (
    "expected linen's apply, its variables and a batch, or an nnx model and a batch; write "
    "gap(model.apply, variables, x) or gap(model, x)."
)
APPLY = "expected a linen model's apply; write"
NNX = (
    "expected an nnx model; write with watch.nnx(model) as seen: y = model(x), or "
    "watch.linen(model.apply) of linen."
)

ALONE = "expected an nnx model alone, or linen's apply and its variables; write"
RECALIBRATE = (
    "expected apply(model, batch), the model and batches; write recalibrate(functools.partial("
    "net.apply, train=False), variables, batches), or of nnx recalibrate(lambda model, x: "
    "model(x), model, batches)."
)
BATCHES = "expected an iterable of batches, such as a list; write"
FUNCTION = "expected an inference function with its weights closed over; write"
SERVING = "health.serving(lambda x: net.apply(variables, x), x)"
DRIFT = "drift(variables, (health.incoming(model.apply)(variables, x)[1] for x in data))"
WRITERS = (export.onnx, export.stablehlo, export.tflite, export.saved_model)
TO_A_FILE = "export.{}(lambda x: net.apply(variables, x), x, path)"
QUOTED = '"NAME"'
NAME = f"expected the name of a file or of a folder; write {QUOTED}."
READERS = (
    export.session,
    export.load_stablehlo,
    export.load_tflite,
    export.load_saved_model,
    export.read_manifest,
)
DONE = export.Exported(Path("net.onnx"), 1, 0.0, 0.0)
TRITON = (
    "expected the folder of a model repository and an ONNX file; write "
    "export.triton(folder, source)."
)
APPLY_OF = operator.attrgetter("apply")


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jaxbn.linen.BatchNorm(use_running_average=False, name="norm")(x)


@pytest.fixture(scope="module", name="models")
def _models():
    with as_pasted():
        net = Net()
        return net, net.init(jax.random.key(0), X), jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        *((jaxbn, name) for name in ("BatchNorm", "batchnorm", "BatchNormalization")),
        *((jaxbn, name) for name in ("batch_normalization", "BatchNorm2d")),
        (jaxbn.linen, "BatchNorm2d"),
        (jaxbn.nnx, "BatchNorm2d"),
    ],
    ids=lambda v: v if isinstance(v, str) else v.__name__,
)
def test_names_of_other_libraries(module, name):
    with pytest.raises(AttributeError) as error:
        getattr(module, name)
    assert str(error.value) == (f"module {module.__name__!r} has no attribute {name!r}; {HERE}")


@pytest.mark.parametrize(
    ("name", "write"),
    [("BatchNorm", HERE), ("SyncBatchNorm", SYNCED)],
    ids=["BatchNorm", "SyncBatchNorm"],
)
def test_names_of_other_libraries_imported(name, write):
    """`from jaxbn import` drops the message of an AttributeError."""
    with pytest.raises(ImportError) as error:
        exec(f"from jaxbn import {name}")
    assert str(error.value) == f"cannot import name {name!r} from 'jaxbn'; {write}"
    assert not hasattr(jaxbn, name)


def test_an_unknown_name_imported_is_pythons_error():
    with pytest.raises(ImportError, match=r"^cannot import name 'layernorm' from 'jaxbn' \("):
        exec("from jaxbn import layernorm")


@pytest.mark.parametrize("name", ["SyncBatchNorm", "sync_batch_norm", "SyncBatchNormalization"])
def test_names_of_synchronized_batch_norm(name):
    with pytest.raises(AttributeError) as error:
        getattr(jaxbn, name)
    assert str(error.value) == f"module 'jaxbn' has no attribute {name!r}; {SYNCED}"


def test_a_typing_error_is_told_its_neighbour():
    with pytest.raises(AttributeError) as error:
        jaxbn.batch_nrom  # noqa: B018
    assert str(error.value) == "module 'jaxbn' has no attribute 'batch_nrom'"
    assert (error.value.name, error.value.obj) == ("batch_nrom", jaxbn)  # "Did you mean: …?"


@pytest.mark.parametrize(
    "module", [jaxbn.linen.BatchNorm, jaxbn.nnx.BatchNorm], ids=["linen", "nnx"]
)
@pytest.mark.parametrize("name", _elsewhere.ARGUMENTS)
def test_arguments_of_other_libraries(module, name):
    write = {
        "eps": "epsilon=1",
        "affine": "use_scale=1, use_bias=1",
        "scale": "use_scale=1",
        "center": "use_bias=1",
        "create_scale": "use_scale=1",
        "create_offset": "use_bias=1",
        "decay": "momentum=1",
        "decay_rate": "momentum=1",
        "train": "use_running_average=not train",
        "training": "use_running_average=not training",
        "is_training": "use_running_average=not is_training",
    }[name]
    with pytest.raises(TypeError) as error:
        module(**{name: 1})
    assert str(error.value) == (f"BatchNorm: {name}=1 is another library's keyword; write {write}.")
    assert name not in inspect.signature(module).parameters


CASES = {  # of a linen model and its variables, and an nnx model
    "gap without a model": (
        lambda net, v, model: health.gap(v, X),
        f"gap: called with (dict, ArrayImpl), {GAP}",
    ),
    "gap of linen without variables": (
        lambda net, v, model: health.gap(net.apply, X),
        f"gap: called with (method, ArrayImpl), {GAP}",
    ),
    "gap of linen without a batch": (
        lambda net, v, model: health.gap(net.apply, v),
        f"gap: called with (method, dict), {GAP}",
    ),
    "gap of nnx without a batch": (
        lambda net, v, model: health.gap(model),
        f"gap: called with (BatchNorm), {GAP}",
    ),
    "watch.linen of variables": (
        lambda net, v, model: watch.linen(v),
        f"watch.linen: called with dict, {APPLY} watch.linen(model.apply), or watch.nnx(model) of "
        "nnx.",
    ),
    "watch.linen of an nnx model": (
        lambda net, v, model: watch.linen(model),
        f"watch.linen: called with BatchNorm, {APPLY} watch.linen(model.apply), or "
        "watch.nnx(model) of nnx.",
    ),
    "watch.nnx of a linen model": (
        lambda net, v, model: watch.nnx(net).__enter__(),
        f"watch.nnx: called with Net, {NNX}",
    ),
    "watch.records of an array": (
        lambda net, v, model: watch.records(X, v),
        "watch.records: called with ArrayImpl, expected a dict, path → Moments of each layer, as "
        "watch.linen gives; write watch.records(seen, variables, grads).",
    ),
    "watch.records, its arguments changed over": (
        lambda net, v, model: watch.records(v, {"norm": jaxbn.moments(X)}),
        "watch.records: called with dict of ['dict'], expected a dict, path → Moments of each "
        "layer, as watch.linen gives; write watch.records(seen, variables, grads).",
    ),
    "watch.metrics of variables": (
        lambda net, v, model: watch.metrics(v),
        "watch.metrics: called with dict of ['dict'], expected a dict, path → Record of each "
        "layer, as watch.records gives; write watch.metrics(records).",
    ),
    "incoming of variables": (
        lambda net, v, model: health.incoming(v),
        f"incoming: called with dict, {APPLY} health.incoming(model.apply).",
    ),
    "freeze of a linen model": (
        lambda net, v, model: jaxbn.freeze(net, v),
        f"freeze: called with Net, {APPLY} freeze(net.apply, variables).",
    ),
    "freeze of nnx, where= in the place of variables": (
        lambda net, v, model: jaxbn.freeze(model, "norm"),
        f"freeze: called with (BatchNorm, str), {ALONE} freeze(model, where=...) or "
        "freeze(net.apply, variables).",
    ),
    "swap of nnx, to= in the place of variables": (
        lambda net, v, model: jaxbn.swap(model, "layer"),
        f"swap: called with (BatchNorm, str), {ALONE} swap(model, to=...) or "
        "swap(net.apply, variables).",
    ),
    "swap, its arguments changed over": (
        lambda net, v, model: jaxbn.swap(v, net.apply),
        "swap: dict without variables, expected an nnx model, or linen's apply and its variables, "
        '"params" and "batch_stats"; write swap(net.apply, variables).',
    ),
    "recalibrate as gap is called, of nnx": (
        lambda net, v, model: jaxbn.recalibrate(model, [X]),
        f"recalibrate: called with (BatchNorm, list), {RECALIBRATE}",
    ),
    "recalibrate without apply": (
        lambda net, v, model: jaxbn.recalibrate(v, [X], limit=1),
        f"recalibrate: called with (dict, list, int), {RECALIBRATE}",
    ),
    "recalibrate, its arguments changed over": (
        lambda net, v, model: jaxbn.recalibrate(v, net.apply, [X]),
        f"recalibrate: called with (dict, method, list), {RECALIBRATE}",
    ),
    "recalibrate by an nnx model": (
        lambda net, v, model: jaxbn.recalibrate(model, model, [X]),
        f"recalibrate: called with (BatchNorm, BatchNorm, list), {RECALIBRATE}",
    ),
    "recalibrate by a linen model": (
        lambda net, v, model: jaxbn.recalibrate(net, v, [X]),
        f"recalibrate: called with (Net, dict, list), {RECALIBRATE}",
    ),
    "recalibrate on one batch": (
        lambda net, v, model: jaxbn.recalibrate(net.apply, v, X),
        f"recalibrate: batches is an array of shape (8, 3), {BATCHES} "
        "recalibrate(apply, model, [x]).",
    ),
    "recalibrate on one dict": (
        lambda net, v, model: jaxbn.recalibrate(net.apply, v, {"x": X}),
        f"recalibrate: batches is a dict, {BATCHES} recalibrate(apply, model, [x]).",
    ),
    "recalibrate on a function": (
        lambda net, v, model: jaxbn.recalibrate(net.apply, v, iter),
        f"recalibrate: batches is a builtin_function_or_method, {BATCHES} "
        "recalibrate(apply, model, [x]).",
    ),
    "fold of a linen model": (
        lambda net, v, model: jaxbn.fold(net, X),
        f"fold: fn is a linen module without its variables, {FUNCTION} "
        "jaxbn.fold(lambda x: model.apply(variables, x), x).",
    ),
    "fold of variables": (
        lambda net, v, model: jaxbn.fold(v, X),
        f"fold: fn is a dict, {FUNCTION} jaxbn.fold(lambda x: model.apply(variables, x), x).",
    ),
    "lint of a linen model": (
        lambda net, v, model: health.lint(net, X),
        "lint: fn is a linen module without its variables, expected a function with its weights "
        "closed over, or an nnx model; write "
        "health.lint(lambda x: net.apply(variables, x), x).",
    ),
    "serving as gap is called": (
        lambda net, v, model: health.serving(net.apply, v, X),
        "serving: called with (method, dict, ArrayImpl), expected an inference function and a "
        f"batch; write {SERVING}.",
    ),
    "serving of a linen model": (
        lambda net, v, model: health.serving(net, X),
        f"serving: fn is a linen module without its variables, {FUNCTION} {SERVING}.",
    ),
    "serving, its arguments changed over": (
        lambda net, v, model: health.serving(X, net.apply),
        f"serving: fn is an ArrayImpl, {FUNCTION} {SERVING}.",
    ),
    "check of variables and a batch": (
        lambda net, v, model: health.check(v, X),
        "check: called with ArrayImpl, expected a dict, path → Moments of each layer, as "
        "calls.hooked_apply(model.apply)(variables, x)[1] gives; write check(variables, moments).",
    ),
    "drift without batches": (
        lambda net, v, model: health.drift(v),
        "drift: called with (dict), expected running statistics, and the moments of each batch; "
        f"write {DRIFT}.",
    ),
    "drift of one batch": (
        lambda net, v, model: health.drift(v, X),
        f"drift: batches is an array of shape (8, 3), {BATCHES} {DRIFT}.",
    ),
    "drift of batches": (
        lambda net, v, model: health.drift(v, [X]),
        "drift: called with ArrayImpl, expected a dict, path → Moments of each layer, as "
        "health.incoming(model.apply)(variables, x)[1] gives; write drift(variables, batches), or "
        "seen(variables, rows).",
    ),
    "decide on moments": (
        lambda net, v, model: health.decide({"norm": jaxbn.moments(X)}),
        "decide: called with dict of ['Moments'], expected a dict, path → Seen of each layer, as "
        "health.merge gives; write health.decide(total).",
    ),
    "merge of moments": (
        lambda net, v, model: health.merge({}, {"norm": jaxbn.moments(X)}),
        "merge: called with dict of ['Moments'], expected a dict, path → Seen of each layer, as "
        "health.seen gives; write health.merge(a, b).",
    ),
    "shards of a batch": (
        lambda net, v, model: health.shards(X),
        "health.shards: called with (ArrayImpl), expected the records of a step; write "
        "health.shards(watch.records(...)).",
    ),
    **{
        f"{call.__name__} as gap is called": (
            lambda net, v, model, call=call: call(net.apply, v, X, "no/file"),
            f"{call.__name__}: called with (method, dict, ArrayImpl, str), expected an inference "
            f"function, an example batch and a path; write {TO_A_FILE.format(call.__name__)}.",
        )
        for call in WRITERS
    },
    **{
        f"{call.__name__} of variables": (
            lambda net, v, model, call=call: call(v, X, "file"),
            f"{call.__name__}: fn is a dict, {FUNCTION} {TO_A_FILE.format(call.__name__)}.",
        )
        for call in WRITERS
    },
    "saved_model without a path": (
        lambda net, v, model: export.saved_model(net, X, [X]),
        f"saved_model: path is a list, {NAME}",
    ),
    **{
        f"{call.__name__} on one batch": (
            lambda net, v, model, call=call: call("source", X, "file"),
            f"{call.__name__}: batches is an array of shape (8, 3), {BATCHES} "
            f"export.{call.__name__}(source, [x], path).",
        )
        for call in (export.int8, export.tflite_int8)
    },
    "int8, its arguments changed over": (
        lambda net, v, model: export.int8("source", "file", [X]),
        f"int8: path is a list, {NAME}",
    ),
    "int8 without batches": (
        lambda net, v, model: export.int8("source", "file"),
        "int8: called with (str, str), expected an ONNX file, batches and a path; write "
        "export.int8(source, [x], path).",
    ),
    **{
        f"{call.__name__} of {what}": (
            lambda net, v, model, call=call, path=path: call(path),
            f"{call.__name__}: path is an {type(path).__name__}, {NAME.replace(QUOTED, write)}",
        )
        for call in READERS
        for what, path, write in (("an array", X, QUOTED), ("a result", DONE, "done.path"))
    },
    "triton without a folder": (
        lambda net, v, model: export.triton("net.onnx"),
        f"triton: called with (str), {TRITON}",
    ),
    "triton with a name by position": (
        lambda net, v, model: export.triton("models", "net.onnx", "net"),
        f"triton: called with (str, str, str), {TRITON}",
    ),
    "triton of a result": (
        lambda net, v, model: export.triton("models", DONE),
        f"triton: source is an Exported, {NAME.replace(QUOTED, 'done.path')}",
    ),
    "triton, its arguments changed over": (
        lambda net, v, model: export.triton(DONE, "models"),
        f"triton: folder is an Exported, {NAME.replace(QUOTED, 'done.path')}",
    ),
    "hooked_apply of a linen model": (
        lambda net, v, model: calls.hooked_apply(net),
        f"hooked_apply: called with Net, {APPLY} calls.hooked_apply(model.apply).",
    ),
    "hooked_apply of an nnx model": (
        lambda net, v, model: calls.hooked_apply(model),
        f"hooked_apply: called with BatchNorm, {APPLY} calls.hooked_apply(model.apply).",
    ),
    "hooked_apply of variables": (
        lambda net, v, model: calls.hooked_apply(v),
        f"hooked_apply: called with dict, {APPLY} calls.hooked_apply(model.apply).",
    ),
    **{
        f"hooked_nnx of linen's {what}": (
            lambda net, v, model, of=of: calls.hooked_nnx(of(net)).__enter__(),
            f"hooked_nnx: called with ({kind}), expected an nnx model; write "
            "calls.hooked_nnx(model), or calls.hooked_apply(model.apply) of linen.",
        )
        for what, kind, of in (("model", "Net", lambda net: net), ("apply", "method", APPLY_OF))
    },
    "manifest of a path": (
        lambda net, v, model: export.manifest("net.onnx"),
        "manifest: called with (str), expected the result of an export; write "
        "manifest(export.onnx(fn, x, path)).",
    ),
    "swap of variables": (
        lambda net, v, model: jaxbn.swap(v, v),
        f"swap: called with dict, {APPLY} swap(net.apply, variables).",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_no_model(case, models):
    f, message = CASES[case]
    with as_pasted(), pytest.raises(TypeError) as error:
        f(*models)
    assert str(error.value) == message


def test_forgotten_mutable(models):
    """Flax's error, which is caught where Flax's was, in words that say what to write."""
    net, variables, _ = models
    with as_pasted(), pytest.raises(errors.ModifyScopeVariableError) as error:
        net.apply(variables, X)
    assert str(error.value) == (
        'BatchNorm: layer "/norm" normalizes by the batch and updates batch_stats, which is '
        'immutable here; expected mutable=["batch_stats"]; write y, updates = model.apply('
        'variables, x, mutable=["batch_stats"]) and keep updates["batch_stats"], or '
        "use_running_average=True for eval, or update_stats=False to normalize by the batch and "
        "learn nothing."
    )


@pytest.mark.parametrize("train", [True, False])
def test_an_nnx_layer_of_another_size_speaks_of_its_own_arguments(train, models):
    *_, model = models
    with as_pasted(), pytest.raises(ValueError) as error:
        model(jnp.ones((8, 5)), use_running_average=not train)
    assert str(error.value) == (
        "BatchNorm: num_features=3, but x with shape (8, 5) has features (5,) on axes (1,); write "
        "num_features=5, or pass the feature axis as axis=."
    )


@pytest.mark.parametrize("name", ["mean", "var"])
def test_linen_statistics_of_another_size_speak_of_batch_stats(name):
    layer = jaxbn.linen.BatchNorm(use_running_average=True, use_bias=False, use_scale=False)
    stats = {"mean": jnp.zeros(5), "var": jnp.ones(5), name: jnp.ones(3)}
    with as_pasted(), pytest.raises(ValueError) as error:
        layer.apply({"batch_stats": stats}, jnp.ones((8, 5)))
    assert str(error.value) == (
        f"BatchNorm: batch_stats/{name} has shape (3,), but x with shape (8, 5) has features (5,) "
        "on axes (1,); write model.init(key, x) for variables of this x, or pass the feature axis "
        "as axis=."
    )


def test_few_values_are_cured_by_what_changes_y():
    moments = {"bn": jaxbn.moments(X[:2])}
    found = {f.kind: f.remedy for f in health.check({"bn": jaxbn.init(3)[1]}, moments)}
    assert found["few_values"] == (
        'a larger batch, or jaxbn.swap: to="batch" with axis_name= pools over devices, to="group" '
        "needs no batch; jaxbn.health.advise(batch_per_device=...) tells which"
    )


def test_pythons_own_words_for_a_keyword_that_is_not_there():
    with pytest.raises(
        TypeError, match=r"^recalibrate\(\) got an unexpected keyword argument 'on'"
    ):
        jaxbn.recalibrate(Net().apply, {}, on=[X])


def test_images_in_place_of_batches_of_images(models):
    """Of rank 4, they may be batches of rank 3; only a failure says that they are not."""
    net, v, _ = models

    def apply(v, x, **how):
        return net.apply(v, x[:, :, :, 0], **how)

    with pytest.raises(IndexError) as error, as_pasted():
        jaxbn.recalibrate(apply, v, jnp.ones((2, 4, 4, 3)))
    assert error.value.__notes__[-1] == (
        "recalibrate: batches is one array of shape (2, 4, 4, 3), each row of which is taken as a "
        "batch; for one batch write recalibrate(apply, model, [x])."
    )
