"""Sums over the reduced axes, each in the form that its platform is fast at.

XLA's CPU back end (jax 0.10 to 0.12) hands a sum, with the arithmetic that makes its terms, to a
library which takes one operation after another through a scratch buffer. A plain sum runs at
the bandwidth of memory there, Σ(x - pivot)² at half of it, Σdy (x - mean) at a third. XLA's own
loops do all their arithmetic in registers, but it has none that sums well. So on CPU an array is
cut into up to eight parts, one loop makes the terms and adds the parts to one another, and what
is left is summed. Elsewhere it is a plain sum. Measurements are in `benchmarks/NOTES.md`.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn.axes import Axes

# At most: with 16, a loop reads from more places at once than the processor follows.
PARTS = 8

# Arrays of fewer values are summed plainly: there is less to gain than a kernel costs to start.
SMALL = 1 << 15


def total(v: jax.Array, axes: Axes) -> jax.Array:
    """Equals `v.sum(axes.reduced)`. Where v needs no arithmetic, the plain sum is as fast."""
    cut, at = _cut(v, axes)

    def plain(v: jax.Array) -> jax.Array:
        return v.sum(axes.reduced)

    def by_parts(v: jax.Array) -> jax.Array:
        v = v.reshape(cut)
        first, *rest = (lax.index_in_dim(v, i, at, keepdims=False) for i in range(cut[at]))
        return plain(_apart(sum(rest, first)))

    return plain(v) if cut[at] == 1 else lax.platform_dependent(v, cpu=by_parts, default=plain)


def spread(v: jax.Array, like: jax.Array, axes: Axes) -> jax.Array:
    """Equals v [C] broadcast against `like`; JAX transposes it to `total`."""
    cut, at = _cut(like, axes)
    if cut[at] == 1:
        return axes.expand(v)

    def plain(v: jax.Array) -> jax.Array:
        return jnp.broadcast_to(axes.expand(v), like.shape)

    def by_parts(v: jax.Array) -> jax.Array:
        part = _apart(jnp.broadcast_to(axes.expand(v), cut[:at] + cut[at + 1 :]))
        return jnp.stack([part] * cut[at], at).reshape(like.shape)

    return lax.platform_dependent(v, cpu=by_parts, default=plain)


def near_mean(x: jax.Array, axes: Axes) -> jax.Array:
    """Equals the mean [C] of x over `axes.reduced`, or on CPU that of one part of x; 0 of none."""
    cut, at = _cut(x, axes)

    def whole(x: jax.Array) -> jax.Array:
        count = jnp.asarray(axes.count(x), x.real.dtype)
        return x.sum(axes.reduced) / jnp.maximum(count, 1).astype(x.dtype)

    def one_part(x: jax.Array) -> jax.Array:
        return whole(lax.index_in_dim(x.reshape(cut), 0, at, keepdims=False))

    return whole(x) if cut[at] == 1 else lax.platform_dependent(x, cpu=one_part, default=whole)


def _cut(v: jax.Array, axes: Axes) -> tuple[tuple[int, ...], int]:
    """The shape of v with one reduced axis cut in two, and which of the two counts the parts.

    It is the axis after the batch, and a part is one run of it, since long runs of memory are
    read fastest. Where there is the batch alone, which may be sharded, a part is one row in
    eight, so that devices with a multiple of eight rows have all parts in their own.
    """
    axis = max(axes.reduced[:2], default=0)
    n = v.shape[axis]
    # What is sharded by its type, or of unknown size, cannot be cut.
    typed = any(name is not None for name in jax.typeof(v).sharding.spec)
    known = all(isinstance(size, int) for size in v.shape)
    if typed or not known or v.size < SMALL or not axes.reduced:
        parts = 1
    else:
        parts = next(k for k in range(PARTS, 0, -1) if n % k == 0)
    alone = len(axes.reduced) == 1
    pair = (n // parts, parts) if alone else (parts, n // parts)
    return (*v.shape[:axis], *pair, *v.shape[axis + 1 :]), axis + alone


def _apart(v: jax.Array) -> jax.Array:
    """Equals v, by a select: that one the library does not know, so a loop makes what is selected.

    The barrier keeps the condition from XLA, which would drop the select.
    """
    return jnp.where(lax.optimization_barrier(jnp.bool_(True)), v, 0)
