"""Weights and running statistics from PyTorch, Keras, Haiku and Equinox to Flax, between Flax's
linen and nnx, and back to PyTorch.

Every call takes the source and `like`, a model of the target kind that says which arrays there are
and of what shape. It returns a new one with the source's values, and a `Report`. Either all arrays
fit, or one error lists all that do not. What is brought over is arrays; the arguments with which
batch norm goes on as in the source are in the report: momentum, epsilon, `unbiased`.

Layers are matched by name, up to separators (`layer1.0.conv1` is `layer1_0/conv1` and
`layer1/0/conv1`). Where no name is shared at all, by the numbers in the names (`conv1`, `conv2` are
`Conv_0`, `Conv_1`; ResNets of torchvision and timm in the order of their forward pass), or by
shapes that occur once; every shape must agree. Otherwise `rename` says it: a mapping of layers or
beginnings of their names, or a function; None for a name drops a layer.
"""

from jaxbn.convert._into_flax import (
    from_equinox,
    from_haiku,
    from_keras,
    from_torch,
    linen_to_nnx,
    nnx_to_linen,
)
from jaxbn.convert._into_torch import to_torch
from jaxbn.convert._norm_arguments import norm_arguments
from jaxbn.convert._report import Report

__all__ = [
    "Report",
    "from_equinox",
    "from_haiku",
    "from_keras",
    "from_torch",
    "linen_to_nnx",
    "nnx_to_linen",
    "norm_arguments",
    "to_torch",
]
