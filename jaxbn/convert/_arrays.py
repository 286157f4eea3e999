"""The words of a conversion: Role, Tensor (an array of the source), Slot (its place), Request."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

Rename = Mapping[str, str | None] | Callable[[str], str | None]


class Role(NamedTuple):
    """The role of an array in its layer, in Flax's terms."""

    leaf: str  # the last part of the path in Flax: kernel, bias, scale, mean, var, …
    transpose_kernel: bool | None = None  # set for transposed convolutions only
    # (H, W, C) of the image that was flattened to the inputs of a dense layer, and of the image
    # that is made of the outputs of a dense layer or of the features of a norm
    flattened: tuple[int, ...] | None = None
    outputs: tuple[int, ...] | None = None
    ndim: int | None = None  # of the array; None if any will do


class Tensor(NamedTuple):
    """One array of the source."""

    key: str
    layer: str
    # role → what was done, and the array; None if this array has another role
    form: Callable[[Role], tuple[str, np.ndarray] | None]
    array: np.ndarray


class Slot(NamedTuple):
    """The place of one array in the target."""

    path: str
    layer: str
    role: Role
    shape: tuple[int, ...]
    dtype: Any


class Request(NamedTuple):
    """What a caller asks of a conversion into Flax, whatever the source."""

    call: str  # the public function, for errors
    like: Any  # linen's variables, an nnx module or its state
    rename: Rename | None = None
    keep: Iterable[str] = ()
    transposed: Mapping[str, bool] | None = None
    flattened: Mapping[str, Any] | None = None  # None: the source flattens as Flax does
