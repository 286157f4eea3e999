"""Rules for what moves axes and parts of arrays, and computes nothing."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxbn._folding.program import Op, shape_of
from jaxbn.export._nodes import node
from jaxbn.export._operators import Operators, Value, ordered, plain

END = 2**31 - 1  # as the end of a Slice: the axis' own end


def transpose(run: Operators, op: Op) -> Value | None:
    """Nothing: the axes stay, their names change."""
    value, permutation = run.values[op.inputs[0]], op.eqn.params["permutation"]
    return Value(value.array, tuple(permutation.index(axis) for axis in value.order))


def ones(run: Operators, op: Op) -> Value | None:
    """Axes of size 1 go, or come in at the end, where they are in no operator's way."""
    value = run.values[op.inputs[0]]
    kept = kept_axes(op, shape_of(op.eqn.invars[0]))
    if kept is None:
        return None
    array, order = value.array, tuple(kept[axis] for axis in value.order if axis in kept)
    if gone := [k for k, axis in enumerate(value.order) if axis not in kept]:
        shape = [n for k, n in enumerate(array.shape) if k not in gone]
        array = node("Squeeze", shape, op.dtype, array, np.array(gone, np.int64))
    if new := [axis for axis in range(len(op.shape)) if axis not in order]:
        at = np.arange(array.ndim, array.ndim + len(new))
        array = node("Unsqueeze", (*array.shape, *(1 for _ in new)), op.dtype, array, at)
    return Value(array, (*order, *new))


def kept_axes(op: Op, old: Sequence[Any]) -> dict[int, int] | None:
    """Old axis → new axis, if only axes of size 1 come or go; None otherwise."""
    if op.name == "squeeze":
        left = [axis for axis in range(len(old)) if axis not in op.eqn.params["dimensions"]]
        return {axis: k for k, axis in enumerate(left)}
    if op.name == "broadcast_in_dim":
        to = op.eqn.params["broadcast_dimensions"]
        same = all(old[k] == op.shape[axis] for k, axis in enumerate(to))
        same &= all(n == 1 for axis, n in enumerate(op.shape) if axis not in to)
        return dict(enumerate(to)) if same else None
    before = [axis for axis, n in enumerate(old) if not n == 1]  # noqa: SIM201 (symbols)
    after = [axis for axis, n in enumerate(op.shape) if not n == 1]  # noqa: SIM201
    if len(before) != len(after):
        return None
    pairs = dict(zip(before, after, strict=True))
    return pairs if all(old[a] == op.shape[b] for a, b in pairs.items()) else None


def reshape(run: Operators, op: Op) -> Value | None:
    """Reshape, with at most one size that is known at run time only."""
    if op.eqn.params["dimensions"] is not None or len(op.inputs) > 1:
        return None
    if (value := ones(run, op)) is not None:
        return value
    sizes = [n if isinstance(n, int) else -1 for n in op.shape]
    if sizes.count(-1) > 1:
        return None
    array = run.array(op.inputs[0])
    return plain(node("Reshape", op.shape, op.dtype, array, np.array(sizes, np.int64)))


def part(run: Operators, op: Op) -> Value | None:
    """Slice, of the axes that are cut."""
    p, old, value = op.eqn.params, shape_of(op.eqn.invars[0]), run.values[op.inputs[0]]
    strides = p["strides"] or (1,) * len(old)
    windows = list(zip(p["start_indices"], p["limit_indices"], strides, strict=True))
    windows = [(a, END if b == n else b, s) for (a, b, s), n in zip(windows, old, strict=True)]
    cut = [k for k, axis in enumerate(value.order) if windows[axis] != (0, END, 1)]
    numbers = [windows[value.order[k]] for k in cut]
    if not all(isinstance(n, int) for window in numbers for n in window):
        return None
    if not cut:
        return value
    starts, ends, steps = (np.array(v, np.int64) for v in zip(*numbers, strict=True))
    at, shape = np.array(cut, np.int64), ordered(op.shape, value.order)
    return Value(node("Slice", shape, op.dtype, value.array, starts, ends, at, steps), value.order)


def concatenate(run: Operators, op: Op) -> Value | None:
    """Concat."""
    order = run.common_order(op)
    arrays = [run.whole(i, order) for i in op.inputs]
    axis = order.index(op.eqn.params["dimension"])
    return Value(node("Concat", ordered(op.shape, order), op.dtype, *arrays, axis=axis), order)
