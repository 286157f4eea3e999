"""Everything that can be wrong with a call, refused before any work.

Every check here reads shapes, dtypes and Python numbers only, so a bad call is refused
before any work, under `jit` as in eager code.
"""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxbn._op.axes import Axes, is_integer
from jaxbn._op.devices import Pool, sharded_as


class OneValueError(ValueError):
    """Training statistics over one value per channel; its words are for whoever goes on."""

    what: str
    remedy: str


def array(call: str, what: str, v: Any) -> jax.Array:
    """V as a JAX array, or an error for what no batch norm can be taken of."""
    library = type(v).__module__.partition(".")[0]
    if library in ("torch", "tensorflow"):
        raise TypeError(
            f"{call}: {what} is a tensor of {library}, expected an array of JAX or NumPy; write "
            f"jnp.asarray({what}.numpy())."
        )
    if type(v).__name__ == "JetTracer":
        raise NotImplementedError(
            f"{call}: {what} is traced by jax.experimental.jet, which has no rule for lax.cond, "
            f"jax.checkpoint and jax.custom_jvp; nest jax.jvp for higher orders, write "
            f"jax.jvp(lambda x: jax.jvp(f, (x,), (v,))[1], (x,), (v,))."
        )
    return jnp.asarray(v)


def check_features(call: str, params: Any, state: Any, x: jax.Array, axes: Axes) -> None:
    """Params, and mean and var of the state, must have exactly the shape of the feature axes."""
    expected = tuple(x.shape[a] for a in axes.features)
    groups = {
        "params": {f"params.{name}": getattr(params, name) for name in ("scale", "bias")},
        "state": {f"state.{name}": getattr(state, name, None) for name in ("mean", "var")},
    }
    shapes = {
        group: {what: np.shape(leaf) for what, leaf in leaves.items() if leaf is not None}
        for group, leaves in groups.items()
    }
    every = {**shapes["params"], **shapes["state"]}
    wrong = {what: shape for what, shape in every.items() if shape != expected}
    if not wrong:
        return
    what, shape = next(iter(wrong.items()))
    own, other = ("params", "state") if what in shapes["params"] else ("state", "params")
    features = expected[0] if len(expected) == 1 else expected
    like = ""
    # All of its own leaves are of another size, and none of those beside it.
    if shapes[other] and wrong.keys() == shapes[own].keys():
        like = f", as {other} {'has' if other == 'state' else 'have'}"
        fresh = "[0] for fresh ones" if own == "params" else "[1] for a fresh one"
        remedy = f"pass this layer's {own} and not another's, or jaxbn.init({features}){fresh}."
    elif len(expected) == 1 and {*every.values()} == {shape} & {(n,) for n in x.shape[1:]}:
        axis = x.shape.index(shape[0], 1)
        order = "channels first: " if axis == 1 else ""
        remedy = f"write axis={axis} ({order}x has {shape[0]} there), or jaxbn.init({features})."
    else:
        remedy = f"write jaxbn.init({features}), or pass the feature axis as axis=."
    raise ValueError(
        f"{call}: {what} has shape {shape}, but x with shape {x.shape} has features {expected} on "
        f"axes {axes.features}{like}; {remedy}"
    )


def check_mask(call: str, mask: Any, x: jax.Array) -> jax.Array:
    """`mask` as booleans with x's rank; broadcastable to x, or an error with the line to write.

    Where shardings are types, its axes are sharded as those of x are.
    """
    given, mask = mask, array(call, "mask", mask)
    if mask.dtype != bool:
        if seen := _other_than_0_and_1(given):
            raise ValueError(
                f"{call}: mask holds {seen[0]}, expected True and False, or 1 and 0: a cell takes "
                f"part in the statistics or it does not, and no weight is read; write mask > 0."
            )
        mask = mask != 0
    tail = x.shape[x.ndim - mask.ndim :] if mask.ndim <= x.ndim else None
    if tail is None or any(m not in (1, n) for m, n in zip(mask.shape, tail, strict=True)):
        remedy = "A mask broadcasts as in NumPy, from the last axis backwards."
        if mask.shape == x.shape[: mask.ndim]:
            nones = ", ".join(["None"] * (x.ndim - mask.ndim))
            remedy = f"A mask over the leading axes: mask[..., {nones}]."
        raise ValueError(
            f"{call}: mask has shape {mask.shape} but x has shape {x.shape}; expected a shape "
            f"that broadcasts to x. {remedy}"
        )
    mask = jnp.expand_dims(mask, tuple(range(x.ndim - mask.ndim)))
    return sharded_as(mask, x, [None if mask.shape[a] == 1 else a for a in range(x.ndim)])


