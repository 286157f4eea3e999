"""Running statistics of a data set: what one batch of it all would give, whatever came before."""

import functools
import io
import sys
from pathlib import Path

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn import layers
from tests.support.networks import NnxNet, TinyLinen

EXAMPLES = Path(__file__).parents[2] / "examples"
RNG = np.random.default_rng(0)
C = 3
# Batches of unequal size and place, of rows that differ from channel to channel.
BATCHES = [
    RNG.normal(at, [1, 2, 3], (rows, C)).astype(np.float32)
    for at, rows in ((0, 8), (5, 8), (-3, 8), (1, 5))
]
ALL = np.concatenate(BATCHES).astype(np.float64)
TOL = {"rtol": 1e-5, "atol": 1e-5}  # float32: some roundings of values up to 10


class Net(linen.Module):
    """A norm on the input, whose moments are the data's, and one behind a layer and dropout."""

    norm: type = jaxbn.linen.BatchNorm
    train: bool = False

    @linen.compact
    def __call__(self, x, mask=None):
        mode = {"use_running_average": not self.train}
        x = self.norm(name="first", **mode)(x, mask=mask)
        x = linen.Dense(4)(x)
        x = linen.Dropout(0.5, deterministic=not self.train)(x)
        return self.norm(name="second", **mode)(x)


class Nnx(nnx.Module):
    def __init__(self, norm=jaxbn.nnx.BatchNorm, rngs=None, **options):
        self.first, self.dense = norm(C, rngs=rngs, **options), nnx.Linear(C, 4, rngs=rngs)
        self.second = norm(4, rngs=rngs, **options)

    def __call__(self, x, mask=None):
        return self.second(self.dense(self.first(x, mask=mask)))


def functional(states, x, mask=None, **options):
    x, first = jaxbn.batch_norm(x, None, states["first"], train=True, mask=mask, **options)
    x = x @ np.arange(12.0, dtype=np.float32).reshape(C, 4)
    x, second = jaxbn.batch_norm(x, None, states["deep"][0], train=True, **options)
    return {"deep": [second], "first": first}


def make(kind, **options):
    """A model of each kind, its apply, and the path of its second layer."""
    if kind == "functional":
        states = {"first": jaxbn.init(C)[1], "deep": [jaxbn.init(4)[1]]}
        return functools.partial(functional, **options), states, "deep/0"
    flax = kind.endswith("flax")
    if kind.startswith("linen"):
        norm = linen.BatchNorm if flax else functools.partial(jaxbn.linen.BatchNorm, **options)
        net = Net(norm)
        return net.apply, net.init(jax.random.key(0), BATCHES[0]), "second"
    norm = nnx.BatchNorm if flax else jaxbn.nnx.BatchNorm
    return lambda model, x, *a: model(x, *a), Nnx(norm, nnx.Rngs(0), **options), "second"


KINDS = ["linen", "linen flax", "nnx", "nnx flax", "functional"]


def copies(model):
    """Path → a copy of every array of the model."""
    tree = nnx.to_pure_dict(nnx.state(model)) if layers.is_nnx(model) else model
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.array(leaf) for path, leaf in leaves}


def unchanged(before, model, but=()):
    after = copies(model)
    assert after.keys() == before.keys()
    for name, leaf in before.items():
        if not any(word in name for word in but):
            assert leaf.tobytes() == after[name].tobytes(), name


def close(state, mean, var):
    np.testing.assert_allclose(state.mean, mean, **TOL)
    np.testing.assert_allclose(state.var, var, **TOL)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_one_batch_of_all(kind):
    apply, model, second = make(kind)
    before = copies(model)
    new = jaxbn.recalibrate(apply, model, iter(BATCHES))
    found = layers.find(new)
    close(found["first"].state, ALL.mean(0), ALL.var(0))
    # Behind the first layer every batch has mean 0 and var 1, so the second sees their mixture.
    kernel = np.arange(12).reshape(C, 4) if kind == "functional" else dense_of(new)
    hidden = [(b - b.mean(0)) / np.sqrt(b.var(0) + 1e-5) @ kernel for b in BATCHES]
    hidden = np.concatenate(hidden)
    np.testing.assert_allclose(found[second].state.mean, hidden.mean(0), atol=2e-5)
    np.testing.assert_allclose(found[second].state.var, hidden.var(0), rtol=1e-4)
    unchanged(before, new, but=("mean", "var", "count"))
    if kind == "functional":
        assert int(new["first"].count) == int(new["deep"][0].count) == 4
    if not kind.startswith("nnx"):
        unchanged(before, model)
        return
    assert new is model


