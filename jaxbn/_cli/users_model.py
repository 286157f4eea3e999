"""The arrays of a checkpoint in a model that the user's own code describes."""

import importlib
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from jaxbn import convert
from jaxbn._checkpoints.contents import is_torch, state_dict, variables
from jaxbn._text import first_line, printable
from jaxbn.convert._report import Report


class Network(NamedTuple):
    """What `jaxbn.recalibrate` takes: a model, how it is run, and data."""

    apply: Callable[..., Any]  # apply(model, batch), in eval mode
    model: Any  # linen's variables or an nnx module; shapes will do
    batches: Iterable[Any]


def network(name: str) -> Network:
    """What the function `module:function` returns: its module is imported, and so runs.

    Raises:
      ValueError: there is no such function, it fails, or it returns something else.

    >>> from jaxbn._cli import users_model
    >>> users_model.network("resnet")
    Traceback (most recent call last):
        ...
    ValueError: network: 'resnet' names no function, expected module:function
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"network: {name!r} names no function, expected module:function")
    try:
        made = getattr(importlib.import_module(module), function)()
    except (Exception, SystemExit) as error:  # `sys.exit()` of a script that runs when imported
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f"network: {name} fails: {_called(error)} ({printable(frame.filename)}, line "
            f"{frame.lineno}); expected a function of an importable module, called as {function}()."
        ) from error
    if not isinstance(made, tuple) or len(made) != 3 or not callable(made[0]):
        raise ValueError(
            f"network: {name} returns a {type(made).__name__}, expected a tuple (apply, model, "
            f"batches) with apply(model, batch), as jaxbn.recalibrate takes them."
        )
    return Network(*made)


def load(
    tree: Mapping[str, Any],
    like: Any,
    *,
    rename: Mapping[str, str | None] | None = None,
    keep: Iterable[str] = (),
    epsilon: float = 1e-5,
) -> tuple[Any, Report]:
    """Equals `like` with the arrays of a checkpoint, every one in its place, by `jaxbn.convert`.

    Args:
      tree: linen's variables, an nnx state, or a PyTorch state_dict, as `checkpoints.read` gives
        them.
      like: linen's variables, an nnx module or its state; shapes will do.
      rename: layer of the checkpoint, or a beginning of its path → layer of like; None drops it.
      keep: layers of like that stay as they are.
      epsilon: that of a PyTorch model, whose file does not say.

    Raises:
      ValueError: something does not fit; all that does not is listed.

    >>> import numpy as np
    >>> from jaxbn._cli import users_model
    >>> like = {"params": {"fc": {"kernel": np.zeros((3, 2))}}}
    >>> new, _ = users_model.load({"fc": {"weight": np.ones((2, 3))}}, like)
    >>> new["params"]["fc"]["kernel"].shape
    (3, 2)
    """
    options: dict[str, Any] = {"rename": rename, "keep": keep}
    if is_torch(tree):
        return convert.from_torch(state_dict(tree), like, eps=epsilon, **options)
    call = convert.nnx_to_linen if isinstance(like, Mapping) else convert.linen_to_nnx
    return call(variables(tree), like, **options)


def _called(error: BaseException) -> str:
    """The kind of an error and what it says, on one line."""
    kind, line = type(error).__name__, first_line(error)
    return line if line.startswith(kind) else f"{kind}: {line}"
