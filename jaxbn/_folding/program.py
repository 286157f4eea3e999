"""A traced function as one flat list of operations."""

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

if TYPE_CHECKING:
    from jax.extend.core import Jaxpr, JaxprEqn

CALLS = {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"}
CUSTOM = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}


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
    avals: tuple[Any, ...] = ()  # the types of the inputs


def trace(
    fn: Callable,
    args: Sequence[Any],
    inline: Callable[["JaxprEqn"], bool],
    one_turn: bool = False,
) -> Program:
    """The program of `fn(*args)`; args may be arrays, tracers or `ShapeDtypeStruct`s.

    Calls (`jit`, `checkpoint`) are inlined. A call with a derivative of its own (`custom_jvp`)
    loses that derivative when inlined, so `inline` decides for each such call. With `one_turn` a
    `scan` is one turn of its body, in which a stack and its slice are one value, and the carry
    comes from nowhere. Such a program shows what is made of what, and cannot run.
    """
    from jax.extend.core import Literal  # slow to import; `import jaxbn` must stay fast

    # JAX keeps the trace of a function it has seen. The lambda is a new function, so fn is traced
    # again, with the weights that it closes over now.
    closed, shapes = jax.make_jaxpr(lambda *args: fn(*args), return_shape=True)(*args)
    consts: dict[int, Any] = {}
    ops: list[Op] = []
    number = itertools.count()

    def constant(value: Any) -> int:
        consts[i := next(number)] = value
        return i

    def stacked(values: Sequence[int], outside: Sequence[Any], inside: Sequence[Any]) -> list[int]:
        """The values that are slices inside a scan; new values for the rest, the carry say."""
        pairs = zip(values, outside, inside, strict=True)
        return [i if shape_of(v) != shape_of(w) else next(number) for i, v, w in pairs]

    def walk(jaxpr: "Jaxpr", values: list[Any], inputs: Sequence[int], path: str) -> list[int]:
        env = dict(zip(jaxpr.constvars, map(constant, values), strict=True))
        env |= zip(jaxpr.invars, inputs, strict=True)

        def read(v: Any) -> int:
            return constant(v.val) if isinstance(v, Literal) else env[v]

        for eqn in jaxpr.eqns:
            scope = "/".join(filter(None, (path, scope_of(eqn))))
            operands = tuple(map(read, eqn.invars))
            name, body = eqn.primitive.name, next(bodies(eqn), None)
            results: Sequence[int]
            if body is not None and name == "scan" and one_turn:
                of_turn = stacked(operands, eqn.invars, body[0].invars)
                results = stacked(walk(*body, of_turn, scope), eqn.outvars, body[0].outvars)
            elif body is not None and (name in CALLS or (name in CUSTOM and inline(eqn))):
                results = walk(*body, operands, scope)
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
    avals = tuple(closed.in_avals)
    return Program(inputs, tuple(kept[::-1]), outputs, consts, jax.tree.structure(shapes), avals)


def scope_of(eqn: "JaxprEqn") -> str:
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