def dense_of(model):
    if layers.is_nnx(model):
        return np.asarray(model.dense.kernel[...], np.float64)
    return np.asarray(model["params"]["Dense_0"]["kernel"], np.float64)


@pytest.mark.parametrize("kind", ["linen flax", "nnx", "functional"])
def test_the_mean_of_the_batches_variances_by_name(kind):
    apply, model, _ = make(kind)
    new = jaxbn.recalibrate(apply, model, BATCHES, variance="mean")
    rows = [len(b) for b in BATCHES]
    var = np.average([b.var(0, dtype=np.float64) for b in BATCHES], 0, rows)
    close(layers.find(new)["first"].state, ALL.mean(0), var)
    assert np.all(var < 0.5 * ALL.var(0))  # what it leaves out


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_bessels_correction_is_the_layers(kind):
    n = len(ALL)
    for variance in ("pooled", "mean"):
        apply, model, _ = make(kind, unbiased=True)
        run = functools.partial(jaxbn.recalibrate, apply, variance=variance)
        state = layers.find(run(model, BATCHES))["first"].state
        if variance == "pooled":
            corrected, biased = ALL.var(0) * n / (n - 1), ALL.var(0)
        else:
            each = [b.var(0, ddof=1, dtype=np.float64) for b in BATCHES]
            corrected = np.average(each, 0, [len(b) for b in BATCHES])
            each = [b.var(0, dtype=np.float64) for b in BATCHES]
            biased = np.average(each, 0, [len(b) for b in BATCHES])
        close(state, ALL.mean(0), corrected)
        close(layers.find(run(model, BATCHES, unbiased=False))["first"].state, ALL.mean(0), biased)
    apply, model, _ = make("functional")
    state = jaxbn.recalibrate(apply, model, BATCHES, unbiased=True)["first"]
    close(state, ALL.mean(0), ALL.var(0) * n / (n - 1))


@pytest.mark.parametrize("kind", ["linen", "nnx", "functional"])
def test_masked_cells_take_no_part(kind):
    """In any batch, all of one batch, and one channel of all batches."""
    apply, model, _ = make(kind)
    masks = [RNG.random((len(b), C)) < 0.6 for b in BATCHES]
    masks[1][:] = False
    for mask in masks:
        mask[:, 2] = False
    poisoned = [
        np.where(mask, b, 1e6).astype(np.float32) for b, mask in zip(BATCHES, masks, strict=True)
    ]
    call = {
        "linen": lambda v, batch, **kw: apply(v, *batch, **kw),
        "nnx": lambda m, batch: m(*batch),
        "functional": lambda s, batch: functional(s, *batch),
    }[kind]
    batches = zip(poisoned, masks, strict=True)
    state = layers.find(jaxbn.recalibrate(call, model, batches))["first"].state
    kept = [ALL[np.concatenate(masks)[:, c], c] for c in (0, 1)]
    close(state, [*(k.mean() for k in kept), 0], [*(k.var() for k in kept), 1])


def test_large_means_do_not_cancel():
    far = [b + 1e4 for b in BATCHES]
    apply, model, _ = make("linen")
    state = layers.find(jaxbn.recalibrate(apply, model, far))["first"].state
    exact = np.concatenate(far).astype(np.float64).var(0)
    np.testing.assert_allclose(state.var, exact, rtol=1e-3)


