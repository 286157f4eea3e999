"""What cannot be exported: the first operation that fails alone, its layer, and what to do."""

from collections.abc import Callable, Iterable
from typing import Any

import jax

from jaxbn._folding.program import Op, run
from jaxbn._text import first_line


def refusal(
    call: str, ops: Iterable[Op], attempt: Callable[[Op], Any], error: Exception, expected: str
) -> ValueError:
    """The refusal of a function that the converter fails on.

    Args:
      call: the public call.
      ops: operations that may be the reason, in order.
      attempt: converts one operation alone, and fails if it is the reason.
      error: the converter's error with the whole function, if no operation fails alone.
      expected: what is expected and what to write.
    """
    what = "fn"
    for op in ops:
        try:
            attempt(op)
        except Exception as alone:
            what, error = f"{op.name} in {op.path or 'fn'}", alone
            break
    return ValueError(f"{call}: {what} cannot be converted: {first_line(error)}; {expected}")


def exported_alone(op: Op, platforms: Any) -> None:
    """Exports one operation as StableHLO."""
    alone = jax.jit(lambda *arrays: run(op, *arrays))
    jax.export.export(alone, platforms=platforms)(*operands_of(op)).serialize()


def operands_of(op: Op) -> list[jax.ShapeDtypeStruct]:
    """Shapes and dtypes of an operation's operands."""
    avals: list[Any] = [v.aval for v in op.eqn.invars]
    return [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
