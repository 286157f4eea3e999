"""A training step and what the oracle says of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxbn
from tests.support import cases, oracle

REAL = [case for case in cases.SMALL if case.dtype != "complex64"]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def step(x, params, dy, mask=None, **options):
    """y, state, dx and the gradients of params."""
    f = functools.partial(jaxbn.batch_norm, train=True, mask=mask, **options)
    features = jnp.shape(params.scale)
    state = jaxbn.State(jnp.zeros(features), jnp.ones(features), jnp.int32(0))
    y, vjp, new = jax.vjp(lambda *p: f(*p, state), x, params, has_aux=True)
    return y, new, *vjp(dy)


def assert_training_equals_the_oracle(case):
    a = cases.arrays(case)
    with jax.enable_x64(case.dtype == "float64"):
        run = jax.jit(functools.partial(step, axis=case.axis))
        y, _, dx, grads = run(a.x, jaxbn.Params(a.scale, a.bias), a.dy, a.mask)
    _, mean, var = oracle.moments(a.x, case.axis, a.mask)
    scale, bias = a.scale.ravel(), a.bias.ravel()
    want_y = oracle.normalize(a.x, mean, var, scale, bias, case.axis)
    want_dx, *want = oracle.gradients(a.x, a.dy, scale, case.axis, a.mask)
    tolerance = oracle.tolerance(case.dtype, case.count)
    oracle.assert_close(oracle.rows(y, case.axis), want_y, tolerance, "y")
    oracle.assert_close(oracle.rows(dx, case.axis), want_dx, tolerance, "dx")
    tolerance = oracle.tolerance(a.scale.dtype, case.count) * np.sqrt(case.count) * 4
    for got, desired in zip(grads, want, strict=True):
        assert np.abs(np.float64(got).ravel() - desired).max() <= tolerance
