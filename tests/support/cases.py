"""One table of batch-norm calls, from the networks they come from.

Tests read `SMALL`; benchmarks read the shapes of `LARGE`, as they stand in those networks.
"""

import math
from typing import NamedTuple

import ml_dtypes
import numpy as np


class Case(NamedTuple):
    name: str
    network: str
    shape: tuple[int, ...]
    axis: int | tuple[int, ...] = -1
    dtype: str = "float32"
    mask: str | None = None

    @property
    def axes(self):
        """The feature axes, sorted."""
        axis = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        return tuple(sorted(a % len(self.shape) for a in axis))

    @property
    def features(self):
        """Shape of the statistics."""
        return tuple(self.shape[a] for a in self.axes)

    @property
    def count(self):
        """Values per channel."""
        return math.prod(self.shape) // math.prod(self.features)


CASES = (
    Case("dense", "MLP", (33, 10)),
    Case("conv1d", "wav2letter", (4, 9, 6)),
    Case("conv2d", "ResNet", (4, 6, 6, 5)),
    Case("conv3d", "R(2+1)D", (2, 3, 4, 4, 5)),
    Case("channels first", "ResNet from PyTorch", (4, 5, 6, 7), axis=1),
    Case("features first", "transposed MLP", (5, 12), axis=0),
    Case("two features", "per-head norm of attention", (8, 7, 3, 4), axis=(2, 3)),
    Case("features apart", "spectrogram, per channel and band", (5, 6, 4, 3), axis=(-1, 1)),
    Case("bfloat16", "ResNet in mixed precision", (4, 6, 6, 5), dtype="bfloat16"),
    Case("float16", "ResNet in mixed precision", (4, 6, 6, 5), dtype="float16"),
    Case("float64", "physics-informed MLP", (32, 6), dtype="float64"),
    Case("complex64", "MRI reconstruction", (4, 6, 6, 3), dtype="complex64"),
    Case("padded batch", "ResNet, last batch", (6, 4, 4, 5), mask="rows"),
    Case("padded sequences", "Tacotron", (4, 9, 6), mask="lengths"),
    Case("valid pixels", "partial convolution", (4, 6, 6, 5), dtype="bfloat16", mask="cells"),
    Case("mask per feature", "tabular data with gaps", (24, 6), mask="features"),
    Case("masked, channels first", "TCN", (4, 5, 9), axis=1, mask="lengths"),
    Case("stem", "ResNet-50, batch 64", (64, 112, 112, 64)),
    Case("stage 1", "ResNet-50, batch 64", (64, 56, 56, 64)),
    Case("stage 1 expanded", "ResNet-50, batch 64", (64, 56, 56, 256)),
    Case("stage 3 expanded", "ResNet-50, batch 32", (32, 14, 14, 1024)),
    Case("stage 3", "CIFAR ResNet-18, batch 128", (128, 8, 8, 512)),
    Case("projector", "SimSiam", (8192, 1024)),
    Case("few channels", "tabular MLP", (100_000, 32)),
    Case("stage 1, bfloat16", "ResNet-50, batch 64", (64, 56, 56, 64), dtype="bfloat16"),
)
SMALL = tuple(case for case in CASES if math.prod(case.shape) < 10_000)
LARGE = tuple(case for case in CASES if case not in SMALL)


class Arrays(NamedTuple):
    """Of NumPy, in the case's dtype; scale, bias, mean and var in float32 or wider."""

    x: np.ndarray
    dy: np.ndarray
    mask: np.ndarray | None
    scale: np.ndarray
    bias: np.ndarray
    mean: np.ndarray
    var: np.ndarray


def dtype_of(case):
    return np.dtype(getattr(ml_dtypes, case.dtype, case.dtype))


def arrays(case, seed=0):
    """Random x with another mean and sd in every channel, cotangent, mask, params and state."""
    rng = np.random.default_rng(seed)
    dtype = dtype_of(case)
    wide = np.float64 if case.dtype == "float64" else np.float32
    spread = [n if a in case.axes else 1 for a, n in enumerate(case.shape)]

    def normal(shape):
        v = rng.normal(size=shape)
        return v + 1j * rng.normal(size=shape) if dtype.kind == "c" else v

    x = normal(case.shape) * rng.uniform(0.5, 2, spread) + 2 * normal(spread)
    return Arrays(
        x=x.astype(dtype),
        dy=normal(case.shape).astype(dtype),
        mask=mask(case, rng),
        scale=rng.normal(size=case.features).astype(wide),
        bias=rng.normal(size=case.features).astype(wide),
        mean=rng.normal(size=case.features).astype(wide),
        var=rng.uniform(0.5, 2, case.features).astype(wide),
    )


def mask(case, rng):
    """The case's mask, broadcastable to x: which cells of it are valid."""
    batch_axis = min(set(range(len(case.shape))) - set(case.axes))
    shape = [1] * len(case.shape)
    shape[batch_axis] = rows = case.shape[batch_axis]
    if case.mask == "rows":  # the last batch of an epoch, filled up to its size
        return (np.arange(rows) < rows - 2).reshape(shape)
    if case.mask == "lengths":
        time = [a for a in range(len(case.shape)) if a not in (*case.axes, batch_axis)][-1]
        steps = [n if a == time else 1 for a, n in enumerate(case.shape)]
        length = rng.integers(1, case.shape[time] + 1, shape)
        return np.arange(case.shape[time]).reshape(steps) < length
    if case.mask == "cells":
        return rng.random([1 if a in case.axes else n for a, n in enumerate(case.shape)]) < 0.6
    if case.mask == "features":
        return rng.random(case.shape) < 0.6
    return None