def test_scanned_layers_are_recalibrated_one_by_one():
    class Block(linen.Module):
        @linen.compact
        def __call__(self, x, _=None):
            x = linen.BatchNorm(use_running_average=True)(x)
            return 2 * linen.Dense(C, kernel_init=linen.initializers.ones)(x), None

    axes = {"params": 0, "batch_stats": 0}
    net = linen.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=2)()
    variables = net.init(jax.random.key(0), BATCHES[0])
    new = jaxbn.recalibrate(net.apply, variables, BATCHES)
    state = layers.find(new)["BatchNorm_0"].state
    assert state.mean.shape == (2, C)
    hidden = [2 * ((b - b.mean(0)) / b.std(0)).sum(1, keepdims=True) for b in BATCHES]
    hidden = np.concatenate(hidden).astype(np.float64)
    close(jax.tree.map(lambda leaf: leaf[0], state), ALL.mean(0), ALL.var(0))
    np.testing.assert_allclose(state.var[1], np.full(C, hidden.var()), rtol=1e-4)


@pytest.mark.parametrize("kind", ["linen", "nnx", "functional"])
def test_statistics_of_before_play_no_part(kind):
    """Not even NaN; so `reset` makes no difference to what comes out."""
    apply, model, _ = make(kind)
    fresh = copies(jaxbn.recalibrate(apply, model, BATCHES))
    spoilt = layers.replace(
        model,
        {
            path: jaxbn.State(layer.state.mean * np.nan, layer.state.var * 0 - 1, None)
            for path, layer in layers.find(model).items()
        },
    )
    unchanged(fresh, jaxbn.recalibrate(apply, spoilt, BATCHES))
    start = copies(jaxbn.reset(spoilt))
    unchanged(copies(make(kind)[1]), jaxbn.reset(spoilt))
    assert start.keys() == fresh.keys()
    unchanged(fresh, jaxbn.recalibrate(apply, jaxbn.reset(spoilt), BATCHES))


@pytest.mark.parametrize("kind", ["linen", "nnx", "functional"])
def test_momentum_is_the_fraction_of_the_old_statistics_that_is_kept(kind):
    apply, model, second = make(kind)
    path_of = {"first": C, second: 4}
    olds = {path: jaxbn.State(*RNG.uniform(1, 2, (2, n)), None) for path, n in path_of.items()}
    model = layers.replace(model, olds)
    news = layers.find(jaxbn.recalibrate(apply, make(kind)[1], BATCHES))
    got = layers.find(jaxbn.recalibrate(apply, model, BATCHES, momentum=0.75))
    for path, old in olds.items():
        new = news[path].state
        close(got[path].state, *(0.75 * a + 0.25 * b for a, b in zip(old[:2], new, strict=False)))


def test_one_layer_at_a_time_each_sees_what_the_blend_before_it_passes_on():
    """As Schneider et al. 2020 have it: a layer answers by the blend of its own input's moments."""
    apply, model, _ = make("linen")
    olds = {"first": jaxbn.State(*RNG.uniform(1, 2, (2, C)), None)}
    olds["second"] = jaxbn.State(*RNG.uniform(1, 2, (2, 4)), None)
    model, x = layers.replace(model, olds), BATCHES[0].astype(np.float64)
    kernel = dense_of(model)
    for path in ("first", "second"):
        model = jaxbn.recalibrate(apply, model, BATCHES[:1], where=path, momentum=0.75)
        mean, var = (0.75 * v for v in olds[path][:2])
        mean, var = mean + 0.25 * x.mean(0), var + 0.25 * x.var(0)
        close(layers.find(model)[path].state, mean, var)
        x = (x - mean) / np.sqrt(var + 1e-5) @ kernel if path == "first" else x


def test_reset_leaves_other_layers_as_they_are():
    apply, model, _ = make("linen")
    model = jaxbn.recalibrate(apply, model, BATCHES)
    stats = jaxbn.reset(model, where="sec*")["batch_stats"]
    assert stats["first"] == model["batch_stats"]["first"]
    assert float(jnp.abs(stats["second"]["mean"]).sum()) == 0


