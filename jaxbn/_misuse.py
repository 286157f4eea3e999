"""Calls whose arguments are missing, swapped or of another kind: the errors say what to write."""

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

from jaxbn._text import a_kind

P = ParamSpec("P")
R = TypeVar("R")
FUNCTION = "an inference function with its weights closed over"


def misuse(call: str, args: Iterable[Any], expected: str, write: str) -> TypeError:
    """The refusal of a call with such arguments.

    Args:
      call: the public call.
      args: what came, in order.
      expected: what was expected.
      write: the line to write instead.

    >>> from jaxbn import _misuse
    >>> print(_misuse.misuse("gap", [{}, 3], "a model and a batch", "gap(model, x)"))
    gap: called with (dict, int), expected a model and a batch; write gap(model, x).
    """
    came = ", ".join(type(v).__name__ for v in args)
    return TypeError(f"{call}: called with ({came}), expected {expected}; write {write}.")


def takes(
    expected: str, write: str, call: str | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: a call with too few or too many arguments ends in `misuse`.

    Keywords that the function does not have are left to Python, which names them.

    Args:
      expected: what the function takes.
      write: the line to write.
      call: the public call; None for the function's name.

    >>> from jaxbn import _misuse
    >>> @_misuse.takes("two numbers", "add(1, 2)")
    ... def add(a, b):
    ...     return a + b
    >>> add(1)
    Traceback (most recent call last):
        ...
    TypeError: add: called with (int), expected two numbers; write add(1, 2).
    """

    def decorate(fn: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(fn)

        @functools.wraps(fn)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                signature.bind(*args, **kwargs)
            except TypeError:
                if signature.parameters.keys() >= kwargs.keys():
                    came = (*args, *kwargs.values())
                    raise misuse(call or fn.__name__, came, expected, write) from None
            return fn(*args, **kwargs)

        return checked

    return decorate


def is_unbound(model: Any) -> bool:
    """Whether this is a linen module without variables, which Python can call and Flax cannot.

    >>> import flax.linen as nn
    >>> from jaxbn import _misuse
    >>> _misuse.is_unbound(nn.Dense(3)), _misuse.is_unbound(nn.Dense(3).bind({}))
    (True, False)
    """
    linen = sys.modules.get("flax.linen")  # if the program has not imported it, none is linen's
    return linen is not None and isinstance(model, linen.Module) and model.scope is None


def check_function(call: str, fn: Any, write: str, expected: str = FUNCTION) -> None:
    """Raises unless fn is a function of data alone: no model without its weights, and no weights.

    Args:
      call: the public call.
      fn: what was given.
      write: the line to write instead.
      expected: what is expected.

    >>> from jaxbn import _misuse
    >>> _misuse.check_function("serving", {}, "health.serving(fn, x)")
    Traceback (most recent call last):
        ...
    TypeError: serving: fn is a dict, expected an inference function with its weights closed over; \
write health.serving(fn, x).
    """
    its_apply = is_unbound(getattr(fn, "__self__", None))
    if not callable(fn) or is_unbound(fn) or its_apply:
        what = "a linen module without its variables" if callable(fn) else a_kind(fn)
        what = "apply of " * its_apply + what
        raise TypeError(f"{call}: fn is {what}, expected {expected}; write {write}.")


def are_batches(batches: Any) -> bool:
    """Whether this can be an iterable of batches: no array of a rank below 3, no dict, no name.

    An array of rank 3 or more may be batches in a row.

    >>> import numpy as np
    >>> from jaxbn import _misuse
    >>> [_misuse.are_batches(v) for v in ([1], np.ones((2, 8, 3)), np.ones((8, 3)), {"x": 1})]
    [True, True, False, False]
    """
    if getattr(batches, "ndim", 3) < 3 or isinstance(batches, Mapping | str | os.PathLike):
        return False
    return isinstance(batches, Iterable)


def check_batches(call: str, batches: Any, write: str) -> None:
    """Raises unless `are_batches`.

    Args:
      call: the public call.
      batches: what was given.
      write: the line to write instead.

    >>> import numpy as np
    >>> from jaxbn import _misuse
    >>> _misuse.check_batches("int8", np.ones((8, 3)), "int8(source, [x], path)")
    Traceback (most recent call last):
        ...
    TypeError: int8: batches is an array of shape (8, 3), expected an iterable of batches, such as \
a list; write int8(source, [x], path).
    """
    if not are_batches(batches):
        array = hasattr(batches, "shape")
        what = f"an array of shape {batches.shape}" if array else a_kind(batches)
        raise TypeError(
            f"{call}: batches is {what}, expected an iterable of batches, such as a list; write "
            f"{write}."
        )


def check_by_path(
    call: str, by_path: Any, kinds: tuple[type, ...], write: str, source: str
) -> None:
    """Raises unless `by_path` is a dict, path → kind; the error says where to get such a dict.

    Args:
      call: the public call.
      by_path: what was given.
      kinds: the types of the values; the first one is named.
      write: the line to write instead.
      source: what gives such a dict.

    >>> from jaxbn import _misuse
    >>> _misuse.check_by_path("f", {"bn": 1.0}, (int,), "f({'bn': 1})", "g")
    Traceback (most recent call last):
        ...
    TypeError: f: called with dict of ['float'], expected a dict, path → int of each layer, as g \
gives; write f({'bn': 1}).
    """
    keyed = isinstance(by_path, Mapping)
    if keyed and all(isinstance(v, kinds) for v in by_path.values()):
        return
    came = type(by_path).__name__
    if keyed:
        came += f" of {sorted({type(v).__name__ for v in by_path.values()})}"
    raise TypeError(
        f"{call}: called with {came}, expected a dict, path → {kinds[0].__name__} of each layer, "
        f"as {source} gives; write {write}."
    )
