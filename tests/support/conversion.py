"""What tests of conversions share."""

import functools

import jax
import numpy as np

FIX = (
    "\nLayers of other names: rename={source: target}, or a function; None for the target drops "
    "one. Layers of the target to leave as they are: keep=[...]."
)


def refused(call, *problems):
    lines = "\n  ".join(problems)
    return f"{call}: the source does not fit the target; nothing was converted.\n  {lines}{FIX}"


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def shapes(model, *x, **options):
    """The variables' shapes as a jitted init gives them, sorted by name."""
    return jax.eval_shape(functools.partial(model.init, **options), jax.random.key(0), *x)


def assert_same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def last(x):
    """[N, C, …] → [N, …, C]."""
    return np.moveaxis(x, 1, -1)