@pytest.mark.parametrize("kind", ["linen", "nnx", "functional"])
def test_recalibrate_leaves_other_layers_as_they_are(kind):
    apply, model, second = make(kind)
    model = jaxbn.recalibrate(apply, model, BATCHES[:1])
    before = copies(model)
    new = jaxbn.recalibrate(apply, model, BATCHES, where=[second])
    unchanged(before, new, but=(f"[{second!r}]", "'deep'"))
    if kind == "functional":
        return
    # The first layer then runs as apply runs it: in eval mode by what it has.
    if kind == "nnx":
        model.eval()
        new = jaxbn.recalibrate(apply, model, BATCHES, where=lambda path: path == "second")
    first = jax.tree.map(np.asarray, layers.find(new)["first"].state)
    hidden = (ALL - first.mean) / np.sqrt(first.var + 1e-5) @ dense_of(new)
    close(layers.find(new)["second"].state, hidden.mean(0), hidden.var(0))


def test_a_count_that_is_kept_is_the_number_of_batches():
    for kind in ("linen", "nnx"):
        apply, model, _ = make(kind, momentum=None)
        found = layers.find(jaxbn.recalibrate(apply, model, BATCHES))
        assert {int(layer.state.count) for layer in found.values()} == {4}


def test_limit_takes_no_batch_too_many():
    apply, model, _ = make("functional")
    batches = iter(BATCHES)
    state = jaxbn.recalibrate(apply, model, batches, limit=2)["first"]
    close(state, ALL[:16].mean(0), ALL[:16].var(0))
    assert int(state.count) == 2
    assert next(batches) is BATCHES[2]


@pytest.mark.parametrize("kind", ["linen", "nnx", "functional"])
def test_compiled_once_for_each_size(kind):
    apply, model, _ = make(kind)
    traces = []

    def counted(model, batch, **kwargs):
        traces.append(batch.shape)
        return apply(model, batch, **kwargs)

    for _ in range(2):
        jaxbn.recalibrate(counted, model, BATCHES)
    assert traces == [(8, C), (5, C)]


def test_memory_is_that_of_one_batch():
    """No batch outlives the one after the next."""
    import weakref

    class Batch(np.ndarray):
        pass

    alive = []

    def batches():
        for _ in range(5):
            batch = np.array(BATCHES[0]).view(Batch)
            alive.append(weakref.ref(batch))
            yield np.asarray(batch)
            del batch
            assert sum(ref() is not None for ref in alive) <= 2

    apply, model, _ = make("functional")
    jaxbn.recalibrate(apply, model, batches())
    assert len(alive) == 5


def mesh():
    return jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))


def test_sharded_batches_give_replicated_statistics():
    apply, model, _ = make("linen")
    everywhere, rows = NamedSharding(mesh(), P()), NamedSharding(mesh(), P("d"))
    on_mesh = jax.device_put(model, everywhere)
    batches = [b[:8] for b in BATCHES[:3]]
    new = jaxbn.recalibrate(apply, on_mesh, (jax.device_put(b, rows) for b in batches))
    expected = jaxbn.recalibrate(apply, model, batches)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(expected), strict=True):
        assert a.sharding == everywhere
        np.testing.assert_allclose(a, b, **TOL)
    jaxbn.assert_replicated(new)
    # Without a place of their own, statistics stay free to move, as they were.
    free = jaxbn.recalibrate(apply, model, [jax.device_put(batches[0], rows)])
    assert not any(leaf.committed for leaf in jax.tree.leaves(free))


