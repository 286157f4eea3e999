"""Names of other libraries that users look for here: the errors say what to write instead."""

import functools
import re
from collections.abc import Callable, Mapping
from types import FrameType, ModuleType
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])

# Keywords of other libraries' batch norms → the keyword of `jaxbn.batch_norm`.
KEYWORDS = {
    "eps": "epsilon={0!r}",
    "decay": "momentum={0!r}",
    "decay_rate": "momentum={0!r}",
    "training": "train={0!r}",
    "is_training": "train={0!r}",
    "use_running_average": "train=not use_running_average",
    "weight": "params=jaxbn.Params(scale, bias)",
}

# Arguments of PyTorch's, Keras' and Haiku's batch norm → the argument of Flax's modules.
ARGUMENTS = {
    "eps": "epsilon={0!r}",
    "affine": "use_scale={0!r}, use_bias={0!r}",
    "scale": "use_scale={0!r}",
    "center": "use_bias={0!r}",
    "create_scale": "use_scale={0!r}",
    "create_offset": "use_bias={0!r}",
    "decay": "momentum={0!r}",
    "decay_rate": "momentum={0!r}",
    "train": "use_running_average=not train",
    "training": "use_running_average=not training",
    "is_training": "use_running_average=not is_training",
}


def missing(name: str, package: ModuleType, caller: FrameType) -> Exception:
    """The error for an attribute that the package does not have: what to write instead, if known.

    `from jaxbn import NAME` replaces an AttributeError by a message of its own, so a known name is
    an ImportError there.

    >>> import sys, jaxbn
    >>> from jaxbn import _elsewhere
    >>> _elsewhere.missing("init_state", jaxbn, sys._getframe())
    AttributeError("module 'jaxbn' has no attribute 'init_state'")
    """
    write = instead(name)
    here = package.__name__
    if write and caller.f_code.co_name == "_handle_fromlist":
        return ImportError(f"cannot import name {name!r} from {here!r}; {write}", name=here)
    said = f"module {here!r} has no attribute {name!r}"
    return AttributeError(f"{said}; {write}" if write else said, name=name, obj=package)


def instead(name: str) -> str:
    """What to write in place of a name of another library; empty for any other name.

    >>> from jaxbn import _elsewhere
    >>> _elsewhere.instead("init_state")
    ''
    """
    near = r"(sync)?batchnorm(alization)?(layer)?([123]d)?"
    found = re.fullmatch(near, name.replace("_", "").lower())
    if found is None:
        return ""
    if found[1]:
        return (
            "write axis_name= of jaxbn.linen.BatchNorm, jaxbn.nnx.BatchNorm or jaxbn.batch_norm, "
            "which pools statistics over that axis of shard_map, pmap or vmap. Under jit on "
            "sharded arrays statistics are global without it."
        )
    return (
        "write jaxbn.linen.BatchNorm or jaxbn.nnx.BatchNorm in a Flax model, jaxbn.batch_norm in "
        "functions of your own."
    )


def names_keywords(call: str, table: Mapping[str, str]) -> Callable[[F], F]:
    """Wraps `call`: another library's keyword raises an error with the keyword to write here.

    A wrapper, because `**kwargs` in the signature would hide typing errors from type checkers.

    >>> from jaxbn import _elsewhere
    >>> f = _elsewhere.names_keywords("f", {"eps": "epsilon={0!r}"})(lambda epsilon=1e-5: None)
    >>> f(eps=1e-3)
    Traceback (most recent call last):
    TypeError: f: eps=0.001 is another library's keyword; write epsilon=0.001.
    """

    def wrap(f: F) -> F:
        @functools.wraps(f)
        def called(*args: Any, **kwargs: Any) -> Any:
            for name in kwargs:
                if name in table:
                    given = kwargs[name]
                    raise TypeError(
                        f"{call}: {name}={given!r} is another library's keyword; write "
                        f"{table[name].format(given)}."
                    )
            return f(*args, **kwargs)

        return cast(F, called)

    return wrap
