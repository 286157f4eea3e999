"""The kernel of the library: moments of an array, of two sets pooled, of all devices pooled."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn import axes as axes_
from jaxbn import collectives
from jaxbn.axes import Axes, wide
from jaxbn.collectives import Pool
from jaxbn.primitives import Operation
from jaxbn.state import Moments
from jaxbn.sums import divisible, parts, real_product, total, totals
from jaxbn.tangent import summed

# Up to this many devices their moments travel in one collective, 2C + 1 numbers a device, and
# are merged locally; beyond, two collectives of O(C) cost less than one that grows with them.
GATHERED = 16

# The pivot is read from one position in so many; see `_pivot`.
STRIDE = 8

# On GPUs, from one in at most so many; see `_by_grid`.
SPARSE = 64

# Channels whose mean² is at most so many times their var need no pivot; see `_at_once`.
NEAR = 16


def moments(
    x: jax.Array,
    axis: int | Sequence[int] = -1,
    mask: jax.Array | None = None,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Moments:
    """Equals count, mean and biased variance of x over all axes but `axis`, pooled over devices.

    Args:
      x: any rank, floating or complex.
      axis: feature axis, or a tuple of them.
      mask: broadcastable to x; cells that are False (or 0) take no part. True and 1 are the
        other values it may hold.
      axis_name: mapped axis or axes to pool over, each device weighted by its count.
      axis_index_groups: pool within subgroups of that axis.

    Returns:
      `Moments(count, mean, var)`: mean and var [C] in float32 or wider, exact to a few
      roundings at any mean; count [] or, where the mask differs per feature, [C]. Plainly
      differentiable, to any order. An empty set has count 0, mean 0 and var 0.

    Raises:
      TypeError: x is not floating or complex.
      ValueError: an axis, the mask, or an axis name does not fit.
      NotImplementedError: under `jax.experimental.jet`, which cannot; `jax.jvp` nests.

    >>> import jax.numpy as jnp, jaxbn
    >>> m = jaxbn.moments(
    ...     jnp.array([[1.0], [2.0], [9.0]]), mask=jnp.array([[True], [True], [False]])
    ... )
    >>> float(m.count), float(m.mean[0]), float(m.var[0])
    (2.0, 1.5, 0.25)
    """
    x = axes_.array("moments", "x", x)
    where = axes_.resolve("moments", x, axis)
    if mask is not None:
        mask = axes_.check_mask("moments", mask, x)
    return across(of(x, where, mask), collectives.resolve("moments", axis_name, axis_index_groups))


def merge(a: Moments, b: Moments) -> Moments:
    """Equals the moments of the two sets put together (Chan, Golub, LeVeque 1979).

    Exact and associative up to rounding; count 0 is neutral, bit for bit.

    >>> import jax.numpy as jnp, jaxbn
    >>> a, b = jaxbn.moments(jnp.array([[1.0], [3.0]])), jaxbn.moments(jnp.array([[5.0]]))
    >>> m = jaxbn.merge(a, b)
    >>> float(m.count), float(m.mean[0]), round(float(m.var[0]), 4)
    (3.0, 3.0, 2.6667)
    """
    count = a.count + b.count
    # 0 where b is empty, 1 where a is: then nothing below is rounded.
    share = b.count / jnp.where(count > 0, count, 1)
    delta = b.mean - a.mean
    mean = a.mean + delta * share.astype(delta.dtype)
    var = a.var + (b.var - a.var) * share + real_product(delta, delta) * (share * (1 - share))
    return Moments(count, mean, var)


# Traced once for equal layers.
@functools.partial(jax.jit, static_argnames="axes", inline=True)
def of(
    x: jax.Array, axes: Axes, mask: jax.Array | None = None, near: jax.Array | None = None
) -> Moments:
    """Equals the moments of x over `axes.reduced`, in float32 or wider.

    Sums are taken of `x - pivot`, so nothing cancels however large the mean is, and they are
    exact for a constant channel, whose mean is then that constant and whose var is 0. TPUs take
    them of x itself where that is as good, and those of a bfloat16 x about `near` [C], or 0.
    """
    real = jnp.finfo(wide(x.dtype)).dtype
    count = jnp.asarray(axes.count(x), real) if mask is None else _count(mask, x, axes, real)
    if near is not None:
        near = lax.stop_gradient(near).astype(wide(x.dtype)) if x.dtype == jnp.bfloat16 else None
    return Moments(count, *mean_and_var(x, divisor(count), mask, near, axes=axes))


def _mean_and_var(  # type: ignore[no-untyped-def]
    device, x, n, mask, near, *, axes: Axes
) -> tuple[jax.Array, jax.Array]:
    way = _by_pivot
    if device == "gpu" and mask is None and all(isinstance(size, int) for size in x.shape):
        way = _by_grid
    if device == "tpu":
        way = functools.partial(_about_near, near) if x.dtype == jnp.bfloat16 else _at_once
    mean, var = way(device, axes, x, mask, n)
    return mean, jnp.maximum(var, 0)  # of a constant channel, that rounding left a hair below


mean_and_var = Operation("moments", _mean_and_var)


@mean_and_var.differentiated
def _(tx: jax.Array, operands: Any, moments: Any, *, axes: Axes) -> tuple[jax.Array, jax.Array]:
    """The tangents of mean and var, also of a var that was rounded to 0."""
    x, n, mask, _ = operands
    s1, s2 = sums_about(tx.astype(wide(x.dtype)), x, moments[0], mask, axes)
    return s1 / n.astype(s1.dtype), 2 * s2 / n


def sums_about(
    t: jax.Array,
    x: jax.Array,
    mean: jax.Array,
    mask: jax.Array | None,
    axes: Axes,
    held: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Equals Σt and Σ Re(conj(x - mean) t) over the valid cells; linear in t."""
    others = None, x.conj(), mean.conj(), mask, None, None
    static = {"dtype": t.dtype, "valid": True, "relu": False, "held": held}
    s1, s2 = summed(t, *others, axes=axes, **static)
    return s1, s2.real


