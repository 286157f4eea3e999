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

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._op.axes import Axes

# At most: with 16, a loop reads from more places at once than the processor follows.
PARTS = 8

# Arrays of fewer values are summed plainly: there is less to gain than a kernel costs to start.
SMALL = 1 << 15

ABREAST = -2  # the axis along which the terms of two sums lie, rows being the last axis


def total(v: jax.Array, axes: Axes) -> jax.Array:
    """Equals `v.sum(axes.reduced)`. Where v lies in memory as it is, the plain sum is as fast."""

    def plain(v: jax.Array) -> jax.Array:
        return v.sum(axes.reduced)

    def by_parts(v: jax.Array) -> jax.Array:
        return plain(_apart(_added(_parts(v, axes))))

    return _chosen(v, axes, by_parts, plain)(v)


def totals(t: jax.Array, d: jax.Array, axes: Axes) -> tuple[jax.Array, jax.Array]:
    """Equals `t.sum(axes.reduced)` and `real_product(d, t).sum(axes.reduced)`."""

    def plain(t: jax.Array, d: jax.Array) -> tuple[jax.Array, jax.Array]:
        return t.sum(axes.reduced), real_product(d, t).sum(axes.reduced)

    def by_parts(t: jax.Array, d: jax.Array) -> tuple[jax.Array, jax.Array]:
        pairs = zip(_parts(t, axes), _parts(d, axes), strict=True)
        terms = _apart(_added([_ones_beside(d) * jnp.expand_dims(t, ABREAST) for t, d in pairs]))
        sum_t, sum_dt = jax.vmap(lambda v: v.sum(axes.reduced), ABREAST)(terms)
        return sum_t, sum_dt

    return _chosen(t, axes, by_parts, plain)(t, d)


def affine(a: jax.Array, b: jax.Array, d: jax.Array, axes: Axes) -> jax.Array:
    """Equals `a + b * d` for a, b [C]; JAX transposes it, linear in them, to `totals`."""

    def plain(a: jax.Array, b: jax.Array, d: jax.Array) -> jax.Array:
        return axes.expand(a) + axes.expand(b) * d

    def by_parts(a: jax.Array, b: jax.Array, d: jax.Array) -> jax.Array:
        parts = _parts(d, axes)

        def spread(v: jax.Array) -> jax.Array:
            return jnp.broadcast_to(axes.expand(v), parts[0].shape)

        both = _apart(jax.vmap(spread, out_axes=ABREAST)(jnp.stack([a, b])))
        y = [(_ones_beside(d) * both).sum(ABREAST) for d in parts]
        return jnp.stack(y, _cut(d.shape, axes)[1]).reshape(d.shape)

    return _chosen(d, axes, by_parts, plain)(a, b, d)


def real_product(d: jax.Array, t: jax.Array) -> jax.Array:
    """Re(conj(d) t)."""
    return d.real * t.real + d.imag * t.imag if jnp.iscomplexobj(d) else d * t


def _chosen(
    v: jax.Array, axes: Axes, by_parts: Callable[..., Any], plain: Callable[..., Any]
) -> Callable[..., Any]:
    """The function by parts on CPU, where v can be cut; elsewhere the plain one."""
    if not divisible(v, axes):
        return plain
    return lambda *arguments: lax.platform_dependent(*arguments, cpu=by_parts, default=plain)


def divisible(v: jax.Array, axes: Axes) -> bool:
    """Whether v can be cut into parts, and is large enough."""
    # What is sharded by its type, or of unknown size, cannot be cut.
    typed = any(name is not None for name in jax.typeof(v).sharding.spec)
    known = all(isinstance(size, int) for size in v.shape)
    if typed or not known or v.size < SMALL or not axes.reduced or jnp.iscomplexobj(v):
        return False
    cut, at = _cut(v.shape, axes)
    return cut[at] > 1


def parts(n: int) -> int:
    """Into how many equal parts an axis of n is cut."""
    return next(k for k in range(PARTS, 0, -1) if n % k == 0)


def _cut(shape: Sequence[int], axes: Axes) -> tuple[tuple[int, ...], int]:
    """A shape with one reduced axis cut in two, and which of the two counts the parts.

    It is the longest axis but the batch, and a part is one run of it, since long runs of memory
    are read fastest. Where there is the batch alone, which may be sharded, a part is one row in
    eight, so that devices with a multiple of eight rows have all parts in their own.
    """
    axis = max(axes.reduced[1:] or axes.reduced, key=lambda a: shape[a])
    n = shape[axis]
    k = parts(n)
    alone = len(axes.reduced) == 1
    pair = (n // k, k) if alone else (k, n // k)
    return (*shape[:axis], *pair, *shape[axis + 1 :]), axis + alone


def _parts(v: jax.Array, axes: Axes) -> list[jax.Array]:
    """The parts that v is cut into, of v's rank; the reduced axes stay where they are."""
    cut, at = _cut(v.shape, axes)
    v = v.reshape(cut)
    return [lax.index_in_dim(v, i, at, keepdims=False) for i in range(cut[at])]


def _added(vs: Sequence[jax.Array]) -> jax.Array:
    """Equals `sum(vs)` without its 0, which would be one more addition in the loop."""
    first, *rest = vs
    return sum(rest, first)


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
