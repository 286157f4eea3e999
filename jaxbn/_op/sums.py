"""Sums over the reduced axes, each in the form that its platform is fast at.

XLA's CPU back end (jax 0.10 to 0.12) hands a sum, with the arithmetic that makes its terms, to a
library which takes one operation after another through a scratch buffer. A plain sum runs at
the bandwidth of memory there, Σ(x - pivot)² at half of it, Σdy (x - mean) at a third. XLA's own
loops do all their arithmetic in registers, but it has none that sums well. So on CPU an array is
cut into up to eight parts, one loop makes the terms and adds the parts to one another, and what
is left is summed. Such a loop has one result, so two sums over one array are made in one, the
terms of both lying abreast, row by row: what the first row read is in cache for the second.
Elsewhere they are plain sums. Measurements are in `benchmarks/NOTES.md`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._op.axes import Axes

# At most: with 16, a loop reads from more places at once than the processor follows.
PARTS = 8

# Arrays of fewer values are summed plainly: there is less to gain than a kernel costs to start.
SMALL = 1 << 15

ABREAST = -2  # the axis along which the terms of two sums lie, rows being the last axis


def total(v: jax.Array, axes: Axes, device: str = "") -> jax.Array:
    """Equals `v.sum(axes.reduced)`. Where v lies in memory as it is, the plain sum is as fast."""
    if device == "cpu" and divisible(v, axes):
        v = _apart(_added(_parts(v, axes)))
    return v.sum(axes.reduced)


def totals(
    t: jax.Array, d: jax.Array, axes: Axes, device: str = "", times: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Equals `t.sum(axes.reduced)` and `(d * t).sum(axes.reduced)`.

    By parts from `times` as large an array as elsewhere.
    """
    if device == "cpu" and divisible(t, axes, times):
        terms = _ones_beside(d) * jnp.expand_dims(t, ABREAST)
        rest = _apart(_added(_parts(terms, axes)))
        sum_t, sum_dt = jax.vmap(lambda v: v.sum(axes.reduced), ABREAST)(rest)
        return sum_t, sum_dt
    if device == "gpu":
        return _together(t, d * t, axes)
    return t.sum(axes.reduced), (d * t).sum(axes.reduced)


def real_product(d: jax.Array, t: jax.Array) -> jax.Array:
    """Re(conj(d) t)."""
    return d.real * t.real + d.imag * t.imag if jnp.iscomplexobj(d) else d * t


def divisible(v: jax.Array, axes: Axes, times: int = 1) -> bool:
    """Whether v can be cut into parts, and is large enough."""
    # What is sharded by its type, or of unknown size, cannot be cut.
    typed = any(name is not None for name in jax.typeof(v).sharding.spec)
    known = all(isinstance(size, int) for size in v.shape)
    if typed or not known or v.size < times * SMALL or not axes.reduced or jnp.iscomplexobj(v):
        return False
    return parts(v.shape[_longest(v.shape, axes)]) > 1


def parts(n: int) -> int:
    """Into how many equal parts an axis of n is cut."""
    return next(k for k in range(PARTS, 0, -1) if n % k == 0)


def _longest(shape: Sequence[int], axes: Axes) -> int:
    """The axis that is cut: the longest but the batch, unless there is the batch alone."""
    return max(axes.reduced[1:] or axes.reduced, key=lambda a: shape[a])


def _parts(v: jax.Array, axes: Axes) -> list[jax.Array]:
    """The parts that v is cut into, of v's rank; the reduced axes stay where they are.

    A part is one run of the axis, since long runs of memory are read fastest. Of the batch, which
    may be sharded, a part is one row in eight, so that devices with a multiple of eight rows have
    all parts in their own. v may have terms abreast.
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
    """Equals `sum(vs)` without its 0, which would be one more addition in the loop."""
    first, *rest = vs
    return sum(rest, first)


def _together(u: jax.Array, v: jax.Array, axes: Axes) -> tuple[jax.Array, jax.Array]:
    """Both sums by one operation, of which XLA's GPU back end makes two kernels and not three."""

    def added(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
        return a[0] + b[0], a[1] + b[1]

    zero = jnp.zeros((), u.dtype)
    sum_u, sum_v = lax.reduce((u, v), (zero, zero), added, axes.reduced)
    return sum_u, sum_v


def _ones_beside(d: jax.Array) -> jax.Array:
    """Rows of ones and rows of d, abreast: the factors of t in Σt and Σdt.

    In one product, since XLA keeps an array rather than make each of its values in more than 15
    places, and there are eight parts.
    """
    shape = (*d.shape[: ABREAST + 1], 2, *d.shape[ABREAST + 1 :])
    first = lax.broadcasted_iota(jnp.int32, shape, d.ndim + 1 + ABREAST) == 0
    return jnp.where(first, 1, jnp.expand_dims(d, ABREAST))


def _apart(v: jax.Array) -> jax.Array:
    """Equals v, by a select: that one the library does not know, so a loop makes what is selected.

    The barrier keeps the condition from XLA, which would drop the select.
    """
    return jnp.where(lax.optimization_barrier(jnp.bool_(True)), v, 0)
