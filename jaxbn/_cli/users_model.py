"""The user's own model: its code is imported and run here, and nowhere else in the package."""

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from jaxbn import convert
from jaxbn._checkpoints.contents import Contents
from jaxbn._misuse import are_batches
from jaxbn._text import a_kind, first_line, printable
from jaxbn.convert._report import Report


class Network(NamedTuple):
    """A model, the function that runs it, and data, as `jaxbn.recalibrate` takes them."""

    apply: Callable[..., Any]  # apply(model, batch), in eval mode
    model: Any  # linen's variables or an nnx module; shapes will do
    batches: Iterable[Any]


def network(name: str) -> Network:
    """Imports the module of `module:function` and calls the function. Both run the user's code.

    Raises:
      ValueError: the function does not exist, fails, or returns something else.

    >>> from jaxbn._cli import users_model
    >>> users_model.network("resnet")
    Traceback (most recent call last):
        ...
    ValueError: network: 'resnet' names no function, expected module:function
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"network: {name!r} names no function, expected module:function")
    if os.getcwd() not in sys.path:  # `python -m jaxbn` has it; the command `jaxbn` does not
        sys.path.append(os.getcwd())
    try:
        made = getattr(importlib.import_module(module), function)()
    except (Exception, SystemExit) as error:  # a script may call `sys.exit()` when it is imported
        raise ValueError(
            f"network: {name} fails: {called(error)}{_place(error)}; expected a function of an "
            f"importable module, called as {function}()."
        ) from error
    if not isinstance(made, tuple) or len(made) != 3 or not callable(made[0]):
        raise ValueError(
            f"network: {name} returns {a_kind(made)}, expected a tuple (apply, model, "
            f"batches) with apply(model, batch), as jaxbn.recalibrate takes them."
        )
    if not are_batches(made[2]):
        raise ValueError(
            f"network: {name} returns batches that are {a_kind(made[2])}, expected a list "
            f"or another iterable of batches; write [x]."
        )
    return Network(*made)


def load(
    source: Contents,
    like: Any,
    *,
    rename: Mapping[str, str | None] | None = None,
    keep: Iterable[str] = (),
    epsilon: float = 1e-5,
) -> tuple[Any, Report]:
    """Equals `like` with the arrays of a checkpoint in their places, by `jaxbn.convert`.

    Args:
      source: the model in the checkpoint.
      like: linen's variables, an nnx module or its state; shapes will do.
      rename: layer of the checkpoint, or a beginning of its path → layer of like; None drops it.
      keep: layers of like that stay as they are.
      epsilon: the epsilon of a PyTorch model, which is not in its file.

    Raises:
      ValueError: some arrays do not fit; the message lists all of them.

    >>> import numpy as np
    >>> from jaxbn._checkpoints.contents import Contents
    >>> from jaxbn._cli import users_model
    >>> like = {"params": {"fc": {"kernel": np.zeros((3, 2))}}}
    >>> source = Contents("torch", {"fc": {"weight": np.ones((2, 3))}})
    >>> new, _ = users_model.load(source, like)
    >>> new["params"]["fc"]["kernel"].shape
    (3, 2)
    """
    options: dict[str, Any] = {"rename": rename, "keep": keep}
    if source.kind == "torch":
        return convert.from_torch(source.state_dict(), like, eps=epsilon, **options)
    call = convert.nnx_to_linen if isinstance(like, Mapping) else convert.linen_to_nnx
    return call(source.variables(), like, **options)


def _place(error: BaseException) -> str:
    """Where the user's code failed; nothing where that code was not reached."""
    ours, frames = (__file__, importlib.__file__), traceback.extract_tb(error.__traceback__)
    theirs = [v for v in frames if not v.filename.startswith((*ours, "<frozen importlib"))]
    return f" ({printable(theirs[-1].filename)}, line {theirs[-1].lineno})" if theirs else ""


def called(error: BaseException) -> str:
    """The type of an error and its first line, on one line."""
    kind, line = type(error).__name__, first_line(error)
    return line if line.startswith(kind) else f"{kind}: {line}"
