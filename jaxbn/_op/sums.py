"""Sums over the reduced axes, each in the form that its platform is fast at.

XLA's CPU back end (jax 0.10 to 0.12) hands a sum, with the arithmetic that makes its terms, to a
library. The library takes one operation after another through a scratch buffer. A plain sum runs
at the bandwidth of memory there, Σ(x - pivot)² at half the bandwidth, Σdy (x - mean) at a third.
XLA's own loops do all their arithmetic in registers, but none of them sums well.

So on CPU an array is cut into up to eight parts. One loop makes the terms and adds the parts to one
another; the library sums the rest. Such a loop has one result. Two sums over one array therefore
share a loop: the terms of both lie abreast, row by row, and what the first row read is in cache for
the second. Other platforms take plain sums. Measurements are in `benchmarks/NOTES.md`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._op.axes import Axes, has_known_sizes

# At most 8: with 16, a loop reads from more places at once than a processor can prefetch.
PARTS = 8

# Smaller arrays are summed plainly: a kernel costs more to start than the loop would gain.
SMALL = 1 << 15

ABREAST = -2  # the axis along which the terms of two sums lie, rows being the last axis


def total(v: jax.Array, axes: Axes, device: str = "") -> jax.Array:
    """Equals `v.sum(axes.reduced)`. For a v that is in memory already, a plain sum is as fast."""
    if device == "cpu" and divisible(v, axes):
        v = apart(_added(_parts(v, axes)))
    return v.sum(axes.reduced)


def totals(
    t: jax.Array, d: jax.Array, axes: Axes, device: str = "", times: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Equals `t.sum(axes.reduced)` and `(d * t).sum(axes.reduced)`.

    Only arrays of `times * SMALL` values or more are cut into parts.
    """
    if device == "cpu" and divisible(t, axes, times):
        terms = _ones_beside(d) * jnp.expand_dims(t, ABREAST)
        rest = apart(_added(_parts(terms, axes)))
        sum_t, sum_dt = jax.vmap(lambda v: v.sum(axes.reduced), ABREAST)(rest)
        return sum_t, sum_dt
    if device == "gpu":
        return _together(t, d * t, axes)
    return t.sum(axes.reduced), (d * t).sum(axes.reduced)


def real_product(d: jax.Array, t: jax.Array) -> jax.Array:
    """Re(conj(d) t)."""
    return d.real * t.real + d.imag * t.imag if jnp.iscomplexobj(d) else d * t


def apart(v: jax.Array) -> jax.Array:
    """Equals v, as an array of its own, which a loop of XLA's makes by a select.

    On CPUs the library that sums has no select, so the library does not make v itself. The barrier
    hides the condition from XLA, which would otherwise drop the select.
    """
    return jnp.where(lax.optimization_barrier(jnp.bool_(True)), v, 0)


def divisible(v: jax.Array, axes: Axes, times: int = 1) -> bool:
    """Whether v can be cut into parts, and is large enough."""
    # An array of unknown size, or whose type is sharded, cannot be cut.
    typed = any(name is not None for name in jax.typeof(v).sharding.spec)
    known = has_known_sizes(v)
    if typed or not known or v.size < times * SMALL or not axes.reduced or jnp.iscomplexobj(v):
        return False
    return parts(v.shape[_longest(v.shape, axes)]) > 1


def parts(n: int) -> int:
    """Into how many equal parts an axis of n is cut."""
    return next(k for k in range(PARTS, 0, -1) if n % k == 0)


def _longest(shape: Sequence[int], axes: Axes) -> int:
    """The axis to cut: the longest after the batch; the batch where no other axis is reduced."""
    return max(axes.reduced[1:] or axes.reduced, key=lambda a: shape[a])


def _parts(v: jax.Array, axes: Axes) -> list[jax.Array]:
    """Cuts v into parts of v's rank; the reduced axes stay in place. v may have terms abreast.

    A part is one run of the axis, since memory is fastest in long runs. On the batch, which may be
    sharded, a part is every eighth row: a device with a multiple of eight rows then holds its share
    of each part.
    """
    shape = v.shape
    if v.ndim > len(axes.features) + len(axes.reduced):
        shape = v.shape[:ABREAST] + v.shape[ABREAST + 1 :]
    axis = _longest(shape, axes)
    n, k = shape[axis], parts(shape[axis])
    axis += v.ndim - len(shape) if axis == len(shape) - 1 else 0
    alone = len(axes.reduced) == 1
    pair = (n // k, k) if alone else (k, n // k)
    v = v.reshape(*v.shape[:axis], *pair, *v.shape[axis + 1 :])
    return [lax.index_in_dim(v, i, axis + alone, keepdims=False) for i in range(k)]


def _added(vs: Sequence[jax.Array]) -> jax.Array:
    """Equals `sum(vs)`, without the addition of 0 that `sum` begins with."""
    first, *rest = vs
    return sum(rest, first)


def _together(u: jax.Array, v: jax.Array, axes: Axes) -> tuple[jax.Array, jax.Array]:
    """Both sums by one operation: XLA's GPU back end makes two kernels of it, not three."""

    def added(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
        return a[0] + b[0], a[1] + b[1]

    zero = jnp.zeros((), u.dtype)
    sum_u, sum_v = lax.reduce((u, v), (zero, zero), added, axes.reduced)
    return sum_u, sum_v


def _ones_beside(d: jax.Array) -> jax.Array:
    """Rows of ones and rows of d, abreast: the factors of t in Σt and Σdt.

    One product takes both. XLA writes an array to memory if more than 15 places would make it
    again, and two products over eight parts would be 16 places.
    """
    shape = (*d.shape[: ABREAST + 1], 2, *d.shape[ABREAST + 1 :])
    first = lax.broadcasted_iota(jnp.int32, shape, d.ndim + 1 + ABREAST) == 0
    return jnp.where(first, 1, jnp.expand_dims(d, ABREAST))
