"""Moments of an array, and of two sets pooled."""

import contextlib
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from jaxbn._op.axes import resolve
from tests.support import cases, oracle

pytestmark = pytest.mark.optimized
pivot_of = sys.modules["jaxbn._op.moments"]._pivot  # the attribute jaxbn.moments is the function
of = jax.jit(jaxbn.moments, static_argnames="axis")
merge = jax.jit(jaxbn.merge)
PLATFORM = "cpu"
EPS = 2.0**-23  # of float32
EMPTY = jaxbn.Moments(jnp.float32(0), jnp.zeros(3), jnp.zeros(3))


def x64(wanted=True):
    return jax.enable_x64(True) if wanted else contextlib.nullcontext()


def normal(shape, mean=0.0, seed=0):
    return np.random.default_rng(seed).normal(mean, 1, shape).astype(np.float32)


@pytest.mark.parametrize("case", cases.SMALL, ids=lambda case: case.name)
def test_moments_equal_the_oracle(case):
    a = cases.arrays(case)
    with x64(case.dtype == "float64"):
        m = of(a.x, axis=case.axis, mask=a.mask)
    desired = oracle.moments(a.x, case.axis, a.mask)
    wide = {"float64": "float64", "complex64": "complex64"}.get(case.dtype, "float32")
    assert (m.mean.dtype, m.mean.shape) == (wide, case.features)
    assert (m.var.dtype, m.var.shape) == (np.abs(np.zeros(1, wide)).dtype, case.features)
    assert m.count.shape == (case.features if case.mask == "features" else ())
    np.testing.assert_array_equal(np.broadcast_to(m.count, case.features).ravel(), desired[0])
    tolerance = oracle.tolerance(wide, case.count)
    oracle.assert_close(m.mean, desired[1], tolerance, "mean")
    oracle.assert_close(m.var, desired[2], tolerance, "var")


ROADS = {
    "eager": jaxbn.moments,
    "jit": of,
    "jit, masked": lambda x, axis: of(x, axis=axis, mask=np.ones((1,) * x.ndim, bool)),
}
LAYOUTS = (((256, 3), -1), ((3, 512), 0), ((8, 9, 9, 3), -1), ((8, 3, 9, 9), 1), ((1 << 18, 2), 1))


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_variance_does_not_cancel_at_large_means(road, shape, axis):
    for mean, allowed in ((1e3, 1e-4), (1e4, 1e-3), (1e5, 1e-2)):
        x = normal(shape, mean)
        _, _, var = oracle.moments(x, axis)
        np.testing.assert_allclose(ROADS[road](x, axis=axis).var, var, rtol=allowed)


@pytest.mark.parametrize("mean", [1e4, 1e5])
def test_y_and_dx_are_finite_and_scaled_at_large_means(mean):
    x, dy = normal((64, 4, 3), mean), normal((64, 4, 3), seed=1)
    y, vjp = jax.vjp(lambda x: jaxbn.batch_norm(x, None, None, train=True)[0], x)
    (dx,) = vjp(dy)
    np.testing.assert_allclose(np.std(y, (0, 1)), 1, rtol=1e-2)
    desired, _, _ = oracle.gradients(x, dy, np.ones(3))
    # x itself carries errors of EPS * mean against an sd of 1, so does each xhat.
    oracle.assert_close(dx, desired, 4 * EPS * mean, "dx")


def pivot(x):
    x = jnp.asarray(x)
    axes = resolve("moments", x, -1)
    return pivot_of(PLATFORM, x, axes, None, jnp.float32(axes.count(x)))


def read(shape):
    """Which cells the pivot is made of."""
    return np.asarray(jax.grad(lambda x: pivot(x).sum())(np.zeros(shape, np.float32))) != 0


def outliers(kind):
    """Batches [32, 32, 33, 2] near 1e3 in which some cells are far away."""
    x = normal((32, 32, 33, 2), 1e3)
    where = {
        "an image of zeros first": np.s_[0],
        "an image of zeros last": np.s_[-1],
        "a saturated pixel first": np.s_[0, 0, 0],
        "a saturated pixel in the middle": np.s_[7, 8, 3],  # where the pivot reads
        "a row of padding": np.s_[:, 0],
        "every position that the pivot reads": read(x.shape),
        "every position that it does not read": ~read(x.shape),
    }[kind]
    x[where] = 0 if "zeros" in kind or "padding" in kind else 1e6
    return x


