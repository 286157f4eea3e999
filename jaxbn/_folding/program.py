"""A traced function as one flat list of operations, and its values that are constants."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from jax.extend.core import Jaxpr, JaxprEqn

CALLS = {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"}
CUSTOM = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}
# Computed in float64: fold and XLA then differ by the rounding of the last cast alone.
ARITHMETIC: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "neg": np.negative,
    "sqrt": np.sqrt,
    "rsqrt": lambda v: 1 / np.sqrt(v),
    "square": np.square,
    "integer_pow": lambda v, y: v ** float(y),
}


def shape_of(v: Any) -> tuple[Any, ...]:
    """The shape of an equation's variable or literal; () where the value is not an array."""
    return getattr(v.aval, "shape", ())


class Op(NamedTuple):
    """One equation. Values are numbered over the whole program."""

    eqn: "JaxprEqn"
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    path: str  # the module or named scope that wrote the equation, "ResNet/bn_init"; or ""

    @property
    def name(self) -> str:
        """The name of the primitive."""
        return self.eqn.primitive.name

    @property
    def shape(self) -> tuple[Any, ...]:
        """The shape of the first result; sizes may be symbols."""
        return shape_of(self.eqn.outvars[0])

    @property
    def dtype(self) -> Any:
        """The dtype of the first result."""
        aval: Any = self.eqn.outvars[0].aval
        return aval.dtype


class Program(NamedTuple):
    """A function of arrays as operations in order, without the operations that no output needs."""

    inputs: tuple[int, ...]
    ops: tuple[Op, ...]
    outputs: tuple[int, ...]
    consts: dict[int, Any]
    tree: Any  # the structure of the outputs


def trace(fn: Callable, args: Sequence[Any], inline: Callable[["JaxprEqn"], bool]) -> Program:
    """The program of `fn(*args)`; args may be arrays, tracers or `ShapeDtypeStruct`s.

    Calls (`jit`, `checkpoint`) are inlined. A call with a derivative of its own (`custom_jvp`)
    loses that derivative when inlined, so `inline` decides for each such call.
    """
    from jax.extend.core import Literal  # slow to import; `import jaxbn` must stay fast

    closed, shapes = jax.make_jaxpr(lambda *args: fn(*args), return_shape=True)(*args)
    consts: dict[int, Any] = {}
    ops: list[Op] = []
    number = iter(range(2**62))

    def constant(value: Any) -> int:
        consts[i := next(number)] = value
        return i

    def walk(jaxpr: "Jaxpr", values: list[Any], inputs: Sequence[int], path: str) -> list[int]:
        env = dict(zip(jaxpr.constvars, map(constant, values), strict=True))
        env |= zip(jaxpr.invars, inputs, strict=True)

        def read(v: Any) -> int:
            return constant(v.val) if isinstance(v, Literal) else env[v]

        for eqn in jaxpr.eqns:
            scope = "/".join(filter(None, (path, _scope(eqn))))
            operands = tuple(map(read, eqn.invars))
            name, body = eqn.primitive.name, next(bodies(eqn), None)
            if body is not None and (name in CALLS or (name in CUSTOM and inline(eqn))):
                results: Sequence[int] = walk(*body, operands, scope)
            else:
                results = tuple(next(number) for _ in eqn.outvars)
                ops.append(Op(eqn, operands, tuple(results), scope))
            env |= zip(eqn.outvars, results, strict=True)
        return [read(v) for v in jaxpr.outvars]

    inputs = tuple(next(number) for _ in closed.jaxpr.invars)
    outputs = tuple(walk(closed.jaxpr, closed.consts, inputs, ""))
    needed = set(outputs)
    kept = []
    for op in reversed(ops):
        if op.eqn.effects or needed & set(op.outputs):
            needed |= set(op.inputs)
            kept.append(op)
    consts = {i: value for i, value in consts.items() if i in needed}
    return Program(inputs, tuple(kept[::-1]), outputs, consts, jax.tree.structure(shapes))


def _scope(eqn: "JaxprEqn") -> str:
    """The named scopes of an equation without transformations: "vmap(conv)/vmap()" gives "conv"."""
    plain = re.sub(r"\w+\(([^()]*)\)", r"\1", str(eqn.source_info.name_stack))
    return "/".join(filter(None, plain.split("/")))


