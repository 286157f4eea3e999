"""A program's operations as the ONNX operators that runtimes have fast kernels for.

jax2onnx lowers one primitive at a time, and axes stay where JAX has them. Runtimes compute with
channels first, and have kernels for whole pools, means and activations. `Operators` runs a program
so: each value keeps the order of axes in which its maker left it, and what networks spend their
time in becomes one node (`_nodes`). The primitives without a rule (`_rules`) are left to jax2onnx.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxbn._folding.constants import Known, compute, known
from jaxbn._folding.program import Op, Program, run
from jaxbn.export._nodes import node
from jaxbn.export._patterns import Found, find


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


Rule = Callable[["Operators", Op], Value | None]


class Operators:
    """Runs a program as ONNX operators, inside a trace of jax2onnx's.

    Args:
      program: the program; its sizes may be symbols.
      opset: the version of ONNX's operators.
      rules: for some primitives, a function of these operators and an operation; it returns a
        value, or None to leave the operation to jax2onnx.
    """

    def __init__(self, program: Program, opset: int, rules: Mapping[str, Rule]) -> None:
        self.program, self.opset, self.rules = program, opset, rules
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
                    rule = self.rules.get(op.name)
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
