"""A ResNet's training step with each library's batch norm: time, images a second, peak memory.

On an accelerator ResNet-18 takes batches of 512 CIFAR images and ResNet-50 batches of 64 and 256
of 224 pixels. On CPU, where a convolution of full width would leave nothing to be seen of the
norms and one step would take seconds, both have a quarter of the width, ResNet-50 on 64 pixels;
`full` gives them their width, and ResNet-50 its pixels, at small batches.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import timing
from benchmarks.reporting.report import Chart, Table, track
from benchmarks.subjects import network, peers
from benchmarks.subjects.network import Task

DTYPES = (jnp.float32, jnp.bfloat16)
R18, R50 = (2, 2, 2, 2), (3, 4, 6, 3)
NONE = "no norm"


def tasks(size: str, accelerated: bool) -> list[Task]:
    if size == "tiny":
        return [Task("ResNet-8", (1, 1, 1), False, 8, 8, 16)]
    if accelerated:
        return [
            Task("ResNet-18", R18, False, 64, 512, 32),
            Task("ResNet-50", R50, True, 64, 64, 224),
            Task("ResNet-50", R50, True, 64, 256, 224),
        ]
    if size == "full":
        return [
            Task("ResNet-18", R18, False, 64, 32, 32),
            Task("ResNet-50", R50, True, 64, 8, 224),
        ]
    return [Task("ResNet-18", R18, False, 16, 64, 32), Task("ResNet-50", R50, True, 16, 32, 64)]


def norms() -> tuple[dict[str, Callable[..., Any] | None], list[str]]:
    """(norms to put into the network, libraries that are not installed).

    Those that JAX compiles, and None: a network without norms shows what is left to win.
    """
    table = {name: f for name, f in peers.installed().items() if name != "torch"}
    absent = [name for name, f in table.items() if f is None]
    return {name: f for name, f in table.items() if f} | {NONE: None}, absent


def compile_step(task: Task, batch_norm, dtype):
    """(the compiled step, its arguments)."""
    model = task.model(batch_norm, dtype)
    arguments = task.arrays(model)
    step = jax.jit(functools.partial(network.step, model))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return step.lower(*arguments).compile(), arguments


def peak(compiled) -> int:
    """Bytes that the compiled step has at once: arguments, results and temporaries."""
    stats = compiled.memory_analysis()
    size = stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes
    return size - stats.alias_size_in_bytes


def run(size="usual") -> list[Table]:
    table, absent = norms()
    rows: list[list[str | float]] = []
    charts, every = [], []
    chosen = tasks(size, timing.accelerated())
    for task, dtype in [(t, d) for t in chosen for d in DTYPES]:
        title = f"{task}, {dtype.__name__}"
        timed, memory, failed = {}, {}, {}
        for name in track(list(table), title):
            try:
                compiled, arguments = compile_step(task, table[name], dtype)
            except Exception as error:
                failed[name] = peers.failure(name, error)
                continue
            timed[name] = timing.queued(compiled, *arguments)
            memory[name] = peak(compiled)
        measured = timing.measure(timed, timing.ROUNDS[size], seconds=20.0) | failed
        every += measured.values()
        points: dict[str, dict[str, float]] = {}
        for name, times in measured.items():
            if isinstance(times, str):
                rows.append([title, name, times, *[""] * 5])
                continue
            of_ours = times.median / measured["jaxbn"].median
            memory_of_ours = memory[name] / memory["jaxbn"]
            cells = [times.median, times.spread / times.median, of_ours]
            cells += [1e3 * task.batch / times.median, memory[name] / 1e6, memory_of_ours]
            rows.append([title, name, *cells])
            points[name] = {"time": of_ours, "peak memory": memory_of_ours}
        rows += [[title, name, "not installed", *[""] * 5] for name in absent]
        charts.append(Chart(f"A training step: {title}", "over that with jaxbn", points, 1.0))
    columns = ("network", "norm", "ms", "spread", "of ours", "images/s", "peak MB", "of ours")
    return [
        Table(
            "A training step with each library's batch norm",
            columns,
            rows,
            [
                "Gradient descent; the same network, convolutions and loss; norms take turns in "
                "one process. Median; spread: between the quartiles, over the median.",
                "Peak: arguments, results and temporaries of the compiled step.",
                timing.note(every),
            ],
            charts,
            "step",
        )
    ]
