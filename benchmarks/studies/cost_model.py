"""`python -m benchmarks.studies.cost_model`: what pooling costs ResNet-50, from 8 to 4,096 devices.

A model, not a measurement: sizes and numbers of the collectives are those of the compiled
modules (tests/benchmarks/test_cost_model.py), their times follow from the two numbers given. For b
bytes on N devices, bandwidth B and latency L of one message,

    ring = 2 (N - 1)/N b/B + 2 (N - 1) L        tree = 2 b/B + 2 ceil(log2 N) L
"""

import math
from typing import NamedTuple

from benchmarks.reporting import command, report
from benchmarks.reporting.report import Table
from jaxbn._op.pooling import GATHERED

BLOCKS = {64: 3, 128: 4, 256: 6, 512: 3}  # width of a stage → its blocks
# The stem, then each block's three norms; the first block of a stage has a fourth, of its shortcut.
RESNET50 = [64] + [
    channels
    for width, blocks in BLOCKS.items()
    for channels in [4 * width] + blocks * [width, width, 4 * width]
]
DEVICES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
FLOAT = 4  # bytes
COLUMNS = (
    "road",
    "devices\npooled",
    "collectives\na layer",
    "largest\nkB",
    "all\nMB",
    "ring\nms",
    "tree\nms",
)


class Collectives(NamedTuple):
    """Bytes of each collective of one layer."""

    forward: list[int]
    backward: list[int]


def of_axis_name(channels: int, devices: int) -> Collectives:
    """Count, mean and var: one slot a device up to GATHERED, beyond two sums. Back: two sums."""
    moments = FLOAT * (2 * channels + 1)
    forward = [devices * moments] if devices <= GATHERED else [moments, moments]
    return Collectives(forward, [FLOAT * 2 * channels])


def of_jit(channels: int, devices: int) -> Collectives:
    """A pivot, then two sums about it, whatever the number of devices."""
    return Collectives([FLOAT * channels, FLOAT * 2 * channels], [FLOAT * 2 * channels])


def ring(size: int, devices: int, bandwidth: float, latency: float) -> float:
    return 2 * (devices - 1) / devices * size / bandwidth + 2 * (devices - 1) * latency


def tree(size: int, devices: int, bandwidth: float, latency: float) -> float:
    return 2 * size / bandwidth + 2 * math.ceil(math.log2(devices)) * latency


def row(name, road, devices, bandwidth, latency):
    """All norm layers of one training step."""
    layers = [road(channels, devices) for channels in RESNET50]
    sizes = [size for layer in layers for size in layer.forward + layer.backward]
    forward, backward = map(len, layers[0])
    return [
        name,
        str(devices),
        f"{forward} + {backward}",
        f"{max(sizes) / 1e3:.1f}",
        f"{sum(sizes) / 1e6:.2f}",
        *(
            f"{1e3 * sum(time(size, devices, bandwidth, latency) for size in sizes):.2f}"
            for time in (ring, tree)
        ),
    ]


def table(bandwidth: float = 50.0, latency: float = 5.0) -> Table:
    """Bandwidth in GB/s, latency in microseconds."""
    roads = [("axis_name", of_axis_name, DEVICES), ("jit", of_jit, DEVICES[::3])]
    return Table(
        f"Norm layers of one ResNet-50 step: {len(RESNET50)} layers, {sum(RESNET50):,} channels",
        COLUMNS,
        [
            row(name, road, devices, 1e9 * bandwidth, 1e-6 * latency)
            for name, road, numbers in roads
            for devices in numbers
        ],
        [f"Assumed: {bandwidth:g} GB/s a device, {latency:g} us a message. Bytes are a device's."],
    )


def main(arguments: list[str]) -> None:
    parser = command.parser("benchmarks.studies.cost_model", __doc__)
    parser.add_argument("--bandwidth", type=float, default=50.0, help="GB/s of one device")
    parser.add_argument("--latency", type=float, default=5.0, help="us of one message")
    options = parser.parse_args(arguments)
    if options.bandwidth <= 0 or options.latency < 0:
        parser.error("expected a bandwidth above 0 and a latency of at least 0")
    report.show(table(options.bandwidth, options.latency))


if __name__ == "__main__":
    command.end(main)
