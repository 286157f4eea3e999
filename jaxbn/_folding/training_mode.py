"""Does a traced function normalize by the batch?"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxbn._folding.program import Program, shape_of, trace


def batch_statistics(fn: Callable, args: Sequence[Any]) -> str | None:
    """The place where `fn` normalizes by statistics of the batch; None in inference mode.

    `fn` is traced twice, the second time with a batch axis twice as long. The batch axis is axis 0
    of every leaf whose axis 0 has the size of the first leaf's. A value that keeps its shape in
    the second trace, but is computed from a value that grew, is a statistic of the batch. If a
    statistic is subtracted from, multiplied with, or divided into a value that grew, then the
    result of one row depends on other rows: `fn` is in training mode. A single number for all
    channels does not count, because it may be the scale of a quantizer.
    """
    traced = at_two_sizes(fn, args)
    if traced is None:
        return None
    once, twice = traced
    grows = grown_inputs(once, twice)
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


def at_two_sizes(
    fn: Callable, args: Sequence[Any], times: int = 1
) -> tuple[Program, Program] | None:
    """The programs of `fn` on `times` as many rows, and on twice as many as that.

    None if `fn` does not take a longer axis 0, or if the two have other operations.
    """
    leaves, tree = jax.tree.flatten(args)
    size = next((leaf.shape[0] for leaf in leaves if leaf.ndim), None)

    def traced(times: int) -> Program:
        shapes = [
            (times * size, *leaf.shape[1:]) if leaf.ndim and leaf.shape[0] == size else leaf.shape
            for leaf in leaves
        ]
        longer = [jax.ShapeDtypeStruct(s, v.dtype) for s, v in zip(shapes, leaves, strict=True)]
        again = args if times == 1 else jax.tree.unflatten(tree, longer)
        return trace(fn, again, lambda eqn: True)

    once = traced(times)
    try:
        twice = traced(2 * times)
    except Exception:  # fn does not accept a longer axis 0, so axis 0 is not a batch axis
        return None
    same = [op.name for op in once.ops] == [op.name for op in twice.ops]
    return (once, twice) if same else None


def grown_inputs(once: Program, twice: Program) -> set[int]:
    """The inputs that have rows: their shapes differ in the two programs."""
    pairs = zip(once.inputs, once.avals, twice.avals, strict=True)
    return {i for i, a, b in pairs if a.shape != b.shape}
