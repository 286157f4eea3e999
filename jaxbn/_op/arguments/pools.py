"""Which values share their statistics: over devices, in ghost batches, and how many at least."""

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from jaxbn._op.axes import Axes, is_integer
from jaxbn._op.devices import Pool, split_over, varying_axes


class OneValueError(ValueError):
    """Training statistics over one value per channel; its words are for whoever goes on."""

    what: str
    remedy: str


def resolve(
    call: str,
    axis_name: str | Sequence[str] | None,
    axis_index_groups: Sequence[Sequence[int]] | None,
    without: str = "write axis_name=None",
) -> Pool | None:
    """The pool that these two keywords ask for; None for this device alone.

    `without` is what to do where statistics are global.

    Raises:
      ValueError: the axis is not bound, or the groups are no partition of it into equal parts.
      NotImplementedError: JAX has no collectives over the axis.
    """
    if axis_name is None:
        if axis_index_groups is not None:
            raise ValueError(
                f"{call}: axis_index_groups={axis_index_groups!r} without axis_name; groups are "
                f"indices along a mapped axis, write axis_name= too, or virtual_batch_size= "
                f"for groups of rows under jit."
            )
        return None
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    of_names = isinstance(names, Sequence) and all(isinstance(name, str) for name in names)
    if not of_names or len({*names}) != len(names):
        raise (ValueError if of_names else TypeError)(
            f"{call}: axis_name={axis_name!r}, expected the name of a mapped axis, or several, "
            f"each once; write axis_name='batch'."
        )
    names = tuple(names)
    mesh = jax.sharding.get_abstract_mesh()
    try:
        size = lax.axis_size(names)
    except NameError:
        remedy = (
            f"Call it under shard_map, pmap or vmap with that axis name; under plain jit "
            f"statistics are global already, {without}."
        )
        apart = {*mesh.axis_names} - {*mesh.manual_axes}
        if mesh.manual_axes and (whole := [name for name in names if name in apart]):
            rest: Any = [name for name in names if name not in apart]
            rest = rest[0] if len(rest) == 1 else tuple(rest)
            remedy = (
                f"This shard_map does not map axis {whole[0]!r} of the mesh, over which statistics "
                f"are global already, {f'write axis_name={rest!r}' if rest else without}."
            )
        raise ValueError(
            f"{call}: axis_name={axis_name!r} is not bound here; bound axes: {_bound()}. {remedy}"
        ) from None
    of_devices = tuple(name for name in names if name in mesh.manual_axes)
    mapped = tuple(name for name in names if name not in mesh.manual_axes)
    # Where types are checked, the index along an axis of devices has a type that differs over it.
    if mapped and mesh.manual_axes and varying_axes(lax.axis_index(mesh.manual_axes[0])):
        raise NotImplementedError(
            f"{call}: axis_name={axis_name!r}, but JAX has no collectives over axis {mapped[0]!r} "
            f"of a vmap where a shard_map checks types; write check_vma=False in the shard_map."
        )
    if axis_index_groups is None:
        return Pool(of_devices, mapped, None, size)
    try:
        groups = tuple(tuple(group) for group in axis_index_groups)
    except TypeError:
        groups = ()
    members = [i for group in groups for i in group]
    integers = all(map(is_integer, members))
    if not integers or sorted(members) != [*range(size)] or len({*map(len, groups)}) != 1:
        raise ValueError(
            f"{call}: axis_index_groups={axis_index_groups!r} must name each index of axis "
            f"{axis_name!r} with size {size} once, in groups of one size; for pairs write "
            f"{[[i, i + 1] for i in range(0, size - size % 2, 2)]}."
        )
    if not isinstance(axis_name, str):
        raise ValueError(
            f"{call}: axis_index_groups with axis_name={axis_name!r}: groups index one axis; "
            f"write one name, or pool over one axis of a mesh that has more."
        )
    return Pool(of_devices, mapped, groups, len(groups[0]))


def _bound() -> list[str]:
    """Names of the mapped axes in scope."""
    from jax._src import core  # JAX has no public list of bound axes; only an error reads it

    names = map(str, core.get_axis_env().axis_sizes)
    return [name for name in names if not name.startswith("_internal")]  # of a pmap without one


def check_ghosts(call: str, x: jax.Array, axes: Axes, virtual_batch_size: int) -> tuple[int, int]:
    """The axis of x that ghost batches divide and their number, or an error with fitting sizes."""
    if not axes.reduced:
        raise ValueError(
            f"{call}: virtual_batch_size={virtual_batch_size} but x with shape {x.shape} has no "
            f"batch axis beside its feature axes {axes.features}; leave virtual_batch_size out."
        )
    batch_axis = axes.reduced[0]
    rows = x.shape[batch_axis]
    if not is_integer(virtual_batch_size):
        raise TypeError(
            f"{call}: virtual_batch_size={virtual_batch_size!r}, expected how many rows a group "
            f"has, an integer that divides the {rows} on axis {batch_axis} of x; write "
            f"virtual_batch_size={rows}."
        )
    if virtual_batch_size < 1 or rows % virtual_batch_size != 0:
        remedy = f"export x with {virtual_batch_size}*{rows} rows"  # where their number is a name
        if is_integer(rows):
            remedy = f"write one of {[d for d in range(1, rows + 1) if rows % d == 0]}"
        raise ValueError(
            f"{call}: virtual_batch_size={virtual_batch_size} does not divide the {rows} rows on "
            f"axis {batch_axis} of x with shape {x.shape}; {remedy}."
        )
    if (shards := split_over(x, batch_axis)) > 1 and (rows // shards) % virtual_batch_size != 0:
        within = rows // shards
        raise ValueError(
            f"{call}: virtual_batch_size={virtual_batch_size}, but the type of x has axis "
            f"{batch_axis} of its shape {x.shape} on {shards} devices, {within} rows on each; "
            f"expected groups of rows on one device; write one of "
            f"{[d for d in range(1, within + 1) if within % d == 0]}."
        )
    return batch_axis, rows // virtual_batch_size


def check_count(call: str, x: jax.Array, count: int, virtual_batch_size: int | None) -> None:
    """Refuse training statistics over exactly one value per channel: y would be bias alone."""
    if count == 1 and x.size:
        where, remedy = "over all devices", "Use a larger batch, pool devices with axis_name="
        if virtual_batch_size is not None:
            where = f"in each group of virtual_batch_size={virtual_batch_size}"
            remedy = "Use a larger virtual_batch_size"
        what = f"x with shape {x.shape} has one value per channel {where}"
        error = OneValueError(
            f"{call}: {what}, and its variance is 0, so y would be bias whatever x is; expected at "
            f"least 2 in training. {remedy}, or normalize by the running statistics with "
            f"train=False."
        )
        error.what, error.remedy = what, remedy
        raise error
