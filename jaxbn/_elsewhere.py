"""Names of other libraries that users look for here: the errors say what to write instead."""

import functools
import re
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import ParamSpec

P = ParamSpec("P")

# Arguments of PyTorch's, Keras' and Haiku's batch norm → the argument of Flax's modules.
ARGUMENTS = {
    "eps": "epsilon={0!r}",
    "affine": "use_scale={0!r}, use_bias={0!r}",
    "scale": "use_scale={0!r}",
    "center": "use_bias={0!r}",
    "create_scale": "use_scale={0!r}",
    "create_offset": "use_bias={0!r}",
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
    if write and caller.f_code.co_name == "_handle_fromlist":
        return ImportError(f"cannot import name {name!r} from 'jaxbn'; {write}", name="jaxbn")
    said = f"module 'jaxbn' has no attribute {name!r}"
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


def takes_flax_arguments(init: Callable[P, None]) -> Callable[P, None]:
    """Wraps a module's `__init__`: another library's argument raises with the name to write.

    >>> from jaxbn import _elsewhere
    >>> init = _elsewhere.takes_flax_arguments(lambda self, epsilon=1e-5: None)
    >>> init(None, eps=1e-3)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    TypeError: BatchNorm: eps=0.001 is no argument of Flax's, ...; write epsilon=0.001.
    """

    @functools.wraps(init)
    def __init__(*args: P.args, **kwargs: P.kwargs) -> None:  # noqa: N807
        for name in kwargs.keys() & ARGUMENTS:
            value = kwargs[name]
            raise TypeError(
                f"BatchNorm: {name}={value!r} is no argument of Flax's, expected its name; write "
                f"{ARGUMENTS[name].format(value)}."
            )
        init(*args, **kwargs)

    return __init__
