"""The linear map in the tangent of batch norm, and its transpose, each as one operation.

With d = x - mean, `affine` is (t, b, c) -> a t + b + c d, and `summed`, its transpose,
g -> (a g, Σg, Σg d), over all cells or over the `valid` ones that a mask leaves. That is all in
either mode of differentiation that is as large as x. Kept for them are x in its own dtype and
numbers [C], never a float32 copy of x: d is made inside.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn.axes import Axes
from jaxbn.primitives import Operation
from jaxbn.sums import CPU, totals

# Sums over a cotangent are taken by parts of arrays this many times as large as others: their loops
# make all that the cotangent is made of, and take far longer to compile.
BACKWARD = 16


def _affine(  # type: ignore[no-untyped-def]
    platform, t, b, c, a, x, mean, mask, *, axes: Axes, dtype: Any, valid: bool
) -> tuple[jax.Array]:
    if platform in CPU:  # see `_summed`
        mean, b, c = lax.optimization_barrier((mean, b, c))
    y = axes.expand(b) + axes.expand(c) * _deviation(x, mean, mask, axes)
    if a is not None:
        y = axes.expand(a) * t + y
    if valid and mask is not None:
        y = jnp.where(mask, y, 0)
    return (lax.convert_element_type(y, dtype),)


def _summed(  # type: ignore[no-untyped-def]
    platform, g, a, x, mean, mask, *, axes: Axes, dtype: Any, valid: bool
) -> tuple[jax.Array, ...]:
    if platform in CPU:
        # Or XLA finds this x - mean equal to others, and keeps that array alive between them.
        mean, a = (mean, a) if a is None else lax.optimization_barrier((mean, a))
    g = lax.convert_element_type(g, mean.dtype)
    if valid and mask is not None:
        g = jnp.where(mask, g, 0)
    sums = totals(g, _deviation(x, mean, mask, axes), axes, platform, BACKWARD)
    return sums if a is None else (axes.expand(a) * g, *sums)


def _deviation(x: jax.Array, mean: jax.Array, mask: jax.Array | None, axes: Axes) -> jax.Array:
    d = x.astype(mean.dtype) - axes.expand(mean)
    # A cell outside the mask that holds NaN must not reach dscale through 0 * NaN.
    return d if mask is None else jnp.where(mask | jnp.isfinite(x), d, 0)


affine = Operation("affine", _affine, linear=3)
summed = Operation("sums", _summed, linear=1)


@affine.transposed
def _(ct: jax.Array, a: Any, *others: Any, **static: Any) -> tuple[Any, ...]:
    cts = summed(ct, a, *others, **static)
    return (None, *cts) if a is None else cts


@summed.transposed
def _(*cts_and_others: Any, **static: Any) -> tuple[jax.Array, ...]:
    *cts, a, x, mean, mask = cts_and_others
    t, b, c = (None, *cts) if a is None else cts
    return affine(t, b, c, a, x, mean, mask, **static)