@pytest.mark.parametrize(
    "kind",
    [
        "an image of zeros first",
        "an image of zeros last",
        "a saturated pixel first",
        "a saturated pixel in the middle",
        "a row of padding",
        "every position that the pivot reads",
        "every position that it does not read",
    ],
)
def test_no_outlier_spoils_the_variance(kind):
    x = outliers(kind)
    n = 32 * 32 * 33
    _, _, var = oracle.moments(x)
    # What `_pivot` promises: a factor 1 + 8 on the rounding of the shifted sums. Where most
    # cells hold nearly one value, that rounding is no random walk but n times half an EPS.
    rounding = n * EPS / 2 if kind.startswith("every") else oracle.tolerance("float32", n)
    allowed = (1 + 8) * rounding
    np.testing.assert_allclose(of(x).var, var, rtol=allowed)
    valid = np.ones((32, 32, 33, 1), bool)
    np.testing.assert_allclose(of(x, mask=valid).var, var, rtol=allowed)


SHARES = {  # how many values there are to one that is read
    (5, 3): 1,
    (1 << 14, 2): 8,
    (2, 16, 1): 8,
    (2, 7, 7, 1): 7,
    (2, 16, 16, 16, 1): 8,
}


@pytest.mark.parametrize("shape", SHARES)
def test_pivot_reads_this_share_of_all_values(shape):
    assert read(shape).sum() * SHARES[shape] == math.prod(shape)


@pytest.mark.parametrize("width", [2, 8, 9, 16, 17])
def test_pivot_is_within_its_bound_of_the_mean(width):
    """(pivot - mean)² <= (n / k) var, also for values chosen against it."""
    shape = (2, width, 3, 1)
    sample = read(shape)
    n, k = sample.size, sample.sum()
    rng = np.random.default_rng(0)
    against = [np.where(sample, far, 0.0) for far in (1, 1e4, -1e6)]
    for x in (*against, *(rng.standard_cauchy(shape) for _ in range(5))):
        x = x.astype(np.float32)
        _, (mean,), (var,) = oracle.moments(x)
        bound = n / k * var * (1 + 8 * EPS) + (EPS * mean) ** 2
        assert (np.float64(pivot(x)[0]) - mean) ** 2 <= bound


@pytest.mark.parametrize("shape", [(3,), (7,), (1001,), (5, 7), (3, 5, 7), (1, 9, 11)])
def test_a_constant_channel_is_exact(shape):
    """Mean is the constant, var is 0 and y is bias, to the bit, whatever the constant."""
    rng = np.random.default_rng(0)
    constants = np.append(rng.normal(0, 1, 200) * 10.0 ** rng.uniform(-6, 6, 200), 99.9)
    constants = constants.astype(np.float32)
    x = np.broadcast_to(constants, (*shape, 201))
    some = np.arange(shape[0]).reshape(-1, *[1] * len(shape)) != 1
    bias = normal(201)
    for mask in (None, some):
        m = of(x, mask=mask)
        np.testing.assert_array_equal(m.mean, constants)
        np.testing.assert_array_equal(m.var, 0)
        params = jaxbn.Params(np.ones(201, np.float32), bias)
        if x.size > 201:
            y, _ = jaxbn.batch_norm(x, params, None, train=True, mask=mask)
            np.testing.assert_array_equal(y, np.broadcast_to(bias, x.shape))
    pooled = merge(of(x), of(x[:1]))
    np.testing.assert_array_equal(pooled.mean, constants)
    np.testing.assert_array_equal(pooled.var, 0)


@pytest.mark.parametrize("mean", [0, 1e4])
def test_merge_equals_the_moments_of_both_sets(mean):
    a, b = normal((10, 3), mean), 3 * normal((37, 3), mean, seed=1)
    m = merge(of(a), of(b))
    count, mean_, var = oracle.moments(np.concatenate([a, b]))
    np.testing.assert_array_equal(m.count, count[0])
    np.testing.assert_allclose(m.mean, mean_, rtol=oracle.tolerance("float32", 47))
    # delta is a difference of rounded means.
    np.testing.assert_allclose(m.var, var, rtol=(1 + mean) * EPS * 8)


