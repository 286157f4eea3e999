"""A program's operations as the ONNX operators that runtimes have fast kernels for.

jax2onnx lowers one primitive at a time, and axes stay where JAX has them. Runtimes compute with
channels first, and have kernels for whole pools, means and activations. `Operators` runs a program
so: each value keeps the order of axes in which its maker left it, and what networks spend their
time in becomes one node (`_nodes`). The primitives without a rule here are left to jax2onnx.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxbn._folding.constants import Known, compute, floating, known
from jaxbn._folding.program import Op, Program, run, shape_of
from jaxbn.export._nodes import node
from jaxbn.export._patterns import IDENTITIES, Found, find

END = 2**31 - 1  # as the end of a Slice: the axis' own end
# Operators with NumPy's broadcasting; those of LOGICAL take booleans alone.
BROADCASTING = {
    **{"add": "Add", "add_any": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "pow": "Pow"},
    **{"max": "Max", "min": "Min", "eq": "Equal", "lt": "Less", "le": "LessOrEqual"},
    **{"gt": "Greater", "ge": "GreaterOrEqual", "and": "And", "or": "Or", "xor": "Xor"},
}
LOGICAL = {"and", "or", "xor"}
# Primitives that work value by value, which jax2onnx lowers in any order of axes.
# fmt: off
VALUE_BY_VALUE = {
    "abs", "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "ceil",
    "cos", "cosh", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1",
    "floor", "integer_pow", "is_finite", "log", "log1p", "logistic", "ne", "neg", "not",
    "rem", "round", "rsqrt", "select_n", "sign", "sin", "sinh", "sqrt", "square", "tan",
    "tanh",
}
# fmt: on


class Value(NamedTuple):
    """A value of the program that is known only at run time."""

    array: Any
    order: tuple[int, ...]  # axis k of the array is axis order[k] of the program's value

    def to(self, order: Sequence[int]) -> Any:
        """The array with its axes in another order."""
        if tuple(order) == self.order:
            return self.array
        perm = [self.order.index(axis) for axis in order]
        shape = [self.array.shape[k] for k in perm]
        return node("Transpose", shape, self.array.dtype, self.array, perm=perm)


def plain(array: Any) -> Value:
    """An array whose axes stand as in the program."""
    return Value(array, tuple(range(array.ndim)))


class Operators:
    """Runs a program as ONNX operators, inside a trace of jax2onnx's.

    Args:
      program: the program; its sizes may be symbols.
      opset: the version of ONNX's operators.
    """

    def __init__(self, program: Program, opset: int) -> None:
        self.program, self.opset = program, opset
        self.known: dict[int, Known] = {}
        for number, value in program.consts.items():
            if (constant := known(value)) is not None:
                self.known[number] = constant
        for op in program.ops:
            if op.inputs and all(i in self.known for i in op.inputs):
                results = compute(op, [self.known[i] for i in op.inputs])
                self.known |= zip(op.outputs, results or (), strict=False)
        self.makers = {i: op for op in program.ops for i in op.outputs}
        self.found = find(program, self.known, opset)
        self.ops = self._needed()
        self.readers: dict[int, list[Op]] = {}
        for op in self.ops:
            for i in set(self._inputs(op)):
                self.readers.setdefault(i, []).append(op)
        self.values: dict[int, Value] = {}
        self.absorbed: dict[int, int] = {}  # result of an operation → the value that contains it
        self.left: list[Op] = []  # what jax2onnx lowers

    def __call__(self, inputs: Sequence[Value]) -> list[Any]:
        """The program's results, with axes as in the program."""
        self.values = dict(zip(self.program.inputs, inputs, strict=True))
        for op in self.ops:
            if not self.values.keys() & self._inputs(op):
                continue  # depends on no argument: `array` runs it where something reads it
            first = op.outputs[0]
            with jax.named_scope(op.path):
                if first in self.absorbed:
                    value: Value | None = self.values[self.absorbed[first]]
                elif first in self.found:
                    value = self._pattern(self.found[first])
                else:
                    rule = RULES.get(op.name)
                    value = rule(self, op) if rule else None
            if value is not None:
                self.values[first] = value
            else:
                self._leave(op)
        results: list[Any] = []
        for i in self.program.outputs:
            array = self.array(i)
            if i in self.values and any(array is v for v in (*results, *(x.array for x in inputs))):
                array = node("Identity", array.shape, array.dtype, array)  # each has a name
            results.append(array)
        return results

    def _inputs(self, op: Op) -> tuple[int, ...]:
        found = self.found.get(op.outputs[0])
        return op.inputs if found is None else (found.input,)

    def _needed(self) -> list[Op]:
        """The operations that results need, without those inside a pattern and without prints."""
        needed, kept = set(self.program.outputs), []
        for op in reversed(self.program.ops):
            if needed & set(op.outputs):
                needed |= set(self._inputs(op))
                kept.append(op)
        return kept[::-1]

    def _pattern(self, found: Found) -> Value:
        x, attributes = self.values[found.input], {**found.pattern.attributes, **found.attributes}
        if found.axis is not None:
            attributes["axis"] = x.order.index(found.axis)
        return like(x, found.pattern.operator, **attributes)

    def _leave(self, op: Op) -> None:
        """Leaves an operation to jax2onnx, with axes as in the program."""
        self.left.append(op)
        for i, result in zip(op.outputs, run(op, *map(self.array, op.inputs)), strict=True):
            self.values[i] = plain(result)

    # Questions about the program

    def reader(self, i: int) -> Op | None:
        """The only operation that reads value i, if the value is no result."""
        readers = self.readers.get(i, [])
        return readers[0] if len(readers) == 1 and i not in self.program.outputs else None

    def uniform(self, i: int) -> Any:
        """The one number that value i consists of; None if it is not known or not one."""
        constant = self.known.get(i)
        if constant is None or constant.value.size == 0:
            return None
        first = constant.value.reshape(-1)[0]
        return first if (constant.value == first).all() else None

    def is_number(self, i: int, number: Any) -> bool:
        """Whether value i is this number, which may be a symbol."""
        while i in self.makers and self.makers[i].name == "convert_element_type":
            (i,) = self.makers[i].inputs
        if i in self.makers and self.makers[i].name == "dim_as_value":
            return bool(self.makers[i].eqn.params["dim"] == number)
        return isinstance(number, int) and self.uniform(i) == number

    def counts_windows(self, i: int, pool: Op) -> bool:
        """Whether value i counts, for each window of a pool, the places inside the array."""
        maker = self.makers.get(i)
        return (
            maker is not None
            and maker.name == pool.name
            and maker.eqn.params == pool.eqn.params
            and self.uniform(maker.inputs[0]) == 1
        )

    # Operands

    def array(self, i: int) -> Any:
        """Value i, with axes as in the program."""
        if i in self.values:
            value = self.values[i]
            return value.to(range(len(value.order)))
        if i in self.program.consts:
            return self.program.consts[i]
        if i not in self.known:
            self._leave(self.makers[i])
            return self.values[i].array
        constant = self.known[i]
        if all(isinstance(n, int) for n in constant.shape):
            return constant.array()
        array, axes = self.broadcast(i, range(len(constant.shape))), range(len(constant.shape))
        p = {"shape": constant.shape, "broadcast_dimensions": tuple(axes[len(axes) - array.ndim :])}
        return jax.lax.broadcast_in_dim_p.bind(array, **p, sharding=None)

    def whole(self, i: int, order: Sequence[int]) -> Any:
        """Value i in its whole shape, with axes in this order."""
        if i in self.values:
            return self.values[i].to(order)
        array = self.array(i)
        if isinstance(array, jax.core.Tracer):
            return plain(array).to(order)
        return np.ascontiguousarray(np.asarray(array).transpose(order))

    def broadcast(self, i: int, order: Sequence[int]) -> Any:
        """Value i as it broadcasts against an array with axes in this order."""
        if i in self.values:
            value = self.values[i]
            return value.to(order) if value.order else value.array
        constant = self.known.get(i)
        if constant is None:
            return plain(self.array(i)).to(order)
        array = constant.value.astype(constant.dtype)
        if array.size == 1:
            return array.reshape(())
        return array.reshape((1,) * (len(order) - array.ndim) + array.shape).transpose(order)

    def common_order(self, op: Op) -> tuple[int, ...]:
        """The order of axes of the first operand that has the result's shape, or at least rank."""
        values = [self.values[i] for i in op.inputs if i in self.values]
        alike = [v for v in values if len(v.order) == len(op.shape)]
        whole = [v for v in alike if tuple(v.array.shape) == ordered(op.shape, v.order)]
        return (*whole, *alike, plain(np.empty((0,) * len(op.shape))))[0].order


