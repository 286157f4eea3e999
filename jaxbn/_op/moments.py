"""Count, mean and var of one array."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._op import axes as axes_
from jaxbn._op import devices as devices_
from jaxbn._op.arguments.cells import check_cells
from jaxbn._op.arguments.choices import check_index
from jaxbn._op.arguments.pools import resolve
from jaxbn._op.arguments.values import array
from jaxbn._op.axes import Axes, has_known_sizes, wide
from jaxbn._op.devices import Pool
from jaxbn._op.pooling import across, not_negative, with_one_count
from jaxbn._op.primitives import Operation
from jaxbn._op.state import Moments
from jaxbn._op.sums import apart, divisible, parts, real_product, total, totals
from jaxbn._op.tables import Domains, alone, rows_of
from jaxbn._op.tangent import summed

# The pivot is the mean of every eighth position; see `_pivot`.
STRIDE = 8

# On GPUs, the pivot is the mean of at least one position in 64; see `_by_grid`.
SPARSE = 64

# A channel needs no pivot where mean² is at most 16 var; see `_at_once`.
NEAR = 16

# Bytes of an x that may stay in a TPU's fast memory: half of the 128 MiB of a v5e; see `_at_once`.
FAST = 1 << 26


def moments(
    x: jax.Array,
    axis: int | Sequence[int] = -1,
    mask: jax.Array | None = None,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    weights: jax.Array | None = None,
    domain: int | jax.Array | None = None,
    domains: int | None = None,
) -> Moments:
    """Equals count, mean and biased variance of x over all axes but `axis`, pooled over devices.

    Args:
      x: any rank, floating or complex.
      axis: feature axis, or a tuple of them.
      mask: broadcastable to x; cells that are False (or 0) take no part. True and 1 are the
        other values it may hold.
      axis_name: mapped axis or axes to pool over, each device weighted by its count.
      axis_index_groups: pool within subgroups of that axis.
      weights: broadcastable to x, at least 0: the share that each cell has in the statistics.
        count is then Σw, mean Σwx / Σw and var Σw|x - mean|² / Σw. Mask and weights multiply.
      domain: with `domains`: the domain that x belongs to, an integer, or one for each row on the
        first axis that is reduced. The moments are those of each domain: count, mean and var are
        [domains, C], with count 0 where a domain has no row.
      domains: the number of domains.

    Returns:
      `Moments(count, mean, var)`: mean and var [C] in float32 or wider, exact to a few
      roundings at any mean; count [] or, where the mask differs per feature, [C]. Plainly
      differentiable, to any order. An empty set has count 0, mean 0 and var 0.

    Raises:
      TypeError: x is not floating or complex, or weights are complex.
      ValueError: an axis, the mask, weights, or an axis name does not fit.
      NotImplementedError: under `jax.experimental.jet`, which cannot; `jax.jvp` nests.

    >>> import jax.numpy as jnp, jaxbn
    >>> m = jaxbn.moments(
    ...     jnp.array([[1.0], [2.0], [9.0]]), mask=jnp.array([[True], [True], [False]])
    ... )
    >>> float(m.count), float(m.mean[0]), float(m.var[0])
    (2.0, 1.5, 0.25)
    """
    x = array("moments", "x", x)
    where = axes_.resolve("moments", x, axis)
    mask, weights = check_cells("moments", mask, weights, x)
    pool = resolve("moments", axis_name, axis_index_groups)
    if domain is None and domains is None:
        return with_one_count(over_devices(x, where, mask, None, weights, pool), mask, weights)
    if domain is None or domains is None:
        given, other = ("domain", "domains=2") if domains is None else ("domains", "domain=0")
        raise ValueError(
            f"moments: {given}= alone, expected the domain of x, or of each row, and the number of "
            f"domains; write {other} too."
        )
    domains = axes_.check_number("moments", "domains", domains)
    index = check_index("moments", "domain", domain, domains, x, where)
    if not isinstance(index, int) and index.ndim:
        rows = Domains(rows_of(where), index, domains)
        return over_devices(x, where, mask, None, weights, pool, rows)
    m = with_one_count(over_devices(x, where, mask, None, weights, pool), mask, weights)
    m = m._replace(count=devices_.spread(m.count, m.mean))
    return Moments(*(alone(leaf, index, domains) for leaf in m))


def over_devices(
    x: jax.Array,
    axes: Axes,
    mask: jax.Array | None,
    near: jax.Array | None,
    weights: jax.Array | None,
    pool: Pool | None,
    domains: Domains | None = None,
) -> Moments:
    """The moments of x on all devices of the pool; near and mask as in `moments_of`.

    With domains, each has its own: mean and var are [domains, C], and so is count.
    """
    if domains is not None:
        return of_domains(x, domains, mask, weights, pool)
    if weights is None:
        return across(moments_of(x, axes, mask, near), pool)
    assert mask is not None  # the cells whose weight is not 0
    return under_weights(x, axes, mask, weights, pool)


def under_weights(
    x: jax.Array, axes: Axes, mask: jax.Array, weights: jax.Array, pool: Pool | None
) -> Moments:
    """Equals the moments of x under weights, over all devices; mask says where these are not 0.

    Differentiable in the weights too, by sums about the pooled mean. `across` would not do: of a
    device whose weights are all 0 it has no mean, and so no derivative.
    """
    w = weights.astype(jnp.finfo(wide(x.dtype)).dtype)
    count = devices_.total(_count(w, x, axes, w.dtype), pool)
    return _about_the_mean(x, axes, mask, w, count, pool)


def of_domains(
    x: jax.Array,
    domains: Domains,
    mask: jax.Array | None,
    weights: jax.Array | None,
    pool: Pool | None,
) -> Moments:
    """Equals the moments of the rows of each domain, over all devices: [domains, C]."""
    one = jnp.ones((1,) * x.ndim, bool)
    mask = one if mask is None else mask
    w = (mask if weights is None else weights).astype(jnp.finfo(wide(x.dtype)).dtype)
    rows = domains.rows.axes
    shape = tuple(x.shape[a] for a in rows.features)
    count = jnp.broadcast_to(_count(w, x, rows, w.dtype), shape)
    count = devices_.total(domains.added(devices_.sharded_as(count, x, rows.features)), pool)
    return _about_the_mean(x, domains, mask, w, count, pool)


def _about_the_mean(
    x: jax.Array,
    axes: Axes | Domains,
    mask: jax.Array,
    w: jax.Array,
    count: jax.Array,
    pool: Pool | None,
) -> Moments:
    """The moments of x under weights w, by sums about the mean of all devices."""
    kind = wide(x.dtype)
    n = divisor(count)
    w = jnp.broadcast_to(w, x.shape)
    # Behind a weight of 0, NaN is not there. Anything else is: more weight would let it in.
    x = jnp.where(mask | jnp.isfinite(x), x.astype(kind), 0)

    def mean_of(v: jax.Array) -> jax.Array:
        total = devices_.total(axes.total(w.astype(v.dtype) * v), pool)
        return total / n.astype(v.dtype)

    pivot = lax.stop_gradient(mean_of(x))
    d = x - axes.expand(pivot)
    shift = mean_of(d)
    var = mean_of(real_product(d, d)) - real_product(shift, shift)
    return Moments(count, pivot + shift, not_negative(var))


# A jit, so that equal layers are traced once.
@functools.partial(jax.jit, static_argnames="axes", inline=True)
def moments_of(
    x: jax.Array, axes: Axes, mask: jax.Array | None = None, near: jax.Array | None = None
) -> Moments:
    """Equals the moments of x over `axes.reduced`, in float32 or wider.

    The sums are of `x - pivot`, so nothing cancels however large the mean is. For a constant
    channel they are exact: mean is the constant, and var is 0. A TPU sums x itself where that is
    as exact; a TPU sums a bfloat16 x about `near` [C], or about 0 without it.
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
    if device == "gpu" and mask is None and has_known_sizes(x) and x.size:
        way = _by_grid
    if device == "tpu":
        way = functools.partial(_about_near, near) if x.dtype == jnp.bfloat16 else _at_once
    mean, var = way(device, axes, x, mask, n)
    return mean, jnp.maximum(var, 0)  # rounding may leave a constant channel's var below 0


