"""Which axes vanish, and everything that can be wrong with shapes and dtypes.

Every check here reads shapes, dtypes and Python numbers only, so a bad call is refused
before any work, under `jit` as in eager code.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class OneValueError(ValueError):
    """Training statistics over one value per channel; its words are for whoever goes on."""

    what: str
    remedy: str


class Axes(NamedTuple):
    """The axes of one x, sorted: `features` keep their statistics apart, `reduced` vanish."""

    features: tuple[int, ...]
    reduced: tuple[int, ...]

    def expand(self, v: jax.Array) -> jax.Array:
        """Equals v [features] with ones where x has reduced axes, to broadcast against x."""
        return jnp.expand_dims(v, self.reduced)

    def count(self, x: jax.Array) -> int:
        """Values of x per channel, known from the shape."""
        return math.prod(x.shape[a] for a in self.reduced)


def promote(*dtypes: Any) -> Any:
    """The dtype that holds them all, also where JAX is told to refuse implicit promotion."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes)


def resolve(call: str, x: jax.Array, axis: int | Sequence[int]) -> Axes:
    """The axes of x for feature axis (or axes) `axis`, or an error that names the call."""
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"{call}: x has dtype {x.dtype}, but statistics need a floating or complex dtype; "
            f"write x.astype(jnp.float32)."
        )
    if x.ndim == 0:
        raise ValueError(
            f"{call}: x is a scalar, but a feature axis was expected; write x[None, None]."
        )
    given = tuple(axis) if isinstance(axis, Sequence) else (axis,)
    if not given or not all(isinstance(a, int) and -x.ndim <= a < x.ndim for a in given):
        raise ValueError(
            f"{call}: axis={axis!r} does not name axes of x with shape {x.shape}; "
            f"expected integers from {-x.ndim} to {x.ndim - 1}, axis=-1 for channels last."
        )
    features = tuple(sorted({a % x.ndim for a in given}))
    return Axes(features, tuple(a for a in range(x.ndim) if a not in features))


def check_kind(call: str, kind: Any, value: Any) -> Any:
    """`value` as the NamedTuple `kind`, from one or from any tuple of as many leaves."""
    if not isinstance(value, tuple) or len(value) != len(kind._fields):
        name, fields = kind.__name__, ", ".join(kind._fields)
        raise TypeError(
            f"{call}: {name.lower()} is {type(value).__name__}, expected jaxbn.{name}({fields}) or "
            f"None; write params, state = jaxbn.init(features)."
        )
    return kind(*value)


def check_features(call: str, what: str, v: Any, x: jax.Array, axes: Axes) -> None:
    """`v`, called `what` in the error, must have exactly the shape of the feature axes."""
    expected = tuple(x.shape[a] for a in axes.features)
    if np.shape(v) != expected:
        features = expected[0] if len(expected) == 1 else expected
        raise ValueError(
            f"{call}: {what} has shape {np.shape(v)}, but x with shape {x.shape} has features "
            f"{expected} on axes {axes.features}; write jaxbn.init({features}), or pass the "
            f"feature axis as axis=."
        )


def check_mask(call: str, mask: Any, x: jax.Array) -> jax.Array:
    """`mask` as booleans with x's rank; broadcastable to x, or an error with the line to write."""
    mask = jnp.asarray(mask)
    if mask.dtype != bool:
        mask = mask != 0
    tail = x.shape[x.ndim - mask.ndim :] if mask.ndim <= x.ndim else None
    if tail is None or any(m not in (1, n) for m, n in zip(mask.shape, tail, strict=True)):
        remedy = "A mask broadcasts as in NumPy, from the last axis backwards."
        if mask.shape == x.shape[: mask.ndim]:
            nones = ", ".join(["None"] * (x.ndim - mask.ndim))
            remedy = f"A mask over the leading axes: mask[..., {nones}]."
        raise ValueError(
            f"{call}: mask has shape {mask.shape} but x has shape {x.shape}; expected a shape "
            f"that broadcasts to x. {remedy}"
        )
    return jnp.expand_dims(mask, tuple(range(x.ndim - mask.ndim)))


def check_numbers(call: str, momentum: float | None, epsilon: float) -> None:
    """Momentum in [0, 1], None or traced; epsilon finite and not negative."""
    traced = isinstance(momentum, jax.core.Tracer)
    if momentum is not None and not traced and not 0 <= momentum <= 1:
        raise ValueError(
            f"{call}: momentum={momentum!r}, expected a number in [0, 1], the fraction of the old "
            f"value that is kept (PyTorch's momentum m is 1 - m here), or None for the cumulative "
            f"average; write momentum=0.99."
        )
    if not 0 <= epsilon < math.inf:
        raise ValueError(
            f"{call}: epsilon={epsilon!r}, expected a finite number of at least 0, added to the "
            f"variance; write epsilon=1e-5."
        )


def check_ghosts(call: str, x: jax.Array, axes: Axes, virtual_batch_size: int) -> tuple[int, int]:
    """The axis of x that ghost batches divide and their number, or an error with fitting sizes."""
    if not axes.reduced:
        raise ValueError(
            f"{call}: virtual_batch_size={virtual_batch_size} but x with shape {x.shape} has no "
            f"batch axis beside its feature axes {axes.features}; leave virtual_batch_size out."
        )
    batch_axis = axes.reduced[0]
    rows = x.shape[batch_axis]
    if virtual_batch_size < 1 or rows % virtual_batch_size:
        sizes = [d for d in range(1, rows + 1) if rows % d == 0]
        raise ValueError(
            f"{call}: virtual_batch_size={virtual_batch_size} does not divide the {rows} rows on "
            f"axis {batch_axis} of x with shape {x.shape}; write one of {sizes}."
        )
    return batch_axis, rows // virtual_batch_size


def check_dtype(call: str, dtype: Any) -> None:
    """The dtype asked for y can hold it."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"{call}: dtype={dtype}, but y is floating or complex; write dtype=jnp.float32, or "
            f"leave dtype out for that of x."
        )


def check_count(call: str, x: jax.Array, count: int, virtual_batch_size: int | None) -> None:
    """Refuse training statistics over exactly one value per channel: y would be bias alone."""
    if count == 1:
        where, remedy = "over all devices", "Use a larger batch, pool devices with axis_name="
        if virtual_batch_size is not None:
            where = f"in each group of virtual_batch_size={virtual_batch_size}"
            remedy = "Use a larger virtual_batch_size"
        what = f"x with shape {x.shape} has one value per channel {where}"
        error = OneValueError(
            f"{call}: {what}, and its variance is 0, so y would be bias whatever x is; expected at "
            f"least 2 in training. {remedy}, or normalize by the running statistics with "
            f"train=False."
        )
        error.what, error.remedy = what, remedy
        raise error