def ordered(shape: Sequence[Any], order: Sequence[int]) -> tuple[Any, ...]:
    """What belongs to the program's axes, for an array with axes in this order."""
    return tuple(shape[axis] for axis in order)


def like(x: Value, operator: str, *operands: Any, **attributes: Any) -> Value:
    """The result of an operator that keeps x's shape and dtype."""
    array = node(operator, x.array.shape, x.array.dtype, x.array, *operands, **attributes)
    return Value(array, x.order)


def cast(array: Any, dtype: Any) -> Any:
    """The array in this dtype."""
    if array.dtype == dtype:
        return array
    from onnx import helper

    to = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return node("Cast", array.shape, dtype, array, to=int(to))


def bind(op: Op, changed: dict[str, Any], *operands: Any) -> Any:
    """The result of an operation whose parameters follow another order of axes."""
    params = op.eqn.primitive.get_bind_params({**op.eqn.params, **changed})
    return op.eqn.primitive.bind(*operands, **params)


def dtype_of(op: Op, operand: int) -> Any:
    """The dtype of an operand."""
    aval: Any = op.eqn.invars[operand].aval
    return aval.dtype


# Rules: (operators, operation) → value, or None to leave the operation to jax2onnx


def identity(run: Operators, op: Op) -> Value | None:
    """An operation that returns its operand."""
    return run.values[op.inputs[0]]