def bodies(eqn: "JaxprEqn") -> Iterator[tuple["Jaxpr", list[Any]]]:
    """The jaxprs in an equation's parameters, each with its constants."""
    from jax.extend.core import ClosedJaxpr, Jaxpr

    for value in eqn.params.values():
        for body in value if isinstance(value, tuple | list) else (value,):
            if isinstance(body, ClosedJaxpr):
                yield body.jaxpr, body.consts
            elif isinstance(body, Jaxpr):
                yield body, []


def run(op: Op, *operands: Any) -> list[Any]:
    """Runs one operation under its named scope and returns the results."""
    params = op.eqn.primitive.get_bind_params(op.eqn.params)
    with op.eqn.ctx.manager, jax.named_scope(op.path):
        results = op.eqn.primitive.bind(*operands, **params)
    return list(results) if op.eqn.primitive.multiple_results else [results]


def evaluate(program: Program, leaves: Sequence[Any]) -> dict[int, Any]:
    """Every value of the program, by its number."""
    values = program.consts | dict(zip(program.inputs, leaves, strict=True))
    for op in program.ops:
        values |= zip(op.outputs, run(op, *(values[i] for i in op.inputs)), strict=True)
    return values


# Constants: values that do not depend on the arguments


class Known(NamedTuple):
    """A constant. An axis on which the numbers do not vary is stored with size 1."""

    value: np.ndarray  # float64 once computed with, even where dtype is narrower
    shape: tuple[Any, ...]
    dtype: Any
    source: Any = None  # the array that the function closed over, if the constant is that array

    def array(self) -> np.ndarray:
        """The whole array, cast to dtype."""
        return np.broadcast_to(self.value.astype(self.dtype), self.shape)

    def numbers(self, ndim: int) -> np.ndarray:
        """The numbers in float64, with `ndim` axes, ready to broadcast."""
        return self.value.astype(np.float64).reshape(
            (1,) * (ndim - self.value.ndim) + self.value.shape
        )


def known(value: Any) -> Known | None:
    """`value` as a constant; None for a tracer or a random key."""
    if isinstance(value, jax.core.Tracer):
        return None
    dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return None
    array = np.asarray(value)
    return Known(array, array.shape, array.dtype, value)


def floating(dtype: Any) -> bool:
    """Whether the dtype is a real float."""
    return bool(jnp.issubdtype(dtype, jnp.floating))


def compute(op: Op, operands: Sequence[Known]) -> list[Known] | None:
    """The results of an operation on constants; None if they are known only at run time.

    Arithmetic is done in float64. Casts and all other operations run as the program runs them.
    """
    if op.name in ARITHMETIC and floating(op.dtype):
        params = {"y": op.eqn.params["y"]} if op.name == "integer_pow" else {}
        with np.errstate(all="ignore"):
            numbers = (k.numbers(len(op.shape)) for k in operands)
            return [Known(ARITHMETIC[op.name](*numbers, **params), op.shape, op.dtype)]
    if len(operands) == 1 and (value := relayout(op, operands[0].value)) is not None:
        if op.name != "convert_element_type":
            return [Known(value, op.shape, op.dtype)]
        if floating(op.dtype) and floating(operands[0].dtype):
            narrows = jnp.finfo(op.dtype).bits < jnp.finfo(operands[0].dtype).bits
            return [Known(value.astype(op.dtype) if narrows else value, op.shape, op.dtype)]
    sizes = [size for v in (*op.eqn.invars, *op.eqn.outvars) for size in shape_of(v)]
    if op.eqn.effects or not all(isinstance(size, int) for size in sizes):
        return None
    with jax.ensure_compile_time_eval():
        results = [known(r) for r in run(op, *(jnp.asarray(k.array()) for k in operands))]
    return None if None in results else results  # type: ignore[return-value]


