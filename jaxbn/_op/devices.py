"""What crosses devices: sums and gathers over mapped axes, in every transform that has them."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

Groups = tuple[tuple[int, ...], ...] | None


class Pool(NamedTuple):
    """The devices whose statistics are one."""

    axis_name: tuple[str, ...]  # axes of shard_map and pmap, along which each device has its part
    mapped: tuple[str, ...]  # axes of vmap, whose parts are all at hand
    groups: Groups
    devices: int  # that pool together, parts of a vmap among them


def total(v: jax.Array, pool: Pool | None) -> jax.Array:
    """Sum of v over the pool. Linear: JAX transposes it."""
    if pool is None:
        return v
    for name in pool.mapped:
        v = parts(v, name, pool.groups).sum(0)
    if not pool.axis_name:
        return v
    return lax.psum(v, pool.axis_name) if pool.groups is None else gather(v, pool).sum(0)


def totals(vs: Sequence[jax.Array], pool: Pool) -> Sequence[jax.Array]:
    """The sums of arrays of one shape over the pool, in one collective."""
    # Where there is none, one stacked array would have JAX mistake which axis is sharded.
    return list(total(jnp.stack(vs), pool)) if pool.axis_name else [total(v, pool) for v in vs]


def parts(v: jax.Array, name: str, groups: Groups) -> jax.Array:
    """The v of each part of a vmap, or of its group: [parts, *v.shape]; v of others is 0."""
    each = lax.all_gather(v, name)
    if groups is None:
        return each
    index = lax.axis_index(name)
    group_of = np.zeros((len(each), len(each)), bool)
    for group in groups:
        group_of[np.ix_(group, group)] = True
    mine = jnp.asarray(group_of)[index]
    return jnp.where(jnp.expand_dims(mine, range(1, each.ndim)), each, 0)


def gather(v: jax.Array, pool: Pool) -> jax.Array:
    """The v of each device in the pool: [devices, *v.shape].

    Without groups it is a psum into one slot a device and not an all_gather, because what
    comes out must be typed as equal on all devices (`out_specs=P()` under `check_vma`). The slots
    are a product, which takes the sharding of v: what is not finite on one device is so in the
    slots of all, and makes the pooled value so in any case.
    """
    if pool.groups is None:
        index, size = lax.axis_index(pool.axis_name), lax.axis_size(pool.axis_name)
        mine = (jnp.arange(size) == index).astype(v.dtype)
        return lax.psum(jnp.expand_dims(mine, range(1, 1 + v.ndim)) * v[None], pool.axis_name)
    return lax.all_gather(v, pool.axis_name, axis_index_groups=pool.groups)


def varying_axes(v: jax.Array) -> frozenset[str]:
    """Mapped axes over which v differs by type; none where nothing is typed (`check_vma` off)."""
    aval = jax.typeof(v)
    kind = getattr(aval, "manual_axis_type", None)  # jax 0.10 and up, for what was aval.vma
    return frozenset(getattr(aval, "vma", ()) if kind is None else kind.varying)


def alike(*vs: Any) -> tuple[Any, ...]:
    """The same values, all typed as different over the mapped axes that any of them differs over.

    For operands of one operation. Where a value equal on all devices is made different, the
    backward pass sums its cotangent over them; two values that are stacked, in one collective.
    """
    axes = frozenset[str]().union(*(varying_axes(v) for v in vs if v is not None))

    def widened(v: jax.Array) -> jax.Array:
        more = tuple(axes - varying_axes(v))
        return lax.pcast(v, more, to="varying") if more else v

    return tuple(v if v is None else widened(v) for v in vs)


def typed(v: jax.Array) -> bool:
    """Whether shardings are types on the mesh of v, on some axes of it at least."""
    return AxisType.Explicit in jax.typeof(v).sharding.mesh.axis_types


def sharded_as(v: jax.Array, like: jax.Array, axes: Iterable[int | None]) -> jax.Array:
    """v, its axes sharded by type as these of `like`, None: as no axis is; v on Auto meshes.

    An axis of size 1 is as no axis is: it broadcasts. What stands in one row must be sharded alike,
    and in one select of equal shapes; a sum or a product takes the sharding of either term. An
    array on no mesh fits any, and only a trace can move it there.
    """
    if not typed(like) or not (typed(v) or isinstance(v, jax.core.Tracer)):
        return v
    sharding = jax.typeof(like).sharding
    pairs = zip(v.shape, axes, strict=True)
    spec = P(*(None if a is None or size == 1 else sharding.spec[a] for size, a in pairs))
    return jax.sharding.reshard(v, sharding.update(spec=spec))


def spread(v: jax.Array, like: jax.Array) -> jax.Array:
    """Equals v broadcast to the shape of `like`, and sharded by type as `like` is."""
    return sharded_as(jnp.broadcast_to(v, like.shape), like, range(like.ndim))


def split_over(v: jax.Array, axis: int) -> int:
    """Devices over which the type of v splits this axis; 1 where shardings are no types."""
    sharding = jax.typeof(v).sharding
    names = sharding.spec[axis]
    names = names if isinstance(names, tuple) else (names,)
    return math.prod(sharding.mesh.shape[name] for name in names if name is not None)


def one_row_a_device(leaf: jax.Array) -> bool:
    """Whether leaf is [devices, ...] with a row on each."""
    rows = leaf.sharding.shard_shape(leaf.shape)[0] if leaf.ndim > 1 else 0
    devices = len(leaf.sharding.device_set)
    return devices > 1 and rows == 1 and leaf.shape[0] == devices
