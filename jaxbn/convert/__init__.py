"""Weights and statistics of PyTorch, Keras, Haiku and Equinox into Flax, and back to PyTorch.

Every call takes a source and `like`, a model of the target kind whose arrays say what is wanted:
their names and shapes. The call returns a new model with the source's values, and a `Report`.
Either all arrays fit, or one error lists all that do not. Arguments are not converted; the report
lists the momentum, epsilon and `unbiased` with which each batch norm continues as in the source.

Layers are matched by name, up to separators: `layer1.0.conv1` is `layer1_0/conv1` and
`layer1/0/conv1`. If the two sides share no name at all, layers are matched by the numbers in their
names (`conv1`, `conv2` are `Conv_0`, `Conv_1`; ResNets of torchvision and timm in the order of
their forward pass), or by shapes that occur once. Every shape must agree. In all other cases
`rename` gives the names: a mapping of layers or beginnings of their names, or a function. None for
a name drops the layer.
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
