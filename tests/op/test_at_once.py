"""Moments as on TPUs: sums of x itself, and about a pivot where a mean is far from 0.

Those of a bfloat16 x are taken about the running mean, or 0, wherever the means are.

Nothing here is a TPU's: the CPU is told to take that way. What a TPU's compiler makes of it is in
`tests/accelerators`.
"""

import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn._op import primitives
from tests.support import oracle
from tests.support.training import REAL, assert_training_equals_the_oracle, normal, step

moments = importlib.import_module("jaxbn._op.moments")
EPS = 2.0**-24


@pytest.fixture(autouse=True)
def way(switched):
    """Chooses one: at once, which is a TPU's, to begin with."""

    def choose(at_once):
        switched(primitives, "DEVICES", {"cpu": "tpu" if at_once else "cpu"})

    choose(True)
    return choose


def of(x, **options):
    return jax.jit(lambda x: jaxbn.moments(x, **options))(x)


def at(*means, rows=512):
    """A channel of sd 1 about each of these means."""
    return normal(rows, 3, len(means)) + np.float32(means)


@pytest.mark.parametrize("case", REAL, ids=lambda case: case.name)
def test_training_equals_the_oracle(case):
    assert_training_equals_the_oracle(case)


@pytest.mark.parametrize("mean", [0, 1, 3.9, 4.1, 30, 1e3, 1e4])
@pytest.mark.parametrize("masked", [False, True])
def test_the_variance_is_right_at_any_mean(mean, masked):
    """Sums about 0 lose 1 + mean² / var roundings, 17 at the most; further away none are taken."""
    x = at(mean, 0)
    mask = np.arange(512)[:, None, None] % 3 > 0 if masked else None
    m = of(x, mask=mask)
    _, want_mean, want_var = oracle.moments(x, -1, mask)
    tolerance = (1 + moments.NEAR) * EPS * np.sqrt(x.size / 2)
    np.testing.assert_allclose(m.var, want_var, rtol=tolerance)
    np.testing.assert_allclose(m.mean, want_mean, rtol=EPS * 4, atol=EPS * np.sqrt(x.size / 2))


def test_one_channel_far_from_0_is_enough_for_the_pivot(way):
    """Bit for bit: near 0 the sums are those of x and x², else those about the pivot, for all."""
    near, far = at(0.5, 3), at(0.5, 300)
    sums = jax.jit(lambda x: (x.sum((0, 1)), (x * x).sum((0, 1))))(near)
    of_near, of_far = of(near), of(far)
    np.testing.assert_array_equal(of_near.mean, sums[0] / near[..., 0].size)
    way(at_once=False)
    assert (np.asarray(of_near.var) != np.asarray(of(near).var)).any()
    for got, want in zip(of_far, of(far), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("dtype", "copies"), [("float32", 1), ("float16", 1), ("bfloat16", 0)])
def test_the_conditional_reads_a_copy_of_an_x_that_fits_into_fast_memory(dtype, copies):
    """So that x may stay there. A larger x is in main memory anyway, and is not copied."""

    def copied(rows):
        x = jax.ShapeDtypeStruct((rows, 64, 1024), dtype)
        traced = jax.jit(jaxbn.moments).trace(x)
        text = traced.lower().as_text()
        return len(re.findall(rf"stablehlo.select .*tensor<{rows}x64x1024x", text))

    most = moments.FAST // (64 * 1024 * jnp.dtype(dtype).itemsize)
    assert [copied(most), copied(most + 1)] == [copies, 0]


def test_complex_values():
    x = at(2, 0) + 1j * normal(512, 3, 2, seed=1)
    m = of(x.astype(np.complex64))
    _, mean, var = oracle.moments(x)
    np.testing.assert_allclose(m.mean, mean, atol=2e-6)
    np.testing.assert_allclose(m.var, var, rtol=1e-5)
    assert m.var.dtype == jnp.float32


