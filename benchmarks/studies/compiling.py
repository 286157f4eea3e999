"""How long a training step takes to trace, to lower and to compile, with Flax's norm and ours.

    python -m benchmarks.studies.compiling                    ResNet-18 of width 16 and 64, this CPU
    python -m benchmarks.studies.compiling --target h100      ResNet-50 of 64 images, for an H100

The networks are linen modules, then nnx modules. The time is CPU seconds of this process, so that
other work on the machine counts for little. The norms take turns that start elsewhere every round,
and JAX's caches are empty before each.
"""

import functools
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jaxbn
from benchmarks.measures.step import R18, R50
from benchmarks.reporting import command, report
from benchmarks.reporting.report import Table, track
from benchmarks.studies import targets
from benchmarks.subjects import network, network_nnx, peers
from benchmarks.subjects.network import Task


def in_linen(norm: Any) -> Callable[..., Any]:
    """A maker of the step and its shapes: a linen network with that norm."""

    def make(task: Task, dtype: Any) -> tuple[Any, Any]:
        model = task.model(norm, dtype)
        return functools.partial(network.step, model), task.shapes(model)

    return make


def in_nnx(norm: Any) -> Callable[..., Any]:
    """The same of an nnx network."""
    return lambda task, dtype: network_nnx.training(task, norm, dtype)


# For each kind of module, Flax's norm first.
NORMS = {
    "linen": {
        "Flax linen": in_linen(peers.linen),
        "jaxbn": in_linen(peers.ours),
        peers.FUSED: in_linen(peers.fused),
    },
    "nnx": {"Flax nnx": in_nnx(nnx.BatchNorm), "jaxbn": in_nnx(jaxbn.nnx.BatchNorm)},
}
STAGES = ("trace", "lower", "compile")


def seconds(task: Task, make: Any, dtype: Any, device: Any) -> tuple[float, float, float]:
    """CPU seconds of each stage; `device` None is this machine."""
    (step, shapes), platforms = make(task, dtype), None
    if device is not None:
        shapes = targets.placed(shapes, device)
        platforms = (targets.platform(device),)
    jax.clear_caches()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        times = [time.process_time()]
        traced = jax.jit(step).trace(*shapes)
        times.append(time.process_time())
        lowered = traced.lower(lowering_platforms=platforms)
        times.append(time.process_time())
        lowered.compile()
        times.append(time.process_time())
    first, second, third = (b - a for a, b in itertools.pairwise(times))
    return first, second, third


def measure(task: Task, modules: str, dtype: Any, device: Any, turns: int) -> Table:
    """A row a norm: the median of each stage, and the median of its ratio to Flax's turn."""
    norms = NORMS[modules]
    names = list(norms)
    taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    starts = [turn % len(names) for turn in range(turns)]
    order = [name for start in starts for name in names[start:] + names[:start]]
    for name in track(order, f"{task}, {modules}, {jnp.dtype(dtype)}"):
        taken[name].append(seconds(task, norms[name], dtype, device))
    rows: list[list[str | float]] = []
    for name, times in taken.items():
        row: list[str | float] = [name]
        for mine, flax in zip(
            zip(*times, strict=True), zip(*taken[names[0]], strict=True), strict=True
        ):
            ratios = [a / b for a, b in zip(mine, flax, strict=True)]
            row += [statistics.median(mine), statistics.median(ratios)]
            row += [f"{min(ratios):.2f} to {max(ratios):.2f}"]
        rows.append(row)
    where = "this machine" if device is None else device.device_kind
    columns = [(f"{stage}, s", "of Flax's", "least and most") for stage in STAGES]
    return Table(
        f"A training step of {task}, {modules}, {jnp.dtype(dtype)}, compiled for {where}",
        ["norm", *(column for three in columns for column in three)],
        rows,
        [f"CPU seconds, medians of {turns} turns. Of Flax's: the median of a turn's ratios."],
    )


def main(arguments: list[str]) -> None:
    parser = command.parser("benchmarks.studies.compiling", __doc__.split("\n\n")[0])
    parser.add_argument("--target", choices=targets.NAMES, help="compile a ResNet-50 step for it")
    parser.add_argument(
        "--width", type=command.positive, nargs="+", default=[16, 64], help="of the ResNet-18"
    )
    parser.add_argument("--dtype", type=command.dtype, nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--turns", type=command.positive, default=3)
    parser.add_argument("--tiny", action="store_true", help="only to see that it runs")
    options = parser.parse_args(arguments)
    device = targets.device(options.target) if options.target else None
    tasks = [Task("ResNet-18", R18, False, width, 32, 32) for width in options.width]
    if device is not None:
        tasks = [Task("ResNet-50", R50, True, 64, 64, 224)]
    if options.tiny:
        tasks = [Task("ResNet-8", (1, 1, 1), False, 8, 8, 16)]
    for task, modules, dtype in itertools.product(tasks, NORMS, map(jnp.dtype, options.dtype)):
        report.show(measure(task, modules, dtype, device, options.turns))
    report.show_environment()


if __name__ == "__main__":
    command.end(main)
