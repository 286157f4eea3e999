"""Several sets of moments as one: of two sets, of many, of all devices."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._op import devices as devices_
from jaxbn._op.devices import Pool
from jaxbn._op.state import Moments
from jaxbn._op.sums import real_product

# Up to this many devices their moments travel in one collective, 2C + 1 numbers a device, and
# are merged locally; beyond, two collectives of O(C) cost less than one that grows with them.
GATHERED = 16


def merge(a: Moments, b: Moments) -> Moments:
    """Equals the moments of the two sets put together (Chan, Golub, LeVeque 1979).

    Exact and associative up to rounding; count 0 is neutral, bit for bit.

    Raises:
      TypeError: a or b is no `Moments`. A `State` is none: its count is of updates, not of values.
      ValueError: they are of other features.

    >>> import jax.numpy as jnp, jaxbn
    >>> a, b = jaxbn.moments(jnp.array([[1.0], [3.0]])), jaxbn.moments(jnp.array([[5.0]]))
    >>> m = jaxbn.merge(a, b)
    >>> float(m.count), float(m.mean[0]), round(float(m.var[0]), 4)
    (3.0, 3.0, 2.6667)
    """
    for name, m in (("a", a), ("b", b)):
        if not isinstance(m, Moments):
            was = "None" if m is None else type(m).__name__
            raise TypeError(
                f"merge: {name} is {was}, expected jaxbn.Moments(count, mean, var); start from "
                f"jaxbn.moments(x) of the first batch."
            )
    shapes = [jnp.shape(m.mean) for m in (a, b)]
    if () not in shapes and shapes[0] != shapes[1]:
        raise ValueError(
            f"merge: a.mean has shape {shapes[0]} but b.mean has shape {shapes[1]}; expected "
            f"moments of the same features; merge those of one layer, and write the same axis= in "
            f"jaxbn.moments."
        )
    count = a.count + b.count
    # 0 where b is empty, 1 where a is: then nothing below is rounded.
    share = b.count / jnp.where(count > 0, count, 1)
    delta = b.mean - a.mean
    mean = a.mean + delta * share.astype(delta.dtype)
    var = a.var + (b.var - a.var) * share + real_product(delta, delta) * (share * (1 - share))
    return Moments(count, mean, var)


def across(m: Moments, pool: Pool | None) -> Moments:
    """The moments of all devices in the pool as one set, each weighted by its count.

    One collective for up to 16 devices, else two. One sum of O(C) numbers cannot do it:
    without a pivot that all devices share, E[x²] - E[x]² cancels, and on the first step there
    is none to share.
    """
    if pool is None:
        return m
    for name in pool.mapped:
        m = merge_all(Moments(*(devices_.parts(leaf, name, pool.groups) for leaf in m)))
    if not pool.axis_name:
        return m
    if pool.devices <= GATHERED:
        return merge_all(_packed(m, lambda v: devices_.gather(v, pool)))
    return _pooled(m, lambda v: _packed(v, lambda flat: devices_.total(flat, pool)))


def with_one_count(m: Moments, *cells: jax.Array | None) -> Moments:
    """The moments, with a count that has the type of the cells that are counted.

    Where mapped axes split the features, each device has mean and var of its own features. The
    count travels with them and takes their type, though all have the same count of whole cells.
    """
    own = frozenset[str]().union(*(devices_.varying_axes(v) for v in cells if v is not None))
    if more := devices_.varying_axes(m.count) - own:
        m = m._replace(count=lax.pmax(lax.stop_gradient(m.count), tuple(more)))
    return m


def _packed(m: Moments, send: Callable[[jax.Array], jax.Array]) -> Moments:
    """What `send` makes of the leaves of m, all 2C + 1 (or 3C) numbers in one array.

    It may put axes before theirs. Features that are sharded by type lie abreast, each device with
    its own, and a count of all goes by itself.
    """
    kind = m.mean.dtype
    if any(jax.typeof(m.mean).sharding.spec):
        rows = send(jnp.stack([leaf.astype(kind) for leaf in m if leaf.ndim], -1))
        count = rows[..., 0].real if m.count.ndim else send(m.count)
        return Moments(count, rows[..., -2], rows[..., -1].real)
    flat = send(jnp.concatenate([leaf.reshape(-1).astype(kind) for leaf in m]))
    count, mean, var = (
        part.reshape(*flat.shape[:-1], *leaf.shape)
        for part, leaf in zip(
            jnp.split(flat, [m.count.size, m.count.size + m.mean.size], axis=-1),
            m,
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
        sums.count, pivot + shift, not_negative(sums.var / n - real_product(shift, shift))
    )


def _align(v: jax.Array, like: jax.Array) -> jax.Array:
    """Equals v with ones appended up to the rank of `like`: a scalar count beside a mean [C]."""
    return v.reshape(v.shape + (1,) * (like.ndim - v.ndim))


def not_negative(var: jax.Array) -> jax.Array:
    """Equals max(var, 0), for a constant channel that rounding left a hair below.

    The derivative is that of var even there: `maximum` would halve a constant channel's
    second derivative, and `where` take it away, as rounding has it.
    """
    return var - lax.stop_gradient(jnp.minimum(var, 0))