@pytest.mark.parametrize("pooled_by", ["layer", "recalibrate"])
@pytest.mark.parametrize("kind", ["linen", "functional"])
@pytest.mark.parametrize("transform", ["shard_map", "pmap"])
def test_within_shard_map_and_pmap_statistics_are_of_all_devices(transform, kind, pooled_by):
    x = RNG.normal(2, 3, (4, 16, C)).astype(np.float32)  # 4 batches, 2 rows a device
    own = {"axis_name": "d"} if pooled_by == "layer" else {}
    apply, model, _ = make(kind, **own)
    asked = {"axis_name": "d"} if pooled_by == "recalibrate" else {}

    def run(model, x):
        return jaxbn.recalibrate(apply, model, x, **asked)

    if transform == "pmap":
        each = x.reshape(4, 8, 2, C).swapaxes(0, 1)
        new = jax.pmap(run, "d", in_axes=(None, 0))(model, each)
        jaxbn.assert_replicated(new)
        new = jax.tree.map(lambda leaf: leaf[0], new)
    else:
        specs = {"in_specs": (P(), P(None, "d")), "out_specs": P()}
        new = jax.jit(jax.shard_map(run, mesh=mesh(), **specs))(model, x)
        jaxbn.assert_replicated(new)
    flat = x.reshape(-1, C).astype(np.float64)
    close(layers.find(new)["first"].state, flat.mean(0), flat.var(0))


def test_a_list_of_batches_is_recalibrated_within_jit():
    apply, model, _ = make("linen")
    new = jax.jit(lambda v, *x: jaxbn.recalibrate(apply, v, x))(model, *BATCHES)
    close(layers.find(new)["first"].state, ALL.mean(0), ALL.var(0))


def test_in_a_trace_a_batch_that_is_not_finite_is_left_out():
    apply, model, _ = make("functional")
    x = np.stack(BATCHES[:3])
    x[1, 0, 0] = np.nan
    state = jax.jit(lambda s, x: jaxbn.recalibrate(apply, s, x))(model, x)["first"]
    rest = np.concatenate(x[[0, 2]]).astype(np.float64)
    close(state, rest.mean(0), rest.var(0))


def test_a_real_network_evaluates_as_its_training_batch():
    """After one batch, eval of that batch is the training forward of it."""
    x = RNG.normal(size=(8, 6, 6, 3)).astype(np.float32)
    net = NnxNet(nnx.BatchNorm, rngs=nnx.Rngs(0))
    expected = nnx.clone(net)(x)
    jaxbn.recalibrate(lambda m, x: m(x), net, [x])
    net.eval()
    np.testing.assert_allclose(net(x), expected, rtol=1e-4, atol=1e-4)


def test_averaged_parameters_get_statistics_of_their_own():
    """Weights averaged by optax: what they do to the data, not what those of the end did."""
    net = Net(linen.BatchNorm)
    variables = net.init(jax.random.key(0), BATCHES[0])
    ema = optax.ema(0.5)
    state = ema.init(variables["params"])
    with jax.numpy_dtype_promotion("standard"):  # optax divides floats by ints
        for k in range(3):
            params = jax.tree.map(lambda v, k=k: v * (k + 1.0), variables["params"])
            averaged, state = ema.update(params, state)
    assert jax.tree.structure(averaged) == jax.tree.structure(variables["params"])
    new = jaxbn.recalibrate(net.apply, {**variables, "params": averaged}, [BATCHES[0]])
    expected = net.apply(new, BATCHES[0])
    hidden = (BATCHES[0] - BATCHES[0].mean(0)) / np.sqrt(BATCHES[0].var(0) + 1e-5)
    first, dense, norm = jax.tree.map(
        np.asarray, [new["params"][name] for name in ("first", "Dense_0", "second")]
    )
    hidden = (hidden * first["scale"] + first["bias"]) @ dense["kernel"] + dense["bias"]
    y = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5) * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(expected, y, rtol=1e-4, atol=1e-4)
    assert new["params"] is averaged


def test_a_bar_is_shown_when_asked(monkeypatch):
    apply, model, _ = make("functional")
    err = io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    quiet = jaxbn.recalibrate(apply, model, BATCHES)
    assert err.getvalue() == ""
    shown = jaxbn.recalibrate(apply, model, BATCHES, limit=3, progress=True)
    assert "Recalibrating" in err.getvalue()
    assert "100%" in err.getvalue()
    assert int(shown["first"].count) == 3
    assert int(quiet["first"].count) == 4


# Bad input: the whole message, and nothing changed.