def broadcasting(run: Operators, op: Op) -> Value | None:
    """Arithmetic, comparisons and logic."""
    if op.name in LOGICAL and dtype_of(op, 0) != np.bool_:
        return None
    order = run.common_order(op)
    operands = [run.broadcast(i, order) for i in op.inputs]
    return Value(node(BROADCASTING[op.name], ordered(op.shape, order), op.dtype, *operands), order)


def conversion(run: Operators, op: Op) -> Value | None:
    """Cast."""
    value = run.values[op.inputs[0]]
    if "complex" in f"{op.dtype} {value.array.dtype}":
        return None
    return Value(cast(value.array, op.dtype), value.order)


def value_by_value(self: Operators, op: Op) -> Value | None:
    """A primitive of jax2onnx's that works value by value."""
    order = self.common_order(op)
    ranks = [len(shape_of(v)) for v in op.eqn.invars]
    operands = [
        self.whole(i, order) if rank else self.array(i)
        for i, rank in zip(op.inputs, ranks, strict=True)
    ]
    self.left.append(op)
    return Value(bind(op, {}, *operands), order)


def maximum(run: Operators, op: Op) -> Value | None:
    """Relu, or Clip together with the minimum that follows."""
    (result,) = op.outputs
    for x, low in (op.inputs, op.inputs[::-1]):
        least = run.uniform(low)
        if least is None or x not in run.values:
            continue
        after = run.reader(result)
        if after is not None and after.name == "min":
            (high,) = (i for i in after.inputs if i != result)
            greatest = run.uniform(high)
            if greatest is not None and greatest >= least:
                run.absorbed[after.outputs[0]] = result
                return clip(run.values[x], least, greatest)
        if least == 0 and floating(op.dtype):
            return like(run.values[x], "Relu")
    return broadcasting(run, op)