def _other_than_0_and_1(mask: Any) -> list[Any]:
    """The first value of a mask that is neither, where its values can be seen from here."""
    if isinstance(mask, jax.core.Tracer) or not getattr(mask, "is_fully_addressable", True):
        return []
    values = np.asarray(mask)
    return values[(values != 0) & (values != 1)][:1].tolist()


def check_numbers(call: str, momentum: Any, epsilon: Any) -> tuple[Any, Any]:
    """Momentum in [0, 1] or None, and epsilon, finite and not negative: floats, or traced."""
    if momentum is not None and not _is_number(momentum, lambda v: 0 <= v <= 1):
        raise _wrong(momentum)(
            f"{call}: momentum={momentum!r}, expected a number in [0, 1], the fraction of the old "
            f"value that is kept (PyTorch's momentum m is 1 - m here), or None for the cumulative "
            f"average; write momentum=0.99."
        )
    if not _is_number(epsilon, lambda v: 0 <= v < math.inf):
        raise _wrong(epsilon)(
            f"{call}: epsilon={epsilon!r}, expected a finite number of at least 0, added to the "
            f"variance; write epsilon=1e-5."
        )
    return _settled(momentum), _settled(epsilon)


def _settled(v: Any) -> Any:
    return v if v is None or isinstance(v, jax.core.Tracer) else float(v)


def _is_number(v: Any, good: Callable[[float], bool]) -> bool:
    """Whether v is a number and good, or traced and may be."""
    return isinstance(v, jax.core.Tracer) or (_wrong(v) is ValueError and good(float(v)))


def _wrong(v: Any) -> type[Exception]:
    """What to raise for v where a number was expected: ValueError for another number."""
    is_number = isinstance(v, numbers.Real | np.generic | np.ndarray | jax.Array)
    return ValueError if is_number and np.shape(v) == () else TypeError


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
    if virtual_batch_size < 1 or rows % virtual_batch_size:
        sizes = [d for d in range(1, rows + 1) if rows % d == 0]
        raise ValueError(
            f"{call}: virtual_batch_size={virtual_batch_size} does not divide the {rows} rows on "
            f"axis {batch_axis} of x with shape {x.shape}; write one of {sizes}."
        )
    return batch_axis, rows // virtual_batch_size


def check_dtype(call: str, what: str, dtype: Any, otherwise: str) -> None:
    """The dtype asked for can hold what it is asked for, and JAX computes with it."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"{call}: dtype={dtype}, but {what} are floating or complex; write "
            f"dtype=jnp.float32, or {otherwise}."
        )
    if jnp.finfo(dtype).bits < 16:
        raise TypeError(
            f"{call}: dtype={dtype}, but JAX promotes no dtype of fewer than 16 bits; write "
            f"dtype=jnp.bfloat16, or {otherwise}, and cast what comes out."
        )


def check_residual(call: str, residual: Any, x: jax.Array, dtype: Any) -> jax.Array:
    """`residual` in y's dtype; of x's shape, or an error with the line to write."""
    residual = array(call, "residual", residual)
    if residual.shape != x.shape:
        raise ValueError(
            f"{call}: residual has shape {residual.shape} but x has shape {x.shape}; expected the "
            f"same. Project the shortcut as x is, or write "
            f"residual=jnp.broadcast_to(residual, x.shape) for one that repeats."
        )
    if jnp.iscomplexobj(residual) and not jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"{call}: residual has dtype {residual.dtype} but y has dtype {jnp.dtype(dtype)}; "
            f"write dtype={residual.dtype.name!r} for a complex y."
        )
    return residual.astype(dtype)


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
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    try:
        size = lax.axis_size(names)
    except NameError:
        raise ValueError(
            f"{call}: axis_name={axis_name!r} is not bound here; bound axes: {_bound()}. Call it "
            f"under shard_map, pmap or vmap with that axis name; under plain jit statistics are "
            f"global already, write axis_name=None."
        ) from None
    manual = jax.sharding.get_abstract_mesh().manual_axes
    of_devices = tuple(name for name in names if name in manual)
    mapped = tuple(name for name in names if name not in manual)
    if axis_index_groups is None:
        return Pool(of_devices, mapped, None, size)
    groups = tuple(tuple(int(i) for i in group) for group in axis_index_groups)
    members = sorted(i for group in groups for i in group)
    if members != list(range(size)) or len({len(group) for group in groups}) != 1:
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

    return [str(name) for name in core.get_axis_env().axis_sizes]
