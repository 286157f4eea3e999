"""`weights=`: moments, y, state and gradients, of the weights too, equal the oracle's."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
from benchmarks.subjects.roads import roads, training
from jaxbn import health
from tests.support import cases, oracle

CASES = [case for case in cases.SMALL if case.network != "MRI reconstruction"]
SOME = [
    case
    for case in CASES
    if case.name in ("conv2d", "channels first", "float64", "valid pixels", "mask per feature")
]


def train(x, params, state=None, **options):
    return jaxbn.batch_norm(x, params, state, train=True, **options)


def step(x, params, weights, state, dy, **options):
    """y, the new state, dx, dparams and dweights."""

    def f(x, params, weights):
        return train(x, params, state, weights=weights, **options)

    y, vjp, state = jax.vjp(f, x, params, weights, has_aux=True)
    return y, state, *vjp(dy)


def weights_of(case, seed=1):
    """Between 0 and 2, some of them 0; of the shape of the case's mask, or x's."""
    rng = np.random.default_rng(seed)
    shape = case.shape if case.mask is None else cases.arrays(case).mask.shape
    w = rng.uniform(0, 2, shape) * (rng.random(shape) < 0.9)
    return w.astype(np.float64 if case.dtype == "float64" else np.float32)


@pytest.mark.parametrize("case", [*CASES, cases.SMALL[11]], ids=lambda case: case.name)
def test_moments_equal_the_oracle(case):
    a, w = cases.arrays(case), weights_of(case)
    with jax.enable_x64(case.dtype == "float64"):
        m = jaxbn.moments(a.x, case.axis, a.mask, weights=w)
    full = w if a.mask is None else w * a.mask
    count, mean, var = oracle.moments(a.x, case.axis, full)
    tolerance = oracle.tolerance(a.scale.dtype, case.count)
    oracle.assert_close(jnp.broadcast_to(m.count, case.features), count, tolerance, "count")
    oracle.assert_close(m.mean, mean.reshape(case.features), tolerance, "mean")
    oracle.assert_close(m.var, var.reshape(case.features), 4 * tolerance, "var")


@pytest.mark.parametrize("mean", [1e3, 1e4])
def test_the_variance_does_not_cancel_at_large_means(mean):
    rng = np.random.default_rng(0)
    x = rng.normal(mean, 1, (256, 3)).astype(np.float32)
    w = rng.uniform(0, 2, (256, 1)).astype(np.float32)
    _, _, var = oracle.moments(x, mask=w)
    oracle.assert_close(jaxbn.moments(x, weights=w).var, var, 1e-5)


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_y_state_and_gradients_equal_the_oracle(case):
    a, w = cases.arrays(case), weights_of(case)
    options = {"axis": case.axis, "mask": a.mask, "momentum": 0.9, "unbiased": True}
    with jax.enable_x64(case.dtype == "float64"):
        params, state = jaxbn.Params(a.scale, a.bias), jaxbn.State(a.mean, a.var, None)
        y, new, dx, (dscale, dbias), dw = jax.jit(functools.partial(step, **options))(
            a.x, params, w, state, a.dy
        )
    full = w if a.mask is None else w * a.mask
    scale, bias, old_mean, old_var = (np.float64(v).ravel() for v in a[3:])
    n, mean, var = oracle.moments(a.x, case.axis, full)
    tolerance = oracle.tolerance(case.dtype, case.count)
    narrow = oracle.tolerance(a.scale.dtype, case.count)
    want = oracle.normalize(a.x, mean, var, scale, bias, case.axis)
    oracle.assert_close(oracle.rows(y, case.axis), want, tolerance, "y")
    oracle.assert_close(np.ravel(new.mean), oracle.running(old_mean, mean, 0.9), narrow, "mean")
    unbiased = var * n / (n - 1)
    oracle.assert_close(np.ravel(new.var), oracle.running(old_var, unbiased, 0.9), narrow, "var")
    want, by_scale, by_bias = oracle.gradients(a.x, a.dy, scale, case.axis, full)
    oracle.assert_close(oracle.rows(dx, case.axis), want, 2 * tolerance, "dx")
    size = 4 * np.sqrt(case.count) * narrow
    assert np.abs(np.float64(dscale).ravel() - by_scale).max() <= size
    assert np.abs(np.float64(dbias).ravel() - by_bias).max() <= size
    # Of each cell's own weight; a weight that stands for several cells gets their sum.
    each = oracle.gradient_of_weights(a.x, a.dy, scale, full, case.axis)
    if a.mask is not None:
        each = each * oracle.rows(a.mask, case.axis, case.shape)
    got = oracle.rows(jnp.broadcast_to(dw, case.shape), case.axis)
    repeats = np.prod(case.shape) / np.prod(w.shape)
    if repeats == 1:
        oracle.assert_close(got, each, 4 * size, "dweights")
    else:
        assert dw.shape == w.shape
        direction = np.random.default_rng(2).normal(size=w.shape)
        along = (each * oracle.rows(direction, case.axis, case.shape)).sum()
        size *= np.abs(each).sum() / np.sqrt(case.count)
        assert abs((np.float64(dw) * direction).sum() - along) <= size


def example(rows=8, channels=4, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    c = channels
    params, state = jaxbn.Params(normal(c), normal(c)), jaxbn.State(normal(c), normal(c) ** 2, None)
    w = jnp.asarray(rng.uniform(0, 2, (rows, 3, 1)), jnp.float32)
    return 2 * normal(rows, 3, c) + 1, params, w, state, normal(rows, 3, c)


@pytest.mark.parametrize("ghosts", [None, 4])
@pytest.mark.parametrize("kind", ["bool", "int32", "float16", "float32"])
def test_weights_of_0_and_1_are_a_mask(kind, ghosts):
    x, params, w, state, dy = example()
    mask = w > 0.7
    x = jnp.where(mask, x, jnp.nan)
    options = {"virtual_batch_size": ghosts}
    y, vjp, new = jax.vjp(
        lambda *v: train(*v, state, mask=mask, **options), x, params, has_aux=True
    )
    got, gvjp, gnew = jax.vjp(
        lambda *v: train(*v, state, weights=mask.astype(kind), **options), x, params, has_aux=True
    )
    dy = jnp.where(mask, dy, 0)
    for u, v in zip(
        jax.tree.leaves((got, gnew, gvjp(dy))), jax.tree.leaves((y, new, vjp(dy))), strict=True
    ):
        oracle.assert_close(u, np.float64(v), 8 * oracle.tolerance("float32", 24))
    by_state = [
        jaxbn.batch_norm(x, params, state, train=False, **given)[0]
        for given in ({"mask": mask}, {"weights": mask.astype(kind)})
    ]
    np.testing.assert_array_equal(*by_state)


def test_mask_and_weights_multiply():
    x, params, w, state, dy = example()
    mask = jnp.arange(8)[:, None, None] < 5
    both = step(x, params, w, state, dy, mask=mask)
    product = step(x, params, jnp.where(mask, w, 0), state, dy)
    chex.assert_trees_all_close(both[:-1], product[:-1], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(both[-1], jnp.where(mask, product[-1], 0))


def test_a_share_for_all_changes_n_alone():
    """So of `unbiased`: n = Σw, of which 1 or less has no correction."""
    x, params, _, state, _ = example()
    y, new = train(x, params, state, unbiased=True)
    for share, n in ((0.5, 12.0), (1 / 24, 1.0)):
        got, moved = train(x, params, state, weights=jnp.full((1, 1, 1), share), unbiased=True)
        oracle.assert_close(got, np.float64(y), 8 * oracle.tolerance("float32", 24))
        bessel = (n / (n - 1) if n > 1 else 1) / (24 / 23)
        var = (new.var - 0.99 * state.var) * bessel + 0.99 * state.var
        oracle.assert_close(moved.var, np.float64(var), 1e-5)


def test_without_any_weight_y_is_bias_and_the_state_stays():
    x, params, w, state, dy = example()
    y, new, *gradients = step(x, params, 0 * w, state, dy)
    np.testing.assert_array_equal(y, jnp.broadcast_to(params.bias, y.shape))
    chex.assert_trees_all_equal(new, state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("residual", [False, True])
def test_relu_comes_last_and_has_its_derivative(residual):
    """Also where y is 0: a constant channel."""
    x, params, w, state, dy = example()
    x = x.at[..., 0].set(2.0)
    params = params._replace(bias=params.bias.at[0].set(0.0))
    shortcut = {"residual": jnp.where(x == 2, 0, x)} if residual else {}

    def apart(x, params):
        y = train(x, params, state, weights=w)[0]
        return jax.nn.relu(y + shortcut["residual"] if residual else y)

    got, vjp = jax.vjp(
        lambda x, p: train(x, p, state, weights=w, activation=jax.nn.relu, **shortcut)[0], x, params
    )
    want, vjp_apart = jax.vjp(apart, x, params)
    chex.assert_trees_all_close((got, vjp(dy)), (want, vjp_apart(dy)), rtol=1e-5, atol=1e-5)


def test_renormalization_is_of_the_weighted_moments():
    x, params, w, state, dy = example()
    y, _, dx, _, _ = step(x, params, w, state, dy, renorm=(1.3, 0.4))
    scale, bias, mean, var = (np.float64(v) for v in (*params, *state[:2]))
    _, *of_batch = oracle.moments(x, -1, w)
    r, d = oracle.corrections(*of_batch, mean, var, 1.3, 0.4)
    want = oracle.normalize(x, *of_batch, scale * r, bias + scale * d)
    oracle.assert_close(oracle.rows(y, -1), want, oracle.tolerance("float32", 24))
    want, *_ = oracle.gradients(x, dy, scale * r, -1, w)
    oracle.assert_close(oracle.rows(dx, -1), want, 2 * oracle.tolerance("float32", 24))


@pytest.mark.parametrize(
    "road",
    [
        "pmap",
        "shard_map",
        "shard_map, check_vma=False",
        "vmap",
        "jit, data x model",
        "jit, Explicit",
        "shard_map, groups interleaved",
        "jit, ghost batches",
    ],
)
def test_devices_equal_one_device(road):
    """Each by the sum of its weights; on one device all of them are 0."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    x, dy = normal(16, 4, 4, 6) + normal(1, 1, 1, 6), normal(16, 4, 4, 6)
    params, state = (normal(6), normal(6)), (normal(6), normal(6) ** 2)
    w = jnp.asarray(rng.uniform(0, 2, (16, 4, 4, 1)), jnp.float32).at[4:6].set(0)
    road = roads(4)[road]

    def bn(x, params, state, mask=None, **options):
        y, state = train(x, params, jaxbn.State(*state, None), weights=mask, **options)
        return y, tuple(state[:2])

    def with_weights(f):
        def step(x, params, state, w, dy):
            dw = jax.grad(lambda w: (f(x, params, state, w)[0] * dy).sum())(w)
            return *training(f)(x, params, state, w, dy), dw

        return jax.jit(step)

    arguments = x, params, state, w, dy
    got = with_weights(road.build(bn))(*road.place(*arguments))
    want = with_weights(road.reference(bn))(*arguments)
    for u, v in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        oracle.assert_close(u, np.float64(v), 8 * oracle.tolerance("float32", 16 * 16))