def clamp(run: Operators, op: Op) -> Value | None:
    """Clip."""
    low, x, high = op.inputs
    least, greatest = run.uniform(low), run.uniform(high)
    if least is None or greatest is None or not greatest >= least or x not in run.values:
        return None
    return clip(run.values[x], least, greatest)


def clip(x: Value, least: Any, greatest: Any) -> Value:
    """Clip of x between two numbers."""
    return like(x, "Clip", *(np.asarray(end, x.array.dtype) for end in (least, greatest)))


def convolution(run: Operators, op: Op) -> Value | None:
    """Conv; ConvTranspose where the input is dilated. The bias that follows is part of the node."""
    p, dtype = op.eqn.params, dtype_of(op, 0)
    lhs, rhs, out = p["dimension_numbers"]
    transposed = any(d != 1 for d in p["lhs_dilation"])
    if p["batch_group_count"] != 1 or not floating(dtype) or dtype_of(op, 1) != dtype:
        return None
    if op.inputs[0] not in run.values or (
        transposed and (any(s != 1 for s in p["window_strides"]) or op.inputs[1] not in run.known)
    ):
        return None
    x, w = run.whole(op.inputs[0], lhs), run.whole(op.inputs[1], rhs)
    spread = [d * (n - 1) for d, n in zip(p["rhs_dilation"], w.shape[2:], strict=True)]
    padding = p["padding"]
    if transposed:  # ConvTranspose counts padding from the places that a kernel reaches at all
        padding = [(s - a, s - b) for s, (a, b) in zip(spread, padding, strict=True)]
        parts = np.split(np.flip(w, tuple(range(2, w.ndim))), p["feature_group_count"])
        w = np.ascontiguousarray(np.concatenate([part.swapaxes(0, 1) for part in parts]))
    strides = p["lhs_dilation"] if transposed else p["window_strides"]
    windows = [s + 1 for s in spread]
    pads = pads_of(padding, () if transposed else x.shape[2:], windows, strides)
    if pads is None:
        return None
    shape, beyond = list(ordered(op.shape, out)), [(0, 0)] * 2
    if "pads" in pads:  # negative widths cut the input, and widen what is transposed
        beyond += [(min(a, 0), min(b, 0)) for a, b in padding]
        pads = {"pads": [max(n, 0) for n in pads["pads"]]}
    widened = transposed and any(map(any, beyond))
    if transposed:
        shape = [n + a + b for n, (a, b) in zip(shape, beyond, strict=True)]
    else:
        x = padded(x, beyond, np.zeros((), dtype))
    bias = None if widened or op.dtype != dtype else bias_after(run, op, out[1])
    y = node(
        "ConvTranspose" if transposed else "Conv",
        shape,
        dtype,
        *((x, w) if bias is None else (x, w, bias)),
        kernel_shape=list(w.shape[2:]),
        strides=list(strides),
        dilations=list(p["rhs_dilation"]),
        group=p["feature_group_count"],
        **pads,
    )
    if widened:
        y = padded(y, [(-a, -b) for a, b in beyond], np.zeros((), dtype))
    return Value(cast(y, op.dtype), tuple(out))


def pads_of(
    padding: Sequence[Any], sizes: Sequence[Any], windows: Sequence[int], strides: Sequence[int]
) -> dict[str, Any] | None:
    """Padding as attributes; of sizes known at run time only, if the padding is JAX's "SAME"."""
    if all(isinstance(n, int | np.integer) for pair in padding for n in pair):
        return {"pads": [int(a) for a, _ in padding] + [int(b) for _, b in padding]}
    for name, word in (("SAME", "SAME_UPPER"), ("SAME_LOWER", "SAME_LOWER")):
        same = jax.lax.padtype_to_pads(sizes, windows, strides, name)
        if len(same) == len(padding) and all(a == b for a, b in zip(same, padding, strict=True)):
            return {"auto_pad": word}
    return None