def test_constant_channels_are_exact():
    x = at(0, 0, 0, 0)
    x[..., 1], x[..., 2], x[..., 3] = 0.1, 1234.567, 0
    params = jaxbn.Params(np.ones(4, "f"), np.arange(4, dtype="f"))
    y, _, dx, _ = jax.jit(lambda *a: step(*a))(x, params, x)
    np.testing.assert_array_equal(y[..., 1:], np.broadcast_to(np.arange(1, 4), y[..., 1:].shape))
    assert np.isfinite(dx).all()
    m = of(x[..., 3:])  # 0 alone is near
    np.testing.assert_array_equal([*m.mean, *m.var], 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_what_is_not_finite_leaves_its_channel(bad):
    x = at(0, 1)
    x[3, 1, 0] = bad
    params, state = jaxbn.init(2)
    _, new = jax.jit(lambda x: jaxbn.batch_norm(x, params, state, train=True))(x)
    for got, want in zip(new[:2], state[:2], strict=True):
        assert got[0] == want[0]
        assert got[1] != want[1]


def test_a_batch_without_a_valid_cell_is_the_empty_set():
    m = of(at(3, 0), mask=np.zeros((512, 1, 1), bool))
    assert float(m.count) == 0
    np.testing.assert_array_equal([*m.mean, *m.var], 0)


@pytest.mark.parametrize("mean", [1, 100])
def test_derivatives_to_second_order_are_those_about_a_pivot(way, mean):
    with jax.enable_x64(True):
        x, dy, tx = (jnp.asarray(normal(16, 3, seed=i), jnp.float64) for i in range(3))
        params = jaxbn.Params(jnp.arange(1.0, 4), jnp.arange(3.0))

        def derivatives(x):
            def loss(x):
                y = jaxbn.batch_norm(x, params, None, train=True)[0]
                return (jnp.sin(y) * dy).sum() + jaxbn.moments(x).var.sum() ** 2

            return jax.jvp(jax.grad(loss), (x,), (tx,)), jax.hessian(loss)(x)

        got = jax.jit(lambda x: derivatives(x))(x + mean)
        way(at_once=False)
        want = jax.jit(lambda x: derivatives(x))(x + mean)
    for u, v in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        oracle.assert_close(u, v, 1e-9)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("options", [{}, {"axis_name": "d"}, {"virtual_batch_size": 2}])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("check_vma", [False, True])
def test_devices_decide_for_themselves(way, options, masked, check_vma, mapped):
    """Rows far from 0 lie on some devices only: the result is that of pivots everywhere."""
    x = normal(32, 5, 3) + np.float32([0, 1, 2])
    x[:8] += 50
    dy, params = normal(32, 5, 3, seed=1), jaxbn.Params(np.ones(3, "f"), np.zeros(3, "f"))
    mask = np.arange(5)[:, None] < np.float32([4, 5, 3]) if masked else None  # the same everywhere
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def run():
        def shard(x, params, dy, mask):
            f = functools.partial(step, **options)
            if mapped:
                f, x, dy = jax.vmap(f, (0, None, 0, None)), x[None], dy[None]
            y, state, dx, grads = f(x, params, dy, mask)
            if mapped:
                y, state, dx, grads = jax.tree.map(lambda v: v[0], (y, state, dx, grads))
            state, grads = jax.tree.map(lambda v: jax.lax.pmean(v, "d"), (state[:2], grads))
            return y, state, dx, grads

        specs = {"in_specs": (P("d"), P(), P("d"), P()), "out_specs": (P("d"), P(), P("d"), P())}
        f = jax.shard_map(shard, mesh=mesh, check_vma=check_vma, **specs)
        return jax.jit(f)(x, params, dy, mask)

    got = run()
    way(at_once=False)
    want = run()
    for u, v in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        oracle.assert_close(u, np.asarray(v, np.float64), 40 * oracle.tolerance("float32", x.size))


def in_bfloat16(*means, rows=512):
    return jnp.asarray(at(*means, rows=rows), jnp.bfloat16)


RATIOS = (0, 1, 4.1, 30, 100, 250)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_variance_of_a_bfloat16_x(known, masked):
    """About 0 it loses mean² / var roundings, less than bfloat16 did; about a known mean none."""
    x = in_bfloat16(*RATIOS)
    mask = np.arange(512)[:, None, None] % 3 > 0 if masked else None
    _, state = jaxbn.init(len(RATIOS))
    if known:
        state = state._replace(mean=jnp.float32(RATIOS) + 0.5)
    run = jax.jit(lambda x: jaxbn.batch_norm(x, None, state, train=True, momentum=0.0, mask=mask))
    _, new = run(x)
    _, mean, var = oracle.moments(x, -1, mask)
    shift = (mean - np.float64(state.mean)) ** 2 / var
    allowed = (1 + shift) * EPS * np.sqrt(x.size / len(RATIOS)) * 2
    assert (np.abs(new.var / var - 1) <= allowed).all()
    np.testing.assert_allclose(new.mean, mean, rtol=EPS * 4, atol=EPS * np.sqrt(512))
    # What rounding x to bfloat16 may have moved the variance by: half a unit in its last place.
    rounding = (np.abs(mean) * 2.0**-8) ** 2 / 12
    assert known or (np.abs(new.var - var) <= var * 1e-4 + rounding).all()


def test_a_bfloat16_x_is_never_read_again():
    """No branch in its program, and none is asked for where the state is not to be trusted."""
    x, (params, state) = in_bfloat16(3, 1e4), jaxbn.init(2)
    for mean in (jnp.zeros(2), jnp.float32([np.nan, np.inf])):
        run = jax.jit(
            lambda x, mean=mean: jaxbn.batch_norm(x, params, state._replace(mean=mean), train=True)
        )
        assert "stablehlo.case" not in run.lower(x).as_text()
        assert jnp.isfinite(run(x)[0]).all()


def test_constant_channels_of_a_bfloat16_x_are_near_their_bias():
    """Not exact, as in float32: but never a variance below 0."""
    constants = jnp.asarray([0.1, 1234.567, 1e8, 0], jnp.bfloat16)
    x = jnp.broadcast_to(constants, (7, 9, 4))
    m = of(x)
    np.testing.assert_allclose(m.mean, constants.astype(jnp.float32), rtol=4 * EPS)
    assert (m.var >= 0).all()
    assert (m.var <= 64 * EPS * np.float64(constants) ** 2).all()


def test_derivatives_of_a_bfloat16_x(way):
    x, dy = in_bfloat16(0, 3), jnp.asarray(normal(512, 3, 2, seed=1), jnp.bfloat16)
    params = jaxbn.Params(np.float32([1, -2]), np.float32([0, 1]))
    got = jax.jit(lambda *a: step(*a))(x, params, dy)
    way(at_once=False)
    want = jax.jit(lambda *a: step(*a))(x, params, dy)
    for u, v in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        oracle.assert_close(u, np.float64(v), oracle.tolerance(str(u.dtype), 512))
