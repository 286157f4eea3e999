"""Weight standardization, against its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from tests.support import oracle
from tests.support.messages import message

RNG = np.random.default_rng(0)
KERNELS = {
    "dense": ((5, 4), -1),
    "convolution": ((3, 3, 4, 6), -1),
    "of PyTorch": ((6, 4, 3, 3), 0),
    "depthwise": ((3, 3, 1, 6), -1),
    "several heads": ((5, 2, 3), (1, 2)),
}


@pytest.mark.parametrize("offset", [0, 1e3])
@pytest.mark.parametrize("kind", KERNELS)
def test_each_output_has_mean_0_and_var_1(kind, offset):
    shape, axis = KERNELS[kind]
    kernel = (RNG.normal(size=shape) + offset).astype(np.float32)
    _, mean, var = oracle.moments(kernel, axis)
    expected = oracle.normalize(kernel, mean, var, 1, 0, axis)
    got = oracle.rows(jaxbn.standardize(kernel, axis), axis)
    # x - mean is exact to a rounding of x, and divided by an sd of 1 or so.
    np.testing.assert_allclose(got, expected, atol=1e-5 + 4e-7 * offset)


def test_gradients_are_those_of_the_formula():
    """Also of second order, with random cotangents."""
    kernel, u, v = (jnp.asarray(RNG.normal(size=(3, 3, 4, 6)), jnp.float32) for _ in range(3))

    def plain(kernel):
        mean, var = kernel.mean((0, 1, 2)), kernel.var((0, 1, 2))
        return (kernel - mean) / jnp.sqrt(var + 1e-5)

    def both(f):
        def grad(kernel):
            return jax.grad(lambda kernel: (f(kernel) * u).sum())(kernel)

        return grad(kernel), jax.grad(lambda kernel: (grad(kernel) * v).sum())(kernel)

    with jax.numpy_rank_promotion("allow"):
        for got, expected in zip(both(jaxbn.standardize), both(plain), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_the_dtype_stays_and_statistics_are_wide():
    kernel = jnp.asarray(RNG.normal(5, 0.1, (3, 3, 16, 4)), jnp.bfloat16)
    y = jaxbn.standardize(kernel)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64).std((0, 1, 2)), 1, rtol=0.01)


BAD = {
    "one value": (
        lambda: jaxbn.standardize(jnp.ones((1, 1, 1, 4))),
        ValueError,
        "standardize: kernel with shape (1, 1, 1, 4) has one value for each output on axes (3,), "
        "which would become 0; expected at least 2; leave such a kernel as it is, or pass the axis "
        "of the outputs as axis=.",
    ),
    "integers": (
        lambda: jaxbn.standardize(jnp.ones((3, 4), int)),
        TypeError,
        "standardize: kernel has dtype int32, expected a floating dtype; write "
        "kernel.astype(jnp.float32).",
    ),
    "epsilon": (
        lambda: jaxbn.standardize(jnp.ones((3, 4)), epsilon=-1.0),
        ValueError,
        "standardize: epsilon=-1.0, expected a finite number of at least 0, added to the variance; "
        "write epsilon=1e-5.",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_calls_are_told_what_to_write(what):
    call, kind, expected = BAD[what]
    assert message(kind, call) == expected
