"""Functions of JAX's in a program that ONNX has one operator for, found by their own traces.

A pattern is the function itself: `jax.nn.gelu`, traced for the shape at hand, is compared operation
by operation with the program. So a pattern changes with JAX.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxbn._folding.constants import Known, floating
from jaxbn._folding.program import Op, Program, trace

# Operations that return their operand.
IDENTITIES = {"copy", "copy_p", "sharding_constraint", "stop_gradient"}


class Pattern(NamedTuple):
    """A function of JAX's and the operator that equals it."""

    operator: str
    opset: int  # the first with this operator
    f: Callable[..., jax.Array]
    last: str  # the last operation of f
    attributes: Mapping[str, Any] = {}
    along_an_axis: bool = False
    free: str = ""  # an attribute: the number that stands where f has FREE


FREE = 0.375  # no number of a pattern's own

PATTERNS = (
    Pattern("Gelu", 20, jax.nn.gelu, "mul", {"approximate": "tanh"}),
    Pattern("Gelu", 20, functools.partial(jax.nn.gelu, approximate=False), "mul"),
    Pattern("HardSwish", 14, jax.nn.hard_swish, "mul"),
    Pattern("HardSigmoid", 6, jax.nn.hard_sigmoid, "div", {"alpha": 1 / 6, "beta": 0.5}),
    Pattern(
        "LeakyRelu",
        16,
        functools.partial(jax.nn.leaky_relu, negative_slope=FREE),
        "select_n",
        free="alpha",
    ),
    Pattern("Elu", 6, functools.partial(jax.nn.elu, alpha=FREE), "select_n", free="alpha"),
    Pattern("Softmax", 13, jax.nn.softmax, "div", along_an_axis=True),
    Pattern("LogSoftmax", 13, jax.nn.log_softmax, "sub", along_an_axis=True),
)


class Found(NamedTuple):
    """A pattern in a program: the number of its input, and the axis along which it works."""

    pattern: Pattern
    input: int
    axis: int | None
    attributes: Mapping[str, Any]


def find(program: Program, known: Mapping[int, Known], opset: int) -> dict[int, Found]:
    """The patterns in a program, by the number of their result.

    Args:
      program: the program; its sizes may be symbols.
      known: the values that depend on no argument.
      opset: the version of ONNX's operators.
    """
    makers = {i: op for op in program.ops for i in op.outputs}
    found = {}
    for op in program.ops:
        for pattern in PATTERNS:
            if op.name != pattern.last or opset < pattern.opset or not floating(op.dtype):
                continue
            for axis in range(len(op.shape)) if pattern.along_an_axis else (None,):
                model = _model(pattern, axis, jax.ShapeDtypeStruct(op.shape, op.dtype))
                if (start := _start(model, op, makers, known, pattern.free)) is not None:
                    found[op.outputs[0]] = Found(pattern, start[0], axis, start[1])
    return found


def _model(pattern: Pattern, axis: int | None, x: jax.ShapeDtypeStruct) -> Program:
    f = pattern.f if axis is None else functools.partial(pattern.f, axis=axis)
    return trace(f, [x], lambda eqn: True)


def _start(
    model: Program, last: Op, makers: Mapping[int, Op], known: Mapping[int, Known], free: str
) -> tuple[int, dict[str, float]] | None:
    """The value that stands for the model's input, if `last` ends operations like the model's.

    With the number that stands for the model's FREE.
    """
    models = {i: op for op in model.ops for i in op.outputs}
    pairs: dict[int, int] = {}
    numbers: set[float] = set()

    def alike(m: int, i: int) -> bool:
        m, i = _before(m, models), _before(i, makers)
        if m in pairs:
            return pairs[m] == i
        pairs[m] = i
        if m in model.inputs:
            return i not in known
        if m in model.consts:
            if i not in known:
                return False
            value, constant = np.asarray(model.consts[m]), known[i].array()
            if free and (value == FREE).all() and constant.shape == value.shape:
                numbers.update(constant.ravel().tolist())
                return len(numbers) == 1
            return np.array_equal(value, constant)
        mine, other = models[m], makers.get(i)
        return (
            other is not None
            and (mine.name, mine.shape, mine.dtype) == (other.name, other.shape, other.dtype)
            and mine.eqn.params == other.eqn.params
            and all(map(alike, mine.inputs, other.inputs))
        )

    if not alike(model.outputs[0], last.outputs[0]):
        return None
    return pairs[model.inputs[0]], {free: numbers.pop()} if free else {}


def _before(i: int, makers: Mapping[int, Op]) -> int:
    """Value i, or the value that operations which return their operand took."""
    while i in makers and (makers[i].name in IDENTITIES or _keeps_dtype(makers[i])):
        i = makers[i].inputs[0]
    return i


def _keeps_dtype(op: Op) -> bool:
    """Whether a cast changes nothing: JAX casts a number of the user's, but not a default."""
    if op.name != "convert_element_type":
        return False
    before: Any = op.eqn.invars[0].aval
    return bool(before.dtype == op.dtype)
