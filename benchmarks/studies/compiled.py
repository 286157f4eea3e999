"""What XLA makes of one batch norm, and of a ResNet-50 step, for accelerators that are not here.

    make targets                                          h100 and v5e, the op and the step
    python -m benchmarks.studies.compiled h100 --only op          one of them

Compiled only (see `targets.py`), so there is no time in it. Kernels are counted with the bytes of
their operands and results, in N, the bytes of x: no kernel can take less than it takes to move
them, and where all are at their floor, 3N forward and 8N in all, no other kernel could do better.
For TPUs also the cycles that their compiler expects, over Flax's.
"""

import functools
import importlib.metadata
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.measures.step import R50, peak
from benchmarks.reporting import command, plots, report, results
from benchmarks.reporting.report import Chart, Table, track
from benchmarks.studies import targets
from benchmarks.subjects import network, peers
from benchmarks.subjects.roads import training

DTYPES = ("float32", "bfloat16")
SHAPES = {
    "tiny": ((128, 64),),
    "usual": ((128, 64), (100000, 32), (8192, 1024), (64, 14, 14, 1024), (64, 56, 56, 64)),
}
RESNET = {
    "tiny": network.Task("ResNet-8", (1, 1, 1), False, 8, 8, 16),
    "usual": network.Task("ResNet-50", R50, True, 64, 64, 224),
}
OURS, FUSED, FLAX, NONE = "jaxbn", peers.FUSED, "Flax linen", "no norm"
COMPILERS = ("jax-cuda12-plugin", "libtpu")


class Made(NamedTuple):
    """Of one compiled program."""

    kernels: int
    moved: int  # bytes
    temporaries: int  # bytes
    peak: int  # bytes of arguments, results and temporaries
    cycles: int  # expected; 0 where the compiler does not say


def make(f: Any, arguments: Any, device: Any) -> Made:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        program = targets.compiled(f, arguments, device)
    listed = targets.kernels(program)
    temporaries = program.memory_analysis().temp_size_in_bytes
    return Made(
        len(listed), targets.moved(listed), temporaries, peak(program), targets.cycles(program)
    )


def of_op(batch_norm: Any, shape: Any, dtype: str, device: Any) -> list[Made]:
    """Forward, and forward + backward."""
    x = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    pair = (jax.ShapeDtypeStruct(shape[-1:], jnp.float32),) * 2

    def train(x, params, state, mask):
        return batch_norm(x, params, state, train=True, mask=mask)

    forward = make(train, (x, pair, pair, None), device)
    return [forward, make(training(train), (x, pair, pair, None, x), device)]


def op(device: Any, size: str) -> Table:
    libraries = {name: f for name, f in peers.installed().items() if name != "torch"}
    steps = [(d, s, n) for d in DTYPES for s in SHAPES[size] for n in libraries]
    rows: list[list[str | float]] = []
    charts = {
        d: Chart(
            f"forward + backward, {d}", "bytes moved, over those of x", {}, 8.0, "8 passes over x"
        )
        for d in DTYPES
    }
    made: dict[Any, list[Made] | str] = {}
    for dtype, shape, name in track(steps, "op"):
        try:
            made[dtype, shape, name] = (
                "not installed"
                if libraries[name] is None
                else of_op(libraries[name], shape, dtype, device)
            )
        except Exception as error:
            made[dtype, shape, name] = peers.failure(name, error)
    for dtype, shape, name in steps:
        label, got = "x".join(map(str, shape)), made[dtype, shape, name]
        row: list[str | float] = [dtype, label, name]
        if isinstance(got, str):
            rows.append([*row, got, *[""] * 7])
            continue
        n = math.prod(shape) * jnp.dtype(dtype).itemsize
        for mine, theirs in zip(got, made[dtype, shape, FLAX], strict=True):
            ratio = mine.cycles / theirs.cycles if theirs.cycles else ""
            row += [mine.kernels, mine.moved / n, mine.temporaries / n, ratio]
        rows.append(row)
        charts[dtype].points.setdefault(name, {})[label] = got[1].moved / n
    columns = ("kernels", "moved, N", "temporaries, N", "cycles, of Flax's")
    return Table(
        f"One batch norm in training, compiled for {device.device_kind}",
        [
            *("dtype", "shape", "library"),
            *(f"{d}\n{c}" for d in ("forward", "fwd+bwd") for c in columns),
        ],
        rows,
        [
            "Compiled, not run. Moved: bytes of the operands and results of all kernels, a slice "
            "counting as what it takes.",
            "At the least 3N forward and 8N in all, 7N where backward's sums or dx are made in the "
            "kernel that writes y, as no network lets them.",
        ],
        list(charts.values()),
        "compiled-op",
    )


def step(device: Any, size: str) -> Table:
    task = RESNET[size]
    rows: list[list[str | float]] = []
    norms = {OURS: peers.ours, FUSED: peers.fused, FLAX: peers.linen, NONE: None}
    steps = [(d, n) for d in DTYPES for n in norms]
    made = {}
    for dtype, name in track(steps, "step"):
        model = task.model(norms[name], jnp.dtype(dtype))
        made[dtype, name] = make(functools.partial(network.step, model), task.shapes(model), device)
    for dtype, name in steps:
        got, flax = made[dtype, name], made[dtype, FLAX]
        row: list[str | float] = [f"{dtype}, {name}", got.kernels]
        for mine, theirs in zip(got[1:4], flax[1:4], strict=True):
            row += [mine / 1e6, mine / theirs if theirs else ""]
        rows.append([*row, got.cycles / flax.cycles if flax.cycles else ""])
    return Table(
        f"A training step of {task}, compiled for {device.device_kind}",
        [
            *("norm", "kernels", "moved, MB", "of Flax's", "temporaries, MB", "of Flax's"),
            *("peak, MB", "of Flax's", "cycles, of Flax's"),
        ],
        rows,
        ["Compiled, not run. Convolutions included; peak: arguments, results and temporaries."],
        key="compiled-step",
    )


BENCHMARKS = {"op": op, "step": step}


def environment(target: str, command: str) -> dict[str, str]:
    """That of this machine, the device being one that is not here."""
    values = report.environment(command)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in COMPILERS]
    return values | {
        "device": f"compiled for {target}",
        "versions": ", ".join([values["versions"], *versions]),
    }


def main(arguments: list[str]) -> int:
    parser = command.parser("benchmarks.studies.compiled", __doc__.split("\n\n")[0])
    parser.add_argument(
        "targets",
        nargs="+",
        choices=targets.NAMES,
        metavar="TARGET",
        help=f"of {', '.join(targets.NAMES)}",
    )
    parser.add_argument("--only", choices=BENCHMARKS, action="append", help="by default both")
    command.add_size(parser)
    results.add_option(parser)
    options = parser.parse_args(arguments)
    line = " ".join(["python -m benchmarks.studies.compiled", *arguments])
    for target in options.targets:
        try:
            device = targets.device(target)
        except ImportError as error:
            parser.error(str(error))
        for name in options.only or BENCHMARKS:
            table = BENCHMARKS[name](device, options.size)
            report.show(table)
            of = environment(target, line)
            record = {"environment": of, "tables": [report.as_json(table)]}
            folder = results.folder(options.results, options.size == "tiny")
            plots.keep(folder, name, record, table.charts)
    return 0


if __name__ == "__main__":
    command.end(main)
