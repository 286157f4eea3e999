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
    """The devices that share their statistics."""

    axis_name: tuple[str, ...]  # axes of shard_map and pmap: each device has one part
    mapped: tuple[str, ...]  # axes of vmap: all parts are in one array
    groups: Groups
    devices: int  # in one pool; each part of a vmap counts as one


def total(v: jax.Array, pool: Pool | None) -> jax.Array:
    """Sum of v over the pool. Linear: JAX transposes it."""
    if pool is None:
        return v
    for name in pool.mapped:
        v = parts(v, name, pool.groups).sum(0)
    if not pool.axis_name:
        return v
    if pool.groups is not None:
        return gather(v, pool).sum(0)
    if varying_axes(v):  # JAX sums over all of the axes that v's type differs over, or over others
        v = varying_too(v, pool.axis_name)
    return lax.psum(v, pool.axis_name)


def totals(vs: Sequence[jax.Array], pool: Pool) -> Sequence[jax.Array]:
    """The sums of arrays of one shape over the pool, in one collective."""
    # Without a collective nothing is stacked: JAX would mistake which axis is sharded.
    return list(total(jnp.stack(vs), pool)) if pool.axis_name else [total(v, pool) for v in vs]


def parts(v: jax.Array, name: str, groups: Groups) -> jax.Array:
    """The v of each part of a vmap: [parts, *v.shape]; 0 for parts of other groups."""
    # Gathered on the last axis, since JAX's type of the result has v's sharding on the first axes.
    each = jnp.moveaxis(lax.all_gather(v, name, axis=v.ndim), -1, 0)
    if groups is None:
        return each
    mine = jnp.zeros(len(each), bool)
    for group in groups:  # not by indexing: JAX cannot index by a position on a mesh
        here = np.isin(np.arange(len(each)), group)
        mine |= jnp.asarray(here) & jnp.any(jnp.asarray(group) == lax.axis_index(name))
    return jnp.where(spread(jnp.expand_dims(mine, range(1, each.ndim)), each), each, 0)


def gather(v: jax.Array, pool: Pool) -> jax.Array:
    """The v of each device in the pool: [devices, *v.shape].

    Without groups this is a psum into one slot a device, not an all_gather: the type of the result
    must be equal on all devices (`out_specs=P()` under `check_vma`). A product fills the slots,
    since a product takes the sharding of v. So a value that is not finite on one device fills all
    slots; the pooled value would not be finite either way.
    """
    if pool.groups is None:
        index, size = lax.axis_index(pool.axis_name), lax.axis_size(pool.axis_name)
        mine = (jnp.arange(size) == index).astype(v.dtype)
        return lax.psum(jnp.expand_dims(mine, range(1, 1 + v.ndim)) * v[None], pool.axis_name)
    return lax.all_gather(v, pool.axis_name, axis_index_groups=pool.groups)


def varying_axes(v: jax.Array) -> frozenset[str]:
    """Mapped axes over which v's type says that v differs; none with `check_vma` off."""
    aval = jax.typeof(v)
    kind = getattr(aval, "manual_axis_type", None)  # jax 0.10 and up, for what was aval.vma
    return frozenset(getattr(aval, "vma", ()) if kind is None else kind.varying)


def alike(*vs: Any) -> tuple[Any, ...]:
    """The same values, each typed as different over all mapped axes that any of them differs over.

    For operands of one operation. Where the type of a value changes from equal to different, the
    backward pass sums the value's cotangent over devices. Two values that are stacked first share
    one collective.
    """
    axes = frozenset[str]().union(*(varying_axes(v) for v in vs if v is not None))

    return tuple(v if v is None else varying_too(v, axes) for v in vs)


def varying_too(v: jax.Array, axes: Iterable[str]) -> jax.Array:
    """Equals v, typed as different over these mapped axes too."""
    more = tuple(axis for axis in axes if axis not in varying_axes(v))
    return lax.pcast(v, more, to="varying") if more else v


def typed(v: jax.Array) -> bool:
    """Whether shardings are types on v's mesh, at least on some of its axes."""
    return AxisType.Explicit in jax.typeof(v).sharding.mesh.axis_types


def sharded_as(v: jax.Array, like: jax.Array, axes: Iterable[int | None]) -> jax.Array:
    """Equals v, with each axis sharded by type as the given axis of `like`; v on Auto meshes.

    None leaves an axis whole, and so does size 1, which broadcasts. Arrays must be sharded alike to
    be concatenated, and to stand in one select; a sum or a product takes the sharding of either
    term. An array on no mesh fits any mesh, and only a trace can move the array to one, or a mesh
    that is set: a part of the array would be on that mesh.
    """
    is_set = not jax.sharding.get_abstract_mesh().empty
    if not typed(like) or not (is_set or typed(v) or isinstance(v, jax.core.Tracer)):
        return v
    sharding = jax.typeof(like).sharding
    pairs = zip(v.shape, axes, strict=True)
    spec = P(*(None if a is None or size == 1 else sharding.spec[a] for size, a in pairs))
    return jax.sharding.reshard(v, sharding.update(spec=spec))


def by_features(v: jax.Array, like: jax.Array, features: Sequence[int]) -> jax.Array:
    """Equals v [C], or a table of such rows, sharded by type as these axes of `like` are."""
    return sharded_as(v, like, (*[None] * (v.ndim - len(features)), *features))


def spread(v: jax.Array, like: jax.Array) -> jax.Array:
    """Equals v broadcast to the shape of `like`, and sharded by type as `like` is."""
    return sharded_as(jnp.broadcast_to(v, like.shape), like, range(like.ndim))


def repeated(v: jax.Array, like: jax.Array) -> jax.Array:
    """Equals v for each part of `like`, on a new first axis that is sharded by type as its is."""
    each = jnp.broadcast_to(v[None], (len(like), *v.shape))
    if not typed(like):
        return each
    sharding = jax.typeof(like).sharding
    spec = P(sharding.spec[0], *jax.typeof(each).sharding.spec[1:])
    return jax.sharding.reshard(each, sharding.update(spec=spec))


def split_over(v: jax.Array, axis: int) -> int:
    """The number of devices that v's type splits this axis over; 1 where shardings are no types."""
    sharding = jax.typeof(v).sharding
    names = sharding.spec[axis]
    names = names if isinstance(names, tuple) else (names,)
    return math.prod(sharding.mesh.shape[name] for name in names if name is not None)


def one_row_a_device(leaf: jax.Array) -> bool:
    """Whether leaf is [devices, ...] with one row on each device."""
    rows = leaf.sharding.shard_shape(leaf.shape)[0] if leaf.ndim > 1 else 0
    devices = len(leaf.sharding.device_set)
    return devices > 1 and rows == 1 and leaf.shape[0] == devices
