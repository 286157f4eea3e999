"""What crosses devices: sums and gathers over mapped axes, in every transform that has them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Pool(NamedTuple):
    """The devices whose statistics are one."""

    axis_name: str | tuple[str, ...]
    groups: tuple[tuple[int, ...], ...] | None
    devices: int  # that pool together
    native: bool  # whether the transform at hand has collectives over groups; vmap has none


def resolve(
    call: str,
    axis_name: str | Sequence[str] | None,
    axis_index_groups: Sequence[Sequence[int]] | None,
) -> Pool | None:
    """The pool that these two keywords ask for; None for this device alone.

    Raises:
      ValueError: the axis is not bound, or the groups are no partition of it into equal parts.
    """
    if axis_name is None:
        if axis_index_groups is not None:
            raise ValueError(
                f"{call}: axis_index_groups={axis_index_groups!r} without axis_name; groups are "
                f"indices along a mapped axis, write axis_name= too, or virtual_batch_size= "
                f"for groups of rows under jit."
            )
        return None
    name = axis_name if isinstance(axis_name, str) else tuple(axis_name)
    try:
        size = lax.axis_size(name)
    except NameError:
        raise ValueError(
            f"{call}: axis_name={axis_name!r} is not bound here; bound axes: {_bound()}. Call it "
            f"under shard_map, pmap or vmap with that axis name; under plain jit statistics are "
            f"global already, write axis_name=None."
        ) from None
    if axis_index_groups is None:
        return Pool(name, None, size, native=True)
    groups = tuple(tuple(int(i) for i in group) for group in axis_index_groups)
    members = sorted(i for group in groups for i in group)
    if members != list(range(size)) or len({len(group) for group in groups}) != 1:
        raise ValueError(
            f"{call}: axis_index_groups={axis_index_groups!r} must name each index of axis "
            f"{axis_name!r} with size {size} once, in groups of one size; for pairs write "
            f"{[[i, i + 1] for i in range(0, size - size % 2, 2)]}."
        )
    if not isinstance(name, str):
        raise ValueError(
            f"{call}: axis_index_groups with axis_name={axis_name!r}: groups index one axis; "
            f"write one name, or pool over one axis of a mesh that has more."
        )
    try:
        lax.all_gather(lax.axis_index(name), name, axis_index_groups=groups)
    except NotImplementedError:
        return Pool(name, groups, len(groups[0]), native=False)
    return Pool(name, groups, len(groups[0]), native=True)


def _bound() -> list[str]:
    """Names of the mapped axes in scope."""
    from jax._src import core  # JAX has no public list of bound axes; only an error reads it

    return [str(name) for name in core.get_axis_env().axis_sizes]


def total(v: jax.Array, pool: Pool) -> jax.Array:
    """Sum of v over the pool. Linear: JAX transposes it."""
    return lax.psum(v, pool.axis_name) if pool.groups is None else gather(v, pool).sum(0)


def gather(v: jax.Array, pool: Pool) -> jax.Array:
    """The v of each device in the pool, stacked: [devices, *v.shape].

    Without groups it is a psum into one slot a device and not an all_gather, because what
    comes out must be typed as equal on all devices (`out_specs=P()` under `check_vma`).
    """
    if pool.groups is not None and pool.native:
        return lax.all_gather(v, pool.axis_name, axis_index_groups=pool.groups)
    index = lax.axis_index(pool.axis_name)
    slots = jnp.zeros((lax.axis_size(pool.axis_name), *v.shape), v.dtype)
    slots = lax.psum(lax.dynamic_update_index_in_dim(slots, v, index, 0), pool.axis_name)
    if pool.groups is None:
        return slots
    group_of = sorted((i, group) for group in pool.groups for i in group)
    return slots[jnp.asarray([group for _, group in group_of])[index]]


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


def one_row_a_device(leaf: jax.Array) -> bool:
    """Whether leaf is [devices, ...] with a row on each."""
    rows = leaf.sharding.shard_shape(leaf.shape)[0] if leaf.ndim > 1 else 0
    devices = len(leaf.sharding.device_set)
    return devices > 1 and rows == 1 and leaf.shape[0] == devices
