"""Which axes of x are features and which are reduced, and the dtypes that hold statistics."""

import functools
import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Axes(NamedTuple):
    """The axes of one x, sorted: `features` keep their statistics apart, `reduced` vanish."""

    features: tuple[int, ...]
    reduced: tuple[int, ...]

    def expand(self, v: jax.Array) -> jax.Array:
        """Equals v [features] with ones where x has reduced axes, to broadcast against x."""
        return jnp.expand_dims(v, self.reduced)

    def total(self, v: jax.Array) -> jax.Array:
        """The sum of v over the reduced axes."""
        return v.sum(self.reduced)

    def count(self, x: jax.Array) -> int:
        """Values of x per channel, known from the shape."""
        return math.prod(x.shape[a] for a in self.reduced)


def has_known_sizes(x: jax.Array) -> bool:
    """Whether no size of x is a name, as in a function that is exported for any batch size."""
    return all(isinstance(size, int) for size in x.shape)


def promote(*dtypes: Any) -> Any:
    """The dtype that holds them all, also where JAX is told to refuse implicit promotion."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes)


def wide(dtype: Any) -> Any:
    """The dtype statistics are computed and kept in: float32, or `dtype` where that is wider."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def resolve(call: str, x: jax.Array, axis: int | Sequence[int]) -> Axes:
    """The axes of x for feature axis (or axes) `axis`, or an error that names the call."""
    if x.ndim == 0:
        raise ValueError(
            f"{call}: x is a scalar, expected an array [..., features] of many values for each "
            f"feature; write x of shape [batch, features] or [batch, height, width, features]."
        )
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"{call}: x has dtype {x.dtype}, but statistics need a floating or complex dtype; "
            f"write x.astype(jnp.float32)."
        )
    if jnp.finfo(x.dtype).bits < 16:
        raise TypeError(
            f"{call}: x has dtype {x.dtype}, but JAX promotes no dtype of fewer than 16 bits; "
            f"write x.astype(jnp.bfloat16)."
        )
    given = tuple(axis) if isinstance(axis, Sequence) else (axis,)
    if not given or not all(is_integer(a) and -x.ndim <= a < x.ndim for a in given):
        raise ValueError(
            f"{call}: axis={axis!r} does not name axes of x with shape {x.shape}; "
            f"expected integers from {-x.ndim} to {x.ndim - 1}, axis=-1 for channels last."
        )
    features = tuple(sorted({int(a) % x.ndim for a in given}))
    return Axes(features, tuple(a for a in range(x.ndim) if a not in features))


def is_integer(v: Any) -> bool:
    """Whether v is an integer of Python or NumPy, and no bool."""
    return isinstance(v, numbers.Integral) and not isinstance(v, bool)


def check_number(call: str, name: str, number: Any) -> int:
    """The number of domains or classes, or an error with the line to write."""
    if not is_integer(number) or number < 1:
        raise (ValueError if is_integer(number) else TypeError)(
            f"{call}: {name}={number!r}, expected how many there are, an integer of at least 1, or "
            f"None for one without an axis of its own; write {name}=2."
        )
    return int(number)


def check_dtype(call: str, what: str, dtype: Any, otherwise: str) -> Any:
    """The dtype asked for, which can hold what it is asked for, and JAX computes with it."""
    try:
        dtype = jnp.dtype(dtype)
    except (TypeError, ValueError):
        raise TypeError(
            f"{call}: dtype={dtype!r}, expected a dtype of JAX or NumPy; write dtype=jnp.float32, "
            f"or {otherwise}."
        ) from None
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"{call}: dtype={dtype}, but {what} are floating or complex; write "
            f"dtype=jnp.float32, or {otherwise}."
        )
    if jnp.finfo(dtype).bits < 16:
        raise TypeError(
            f"{call}: dtype={dtype}, but JAX promotes no dtype of fewer than 16 bits; write "
            f"dtype=jnp.bfloat16, or {otherwise}, and cast what comes out."
        )
    return dtype
