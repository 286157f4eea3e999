"""Eval: a ResNet's answer to one image and to a batch, by the running statistics."""

import functools

import jax
import jax.numpy as jnp

from benchmarks import timing
from benchmarks.measures.step import R18, R50, norms
from benchmarks.reporting.report import Chart, Table, track
from benchmarks.subjects import network
from benchmarks.subjects.network import Task


def tasks(size: str, accelerated: bool) -> list[Task]:
    """ResNet-50 on 224 pixels and ResNet-18 on 32; on CPU a quarter as wide unless `full`."""
    if size == "tiny":
        return [Task("ResNet-8", (1, 1, 1), False, 8, 1, 16)]
    width = 64 if accelerated or size == "full" else 16
    batches = (1, 256) if accelerated else (1, 32)
    pairs = [(name, batch) for name in ("ResNet-18", "ResNet-50") for batch in batches]
    return [
        Task(name, R50, True, width, batch, 224)
        if name == "ResNet-50"
        else Task(name, R18, False, width, batch, 32)
        for name, batch in pairs
    ]


def run(size="usual") -> list[Table]:
    table, absent = norms()
    rows: list[list[str | float]] = []
    points: dict[str, dict[str, float]] = {}
    every = []
    for task in tasks(size, timing.accelerated()):
        timed = {}
        for name in track(list(table), f"eval, {task}"):
            model = task.model(table[name], jnp.float32)
            params, batch_stats, x, _ = task.arrays(model)
            infer = jax.jit(functools.partial(network.infer, model))
            timed[name] = timing.queued(infer, params, batch_stats, x)
        measured = timing.measure(timed, timing.ROUNDS[size])
        every += measured.values()
        for name, times in measured.items():
            if isinstance(times, str):
                rows.append([str(task), name, times, *[""] * 3])
                continue
            of_ours = times.median / measured["jaxbn"].median
            spread, images = times.spread / times.median, 1e3 * task.batch / times.median
            rows.append([str(task), name, times.median, spread, of_ours, images])
            points.setdefault(name, {})[str(task)] = of_ours
        rows += [[str(task), name, "not installed", *[""] * 3] for name in absent]
    return [
        Table(
            "Eval with each library's batch norm, float32",
            ("network", "norm", "ms", "spread", "of ours", "images/s"),
            rows,
            [
                "Median; spread: between the quartiles, over the median. On an accelerator of ten "
                "calls in a queue, so that throughput is measured and dispatch is not.",
                timing.note(every),
            ],
            [Chart("A network in eval mode, float32", "time, over that with jaxbn", points, 1.0)],
            "latency",
        )
    ]
