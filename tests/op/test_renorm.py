"""Batch renormalization equals the formula in float64, and Keras' layer, on every road."""

import functools
import os
import warnings
from pathlib import Path

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
from benchmarks.subjects.roads import roads, training
from tests.support import cases, oracle

EXAMPLES = Path(__file__).parents[2] / "examples"
LIMITS = (1.3, 0.4)  # of the random statistics of a case, some are clipped and some are not
CASES = [
    case
    for case in cases.SMALL
    if case.name in ("conv2d", "channels first", "bfloat16", "float64", "mask per feature")
]


def train(x, params, state, **options):
    return jaxbn.batch_norm(x, params, state, train=True, **options)


def step(x, params, state, dy, **options):
    """y, the new state, dx and dparams."""
    f = functools.partial(train, state=state, **options)
    y, vjp, state = jax.vjp(f, x, params, has_aux=True)
    return y, state, *vjp(dy)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_y_state_and_gradients_equal_the_oracle(case):
    a = cases.arrays(case)
    options = {"axis": case.axis, "mask": a.mask, "momentum": 0.9, "renorm": LIMITS}
    with jax.enable_x64(case.dtype == "float64"):
        params, state = jaxbn.Params(a.scale, a.bias), jaxbn.State(a.mean, a.var, None)
        y, new, dx, (dscale, dbias) = jax.jit(functools.partial(step, **options))(
            a.x, params, state, a.dy
        )
    scale, bias, old_mean, old_var = (np.float64(v).ravel() for v in a[3:])
    _, mean, var = oracle.moments(a.x, case.axis, a.mask)
    r, d = oracle.corrections(mean, var, old_mean, old_var, *LIMITS)
    assert {*np.sign(np.abs(np.log(r)) - np.log(LIMITS[0]) + 1e-9)} == {-1, 1}
    tolerance = oracle.tolerance(case.dtype, case.count)
    want = oracle.normalize(a.x, mean, var, scale * r, bias + scale * d, case.axis)
    oracle.assert_close(oracle.rows(y, case.axis), want, tolerance, "y")
    assert y.dtype == case.dtype
    # The state learns as ever.
    narrow = oracle.tolerance(a.scale.dtype, case.count)
    oracle.assert_close(np.ravel(new.mean), oracle.running(old_mean, mean, 0.9), narrow, "mean")
    oracle.assert_close(np.ravel(new.var), oracle.running(old_var, var, 0.9), narrow, "var")
    # r and d are constants: of scale * r and scale * d + bias.
    want, by_scale, by_bias = oracle.gradients(a.x, a.dy, scale * r, case.axis, a.mask)
    oracle.assert_close(oracle.rows(dx, case.axis), want, tolerance, "dx")
    size = 4 * np.sqrt(case.count) * narrow
    assert np.abs(np.float64(dscale).ravel() - (r * by_scale + d * by_bias)).max() <= size
    assert np.abs(np.float64(dbias).ravel() - by_bias).max() <= size


