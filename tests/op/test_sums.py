"""Sums by parts, as on CPU: the same sums, the same derivatives, and one loop for their terms."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn._op import axes as axes_
from jaxbn._op import sums, tangent
from tests.support import oracle
from tests.support.training import REAL, assert_training_equals_the_oracle, normal, step

pytestmark = pytest.mark.optimized
LAYOUTS = [
    ((64, 9), -1),
    ((63, 9), -1),  # seven parts
    ((61, 9), -1),  # a prime: not cut
    ((9, 64), 0),
    ((3, 16, 5), -1),
    ((3, 7, 4, 5), -1),
    ((3, 5, 12, 4), 1),
    ((4, 5, 6, 3), (-1, 1)),
    ((5,), 0),
]


@pytest.fixture
def small_too(switched):
    """Arrays of any size are summed by parts."""
    switched(sums, "SMALL", 0)


def resolved(x, axis):
    return axes_.resolve("test", jnp.asarray(x), axis)


@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
@pytest.mark.parametrize("masked", [False, True])
def test_sums_and_affine_are_each_others_transpose(small_too, shape, axis, masked):
    """And so are their derivatives, in each argument."""
    axes = resolved(normal(*shape), axis)
    features = [shape[i] for i in axes.features]
    g, x, dg, dx, t, dt = (normal(*shape, seed=i) for i in range(6))
    a, mean, b, c, da, dmean, db, dc = (normal(*features, seed=6 + i) for i in range(8))
    mask = normal(*shape, seed=14) > 0 if masked else None
    options = {"axes": axes, "dtype": jnp.dtype("float32"), "valid": masked}
    options |= {"relu": False, "held": False}
    wide = lambda v: np.expand_dims(np.float64(v), axes.reduced)  # noqa: E731
    w = 1.0 if mask is None else np.float64(mask)
    d, dd = np.float64(x) - wide(mean), np.float64(dx) - wide(dmean)

    def summed(g, a, x, mean):
        return tangent.summed(g, a, x, mean, mask, None, None, **options)

    def affine(t, b, c, a, x, mean):
        return tangent.affine(t, b, c, None, a, x, mean, mask, None, None, **options)[0]

    def along(f, *values):
        n = len(values) // 2
        got = jax.jit(lambda *v: jax.jvp(f, v[:n], v[n:]))(*values)
        return [np.asarray(v) for v in jax.tree.leaves(got)]

    def close(got, *terms):
        want = sum(np.broadcast_to(np.float64(term) * w, shape) for term in terms)
        want = want if got.shape == shape else want.sum(axes.reduced)
        np.testing.assert_allclose(got, want, atol=1e-6 * g.size)

    got = along(summed, g, a, x, mean, dg, da, dx, dmean)
    want = [(wide(a) * g,), (g,), (g * d,)]
    want += [(wide(da) * g, wide(a) * dg), (dg,), (dg * d, g * dd)]
    for v, terms in zip(got, want, strict=True):
        close(v, *terms)
    y, dy = along(affine, t, b, c, a, x, mean, dt, db, dc, da, dx, dmean)
    close(y, wide(a) * t, wide(b), wide(c) * d)
    close(dy, *(wide(da) * t, wide(a) * dt, wide(db), wide(dc) * d, wide(c) * dd))

    (ct,) = jax.jit(jax.linear_transpose(lambda g: summed(g, a, x, mean), g))((t, b, c))
    np.testing.assert_allclose(ct, y, atol=1e-6)
    cts = jax.jit(jax.linear_transpose(lambda *v: affine(*v, a, x, mean), t, b, c))(g)
    for v, u in zip(cts, got[:3], strict=True):
        np.testing.assert_allclose(v, u, atol=1e-6 * g.size)


@pytest.mark.parametrize("case", REAL, ids=lambda case: case.name)
def test_training_equals_the_oracle(small_too, case):
    assert_training_equals_the_oracle(case)


@pytest.mark.parametrize(("shape", "masked"), [((64, 3), True), ((2, 8, 5, 3), False)])
def test_derivatives_to_second_order_equal_those_of_plain_sums(switched, shape, masked):
    """In float64: only the order of additions may differ."""
    with jax.enable_x64(True):
        x, dy, tx = (jnp.asarray(normal(*shape, seed=i), jnp.float64) for i in range(3))
        params = jaxbn.Params(jnp.arange(1.0, 4), jnp.arange(3.0))
        mask = x[..., :1] > -1 if masked else None

        def f(x, params):
            return jaxbn.batch_norm(x, params, None, train=True, mask=mask)[0]

        def derivatives():
            grad = jax.grad(lambda x, p: (jnp.sin(f(x, p)) * dy).sum(), (0, 1))
            along = lambda x, p: sum(jax.tree.leaves(jax.tree.map(jnp.sum, grad(x, p))))  # noqa: E731
            return (
                jax.jvp(f, (x, params), (tx, params)),
                jax.jvp(grad, (x, params), (tx, params)),
                jax.grad(along, (0, 1))(x, params),
            )

        plain = jax.jit(derivatives)()
        switched(sums, "SMALL", 0)
        by_parts = jax.jit(lambda: derivatives())()
    for got, want in zip(jax.tree.leaves(by_parts), jax.tree.leaves(plain), strict=True):
        oracle.assert_close(got, want, 1e-10)


@pytest.mark.parametrize("shape", [(64, 5), (4, 16, 3, 5)])
def test_accuracy_is_that_of_shifted_sums(small_too, shape):
    """A constant channel is exact, and the variance does not cancel at large means."""
    x = normal(*shape) + np.float32([3, 1e3, 1e4, 0, 0])
    x[..., 3], x[..., 4] = 0.1, 1234.567
    y, _, dx, _ = jax.jit(step)(x, jaxbn.Params(np.ones(5, "f"), np.arange(5, dtype="f")), x)
    np.testing.assert_array_equal(y[..., 3:], np.broadcast_to(np.float32([3, 4]), y[..., 3:].shape))
    assert np.isfinite(dx).all()
    m = jax.jit(jaxbn.moments)(x)
    _, mean, var = oracle.moments(x)
    np.testing.assert_array_equal(m.var[3:], 0)
    np.testing.assert_allclose(m.mean, mean, rtol=2**-23)
    np.testing.assert_allclose(m.var[:3], var[:3], rtol=1e-5)


@pytest.mark.parametrize("shape", [(64, 4), (8, 16, 3, 4)])
@pytest.mark.parametrize("road", ["jit", "explicit", "shard_map", "vmap", "rows of their own"])
def test_devices_equal_one_device(small_too, shape, road):
    x, dy = normal(*shape), normal(*shape, seed=1)
    params = jaxbn.Params(np.float32([1, 2, 3, 4]), np.zeros(4, np.float32))
    want = jax.jit(step)(x, params, dy)
    if road == "rows of their own":  # 5 of 8 parts on each device: data moves, the result does not
        x, dy = x[:40], dy[:40]
        want = jax.jit(step)(x, params, dy)
    kind = AxisType.Explicit if road == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    pooled = functools.partial(step, axis_name="d")
    if road == "shard_map":
        specs = (P("d"), P(), P("d"))
        f = jax.shard_map(pooled, mesh=mesh, in_specs=specs, out_specs=(P("d"), P(), P("d"), P()))
        got = jax.jit(f)(x, params, dy)
    elif road == "vmap":
        split = lambda v: v.reshape(8, -1, *shape[1:])  # noqa: E731
        f = jax.vmap(pooled, (0, None, 0), axis_name="d")
        y, state, dx, grads = jax.jit(f)(split(x), params, split(dy))
        # A gradient of each copy of params, to be summed; the state is the same in all.
        state = jax.tree.map(lambda v: v[0], state)
        grads = jax.tree.map(lambda v: v.sum(0), grads)
        got = (y.reshape(shape), state, dx.reshape(shape), grads)
    else:
        with jax.set_mesh(mesh):
            x, dy = (jax.device_put(v, NamedSharding(mesh, P("d"))) for v in (x, dy))
            params = jax.device_put(params, NamedSharding(mesh, P()))
            got = jax.jit(step)(x, params, dy)
    tolerance = 8 * oracle.tolerance("float32", x.size // 4)
    for u, v in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        oracle.assert_close(u, np.asarray(v, np.float64), tolerance, road)


def arguments(shape):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    c = jax.ShapeDtypeStruct(shape[-1:], jnp.float32)
    return x, jaxbn.Params(c, c), x


@pytest.mark.parametrize("shape", [(16384, 32), (16, 56, 56, 32)])
def test_on_cpu_a_sum_is_of_one_array(shape):
    """What reduces does nothing else: a loop made the terms and added the parts."""
    text = jax.jit(step).lower(*arguments(shape)).compile().as_text()
    bodies = re.findall(r"^%\S+ \(.*?\n}", text, re.MULTILINE | re.DOTALL)
    reducing = [body for body in bodies if re.search(r"= f32\S* reduce\(", body)]
    assert reducing
    assert not [body for body in reducing if re.search(r" (add|subtract|multiply)\(", body)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(16384, 32), (16, 32, 32, 32)])
def test_on_cpu_nothing_of_the_size_of_x_is_written_but_y_and_dx(shape, dtype):
    """No float32 copy of a bfloat16 x or dy, no x - mean: the loops make them where they use them.

    The largest is what is left to sum: for two sums, an eighth of x's values each.
    """
    x, params, _ = arguments(shape)
    x = x.update(dtype=dtype)
    compiled = jax.jit(step).lower(x, params, x).compile()
    text = compiled.as_text()
    entry = text[text.index("ENTRY") :]
    large = re.findall(rf" = \w+\[{','.join(map(str, shape))}\]\S* (?!parameter)", entry)
    assert len(large) == 2, large
    assert compiled.memory_analysis().temp_size_in_bytes < 0.3 * x.size * 4


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_elsewhere_sums_are_plain(platform):
    """Of a convolution's x one slice is taken, for the pivot, and nothing is selected."""
    traced = jax.jit(step).trace(*arguments((8, 56, 56, 32)))
    large = r"-> tensor<8x\d+x\d+x(?:\d+x)?(?:2x)?32xf32>"
    found = {
        name: re.findall(rf"stablehlo\.(?:slice|select)\b.*{large}", text)
        for name in (platform, "cpu")
        for text in [traced.lower(lowering_platforms=(name,)).as_text()]
    }
    assert len(found[platform]) == 1
    assert len(found["cpu"]) > 16


@pytest.mark.parametrize(("shape", "axis"), [((16, 32, 32, 32), 1), ((16, 16, 32, 8, 8), (1, -1))])
def test_gradients_of_arrays_that_are_cut(shape, axis):
    """Large enough to be summed by parts in backward too: channels first, features apart."""
    x, dy = normal(*shape) + 1, normal(*shape, seed=1)
    features = [n for i, n in enumerate(shape) if i in axes_.resolve("test", x, axis).features]
    params = jaxbn.Params(normal(*features, seed=2), normal(*features, seed=3))
    _, _, dx, grads = jax.jit(functools.partial(step, axis=axis))(x, params, dy)
    want_dx, *want = oracle.gradients(x, dy, params.scale.ravel(), axis)
    count = x.size // params.scale.size
    oracle.assert_close(oracle.rows(dx, axis), want_dx, oracle.tolerance("float32", count), "dx")
    tolerance = oracle.tolerance("float32", count) * np.sqrt(count) * 4
    for got, desired in zip(grads, want, strict=True):
        assert np.abs(np.float64(got).ravel() - desired).max() <= tolerance