mean_and_var = Operation("moments", _mean_and_var)


@mean_and_var.differentiated
def _(tx: jax.Array, operands: Any, moments: Any, *, axes: Axes) -> tuple[jax.Array, jax.Array]:
    """The tangents of mean and var. They are right also where var was rounded to 0."""
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
    """Mean and variance by sums about a pivot, which a first pass reads from x."""
    return _about(device, _pivot(device, x, axes, mask, n), axes, x, mask, n)


def _by_grid(
    device: str, axes: Axes, x: jax.Array, mask: jax.Array | None, n: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mean and variance by sums about the mean of K positions on a grid, for GPUs.

    With Σ the sum over the grid, the sums are of K x - Σ, which is K (x - pivot). K is a power of
    two where the batch is one: then K x is exact, and no kernel divides. Whatever the values are,
    (pivot - mean)² is at most SPARSE times the variance. On a sharded batch, each device holds
    its own part of the grid.
    """
    kind = wide(x.dtype)
    grid = _grid(x, axes).astype(kind)
    total, k = grid.sum(axes.reduced), axes.count(grid)
    if k & (k - 1):
        total, k = total / k, 1
    mean, var = _about(device, total, axes, x.astype(kind) * k, mask, n)
    return mean / k, var / float(k) ** 2  # the square of an integer may exceed 32 bits


def _grid(x: jax.Array, axes: Axes) -> jax.Array:
    """At least one position in SPARSE, evenly over each image; over the batch where x is rows."""
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
    """Mean and variance by sums about 0; about a pivot where some channel's mean is far from 0.

    For TPUs: the convolution that makes x also makes sums about 0, without reading x again. Such
    sums lose a factor of 1 + mean² / var to cancellation, at most 1 + NEAR here. A constant channel
    other than 0 takes the pivot, and so does a channel that is not finite.

    XLA keeps the operands of a conditional in the TPU's main memory. The conditional therefore gets
    a copy of a small x, so that x itself may stay in fast memory for whatever else reads x.
    """
    zero = jnp.zeros([x.shape[a] for a in axes.features], wide(x.dtype))
    mean, var = _about(device, zero, axes, x, mask, n)
    near = jnp.all(real_product(mean, mean) <= NEAR * var)
    by_pivot = functools.partial(_by_pivot, device, axes)
    if has_known_sizes(x) and x.nbytes <= FAST:
        x = apart(x)
    return lax.cond(near, lambda *_: (mean, var), by_pivot, x, mask, n)


def _about_near(
    near: jax.Array | None,
    device: str,
    axes: Axes,
    x: jax.Array,
    mask: jax.Array | None,
    n: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Mean and variance by sums about `near`, or about 0 without it.

    For a bfloat16 x on TPUs: the convolution that makes x makes these sums too. About 0, var loses
    a factor of 1 + mean² / var of float32's precision. Rounding x to bfloat16 has lost more than
    that before: a quarter of a unit in x's last place, squared. About the running mean, nothing is
    lost once the running mean is near.
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


def divisor(count: jax.Array) -> jax.Array:
    """Equals count, or 1 where count is 0, behind a barrier.

    If XLA saw a constant n, it would multiply by 1 / n. A constant channel's var would then not
    quite be 0, and XLA would move the product into the loops over x. A division stays [C].
    """
    return lax.optimization_barrier(jnp.where(count > 0, count, 1))


def _pivot(
    device: str, x: jax.Array, axes: Axes, mask: jax.Array | None, n: jax.Array
) -> jax.Array:
    """A value near each channel's mean [C]: the mean of every STRIDE-th position.

    The positions lie along the axis after the batch. For k of n values, (pivot - mean)² is at most
    n/k times the variance, whatever the values are. So the shifted sums lose at most a factor
    1 + n/k of float32's precision, and no outlier breaks the pivot, as an outlier would break a
    pivot of one row. The sample is sliced from x in x's own dtype; a TPU would otherwise write a
    float32 copy of x first. A masked x is not sampled, since the sample might miss the valid cells:
    the pivot is then the mean itself, which costs one more read of x.
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
    """The axis that the pivot's sample is taken along, and the stride on it.

    The axis is the batch only where there is no other reduced axis. The stride then divides the
    batch, which may be sharded: each device holds its own part of the sample where its rows are a
    multiple of the stride. Where shardings are types, the stride leaves all devices equally many
    positions.
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
    """Valid cells per channel: [] where the mask is the same for all features, else [C]."""
    repeats = 1  # cells of x that one cell of the mask covers
    for a in axes.reduced:
        repeats *= x.shape[a] if mask.shape[a] == 1 else 1
    # In the pivot's dtype, so that a sharded mask shares the pivot's all-reduce.
    count = mask.astype(dtype).sum(axes.reduced) * repeats
    if all(mask.shape[a] == 1 for a in axes.features):
        return count.reshape(())
    count = jnp.broadcast_to(count, tuple(x.shape[a] for a in axes.features))
    return devices_.sharded_as(count, x, axes.features)