NAN = np.array(BATCHES[1])
NAN[2, 1] = np.nan
WRONG = {
    "empty": (
        [],
        {},
        "recalibrate: no batches, expected at least one. A generator that was used up gives none; "
        "make a new generator for each call.",
    ),
    "another shape": (
        [BATCHES[0], BATCHES[1][:, :2]],
        {},
        "recalibrate: batch 1 has shapes [(8, 2)], but batch 0 has [(8, 3)]; only the size of the "
        "first axis may differ. Resize, or pad and mask.",
    ),
    "NaN": (
        [BATCHES[0], NAN, BATCHES[2]],
        {},
        "recalibrate: batch 1 has moments that are not finite in SORTED; nothing "
        "was changed. Leave that batch out, or mask its NaN cells.",
    ),
    "NaN at the end": (
        [BATCHES[0], NAN],
        {},
        "recalibrate: batch 1 has moments that are not finite in SORTED; nothing "
        "was changed. Leave that batch out, or mask its NaN cells.",
    ),
    "variance": (
        BATCHES,
        {"variance": "sum"},
        'recalibrate: variance=\'sum\', expected "pooled" or "mean".',
    ),
    "momentum": (
        BATCHES,
        {"momentum": 1.5},
        "recalibrate: momentum=1.5, expected the fraction of the old statistics to keep, a number "
        "in [0, 1]; write momentum=N / (N + n) for n images beside old statistics that weigh as N "
        "images.",
    ),
    "momentum of no number": (
        BATCHES,
        {"momentum": None},
        "recalibrate: momentum=None, expected the fraction of the old statistics to keep, a number "
        "in [0, 1]; write momentum=N / (N + n) for n images beside old statistics that weigh as N "
        "images.",
    ),
    "limit": (
        BATCHES,
        {"limit": 0},
        "recalibrate: limit=0, expected at least 1 batch, or None for all.",
    ),
    "axis": (
        BATCHES,
        {"axis_name": "d"},
        "recalibrate: axis_name='d' is not bound here; bound axes: []. Call it under shard_map, "
        "pmap or vmap with that axis name; under plain jit statistics are global already, write "
        "axis_name=None.",
    ),
    "where": (
        BATCHES,
        {"where": "head*"},
        "recalibrate: where='head*' selects none of the batch norm layers GIVEN; "
        'expected a glob such as "first", several of them, or a function of the path.',
    ),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("kind", ["linen", "nnx", "functional"])
def test_bad_input_changes_nothing(kind, what):
    apply, model, second = make(kind)
    before = copies(model)
    batches, options, message = WRONG[what]
    with pytest.raises(TypeError if "no number" in what else ValueError) as error:
        jaxbn.recalibrate(apply, model, batches, **options)
    given, sorted_ = ["first", second], sorted(["first", second])
    assert str(error.value) == message.replace("GIVEN", str(given)).replace("SORTED", str(sorted_))
    unchanged(before, model)


def test_a_layer_that_apply_does_not_run_is_named():
    class Heads(linen.Module):
        @linen.compact
        def __call__(self, x, both=True):
            a = jaxbn.linen.BatchNorm(use_running_average=True, name="main")(x)
            if both:
                jaxbn.linen.BatchNorm(use_running_average=True, name="auxiliary")(x)
            return a

    variables = Heads().init(jax.random.key(0), BATCHES[0])
    apply = functools.partial(Heads().apply, both=False)
    with pytest.raises(ValueError) as error:
        jaxbn.recalibrate(apply, variables, BATCHES)
    assert str(error.value) == (
        "recalibrate: no value came through ['auxiliary'] in 4 batches: apply does not run "
        "these layers, or every cell was masked. Run them, or leave them out by where=."
    )
    new = jaxbn.recalibrate(apply, variables, BATCHES, where="main")["batch_stats"]
    close(jaxbn.State(**new["main"], count=None), ALL.mean(0), ALL.var(0))


def test_a_model_without_batch_norm_is_refused():
    expected = (
        "recalibrate: no batch norm layer in this {}; expected variables with "
        '"batch_stats", an nnx model that holds a BatchNorm, or a tree of jaxbn.State.'
    )
    net = linen.Dense(3)
    for apply, model, kind in (
        (net.apply, net.init(jax.random.key(0), BATCHES[0]), "dict"),
        (lambda m, x: m(x), nnx.Linear(3, 3, rngs=nnx.Rngs(0)), "Linear"),
    ):
        with pytest.raises(ValueError) as error:
            jaxbn.recalibrate(apply, model, BATCHES)
        assert str(error.value) == expected.format(kind)


def test_an_apply_that_reaches_no_statistics_is_refused():
    _, variables, _ = make("linen")
    with pytest.raises(TypeError) as error:
        jaxbn.recalibrate(lambda v, x: Net().apply(v, x), variables, BATCHES)
    assert str(error.value) == (
        "recalibrate: apply does not take (variables, batch, mutable=…), expected a "
        "function that passes mutable= on to linen; write "
        "functools.partial(net.apply, train=False), or "
        "lambda variables, batch, **kwargs: net.apply(variables, batch[0], **kwargs)."
    )
    _, states, _ = make("functional")
    with pytest.raises(TypeError) as error:
        jaxbn.recalibrate(lambda s, x: (x, functional(s, x)), states, BATCHES)
    expected = "{'deep': [*], 'first': *}"
    assert str(error.value) == (
        f"recalibrate: apply(states, batch) returned PyTreeDef((*, {expected})), expected the tree "
        f"of states as training returns it, PyTreeDef({expected}); write "
        f"lambda states, batch: forward(params, states, batch, train=True)[1]."
    )


def test_a_functional_model_in_eval_mode_is_refused():
    _, state = jaxbn.init(C)
    with pytest.raises(ValueError) as error:
        jaxbn.recalibrate(lambda s, x: jaxbn.batch_norm(x, None, s, train=False)[1], state, BATCHES)
    assert str(error.value) == (
        "batch_norm: state is a Moments with train=False, but moments are gathered, as "
        "jaxbn.recalibrate does, of batches in training; write train=True, or pass a State."
    )


def test_a_moments_in_place_of_a_state_gathers_all_batches():
    """`batch_norm` merges into it, in the wider of the dtypes, whatever the momentum."""
    gathered = jaxbn.Moments(np.float32(0), np.zeros(C, np.float32), np.zeros(C, np.float32))
    for b in BATCHES:
        y, gathered = jaxbn.batch_norm(b, None, gathered, train=True, momentum=0.3, unbiased=True)
        np.testing.assert_allclose(y.mean(0), np.zeros(C), atol=1e-6)
    assert float(gathered.count) == len(ALL)
    np.testing.assert_allclose(gathered.mean, ALL.mean(0), **TOL)
    np.testing.assert_allclose(gathered.var, ALL.var(0), **TOL)


# The example


def test_the_example_runs(monkeypatch):
    """On digits, in its smallest form: averaged weights, and four shifts of the images."""
    monkeypatch.syspath_prepend(EXAMPLES / "recalibrate")
    import recalibrate

    monkeypatch.setattr(recalibrate, "ResNet9", TinyLinen)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        table = recalibrate.main(width=2, steps=10, batch=16)
    columns = [list(column.cells) for column in table.columns]
    assert [len(cells) for cells in columns] == [6, 6, 6, 6]
    assert columns[1][2:] == [f"second half, {name}" for name in recalibrate.SHIFTS]
    scores = [float(cell.rstrip("%")) for cell in columns[2] + columns[3][1:]]
    assert all(0 <= score <= 100 for score in scores)


def test_replaced_statistics_are_float32_or_wider():
    state = jaxbn.State(jnp.float32([1, 2]), jnp.float32([1e6, 3]), jnp.int32(7))
    narrow = {"mean": jnp.zeros(2, "bfloat16"), "var": jnp.ones(2, "float16"), "count": np.int8(0)}
    got = layers.replace({"bn": narrow}, {"bn": state})["bn"]
    np.testing.assert_array_equal(got["mean"], state.mean)
    np.testing.assert_array_equal(got["var"], state.var)  # beyond float16
    assert [v.dtype for v in got.values()] == ["float32", "float32", "int8"]