def example(rows=8, channels=4, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    c = channels
    params, state = jaxbn.Params(normal(c), normal(c)), jaxbn.State(normal(c), normal(c) ** 2, None)
    return 2 * normal(rows, 3, c) + 1, params, state, normal(rows, 3, c)


OPTIONS = {
    "plain": {},
    "masked": {"mask": np.arange(8)[:, None, None] % 3 > 0},
    "ghosts, relu": {"virtual_batch_size": 4, "activation": jax.nn.relu},
    "traced epsilon": {"epsilon": 1e-3},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_at_1_and_0_it_is_batch_norm_and_wide_open_it_is_eval(options):
    """And both of one program: the limits are traced."""
    x, params, state, dy = example()
    options = OPTIONS[options]
    traced = "epsilon" in options
    run = jax.jit(lambda limits, epsilon: step(
        x, params, state, dy, **options | {"epsilon": epsilon if traced else 1e-5}, renorm=limits
    ))  # fmt: skip
    epsilon = options.get("epsilon", 1e-5)
    got = run((1.0, 0.0), epsilon)
    want = jax.jit(lambda: step(x, params, state, dy, **options))()
    for u, v in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # The same operations, which XLA orders as it likes.
        oracle.assert_close(u, np.float64(v), 8 * oracle.tolerance("float32", 24))
    y, new, *_ = run((1e6, 1e6), epsilon)
    by_state, _ = jaxbn.batch_norm(x, params, state, train=False, **options)
    oracle.assert_close(y, np.float64(by_state), 8 * oracle.tolerance("float32", 24))
    chex.assert_trees_all_close(new, want[1], rtol=1e-6)
    assert run._cache_size() == 1


def test_limits_have_no_derivative():
    x, params, state, dy = example()

    def loss(limits):
        return (train(x, params, state, renorm=limits)[0] * dy).sum()

    assert jax.tree.map(float, jax.grad(loss)((1.5, 0.5))) == (0.0, 0.0)


@pytest.fixture(scope="module")
def keras():
    os.environ["KERAS_BACKEND"] = "jax"
    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
        warnings.simplefilter("ignore")  # of its own imports
        import keras
    return keras


@pytest.mark.parametrize("limits", [LIMITS, (1.0, 0.0), (1e6, 1e6)])
def test_one_step_of_keras(keras, limits):
    """Its own statistics are of the sd, so it agrees for one step."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # Keras needs
        got, want = ours_and_kerass(keras, limits)
    # They take the variance as E[x²] - E[x]², about the same at a mean of 1.
    for u, v in zip(got, want, strict=True):
        oracle.assert_close(u, np.float64(v), 2e-5)


def ours_and_kerass(keras, limits):
    """y, dx, dscale and dbias, of either."""
    x, params, state, dy = example()
    r_max, d_max = limits
    clipping = {"rmin": 1 / r_max, "rmax": r_max, "dmax": d_max}
    layer = keras.layers.BatchNormalization(epsilon=1e-5, renorm=True, renorm_clipping=clipping)
    layer.build(x.shape)
    layer.gamma.assign(params.scale)
    layer.beta.assign(params.bias)
    layer.renorm_mean.assign(state.mean)
    layer.renorm_stddev.assign(jnp.sqrt(state.var + 1e-5))
    trainable, rest = ([v.value for v in vs] for vs in (
        layer.trainable_variables, layer.non_trainable_variables
    ))  # fmt: skip

    def theirs(x, trainable):
        return layer.stateless_call(trainable, rest, x, training=True)[0]

    y, vjp = jax.vjp(theirs, x, trainable)
    dx, by_params = vjp(dy)
    got, _, got_dx, got_params = step(x, params, state, dy, renorm=limits)
    return (got, got_dx, *got_params), (y, dx, *by_params)


@pytest.mark.parametrize(
    "road", ["pmap", "shard_map", "shard_map, check_vma=False", "vmap", "jit, data x model"]
)
def test_devices_equal_one_device(road):
    """The corrections are of the pooled moments."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    x, dy = normal(16, 4, 4, 6) + normal(1, 1, 1, 6), normal(16, 4, 4, 6)
    params, state = (normal(6), normal(6)), (normal(6), normal(6) ** 2)
    mask = jnp.asarray(rng.random((16, 4, 4, 1)) < 0.3)
    road = roads(4)[road]

    def bn(x, params, state, **options):
        state = jaxbn.State(*state, None)
        y, state = train(x, params, state, renorm=(1.3, 0.4), **options)
        return y, tuple(state[:2])

    arguments = x, params, state, mask, dy
    got = jax.jit(training(road.build(bn)))(*road.place(*arguments))
    want = jax.jit(training(road.reference(bn)))(*arguments)
    for u, v in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        oracle.assert_close(u, np.float64(v), 4 * oracle.tolerance("float32", 16 * 16))


def test_where_nothing_can_be_told():
    """No valid cell: y is bias. A constant channel, with epsilon 0 too: y is finite."""
    x, params, state, dy = example()
    options = {"renorm": (3.0, 5.0), "epsilon": 0.0}
    y, new, dx, _ = step(x, params, state, dy, mask=jnp.zeros((1, 1, 1), bool), **options)
    np.testing.assert_array_equal(y, jnp.broadcast_to(params.bias, y.shape))
    chex.assert_trees_all_equal(new, state)
    y, _, dx, _ = step(jnp.ones_like(x), params, state._replace(var=jnp.zeros(4)), dy, **options)
    assert all(np.isfinite(v).all() for v in (y, dx))


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_without_scale_or_bias(scale, bias):
    x, params, state, dy = example()
    ones = jaxbn.Params(jnp.ones(4), jnp.zeros(4))
    some = jaxbn.Params(params.scale if scale else None, params.bias if bias else None)
    full = jaxbn.Params(*(b if a is None else a for a, b in zip(some, ones, strict=True)))
    got, want = (step(x, p, state, dy, renorm=LIMITS) for p in (some, full))
    chex.assert_trees_all_close(got[:3], want[:3], rtol=1e-5, atol=1e-5)


def test_kept_for_backward_is_x():
    x, params, state, _ = example(64)
    _, vjp = jax.vjp(
        lambda x, p: train(x, p, state, renorm=LIMITS)[0], x.astype("bfloat16"), params
    )
    large = [leaf for leaf in jax.tree.leaves(vjp) if getattr(leaf, "size", 0) >= x.size]
    assert [leaf.dtype for leaf in large] == ["bfloat16"]


class Linen(nn.Module):
    limits: tuple | None = None

    @nn.compact
    def __call__(self, x, train=True, renorm=None):
        norm = functools.partial(jaxbn.linen.BatchNorm, use_running_average=not train)
        x = norm(renorm=self.limits, name="first")(x, renorm=renorm)
        return norm(renorm=self.limits, name="second")(x**2, renorm=renorm)


class Nnx(nnx.Module):
    def __init__(self, limits=None):
        self.first = jaxbn.nnx.BatchNorm(4, renorm=limits, rngs=nnx.Rngs(0))
        self.second = jaxbn.nnx.BatchNorm(4, renorm=limits, rngs=nnx.Rngs(0))

    def __call__(self, x, renorm=None):
        return self.second(self.first(x, renorm=renorm) ** 2, renorm=renorm)


STATS = {
    name: {"mean": np.float32([0.5, 0, 2, 1]), "var": np.float32([1, 9, 0.2, 2])}
    for name in ("first", "second")
}


def functional(x, limits):
    """The result and both layers' statistics."""
    ones, stats = (jnp.ones(4), jnp.zeros(4)), {}
    for name in STATS:
        x, state = train(x, ones, (*STATS[name].values(), None), renorm=limits)
        stats[name] = {"mean": state.mean, "var": state.var}
        x, y = x**2, x
    return y, stats


def linen(x, constructed, called):
    net = Linen(constructed)
    params = net.init(jax.random.key(0), x)["params"]
    variables = {"params": params, "batch_stats": STATS}
    y, updates = net.apply(variables, x, renorm=called, mutable=["batch_stats"])
    return y, updates["batch_stats"]


def of_nnx(constructed):
    model = Nnx(constructed)
    nnx.update(model, STATS)
    return model


def nnx_(x, constructed, called):
    model = of_nnx(constructed)
    y = model(x, renorm=called)
    return y, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


@pytest.mark.parametrize("module", [linen, nnx_])
def test_the_modules_pass_it_on_and_the_call_is_obeyed(module):
    x = example()[0]
    wants = {limits: functional(x, limits) for limits in (LIMITS, (1.0, 0.0), (2.0, 1.0))}
    for constructed, called, want in (
        (LIMITS, None, LIMITS),
        (None, LIMITS, LIMITS),
        (LIMITS, (2.0, 1.0), (2.0, 1.0)),
        (None, None, (1.0, 0.0)),
    ):
        got = module(x, constructed, called)
        chex.assert_trees_all_close(got, wants[want], rtol=1e-5, atol=1e-5)
    y, _ = jax.jit(lambda limits: module(x, (3.0, 5.0), limits))(LIMITS)
    chex.assert_trees_all_close(y, wants[LIMITS][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("given", ["constructor", "call"])
@pytest.mark.parametrize("library", ["linen", "nnx", "functional"])
def test_recalibration_does_not_lean_on_the_old_statistics(library, given):
    """So the second layer sees what it would see without renormalization."""
    x = example()[0]
    constructed, called = (LIMITS, None) if given == "constructor" else (None, LIMITS)
    if library == "linen":
        net = Linen(constructed)
        variables = {"params": Linen().init(jax.random.key(0), x)["params"], "batch_stats": STATS}
        apply = functools.partial(net.apply, train=False, renorm=called)
        got = jaxbn.recalibrate(apply, variables, [x])["batch_stats"]["second"]
        mean, var = got["mean"], got["var"]
    elif library == "nnx":
        model = jaxbn.recalibrate(lambda m, x: m(x, renorm=called), of_nnx(constructed), [x])
        mean, var = model.second.mean[...], model.second.var[...]
    else:

        def apply(states, x):
            y, first = train(x, None, states[0], renorm=LIMITS)
            return [first, train(y**2, None, states[1], renorm=LIMITS)[1]]

        states = [jaxbn.State(*STATS[name].values(), None) for name in STATS]
        _, (mean, var, _) = jaxbn.recalibrate(apply, states, [x])
    y = train(x, None, jaxbn.init(4)[1])[0] ** 2
    oracle.assert_close(mean, np.float64(y.mean((0, 1))), 1e-5)
    oracle.assert_close(var, np.float64(y.var((0, 1))), 1e-5)


def test_the_example_runs(monkeypatch):
    """On digits, in its smallest form: a score of either norm for each kind of batch."""
    monkeypatch.syspath_prepend(EXAMPLES / "renorm")
    import renorm

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        table = renorm.main(width=1, images=16, batches=((4, 2),), seeds=1)
    columns = [list(column.cells) for column in table.columns]
    assert columns[0] == ["4, of 2 classes"]
    assert all(0 <= float(cells[0].partition("%")[0]) <= 100 for cells in columns[1:])


def test_the_limits_of_the_example_open_from_plain_batch_norm(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "renorm")
    import renorm

    for done, want in ((0, (1, 0)), (0.1, (1, 0)), (0.3, (2, 2.5)), (0.5, (3, 5)), (1, (3, 5))):
        np.testing.assert_allclose(renorm.limits(done), want, rtol=1e-6)
