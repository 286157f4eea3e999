"""Count, mean and var of one array."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._op import arguments
from jaxbn._op import axes as axes_
from jaxbn._op import devices as devices_
from jaxbn._op.axes import Axes, wide
from jaxbn._op.pooling import across, not_negative
from jaxbn._op.state import Moments
from jaxbn._op.sums import divisible, parts, real_product, total, totals

# The pivot is read from one position in so many; see `_pivot`.
STRIDE = 8

# The platform that needs no pivot for channels whose mean² is at most NEAR times their var; see
# `_at_once`.
AT_ONCE, NEAR = "tpu", 16


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
    x = arguments.array("moments", "x", x)
    where = axes_.resolve("moments", x, axis)
    if mask is not None:
        mask = arguments.check_mask("moments", mask, x)
    return across(of(x, where, mask), arguments.resolve("moments", axis_name, axis_index_groups))


# Traced once for equal layers.
@functools.partial(jax.jit, static_argnames=("axes", "mapped"), inline=True)
def of(x: jax.Array, axes: Axes, mask: jax.Array | None = None, mapped: bool = False) -> Moments:
    """Equals the moments of x over `axes.reduced`, in float32 or wider.

    Sums are taken of `x - pivot`, so nothing cancels however large the mean is, and they are
    exact for a constant channel, whose mean is then that constant and whose var is 0. TPUs take
    them of x itself where that is as good, but not where `mapped` says that this is called under
    `vmap`, which takes both branches of a conditional.
    """
    kind = wide(x.dtype)
    real = jnp.finfo(kind).dtype
    count = jnp.asarray(axes.count(x), real) if mask is None else _count(mask, x, axes, real)
    n = divisor(count)
    at_once, by_pivot = (functools.partial(way, axes) for way in (_at_once, _by_pivot))
    # Where shardings are types, JAX cannot map a conditional either.
    if mapped or devices_.typed(x):
        return Moments(count, *by_pivot(x, mask, n))
    operands = devices_.alike(x, mask, n)
    mean, var = lax.platform_dependent(*operands, default=by_pivot, **{AT_ONCE: at_once})
    return Moments(count, mean, var)


def _by_pivot(
    axes: Axes, x: jax.Array, mask: jax.Array | None, n: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mean and variance by sums about a pivot, which is read from x first."""
    mean, var = _about(lax.stop_gradient(_pivot(x, axes, mask, n)), axes, x, mask, n)
    return mean, not_negative(var)


def _at_once(
    axes: Axes, x: jax.Array, mask: jax.Array | None, n: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The same by sums about 0, and by a pivot only where some channel's mean is far from 0.

    For TPUs: sums that wait for nothing are made inside the convolution that makes x, and x is
    not read for them. They lose a factor of 1 + mean² / var to cancellation, at most 1 + NEAR
    here; a constant channel other than 0, and what is not finite, are never near.
    """
    zero = jnp.zeros([x.shape[a] for a in axes.features], wide(x.dtype))
    mean, var = _about(zero, axes, x, mask, n)
    near = jnp.all(real_product(mean, mean) <= NEAR * var)
    by_pivot = functools.partial(_by_pivot, axes)
    return lax.cond(near, lambda *_: (mean, var), by_pivot, x, mask, n)


def _about(
    pivot: jax.Array, axes: Axes, x: jax.Array, mask: jax.Array | None, n: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mean and variance by Σ(x - pivot) and Σ|x - pivot|², over n."""
    d = x.astype(pivot.dtype) - axes.expand(pivot)
    if mask is not None:
        d = jnp.where(mask, d, 0)
    sum_d, sum_d2 = totals(d, d, axes)
    shift = sum_d / n.astype(d.dtype)
    return pivot + shift, sum_d2 / n - real_product(shift, shift)


def divisor(count: jax.Array) -> jax.Array:
    """Equals count, or 1 where that is 0, behind a barrier.

    A constant would make XLA multiply by 1 / n: a constant channel's var would not quite be 0,
    and the products would move into the loops over x, where a division stays [C] before them.
    """
    return lax.optimization_barrier(jnp.where(count > 0, count, 1))


def _pivot(x: jax.Array, axes: Axes, mask: jax.Array | None, n: jax.Array) -> jax.Array:
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
        return total(jnp.where(mask, x.astype(kind), 0), axes) / n.astype(kind)
    axis, stride = _sample(x, axes)
    if stride > 1:
        x = lax.slice_in_dim(x, 0, None, stride, axis=axis)
    count = jnp.asarray(axes.count(x), jnp.finfo(kind).dtype)
    return total(x.astype(kind), axes) / jnp.maximum(count, 1).astype(kind)


def _sample(x: jax.Array, axes: Axes) -> tuple[int, int]:
    """The axis that the pivot's sample is taken along, and one position in how many.

    The batch axis only where there is no other, and by a stride that divides it: it may be
    sharded, and devices then have each its part of the sample, if their rows are a multiple of it.
    Where shardings are types, the stride is one that leaves each device as many positions.
    """
    if len(axes.reduced) > 1:
        axis = axes.reduced[1]
        devices = devices_.split_over(x, axis)
        fits = (k for k in range(STRIDE, 1, -1) if -(-x.shape[axis] // k) % devices == 0)
        return axis, next(fits, 1) if x.size else 1
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
    count = jnp.broadcast_to(count, tuple(x.shape[a] for a in axes.features))
    return devices_.sharded_as(count, x, axes.features)
