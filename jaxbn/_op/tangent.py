"""The linear map in the tangent of batch norm, and its transpose, each as one operation.

With d = x - mean, and where relu follows y > 0 or 0,

    affine: (t, b, c, u) -> (a t + b + c d + u) where y > 0,    y = relu(a d + bias + residual),

and `summed` is its transpose: g -> (a g, Σg, Σg d, g), with g set to 0 where y is not positive.
Both run over all cells, or over the `valid` cells of a mask. Nothing else in forward or reverse
mode is as large as x. Both make d inside, so what is kept for them is x in its own dtype and
numbers [C], never a float32 copy of x. They also decide y > 0 from x; with a residual they read y,
which the next layer keeps anyway.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._op.axes import Axes
from jaxbn._op.primitives import Operation
from jaxbn._op.sums import totals

# Sums over a cotangent are cut into parts only for arrays 16 times as large as elsewhere: their
# loops also make the cotangent itself, and take far longer to compile.
BACKWARD = 16


def _affine(  # type: ignore[no-untyped-def]
    device, t, b, c, u, a, x, mean, mask, bias, y, *, axes: Axes, dtype: Any, valid, relu, held
) -> tuple[jax.Array]:
    if device == "cpu" or (device == "gpu" and held):  # see `_summed`
        mean, b, c = lax.optimization_barrier((mean, b, c))
    d = _deviation(x, mean, mask, axes)
    ty = axes.expand(b) + axes.expand(c) * d
    if a is not None:
        ty = axes.expand(a) * t + ty
    if valid and mask is not None:
        ty = jnp.where(mask, ty, 0)
    ty = lax.convert_element_type(ty, dtype)
    if u is not None:
        ty = ty + u
    return (jnp.where(_positive(d, a, bias, y, axes), ty, 0) if relu else ty,)


def _summed(  # type: ignore[no-untyped-def]
    device, g, a, x, mean, mask, bias, y, *, axes: Axes, dtype: Any, valid, relu, held
) -> tuple[jax.Array, ...]:
    if device == "cpu" and a is not None:
        # Or XLA finds this x - mean equal to others, and keeps that array alive between them.
        mean, a = lax.optimization_barrier((mean, a))
    if relu and y is None and mask is None and device == "gpu":
        return _summed_where_positive(device, g, a, x, mean, bias, axes)
    d = _deviation(x, mean, mask, axes)
    if relu:
        if y is not None and device == "gpu":
            y = lax.optimization_barrier(y)  # or XLA makes y again, from x and the residual
        g = jnp.where(_positive(d, a, bias, y, axes), g, 0)
        if device == "cpu":
            # Or XLA keeps g as it was and d beside the masked g, until dx is made.
            g, mean = lax.optimization_barrier((g, mean))
            d = _deviation(x, mean, mask, axes)
    u = () if y is None else (g,)
    g = lax.convert_element_type(g, mean.dtype)
    if valid and mask is not None:
        g = jnp.where(mask, g, 0)
    sums = totals(g, d, axes, device, BACKWARD)
    if a is None:
        return sums
    if relu and device == "gpu":
        a, *sums = lax.optimization_barrier((a, *sums))
    return (axes.expand(a) * g, *sums, *u)


def _summed_where_positive(device, g, a, x, mean, bias, axes):  # type: ignore[no-untyped-def]
    """`_summed` for GPUs: two kernels decide y > 0, and neither writes the answer to memory.

    They compare x with a threshold [C], since XLA writes out whatever takes more to compute. Two
    barriers hold the comparisons back. Without g in the first barrier, XLA decides y > 0 in the
    kernel that makes y; without the sums in the second, one kernel hands its answer to the other.
    """
    down = a < 0
    least = _threshold(mean, a, bias, down)

    def positive(least: Any, down: Any) -> Any:
        kept = (x.astype(mean.dtype) > axes.expand(least)) != axes.expand(down)
        return jnp.where(kept, lax.convert_element_type(g, mean.dtype), 0)

    g, mean, least, down = lax.optimization_barrier((g, mean, least, down))
    sums = totals(positive(least, down), _deviation(x, mean, None, axes), axes, device)
    a, least, down, *sums = lax.optimization_barrier((a, least, down, *sums))
    return (axes.expand(a) * positive(least, down), *sums)


def _threshold(mean: jax.Array, a: jax.Array, bias: jax.Array, down: jax.Array) -> jax.Array:
    """The t for which x > t equals (x - mean) a + bias > 0; where a < 0 (`down`), its opposite.

    Exactly, t is mean - bias / a. Rounding may put that off by half a unit in mean's last place,
    which is enough to put a whole constant channel on the wrong side. So t is the largest of three
    neighbouring numbers at which the rounded x - mean does not pass -bias / a.
    """
    at = -bias / a
    near = mean + at
    tiny = jnp.finfo(near.dtype).tiny  # some devices take smaller numbers as 0
    up = jnp.maximum(jnp.nextafter(near, jnp.full_like(near, jnp.inf)), near + tiny)
    low = jnp.minimum(jnp.nextafter(near, jnp.full_like(near, -jnp.inf)), near - tiny)

    def below(t: jax.Array) -> jax.Array:
        return jnp.where(down, t - mean < at, t - mean <= at)

    t = jnp.where(below(up), up, jnp.where(below(near), near, low))
    return jnp.where(a == 0, jnp.where(bias > 0, -jnp.inf, jnp.inf), t)


def _deviation(x: jax.Array, mean: jax.Array, mask: jax.Array | None, axes: Axes) -> jax.Array:
    d = x.astype(mean.dtype) - axes.expand(mean)
    # A cell outside the mask that holds NaN must not reach dscale through 0 * NaN.
    return d if mask is None else jnp.where(mask | jnp.isfinite(x), d, 0)


def _positive(d: Any, a: Any, bias: Any, y: Any, axes: Axes) -> jax.Array:
    """Whether y > 0; without y by the same formula as `normalize`, which a compiler may reuse."""
    if y is None:
        y = d * axes.expand(a) + axes.expand(bias)
    return y > 0


affine = Operation("affine", _affine, linear=4)
summed = Operation("sums", _summed, linear=1)


@affine.transposed
def _(ct: jax.Array, a: Any, *others: Any, **static: Any) -> tuple[Any, ...]:
    cts = summed(ct, a, *others, **static)
    return (None, *cts, None) if a is None else (*cts, None)[:4]


@summed.transposed
def _(*cts_and_others: Any, **static: Any) -> tuple[jax.Array, ...]:
    *cts, a, x, mean, mask, bias, y = cts_and_others
    t, b, c, u = (None, *cts, None) if a is None else (*cts, None)[:4]
    return affine(t, b, c, u, a, x, mean, mask, bias, y, **static)
