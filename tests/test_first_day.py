"""What a first day tries, and what it is told: each message whole."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import errors, nnx

import jaxbn
from jaxbn import _elsewhere, health, watch
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