def bias_after(run: Operators, op: Op, axis: int) -> np.ndarray | None:
    """The constant per channel that is added next, if nothing else reads op's result."""
    (result,) = op.outputs
    after = run.reader(result)
    if after is None or (after.name, after.shape, after.dtype) != ("add", op.shape, op.dtype):
        return None
    constant = next((run.known[i] for i in after.inputs if i in run.known), None)
    if constant is None:
        return None
    numbers = constant.numbers(len(op.shape))
    if numbers.size not in (1, numbers.shape[axis]):
        return None
    run.absorbed[after.outputs[0]] = result
    return np.broadcast_to(numbers.reshape(-1), (op.shape[axis],)).astype(op.dtype)


def padded(x: Any, padding: Sequence[tuple[int, int]], value: np.ndarray) -> Any:
    """Pad x with a constant. Negative widths cut."""
    if not any(map(any, padding)):
        return x
    shape = [n + a + b for n, (a, b) in zip(x.shape, padding, strict=True)]
    pads = np.array([a for a, _ in padding] + [b for _, b in padding], np.int64)
    return node("Pad", shape, x.dtype, x, pads, value, mode="constant")


def pad(run: Operators, op: Op) -> Value | None:
    """Pad with one number."""
    x, fill = op.inputs
    config, number = op.eqn.params["padding_config"], run.uniform(fill)
    widths = [n for a, b, _ in config for n in (a, b)]
    if number is None or x not in run.values or any(inner for _, _, inner in config):
        return None
    if not all(isinstance(n, int | np.integer) for n in widths):
        return None
    value = run.values[x]
    padding = ordered([(int(a), int(b)) for a, b, _ in config], value.order)
    return Value(padded(value.array, padding, np.asarray(number, op.dtype)), value.order)


def dot(run: Operators, op: Op) -> Value | None:
    """A product with a constant matrix: Gemm with the bias that follows; MatMul from rank 3 on."""
    (left, right), batch = op.eqn.params["dimension_numbers"]
    x, kernel = op.inputs
    dtype, rank = dtype_of(op, 0), len(shape_of(op.eqn.invars[0]))
    if x not in run.values or kernel not in run.known or any(map(len, batch)) or rank < 2:
        return None
    if dtype_of(op, 1) != dtype or not floating(dtype) or tuple(left) != (rank - 1,):
        return None
    if len(shape_of(op.eqn.invars[1])) != 2:
        return None
    (axis,) = right
    array, w = run.array(x), run.whole(kernel, (axis, 1 - axis))
    if rank > 2:
        return plain(cast(node("MatMul", op.shape, dtype, array, w), op.dtype))
    bias = bias_after(run, op, 1) if op.dtype == dtype else None
    bias = np.zeros(w.shape[1], dtype) if bias is None else bias  # quantizers need one a column
    return plain(cast(node("Gemm", op.shape, dtype, array, w, bias), op.dtype))


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


RULES: dict[str, Callable[[Operators, Op], Value | None]] = {
    **dict.fromkeys(IDENTITIES, identity),
    **dict.fromkeys(BROADCASTING, broadcasting),
    **dict.fromkeys(VALUE_BY_VALUE, value_by_value),
    **dict.fromkeys(("reduce_max", "reduce_min", "reduce_prod"), reduction),
    "broadcast_in_dim": ones,
    "clamp": clamp,
    "concatenate": concatenate,
    "conv_general_dilated": convolution,
    "convert_element_type": conversion,
    "dot_general": dot,
    "max": maximum,
    "pad": pad,
    "reduce_sum": total,
    "reduce_window_max": max_pool,
    "reduce_window_sum": average_pool,
    "reshape": reshape,
    "slice": part,
    "squeeze": ones,
    "transpose": transpose,
}
