"""Rules for what works value by value, in any order of axes."""

from typing import Any

import numpy as np

from jaxbn._folding.constants import floating
from jaxbn._folding.program import Op, shape_of
from jaxbn.export._nodes import node
from jaxbn.export._operators import Operators, Value, bind, cast, dtype_of, like, ordered

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
