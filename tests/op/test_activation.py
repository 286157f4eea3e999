"""`activation=` and `residual=`: one call equals the three apart, in every mode and on every road.

Each device's way of making relu's derivative is taken by the CPU in turn; what a GPU's compiler
makes of its own is in `tests/accelerators`.
"""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
from jaxbn import calls
from jaxbn._op import primitives
from tests.support import oracle

SHAPE = (8, 5, 6)
ROADS = {
    "plain": {},
    "channels first": {"axis": 1},
    "masked": {"mask": np.arange(8)[:, None, None] % 3 > 0},
    "ghosts": {"virtual_batch_size": 4},
    "ghosts, masked": {"virtual_batch_size": 2, "mask": np.arange(5)[:, None] < 3},
    "float64 y": {"dtype": "float64"},
}


@pytest.fixture(params=["cpu", "gpu", "tpu"])
def device(request, switched):
    """The CPU takes that device's way."""
    switched(primitives, "DEVICES", {"cpu": request.param})
    return request.param


def normal(shape, seed, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def example(axis=-1, dtype="float32"):
    """x, params with scales below and at 0, residual, and a direction of each; state, dy."""
    c = SHAPE[axis]
    scale = normal(c, 1).at[1].set(0.0).at[2].set(0.0).at[3].set(-1.5)
    bias = normal(c, 2).at[0].set(0.0).at[1].set(0.5).at[2].set(-0.5)
    primals = normal(SHAPE, 0, dtype) + 1, jaxbn.Params(scale, bias), normal(SHAPE, 3, dtype)
    directions = jax.tree.map(lambda leaf: leaf[::-1], primals)
    state = jaxbn.State(normal(c, 4), normal(c, 5) ** 2, jnp.int32(3))
    return primals, directions, state, normal(SHAPE, 6, dtype)


def fused(activation, with_residual, train, options, x, params, residual, state):
    options = options | {"activation": activation, "residual": residual if with_residual else None}
    return jaxbn.batch_norm(x, params, state, train=train, **options)


def apart(activation, with_residual, train, options, x, params, residual, state):
    y, state = jaxbn.batch_norm(x, params, state, train=train, **options)
    y = y + residual.astype(y.dtype) if with_residual else y
    return (y if activation is None else activation(y)), state


def derivatives(f, primals, directions, dy, order):
    """y, state, gradients, tangents and (of order 2) forward over reverse and reverse over it."""
    y, vjp, state = jax.vjp(f, *primals, has_aux=True)
    dy = dy.astype(y.dtype)
    along = jax.jvp(lambda *p: f(*p)[0], primals, directions)
    found = [y, state, vjp(dy), along]

    def gradient(*p):
        return jax.grad(lambda *p: (jnp.sin(f(*p)[0]) * dy).sum().real, (0, 1, 2))(*p)

    def squared(*p):
        return sum((leaf.astype(dy.dtype) ** 2).sum() for leaf in jax.tree.leaves(gradient(*p)))

    if order == 2:
        found += [jax.jvp(gradient, primals, directions), jax.grad(squared, (0, 1, 2))(*primals)]
    return found


def assert_equal_to_the_three_apart(activation, residual, train, options, dtype, order=1):
    primals, directions, state, dy = example(options.get("axis", -1), dtype)
    got, want = (
        jax.jit(
            lambda f=f: derivatives(
                lambda *p: f(activation, residual, train, options, *p, state),
                primals,
                directions,
                dy,
                order,
            )
        )()
        for f in (fused, apart)
    )
    for u, v in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (u.dtype, u.shape) == (v.dtype, v.shape)
        # The same operations on the same numbers, which XLA may order otherwise.
        tolerance = 8 * oracle.tolerance(str(u.dtype), 40) if order == 1 else 1e-10
        oracle.assert_close(u, np.asarray(v, np.float64), tolerance)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("road", ROADS)
def test_relu_equals_the_three_apart(device, road, residual):
    with jax.enable_x64("dtype" in ROADS[road]):
        assert_equal_to_the_three_apart(jax.nn.relu, residual, True, ROADS[road], "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("residual", [False, True])
def test_relu_in_every_dtype(device, dtype, residual):
    assert_equal_to_the_three_apart(jax.nn.relu, residual, True, {}, dtype, 1)


@pytest.mark.parametrize("residual", [False, True])
def test_relu_to_second_order(residual):
    with jax.enable_x64(True):
        assert_equal_to_the_three_apart(jax.nn.relu, residual, True, {}, "float64", 2)


@pytest.mark.parametrize("activation", [None, jax.nn.relu, jax.nn.silu, jax.nn.leaky_relu])
@pytest.mark.parametrize("train", [False, True])
def test_any_function_in_both_modes(activation, train):
    assert_equal_to_the_three_apart(activation, True, train, {}, "float32")


def test_complex_y_is_handed_to_the_function_as_it_is():
    x = jax.lax.complex(normal((8, 3), 0), normal((8, 3), 1))
    y, _ = jaxbn.batch_norm(x, None, None, train=True)
    got, _ = jaxbn.batch_norm(x, None, None, train=True, activation=jax.nn.relu, residual=x)
    np.testing.assert_array_equal(got, jax.nn.relu(y + x))


def test_flaxs_relus_are_this_one():
    assert nn.relu is nnx.relu is jax.nn.relu


def test_where_y_is_0_or_a_constant(device):
    """Of a constant channel y is bias in every cell, and so is whether it has a derivative."""
    means, biases, scales = (0.0, 1234.567, -1e6), (-1e-3, 0.0, 1e-3), (-2.0, 0.0, 2.0)
    mean, bias, scale = np.float32(list(itertools.product(means, biases, scales))).T
    x = np.tile(mean, (16, 2))
    x[:, : len(mean)] += np.float32([-1, 0, 1, 0] * 4)[:, None]  # in half of these x - mean is 0
    params = jaxbn.Params(np.tile(scale, 2), np.tile(bias, 2))
    dy = normal(x.shape, 0)

    def gradient(activation):
        def f(x, params):
            y = jaxbn.batch_norm(x, params, None, train=True, activation=activation)[0]
            return y if activation else jax.nn.relu(y)

        y, vjp = jax.vjp(f, x, params)
        return y, vjp(dy)[1]

    got, want = (jax.jit(gradient, static_argnums=0)(f) for f in (jax.nn.relu, None))
    # Channel by channel: each error is relative to the largest value of its own channel.
    for u, v in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        for of_u, of_v in zip(np.moveaxis(u, -1, 0), np.moveaxis(v, -1, 0), strict=True):
            oracle.assert_close(of_u, np.float64(of_v), 1e-5)


@pytest.mark.parametrize("residual", [False, True])
def test_kept_for_backward_is_x_and_with_a_residual_y(residual):
    (x, params, shortcut), _, state, _ = example(dtype="bfloat16")
    f = functools.partial(fused, jax.nn.relu, residual, True, {}, state=state)
    _, vjp = jax.vjp(lambda *p: f(*p)[0], x, params, shortcut)
    large = [leaf for leaf in jax.tree.leaves(vjp) if getattr(leaf, "size", 0) >= x.size]
    assert [leaf.dtype for leaf in large] == ["bfloat16"] * (1 + residual)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        norm = jaxbn.linen.BatchNorm(use_running_average=not train, activation=nn.relu)
        return norm(nn.Dense(6)(x), residual=x)


class Apart(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        y = jaxbn.linen.BatchNorm(use_running_average=not train)(nn.Dense(6)(x))
        return nn.relu(y + x)


class Nnx(nnx.Module):
    def __init__(self):
        self.dense = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
        self.norm = jaxbn.nnx.BatchNorm(6, activation=nnx.relu, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(self.dense(x), residual=x)


@pytest.mark.parametrize("train", [False, True])
def test_the_modules_pass_both_on_and_hooks_see_through(train):
    x = normal((16, 6), 0)
    with jax.numpy_rank_promotion("allow"):
        linen, model = Linen(), Nnx()
        variables = linen.init(jax.random.key(0), x)
        params = variables["params"]["Dense_0"]
        options = {"train": train, "mutable": ["batch_stats"]}
        y, updates = linen.apply(variables, x, **options)
        (hooked, _), seen = calls.hooked_apply(linen.apply)(variables, x, **options)
        h = x @ params["kernel"]
        want = jaxbn.batch_norm(
            *(h, *jaxbn.init(6)), train=train, activation=jax.nn.relu, residual=x
        )
        oracle.assert_close(y, np.float64(want[0]), 1e-5)
        oracle.assert_close(
            updates["batch_stats"]["BatchNorm_0"]["mean"], np.float64(want[1].mean), 1e-5
        )
        np.testing.assert_array_equal(hooked, y)
        (moments,) = seen.values()
        oracle.assert_close(moments.mean, np.float64(h.mean(0)), 1e-5)

        model.train() if train else model.eval()
        h = model.dense(x)
        want = jaxbn.batch_norm(
            *(h, *jaxbn.init(6)), train=train, activation=jax.nn.relu, residual=x
        )
        with calls.hooked_nnx(model) as seen:
            y = model(x)
        oracle.assert_close(y, np.float64(want[0]), 1e-5)
        oracle.assert_close(seen["norm"].mean, np.float64(h.mean(0)), 1e-5)
        if train:
            oracle.assert_close(model.norm.mean[...], np.float64(want[1].mean), 1e-5)


@pytest.mark.parametrize("to", ["group", "layer", "instance"])
def test_a_norm_that_is_swapped_in_keeps_both(to):
    x = normal((4, 3, 6), 0)
    with jax.numpy_rank_promotion("allow"):
        linen, model = Linen(), Nnx()
        variables = linen.init(jax.random.key(0), x)
        swapped = jaxbn.swap(linen.apply, variables, to=to)
        plain = jaxbn.swap(Apart().apply, variables, to=to)
        y = swapped.model(swapped.variables, x)
        np.testing.assert_array_equal(y, plain.model(plain.variables, x))
        assert (y == 0).any()
        dense = model.dense(x)
        y = jaxbn.swap(model, to=to).model(x)
        norm = jaxbn.swap(jaxbn.nnx.BatchNorm(6, rngs=nnx.Rngs(0)), to=to).model
        np.testing.assert_array_equal(y, nn.relu(norm(dense) + x))