def test_the_empty_set_is_neutral_to_the_bit():
    m = of(normal((7, 3), 5))
    for pooled in (merge(m, EMPTY), merge(EMPTY, m)):
        jax.tree.map(np.testing.assert_array_equal, pooled, m)
    jax.tree.map(np.testing.assert_array_equal, merge(EMPTY, EMPTY), EMPTY)
    for x, mask in ((np.ones((0, 3), np.float32), None), (normal((4, 3)), np.zeros((4, 1)))):
        jax.tree.map(np.testing.assert_array_equal, of(x, mask=mask), EMPTY)


def test_merge_is_associative_and_commutative_to_rounding():
    a, b, c = (of(normal((n, 3), n, seed=n)) for n in (2, 30, 500))
    left, right, back = merge(merge(a, b), c), merge(a, merge(b, c)), merge(merge(c, b), a)
    for other in (right, back):
        for u, v in zip(left, other, strict=True):
            np.testing.assert_allclose(u, v, rtol=16 * EPS)


def test_merge_counts_each_feature_where_masks_differ():
    x, rng = normal((20, 4)), np.random.default_rng(0)
    mask = rng.random(x.shape) < 0.5
    mask[:, 2], mask[:8, 3] = False, False  # no cell of feature 2; none of 3 in the first part
    whole = of(x, mask=mask)
    parts = merge(of(x[:8], mask=mask[:8]), of(x[8:], mask=mask[8:]))
    np.testing.assert_array_equal(whole.count, mask.sum(0))
    np.testing.assert_array_equal(parts.count, mask.sum(0))
    np.testing.assert_allclose(parts.mean, whole.mean, rtol=16 * EPS, atol=4 * EPS)
    np.testing.assert_allclose(parts.var, whole.var, rtol=16 * EPS)


def test_merge_pools_complex_sets():
    case = next(case for case in cases.SMALL if case.dtype == "complex64")
    x = cases.arrays(case).x
    m = merge(of(x[:1]), of(x[1:]))
    _, mean, var = oracle.moments(x)
    oracle.assert_close(m.mean, mean, oracle.tolerance("complex64", case.count))
    oracle.assert_close(m.var, var, oracle.tolerance("complex64", case.count))


@pytest.mark.parametrize("value", [0, 1, 3.0, -1.0])
def test_a_mask_of_numbers_means_not_zero(value):
    x, mask = normal((6, 3)), np.array([[1], [0], [1], [1], [0], [1]], bool)
    numbers = np.where(mask, value, 0).astype(type(value))
    desired = of(x, mask=mask) if value else EMPTY
    jax.tree.map(np.testing.assert_array_equal, of(x, mask=numbers), desired)


def plain(x, mask):
    """Mean and var by the textbook, for float64."""
    w = jnp.broadcast_to(mask, x.shape).astype(x.dtype)
    n = w.sum(0)
    mean = (x * w).sum(0) / n
    return mean, ((x - mean[None]) ** 2 * w).sum(0) / n


def merged(x, mask):
    m = jaxbn.merge(*(jaxbn.moments(x[i], mask=mask[i]) for i in (np.s_[:3], np.s_[3:])))
    return m.mean, m.var


def pooled(x, mask):
    x, mask = (v.reshape(2, 4, v.shape[-1]) for v in (x, mask))
    m = jax.vmap(lambda x, mask: jaxbn.moments(x, -1, mask, "d"), axis_name="d")(x, mask)
    return m.mean[0], m.var[0]


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("road", ["of", "merge", "axis_name"])
def test_moments_are_differentiable_to_second_order(road, constant):
    """Against the textbook formula: value, gradient and Hessian of a loss on statistics."""
    f = {
        "of": lambda x, mask: jaxbn.moments(x, mask=mask)[1:],
        "merge": merged,
        "axis_name": pooled,
    }[road]
    rng = np.random.default_rng(0)
    with x64():
        x = jnp.asarray(rng.normal(size=(8, 2)))
        if constant:  # the kink of max(var, 0) lies here, and must not halve derivatives
            x = jnp.full_like(x, 0.1)
        mask = jnp.asarray(rng.random((8, 1)) < 0.7)
        weights = jnp.asarray(rng.normal(size=(2, 2)))

        def derivatives(f):
            def loss(x):
                mean, var = f(x, mask)
                return (weights[0] * (mean + mean**2)).sum() + (weights[1] * (var + var**2)).sum()

            return jax.jit(lambda x: (loss(x), jax.grad(loss)(x), jax.hessian(loss)(x)))(x)

        for got, desired in zip(derivatives(f), derivatives(plain), strict=True):
            np.testing.assert_allclose(got, desired, rtol=1e-12, atol=1e-12)
