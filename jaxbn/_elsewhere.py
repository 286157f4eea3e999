"""Names of other libraries that users look for here: the errors say what to write instead."""

import functools
import re
from collections.abc import Callable
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


def attribute(name: str) -> str:
    """The message for an attribute that the package does not have.

    >>> from jaxbn import _elsewhere
    >>> _elsewhere.attribute("init_state")
    "module 'jaxbn' has no attribute 'init_state'"
    """
    said = f"module 'jaxbn' has no attribute {name!r}"
    near = r"(sync)?batchnorm(alization)?(layer)?([123]d)?"
    found = re.fullmatch(near, name.replace("_", "").lower())
    if found is None:
        return said
    if found[1]:
        return (
            f"{said}; write axis_name= of jaxbn.linen.BatchNorm, jaxbn.nnx.BatchNorm or "
            f"jaxbn.batch_norm, which pools statistics over that axis of shard_map, pmap or vmap. "
            f"Under jit on sharded arrays statistics are global without it."
        )
    return (
        f"{said}; write jaxbn.linen.BatchNorm or jaxbn.nnx.BatchNorm in a Flax model, "
        f"jaxbn.batch_norm in functions of your own."
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