def relayout(op: Op, value: np.ndarray) -> np.ndarray | None:
    """The constant `value` after `op`, an operation that reshapes, transposes or casts.

    `value` has size 1 on axes on which it does not vary, as in `Known`. Returns None if `op` is
    another kind of operation, or if a reshape merges a varying axis with a constant one.
    """
    params = op.eqn.params
    if op.name in ("convert_element_type", "copy"):
        return value
    if op.name == "transpose":
        return value.transpose(params["permutation"])
    if op.name == "squeeze":
        return value.squeeze(tuple(params["dimensions"]))
    if op.name == "broadcast_in_dim" and len(op.inputs) == 1:
        shape = [1] * len(op.shape)
        for size, axis in zip(value.shape, params["broadcast_dimensions"], strict=True):
            shape[axis] = size
        return value.reshape(shape)
    if op.name == "reshape" and len(op.inputs) == 1 and params["dimensions"] is None:
        return _reshape(value, shape_of(op.eqn.invars[0]), op.shape)
    return None


def _reshape(value: np.ndarray, old: tuple[Any, ...], new: tuple[Any, ...]) -> np.ndarray | None:
    """`value`, which belongs to an array of shape `old`, after a reshape of that array to `new`.

    Sizes may be symbols.
    """
    varies = [axis for axis, size in enumerate(value.shape) if size > 1]
    if not varies:
        return value.reshape((1,) * len(new))
    first, last = varies[0], varies[-1] + 1
    if value.shape[first:last] != tuple(old[first:last]):
        return None
    before, inside = math.prod(old[:first]), math.prod(old[first:last])
    for start in range(len(new)):
        for stop in range(start + 1, len(new) + 1):
            if math.prod(new[:start]) == before and math.prod(new[start:stop]) == inside:
                return value.reshape((1,) * start + new[start:stop] + (1,) * (len(new) - stop))
    return None


# Training mode


def batch_statistics(fn: Callable, args: Sequence[Any]) -> str | None:
    """The place where `fn` normalizes by statistics of the batch; None in inference mode.

    `fn` is traced twice, the second time with a batch axis twice as long. The batch axis is axis 0
    of every leaf whose axis 0 has the size of the first leaf's. A value that keeps its shape in
    the second trace, but is computed from a value that grew, is a statistic of the batch. If a
    statistic is subtracted from, multiplied with, or divided into a value that grew, then the
    result of one row depends on other rows: `fn` is in training mode. A single number for all
    channels does not count, because it may be the scale of a quantizer.
    """
    leaves = jax.tree.leaves(args)
    size = next((leaf.shape[0] for leaf in leaves if leaf.ndim), None)
    longer = [
        jax.ShapeDtypeStruct(
            (2 * size, *leaf.shape[1:]) if leaf.ndim and leaf.shape[0] == size else leaf.shape,
            leaf.dtype,
        )
        for leaf in leaves
    ]
    once = trace(fn, args, lambda eqn: True)
    try:
        twice = trace(fn, jax.tree.unflatten(jax.tree.structure(args), longer), lambda eqn: True)
    except Exception:  # fn does not accept a longer axis 0, so axis 0 is not a batch axis
        return None
    if [op.name for op in once.ops] != [op.name for op in twice.ops]:
        return None
    grows = {
        i
        for i, short, long in zip(once.inputs, leaves, longer, strict=True)
        if short.shape != long.shape
    }
    statistic: dict[int, int] = {}  # value → how many numbers it holds before broadcasting
    for op, long in zip(once.ops, twice.ops, strict=True):
        from_statistic = max((statistic.get(i, 0) for i in op.inputs), default=0)
        from_rows = any(i in grows and i not in statistic for i in op.inputs)
        if op.name in ("sub", "mul", "div") and from_rows and from_statistic > 1:
            return op.path or f"a {op.name} of shape {op.shape}"
        for i, a, b in zip(op.outputs, op.eqn.outvars, long.eqn.outvars, strict=True):
            longer_now = shape_of(a) != shape_of(b)
            if longer_now:
                grows.add(i)
            if from_statistic and not (longer_now and from_rows):
                statistic[i] = max(from_statistic, 0 if longer_now else math.prod(shape_of(a)))
            elif from_rows and not longer_now:
                statistic[i] = math.prod(shape_of(a))
    return None
