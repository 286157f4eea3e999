"""The shapes that the op is measured on: those of `tests/support/cases.py`, and more of the same.

A size is one word. `tiny` shows in a minute that everything runs. `usual` leaves out most of
ResNet-50's: one shape a stage at batch 64, and at batch 256, on CPU, those of at most 110 MB in
float32. `full` is everything. In every size a shape is left out, and named, where fourteen float32
arrays of it are more than half of the memory that is free.
"""

import math
from typing import NamedTuple

from tests.support.cases import LARGE

ARRAYS = 14  # x, dy, their copies for Equinox and torch, and what one call makes of them


class Shape(NamedTuple):
    network: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes in float32."""
        return 4 * math.prod(self.shape)

    def __str__(self):
        return f"{'x'.join(map(str, self.shape))} {self.network}"


# ResNet-50's norms, (pixels, channels): the last of each stage, and the rest.
LAST = ((112, 64), (56, 256), (28, 512), (14, 1024), (7, 2048))
REST = ((56, 64), (56, 128), (28, 128), (28, 256), (14, 256), (14, 512), (7, 512))


def resnet50(batch: int, norms=LAST + REST) -> list[Shape]:
    return [
        Shape(f"ResNet-50, batch {batch}", (batch, pixels, pixels, channels))
        for pixels, channels in norms
    ]


CASES = [Shape(case.network, case.shape) for case in LARGE if case.dtype == "float32"]
SMALL = [
    Shape("MLP, batch 128", (128, 64)),
    Shape("CIFAR ResNet-20, batch 128", (128, 8, 8, 64)),
    Shape("CIFAR ResNet-20, batch 128", (128, 32, 32, 16)),
]
ODD = [  # channels that are no power of two
    Shape("MLP, batch 4096", (4096, 300)),
    Shape("EfficientNet-B0, batch 64", (64, 28, 28, 240)),
    Shape("DenseNet-121, batch 64", (64, 14, 14, 608)),
]


def of_size(size: str, accelerated: bool, free: int) -> tuple[list[Shape], list[Shape]]:
    """(shapes to measure, shapes that memory does not permit), the smallest first."""
    if size == "tiny":
        chosen = [SMALL[1], ODD[0]]
    elif size == "full":
        chosen = SMALL + ODD + CASES + resnet50(64) + resnet50(256)
    else:
        large = [s for s in resnet50(256, LAST) if accelerated or s.size <= 110e6]
        chosen = SMALL + ODD + CASES + resnet50(64, LAST) + large
    # The first network that has a shape names it.
    unique = list({shape.shape: shape for shape in reversed(chosen)}.values())
    unique.sort(key=lambda shape: shape.size)
    fits = [shape for shape in unique if ARRAYS * shape.size <= free / 2]
    return fits, [shape for shape in unique if shape not in fits]
