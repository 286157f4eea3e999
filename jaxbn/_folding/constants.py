"""Values that depend on no argument, computed in float64 while folding."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._folding.program import Op, run, shape_of

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
    sizes += filter(jax.export.is_symbolic_dim, op.eqn.params.values())  # a size as a value
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
    if op.name in ("convert_element_type", "copy", "reshard"):
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


def expanded(value: np.ndarray, old: tuple[Any, ...], new: tuple[Any, ...]) -> np.ndarray:
    """`value`, its numbers repeated on the axes that a reshape merges with axes on which it varies.

    `value` belongs to an array of shape `old`, which becomes `new`. [1, 1, 1, C] of [B, H, W, C]
    becomes [1, H, W, C] if (H, W, C) become one axis. Sizes may be symbols, but not of these axes.

    >>> import numpy as np
    >>> from jaxbn._folding.constants import expanded
    >>> expanded(np.ones((1, 1, 1, 3)), (8, 2, 2, 3), (8, 12)).shape
    (1, 2, 2, 3)
    """
    varies = [axis for axis, size in enumerate(value.shape) if size > 1]
    if not varies:
        return value
    for first in range(varies[0], -1, -1):
        for last in range(varies[-1] + 1, len(old) + 1):
            sizes = old[first:last]
            if all(isinstance(n, int) for n in sizes) and _as_axes(old, new, first, last):
                return np.broadcast_to(value, value.shape[:first] + sizes + value.shape[last:])
    return value


def _as_axes(
    old: tuple[Any, ...], new: tuple[Any, ...], first: int, last: int
) -> tuple[int, int] | None:
    """The axes of `new` that hold the axes from first to last of `old`, and no other."""
    before, inside = math.prod(old[:first]), math.prod(old[first:last])
    for start in range(len(new)):
        for stop in range(start + 1, len(new) + 1):
            if math.prod(new[:start]) == before and math.prod(new[start:stop]) == inside:
                return start, stop
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
    if (axes := _as_axes(old, new, first, last)) is None:
        return None
    start, stop = axes
    return value.reshape((1,) * start + new[start:stop] + (1,) * (len(new) - stop))