def test_kept_for_backward_are_x_and_the_weights():
    x, params, w, _, _ = example(64)
    _, vjp = jax.vjp(lambda *v: train(*v[:2], weights=v[2])[0], x.astype("bfloat16"), params, w)
    large = [leaf for leaf in jax.tree.leaves(vjp) if getattr(leaf, "size", 0) >= w.size]
    kept = {(leaf.shape, str(leaf.dtype)) for leaf in large if leaf.dtype != bool}
    assert kept == {(x.shape, "bfloat16"), (w.shape, "float32")}


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, w, train=True):
        norm = jaxbn.linen.BatchNorm(use_running_average=not train, name="norm")
        return norm(x, weights=w)


class Nnx(nnx.Module):
    def __init__(self):
        self.norm = jaxbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0))

    def __call__(self, x, w):
        return self.norm(x, weights=w)


def test_the_modules_and_recalibration_take_them_from_the_call():
    x, _, w, _, _ = example()
    params, state = jaxbn.init(4)
    y, new = train(x, params, state, weights=w)
    net, model = Linen(), Nnx()
    variables = net.init(jax.random.key(0), x, w)
    got, updates = net.apply(variables, x, w, mutable=["batch_stats"])
    chex.assert_trees_all_close((got, model(x, w)), (y, y), rtol=1e-5, atol=1e-5)
    for mean in (updates["batch_stats"]["norm"]["mean"], model.norm.mean[...]):
        np.testing.assert_allclose(mean, new.mean, rtol=1e-5)

    batches = [(x, w), (x + 5, w**2)]
    every, shares = (np.concatenate([b[i] for b in batches]) for i in (0, 1))
    _, mean, var = oracle.moments(every, -1, shares)

    def apply(variables, batch, **options):
        return net.apply(variables, *batch, train=False, **options)

    new = jaxbn.recalibrate(apply, variables, batches)["batch_stats"]["norm"]
    model = jaxbn.recalibrate(lambda model, batch: model(*batch), model, batches)
    for stats in ((new["mean"], new["var"]), (model.norm.mean[...], model.norm.var[...])):
        oracle.assert_close(stats[0], mean, 1e-5)
        oracle.assert_close(stats[1], var, 1e-5)


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_a_norm_that_is_swapped_in_leaves_out_what_has_no_weight(library):
    x, _, w, _, _ = example()
    w = jnp.where(w > 1, w, 0)
    with jax.numpy_rank_promotion("allow"):  # Flax needs
        if library == "linen":
            net = Linen()
            apply, variables, _ = jaxbn.swap(net.apply, net.init(jax.random.key(0), x, w), "layer")
            y = apply(variables, x, w)
        else:
            y = jaxbn.swap(Nnx(), to="layer").model(x, w)
        norm = nnx.LayerNorm(4, epsilon=1e-5, use_fast_variance=False, rngs=nnx.Rngs(0))
        want = norm(x, mask=jnp.broadcast_to(w > 0, x.shape))
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


def test_drift_sees_the_rows_under_their_weights():
    x, _, w, _, _ = example()
    net = Linen()
    variables = net.init(jax.random.key(0), x, w)
    _, seen = health.incoming(net.apply)(variables, x, w, train=False)
    (rows,) = seen.values()
    for i in range(len(x)):
        _, mean, var = oracle.moments(x[i], -1, w[i])
        oracle.assert_close(rows.mean[:, i], mean, 1e-5)
        oracle.assert_close(rows.var[:, i], var, 1e-5)
