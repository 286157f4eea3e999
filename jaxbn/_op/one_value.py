"""Training on one value per channel: the Flax modules do as Flax's do, and warn."""

import sys
import warnings
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._op.arguments.pools import OneValueError
from jaxbn._op.batch_norm import batch_norm
from jaxbn._op.state import Params, State

LIBRARIES = {"jaxbn", "flax", "jax", "contextlib", "functools"}


class OneValueWarning(UserWarning):
    """A Flax module trains with one value per channel, so y is bias whatever x is.

    It comes with every such call or trace: Python's filters decide what is shown.

    >>> import warnings, jaxbn
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("error", jaxbn.OneValueWarning)  # as an error, while this runs
    """


def train_anyway(
    path: str, x: jax.Array, params: Params, state: State, *, mask: Any = None, **options: Any
) -> tuple[jax.Array, Any]:
    """Equals `batch_norm`, which also takes one value per channel here, as Flax does.

    Then y is bias, and the state learns x as the mean and 0 as the var, as ever.

    Args:
      path: of the layer, for the warning; "" where it is not known.
      x: as in `batch_norm`, as all that follow.
      params: likewise.
      state: likewise.
      mask: likewise.
      **options: likewise.
    """
    try:
        return batch_norm(x, params, state, mask=mask, **options)
    except OneValueError as error:
        what, remedy = error.what, error.remedy  # not the error, which holds this frame and x
    layer = f"BatchNorm {path!r}" if path else "BatchNorm"
    warnings.warn(
        f"{layer}: {what}, so y is bias whatever x is; expected at least 2 in training. {remedy}, "
        f"or normalize by the running statistics with use_running_average=True (nnx: "
        f"model.eval()).",
        OneValueWarning,
        stacklevel=_to_the_user(),
    )
    # What a mask leaves is known only when it runs, so nothing is refused.
    everything = jnp.ones((1,) * x.ndim, bool)
    return batch_norm(x, params, state, mask=everything, **options)


def _to_the_user() -> int:
    """The `stacklevel`, for the caller, of the innermost call that no library makes."""
    frame, level = sys._getframe(1), 1
    while frame.f_globals.get("__name__", "").partition(".")[0] in LIBRARIES and frame.f_back:
        frame, level = frame.f_back, level + 1
    return level