def _by_pivot(
    device: str, axes: Axes, x: jax.Array, mask: jax.Array | None, n: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mean and variance by sums about a pivot, which is read from x first."""
    return _about(device, _pivot(device, x, axes, mask, n), axes, x, mask, n)


def _by_grid(
    device: str, axes: Axes, x: jax.Array, mask: jax.Array | None, n: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The same about the mean of a grid of positions, in units of one over their number.

    For GPUs: that number K is a power of two where the batch is one, so K x - Σ is K (x - pivot)
    to the bit, and no kernel has to divide. (pivot - mean)² is at most SPARSE times the variance
    whatever the values are; and where the batch is sharded, each device has its part of the grid.
    """
    kind = wide(x.dtype)
    grid = _grid(x, axes).astype(kind)
    total, k = grid.sum(axes.reduced), axes.count(grid)
    if k & (k - 1):
        total, k = total / k, 1
    mean, var = _about(device, total, axes, x.astype(kind) * k, mask, n)
    return mean / k, var / k**2


def _grid(x: jax.Array, axes: Axes) -> jax.Array:
    """One position in at most SPARSE, evenly over each image, and of rows alone over the batch."""
    inner = axes.reduced[1:] or axes.reduced
    counts = dict.fromkeys(inner, 1)
    while math.prod(x.shape[a] for a in inner) > SPARSE * math.prod(counts.values()):
        counts[max(inner, key=lambda a: x.shape[a] / counts[a])] *= 2
    starts, limits, strides = [0] * x.ndim, list(x.shape), [1] * x.ndim
    for a, count in counts.items():
        strides[a] = x.shape[a] // count
        starts[a] = (x.shape[a] - 1 - (count - 1) * strides[a]) // 2
        limits[a] = starts[a] + (count - 1) * strides[a] + 1
    return lax.slice(x, starts, limits, strides)


def _at_once(
    device: str, axes: Axes, x: jax.Array, mask: jax.Array | None, n: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The same by sums about 0, and by a pivot only where some channel's mean is far from 0.

    For TPUs: sums that wait for nothing are made inside the convolution that makes x, and x is
    not read for them. They lose a factor of 1 + mean² / var to cancellation, at most 1 + NEAR
    here; a constant channel other than 0, and what is not finite, are never near.
    """
    zero = jnp.zeros([x.shape[a] for a in axes.features], wide(x.dtype))
    mean, var = _about(device, zero, axes, x, mask, n)
    near = jnp.all(real_product(mean, mean) <= NEAR * var)
    by_pivot = functools.partial(_by_pivot, device, axes)
    return lax.cond(near, lambda *_: (mean, var), by_pivot, x, mask, n)


def _about_near(
    near: jax.Array | None,
    device: str,
    axes: Axes,
    x: jax.Array,
    mask: jax.Array | None,
    n: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The same about `near` as it is, or 0.

    For a bfloat16 x on TPUs, which then read x for its sums never. About 0, var loses a factor of
    1 + mean² / var of float32's precision, in which bfloat16 has lost more when x was rounded to
    it: a quarter of a unit of x's last place, squared. About the running mean nothing is lost
    once that is near.
    """
    pivot = jnp.zeros([x.shape[a] for a in axes.features], wide(x.dtype))
    if near is not None:
        pivot = jnp.where(jnp.isfinite(near), near, pivot)
    return _about(device, pivot, axes, x, mask, n)


def _about(
    device: str, pivot: jax.Array, axes: Axes, x: jax.Array, mask: jax.Array | None, n: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mean and variance by Σ(x - pivot) and Σ|x - pivot|², over n."""
    d = x.astype(pivot.dtype) - axes.expand(pivot)
    if mask is not None:
        d = jnp.where(mask, d, 0)
    sum_d, sum_d2 = totals(d, d.conj(), axes, device)
    shift = sum_d / n.astype(d.dtype)
    return pivot + shift, sum_d2.real / n - real_product(shift, shift)


def across(m: Moments, pool: Pool | None) -> Moments:
    """The moments of all devices in the pool as one set, each weighted by its count.

    One collective for up to 16 devices, else two. One sum of O(C) numbers cannot do it:
    without a pivot that all devices share, E[x²] - E[x]² cancels, and on the first step there
    is none to share.
    """
    if pool is None:
        return m
    if pool.devices <= GATHERED:
        return merge_all(_unpack(collectives.gather(_pack(m), pool), m))
    return _pooled(m, lambda v: _unpack(collectives.total(_pack(v), pool), v))


def _pack(m: Moments) -> jax.Array:
    """The 2C + 1 (or 3C) numbers of m in one array, for one collective."""
    return jnp.concatenate([leaf.reshape(-1).astype(m.mean.dtype) for leaf in m])


def _unpack(flat: jax.Array, like: Moments) -> Moments:
    """Undo `_pack`, along the last axis of `flat`."""
    count, mean, var = (
        part.reshape(*flat.shape[:-1], *leaf.shape)
        for part, leaf in zip(
            jnp.split(flat, [like.count.size, like.count.size + like.mean.size], axis=-1),
            like,
            strict=True,
        )
    )
    return Moments(count.real, mean, var.real)


def merge_all(m: Moments) -> Moments:
    """The sets stacked along the leading axis of m as one set.

    In two sums and not by `merge`, since XLA makes two all-reduces of them where that axis is
    sharded over devices.
    """
    pooled = _pooled(m, lambda v: Moments(*(leaf.sum(0, keepdims=True) for leaf in v)))
    return Moments(*(leaf[0] for leaf in pooled))


def _pooled(m: Moments, total: Callable[[Moments], Moments]) -> Moments:
    """Sets of moments as one, `total` summing over them: their mean first, then all about it."""
    kind = m.mean.dtype
    weight = _align(m.count, m.mean)
    sums = total(Moments(m.count, weight.astype(kind) * m.mean, jnp.zeros_like(m.var)))
    n = _align(jnp.where(sums.count > 0, sums.count, 1), m.mean)
    pivot = lax.stop_gradient(sums.mean / n.astype(kind))
    d = m.mean - pivot
    sums = total(Moments(m.count, weight.astype(kind) * d, weight * (m.var + real_product(d, d))))
    shift = sums.mean / n.astype(kind)
    return Moments(
        sums.count, pivot + shift, _not_negative(sums.var / n - real_product(shift, shift))
    )


def divisor(count: jax.Array) -> jax.Array:
    """Equals count, or 1 where that is 0, behind a barrier.

    A constant would make XLA multiply by 1 / n: a constant channel's var would not quite be 0,
    and the products would move into the loops over x, where a division stays [C] before them.
    """
    return lax.optimization_barrier(jnp.where(count > 0, count, 1))


def _pivot(
    device: str, x: jax.Array, axes: Axes, mask: jax.Array | None, n: jax.Array
) -> jax.Array:
    """A value near each channel's mean [C], to shift by.

    The mean of one position in STRIDE along the axis after the batch. For k of n values,
    (pivot - mean)² is at most n/k times the variance whatever the values are, so the shifted
    sums lose at most a factor 1 + n/k of float32's precision: no outlier breaks it, as it
    would break a pivot of one row. The sample is taken of x in its own dtype, or a TPU writes out
    all of it in float32 first. A masked x is not sampled, since its valid cells might be missed:
    the pivot is then the mean itself, at the price of one more read.
    """
    kind = wide(x.dtype)
    if mask is not None:
        return total(jnp.where(mask, x.astype(kind), 0), axes, device) / n.astype(kind)
    axis, stride = _sample(x, axes)
    if stride > 1:
        x = lax.slice_in_dim(x, 0, None, stride, axis=axis)
    count = jnp.asarray(axes.count(x), jnp.finfo(kind).dtype)
    return total(x.astype(kind), axes, device) / jnp.maximum(count, 1).astype(kind)


def _sample(x: jax.Array, axes: Axes) -> tuple[int, int]:
    """The axis that the pivot's sample is taken along, and one position in how many.

    The batch axis only where there is no other, and by a stride that divides it: it may be
    sharded, and devices then have each its part of the sample, if their rows are a multiple of it.
    """
    if len(axes.reduced) > 1:
        return axes.reduced[1], STRIDE if x.size else 1
    if not divisible(x, axes):
        return 0, 1
    axis = axes.reduced[0]
    return axis, parts(x.shape[axis])


def _count(mask: jax.Array, x: jax.Array, axes: Axes, dtype: jnp.dtype) -> jax.Array:
    """Valid cells per channel: [] where the mask does not tell features apart, else [C]."""
    repeats = 1  # cells of x behind one cell of the mask
    for a in axes.reduced:
        repeats *= x.shape[a] if mask.shape[a] == 1 else 1
    # Summed in the pivot's dtype, so that on a sharded mask it shares its all-reduce.
    count = mask.astype(dtype).sum(axes.reduced) * repeats
    if all(mask.shape[a] == 1 for a in axes.features):
        return count.reshape(())
    return jnp.broadcast_to(count, tuple(x.shape[a] for a in axes.features))


def _align(v: jax.Array, like: jax.Array) -> jax.Array:
    """Equals v with ones appended up to the rank of `like`: a scalar count beside a mean [C]."""
    return v.reshape(v.shape + (1,) * (like.ndim - v.ndim))


def _not_negative(var: jax.Array) -> jax.Array:
    """Equals max(var, 0), for a constant channel that rounding left a hair below.

    The derivative is that of var even there: `maximum` would halve a constant channel's
    second derivative, and `where` take it away, as rounding has it.
    """
    return var - lax.stop_gradient(jnp.minimum(var, 0))
