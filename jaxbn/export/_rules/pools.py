"""Rules for pools, sums, means and other reductions."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxbn._folding.constants import floating
from jaxbn._folding.program import Op, shape_of
from jaxbn.export._nodes import node
from jaxbn.export._operators import Operators, Value, bind, ordered
from jaxbn.export._rules.contractions import pads_of


def pooled(run: Operators, op: Op) -> tuple[Value, dict[str, Any]] | None:
    """What a pool pools, with batch and channels first, and the operator's attributes."""
    p, (x,) = op.eqn.params, op.inputs
    windows = zip(p["window_dimensions"], p["window_strides"], p["padding"], strict=True)
    still = [axis for axis, window in enumerate(windows) if window == (1, 1, (0, 0))]
    if len(still) < 2 or len(op.shape) < 3 or x not in run.values or not floating(op.dtype):
        return None
    if any(d != 1 for d in p["base_dilation"]):
        return None
    value = run.values[x]
    if not set(value.order[:2]) <= set(still):
        first = (still[0], still[-1])
        order = (*first, *(axis for axis in range(len(op.shape)) if axis not in first))
        value = Value(value.to(order), order)
    names = ("window_dimensions", "window_strides", "window_dilation", "padding")
    sizes, strides, dilations, padding = (ordered(p[name], value.order[2:]) for name in names)
    reach = [d * (n - 1) + 1 for n, d in zip(sizes, dilations, strict=True)]
    pads = pads_of(padding, value.array.shape[2:], reach, strides)
    if pads is None:
        return None
    attributes = {"kernel_shape": list(sizes), "strides": list(strides), **pads}
    return value, attributes | ({"dilations": list(dilations)} if set(dilations) != {1} else {})


def max_pool(run: Operators, op: Op) -> Value | None:
    """MaxPool."""
    if (found := pooled(run, op)) is None:
        return None
    value, attributes = found
    shape = ordered(op.shape, value.order)
    return Value(node("MaxPool", shape, op.dtype, value.array, **attributes), value.order)


def average_pool(run: Operators, op: Op) -> Value | None:
    """A sum over windows: AveragePool with the division that follows, or times a window's size."""
    if (found := pooled(run, op)) is None:
        return None
    (value, attributes), (result,) = found, op.outputs
    size = math.prod(attributes["kernel_shape"])
    after = run.reader(result)
    divisor = after.inputs[1] if after is not None and after.name == "div" else -1
    inside = run.counts_windows(divisor, op)
    attributes["count_include_pad"] = int(not inside)
    shape = ordered(op.shape, value.order)
    array = node("AveragePool", shape, op.dtype, value.array, **attributes)
    if after is not None and (inside or run.is_number(divisor, size)):
        run.absorbed[after.outputs[0]] = result
    else:
        array = node("Mul", shape, op.dtype, array, np.asarray(size, op.dtype))
    return Value(array, value.order)


def total(run: Operators, op: Op) -> Value | None:
    """A sum; a mean where a division by the count follows, perhaps after axes of size 1."""
    axes, x = op.eqn.params["axes"], op.inputs[0]
    count = math.prod(shape_of(op.eqn.invars[0])[axis] for axis in axes)
    last, after = op.outputs[0], run.reader(op.outputs[0])
    while after is not None and after.name in ("broadcast_in_dim", "reshape"):
        last, after = after.outputs[0], run.reader(after.outputs[0])
    if (
        after is None
        or (after.name, after.inputs[0]) != ("div", last)
        or not floating(op.dtype)
        or not run.is_number(after.inputs[1], count)
    ):
        return reduction(run, op)
    run.absorbed[after.outputs[0]] = last
    value = run.values[x]
    at, order = without(value, axes)
    shape = [n for k, n in enumerate(value.array.shape) if k not in at]
    moved = value.order != tuple(range(len(value.order)))
    if moved and len(shape) == 2 and at[0] == 2:  # a norm over the last axis is no pool
        ones = [1] * len(at)
        array = node("GlobalAveragePool", (*shape, *ones), op.dtype, value.array)
        return Value(node("Flatten", shape, op.dtype, array, axis=1), order)
    operands: list[Any] = [value.array]
    attributes: dict[str, Any] = {"keepdims": 0}
    if run.opset < 18:
        attributes["axes"] = at
    else:
        operands.append(np.array(at, np.int64))
    return Value(node("ReduceMean", shape, op.dtype, *operands, **attributes), order)


def without(value: Value, axes: Sequence[int]) -> tuple[list[int], tuple[int, ...]]:
    """Where these axes stand, and the order of the others once they are gone."""
    left = [axis for axis in value.order if axis not in axes]
    at = [k for k, axis in enumerate(value.order) if axis in axes]
    return at, tuple(sorted(left).index(axis) for axis in left)


def reduction(run: Operators, op: Op) -> Value | None:
    """A reduction of jax2onnx's, over axes where they stand."""
    value = run.values[op.inputs[0]]
    at, order = without(value, op.eqn.params["axes"])
    run.left.append(op)
    return Value(bind(op, {"axes": tuple(at)}, value.array), order)
