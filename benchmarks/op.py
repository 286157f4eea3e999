"""Time of one batch norm on this machine: forward, and forward + backward, beside every peer.

The floor is the bytes that must move, N being those of x: forward 3N (read x for the moments,
read it again, write y), backward 5N (read x and dy, read both again, write dx), over the
bandwidth of a copy measured in the same run.

All is measured in one child process, whose allocator keeps its memory: a fresh array of 50 MB
costs more in page faults than the arithmetic on it. There torch's threads sleep when they wait,
for spinning ones would slow down whatever is measured next.
"""

import functools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers
from benchmarks.report import Table
from benchmarks.roads import training
from tests.cases import LARGE

NAMES = ("stage 1", "stage 3 expanded", "stage 3", "projector")
ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "1000000000",
    "OMP_WAIT_POLICY": "passive",
}
COPY = "copy"  # stands among the libraries; moves 2N
FLOOR = {"forward": 3 / 2, "forward + backward": 8 / 2}  # in copies


def calls(x, dy, libraries) -> dict[str, dict[str, Callable]]:
    """What is timed, by direction and library: functions without arguments."""
    c = x.shape[-1]
    params = state = (jnp.ones(c), jnp.zeros(c))
    words = jnp.zeros(x.nbytes // 4, jnp.uint32)
    copy = functools.partial(jax.jit(lambda v: v ^ 1), words)
    table: dict[str, dict[str, Callable]] = {direction: {COPY: copy} for direction in FLOOR}
    for name, batch_norm in libraries.items():
        if batch_norm is None:
            continue
        if batch_norm is peers.torch:
            forward, both = torch_calls(x, dy)
        else:
            own_x, own_dy = x, dy
            if batch_norm is peers.equinox:
                batch_norm = peers.equinox_channels_first
                own_x, own_dy = jnp.moveaxis(x, -1, 1), jnp.moveaxis(dy, -1, 1)

            def train(x, params, state, mask, batch_norm=batch_norm):
                return batch_norm(x, params, state, train=True, mask=mask)

            arguments = (own_x, params, state, None)
            forward = functools.partial(jax.jit(train), *arguments)
            both = functools.partial(jax.jit(training(train)), *arguments, own_dy)
        table["forward"][name] = forward
        table["forward + backward"][name] = both
    return table


def torch_calls(x, dy):
    import torch

    x, dy = (peers.channels_first(peers.to_torch(v)) for v in (x, dy))
    scale, bias, mean, var = (torch.ones(x.shape[1]) for _ in range(4))
    leaves = tuple(v.requires_grad_() for v in (x, scale, bias))

    def batch_norm():
        return torch.nn.functional.batch_norm(x, mean, var, scale, bias, True, 0.01)

    def forward():
        with torch.no_grad():
            return batch_norm()

    def both():
        y = batch_norm()
        return y, torch.autograd.grad(y, leaves, dy)

    return forward, both


def milliseconds(functions, repeats) -> dict[str, list[float]]:
    """Times of each, called in turn; the turn starts one further every round."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for i in range(-2, repeats):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            result = jax.block_until_ready(functions[name]())
            if i >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
            del result
    return times


def measure(shape, dtype, repeats, libraries):
    """{direction: {library: (median, spread)}} in ms; spread is between the quartiles."""
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2))
    quartiles = {}
    for direction, functions in calls(x, dy, libraries).items():
        times = milliseconds(functions, repeats)
        quartiles[direction] = {name: np.percentile(t, (25, 50, 75)) for name, t in times.items()}
    return {
        direction: {name: (mid, high - low) for name, (low, mid, high) in of.items()}
        for direction, of in quartiles.items()
    }


def run(dtype="float32", repeats=25, names=NAMES) -> list[Table]:
    child = [sys.executable, "-m", "benchmarks.op", json.dumps([dtype, repeats, names])]
    output = subprocess.run(
        child, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, check=True, text=True
    ).stdout
    measured = json.loads(output.splitlines()[-1])
    return [by_shape(measured, dtype, repeats, peers.installed()), over_shapes(measured)]


def by_shape(measured, dtype, repeats, libraries) -> Table:
    rows, bandwidth = [], []
    for case in LARGE:
        if case.name not in measured:
            continue
        for library in libraries:
            row: list[str | float] = [f"{case.shape}", library]
            for direction, floor in FLOOR.items():
                of = measured[case.name][direction]
                if library not in of:
                    row += ["not installed", "", "", ""]
                    continue
                median, spread = of[library]
                fraction = floor * of[COPY][0] / median
                row += [median, spread / median, median / of["jaxbn"][0], fraction]
            rows.append(row)
        moved = 2 * math.prod(case.shape) * jnp.dtype(dtype).itemsize
        copy, _ = measured[case.name]["forward + backward"][COPY]
        bandwidth.append(f"{case.name} {moved / copy / 1e6:.0f} GB/s")
    columns = ("ms", "spread", "of ours", "floor/it")
    return Table(
        f"Time of one batch norm in training, {dtype}",
        ["shape", "library", *(f"{d}\n{c}" for d in ("forward", "fwd+bwd") for c in columns)],
        rows,
        [
            f"Median of {repeats} calls in rotated order, one process; spread: between the "
            "quartiles, over the median.",
            "Floor: 3N bytes forward, 8N in all, at the bandwidth of a copy: "
            + ", ".join(bandwidth),
            "Page faults kept out: " + " ".join(f"{k}={v}" for k, v in ENVIRONMENT.items()),
            "torch: channels_last. Equinox: channels first. Running statistics are updated.",
        ],
    )


def over_shapes(measured) -> Table:
    """Geometric mean of ours / peer."""
    rows = []
    first = next(iter(measured.values()))["forward"]
    for library in first:
        if library in (COPY, "jaxbn"):
            continue
        row = [library]
        for direction in FLOOR:
            of = [shape[direction] for shape in measured.values()]
            row.append(math.exp(np.mean([math.log(v["jaxbn"][0] / v[library][0]) for v in of])))
        rows.append(row)
    return Table("Our time over theirs, geometric mean of the shapes", ["library", *FLOOR], rows)


if __name__ == "__main__":
    dtype, repeats, names = json.loads(sys.argv[1])
    cases = [case for case in LARGE if case.name in names]
    libraries = peers.installed()
    measured = {case.name: measure(case.shape, dtype, repeats, libraries) for case in cases}
    print(json.dumps(measured))
