"""An nnx layer changes its class and stays the same object, with the same variables.

Lists, dicts and other modules hold the layer itself, so they see the change. A class may change for
good (`freeze`, `swap`) or for a while (`hooks.hooked_nnx`).
"""

import copyreg
import functools
from collections.abc import Callable
from typing import Any

MADE_BY = "jaxbn_made_by"  # attribute of a class of `subclass`: the arguments that made the class


@functools.lru_cache(maxsize=64)
def subclass(cls: Any, name: str, call: Callable[..., Any], *args: Any) -> Any:
    """A subclass of an nnx layer's class with another `__call__`; equal arguments give one class.

    The class pickles as this call with these arguments. An ordinary class made at run time does
    not pickle: Python looks for a class in the module that the class names.

    Args:
      cls: the layer's class.
      name: of the new class.
      call: `call(cls, *args)` returns the new `__call__`. A function of a module, if the class is
        to pickle.
      *args: hashable.

    >>> import pickle
    >>> from flax import nnx
    >>> from jaxbn._adapt.freeze import frozen_class
    >>> frozen = frozen_class(nnx.BatchNorm)
    >>> pickle.loads(pickle.dumps(frozen)) is frozen
    True
    """
    meta: Any = type(cls)
    body = {
        "__call__": call(cls, *args),
        "__module__": cls.__module__,
        MADE_BY: (cls, name, call, *args),
    }
    # A base for all such classes would be plainer, but Python refuses to assign a class with
    # other bases to an object: the layouts of their instances differ.
    return _picklable(meta)(name, (cls,), body)


def exchange(layer: Any, cls: Any) -> None:
    """Give the layer this class. nnx modules refuse the assignment, `object` does not."""
    object.__setattr__(layer, "__class__", cls)


def restore(layer: Any) -> None:
    """Give the layer the class that its class of `subclass` was made from."""
    exchange(layer, type(layer).__base__)


def has_class_of(layer: Any, call: Callable[..., Any]) -> bool:
    """Whether the layer's class, or a class below that, is a `subclass` with this call."""
    made = (vars(cls).get(MADE_BY) for cls in type(layer).__mro__)
    return any(arguments is not None and arguments[2] is call for arguments in made)


@functools.cache
def _picklable(meta: Any) -> Any:
    """A metaclass whose classes pickle as the call of `subclass` that made them.

    A user's own class that derives from such a class has the metaclass too, but was not made by
    `subclass`: pickle takes the user's class by name.
    """
    new = type(meta.__name__, (meta,), {})

    def reduce(cls: Any) -> Any:
        made_by = vars(cls).get(MADE_BY)
        return cls.__qualname__ if made_by is None else (subclass, made_by)

    copyreg.pickle(new, reduce)
    return new
