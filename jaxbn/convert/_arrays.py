"""The words of a conversion: what an array is for, one that comes, one that is wanted."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Role(NamedTuple):
    """The role of an array in its layer."""

    leaf: str  # kernel, bias, scale, mean, var, …: the last part of the path in Flax
    transpose_kernel: bool | None = None  # set for transposed convolutions only
    flattened: tuple[int, ...] | None = None  # (H, W, C) behind the inputs of a dense layer


class Tensor(NamedTuple):
    """One array of the source."""

    key: str
    layer: str
    form: Callable[[Role], tuple[str, np.ndarray] | None]  # role → what was done, and the array
    array: np.ndarray


class Slot(NamedTuple):
    """A place in the target."""

    path: str
    layer: str
    role: Role
    shape: tuple[int, ...]
    dtype: Any
