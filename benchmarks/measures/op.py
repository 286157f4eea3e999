"""Time of one batch norm in training: forward, and forward + backward, beside every peer.

The floor is the bytes that must move, N being those of x: forward 3N (read x for the moments,
read it again, write y), backward 5N (read x and dy, read both again, write dx), over the
bandwidth of a copy of as many bytes as x has, timed in the same rounds. Where x fits on chip the
second reads are free and a time may lie below the floor.
"""

import math

import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.reporting.report import Chart, Table, track
from benchmarks.subjects import peers, shapes
from benchmarks.subjects.roads import training
from benchmarks.timing import Timed, Times

COPY = "copy"  # stands among the libraries; moves 2N
FLOOR = {"forward": 3 / 2, "forward + backward": 8 / 2}  # in copies
DTYPES = ("float32", "bfloat16")
UNIT = "time, over that of moving the bytes that must move"
SHORT = 10e6  # bytes in float32; a call takes less than 2 ms


def calls(x, dy, libraries) -> dict[str, dict[str, Timed]]:
    """What is timed, by direction and library."""
    c = x.shape[-1]
    params = state = (jnp.ones(c), jnp.zeros(c))
    words = jnp.zeros(x.nbytes // 4, jnp.uint32)
    copy = timing.timed(lambda v: v ^ 1, words, size=x.nbytes)
    table: dict[str, dict[str, Timed]] = {direction: {COPY: copy} for direction in FLOOR}
    for name, batch_norm in libraries.items():
        if batch_norm is None:
            continue
        if batch_norm is peers.torch:
            forward, both = (timing.graph(f, x.nbytes) for f in torch_calls(x, dy))
        else:
            own_x, own_dy = x, dy
            if batch_norm is peers.equinox:
                batch_norm = peers.equinox_channels_first
                own_x, own_dy = jnp.moveaxis(x, -1, 1), jnp.moveaxis(dy, -1, 1)

            def train(x, params, state, mask, batch_norm=batch_norm):
                return batch_norm(x, params, state, train=True, mask=mask)

            arguments = (own_x, params, state, None)
            forward = timing.timed(train, *arguments, size=x.nbytes)
            both = timing.timed(training(train), *arguments, own_dy, size=x.nbytes)
        table["forward"][name] = forward
        table["forward + backward"][name] = both
    return table


def torch_calls(x, dy):
    import torch

    device = "cuda" if timing.accelerated() else "cpu"
    x, dy = (peers.channels_first(peers.to_torch(v).to(device)) for v in (x, dy))
    scale, bias, mean, var = (torch.ones(x.shape[1], device=device) for _ in range(4))
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


def rounds(size, shape) -> int:
    """Short calls scatter more, and cost less to repeat."""
    return timing.ROUNDS[size] * (8 if shape.size < SHORT else 1)


def measure(shape, dtype, rounds, libraries) -> dict[str, dict[str, Times | str]]:
    """By direction and library."""
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for _ in range(2))
    return {
        direction: timing.measure(functions, rounds)
        for direction, functions in calls(x, dy, libraries).items()
    }


def run(size="usual") -> list[Table]:
    free = timing.free_bytes()
    chosen, too_large = shapes.of_size(size, timing.accelerated(), free)
    timing.prefault(shapes.ARRAYS * chosen[-1].size)
    libraries = peers.installed()
    measured: dict[str, dict[str, dict]] = {dtype: {} for dtype in DTYPES}
    for dtype, shape in track([(d, s) for d in DTYPES for s in chosen], "op"):
        measured[dtype][str(shape)] = measure(shape.shape, dtype, rounds(size, shape), libraries)
    every = (
        times
        for of_dtype in measured.values()
        for of_shape in of_dtype.values()
        for of in of_shape.values()
        for times in of.values()
    )
    notes = [
        f"Median of {timing.ROUNDS[size]} rounds, eight times as many below {SHORT / 1e6:.0f} MB; "
        f"after 6 s no round begins, once {timing.FEWEST} are done. The libraries take turns in "
        "one process, and each makes an untimed call just before its timed call. Spread: between "
        "the quartiles, over the median.",
        "torch: channels_last. Equinox: channels first. Running statistics are updated.",
        timing.note(every),
    ]
    if too_large:
        left_out = "; ".join(map(str, too_large))
        notes.append(f"Left out for want of memory ({free / 1e9:.0f} GB are free): {left_out}.")
    return [
        *(by_shape(of, dtype, libraries, notes) for dtype, of in measured.items()),
        over_shapes(measured, libraries),
    ]


def by_shape(measured, dtype, libraries, notes) -> Table:
    rows, bandwidth = [], []
    points: dict[str, dict[str, dict[str, float]]] = {d: {} for d in FLOOR}
    for shape, of_shape in measured.items():
        for library in libraries:
            row: list[str | float] = [shape, library]
            for direction, floor in FLOOR.items():
                of = of_shape[direction]
                times = of.get(library, "not installed")
                if isinstance(times, str):
                    row += [times, "", "", ""]
                    continue
                fraction = floor * of[COPY].median / times.median
                ratio = times.median / of["jaxbn"].median
                row += [times.median, times.spread / times.median, ratio, fraction]
                points[direction].setdefault(library, {})[shape] = 1 / fraction
            rows.append(row)
        moved = 2 * math.prod(map(int, shape.split()[0].split("x"))) * jnp.dtype(dtype).itemsize
        copy = of_shape["forward + backward"][COPY].median
        bandwidth.append(f"{moved / copy / 1e6:.0f}")
    columns = ("ms", "spread", "of ours", "floor/it")
    floor = (
        f"Floor: 3N bytes forward, 8N in all, at a copy's bandwidth: {', '.join(bandwidth)} GB/s."
    )
    return Table(
        f"Time of one batch norm in training, {dtype}",
        ["shape", "library", *(f"{d}\n{c}" for d in ("forward", "fwd+bwd") for c in columns)],
        rows,
        [*notes, floor],
        [Chart(f"{d}, {dtype}", UNIT, of, 1.0, "memory speed") for d, of in points.items()],
        f"op-{dtype}",
    )


def over_shapes(measured, libraries) -> Table:
    """Our time over a peer's and over the floor: geometric mean, worst and best of the shapes."""
    rows: list[list[str | float]] = []
    for dtype, of_dtype in measured.items():
        for direction, floor in FLOOR.items():
            for library in (*libraries, COPY):
                ratios = {}
                for shape, of_shape in of_dtype.items():
                    of = of_shape[direction]
                    if isinstance(of.get(library), Times):
                        theirs = of[library].median * (floor if library == COPY else 1)
                        ratios[shape] = of["jaxbn"].median / theirs
                if library == "jaxbn":
                    continue
                name = "the floor" if library == COPY else library
                if not ratios:
                    rows.append([dtype, direction, name, "not installed", "", "", "", ""])
                    continue
                mean = math.exp(np.mean(np.log(list(ratios.values()))))
                worst, best = max(ratios, key=ratios.get), min(ratios, key=ratios.get)
                rows.append(
                    [dtype, direction, name, mean, ratios[worst], worst, ratios[best], best]
                )
    return Table(
        "Our time over theirs, and over the floor: below 1 is faster",
        ["dtype", "direction", "library", "mean", "worst", "at", "best", "at"],
        rows,
        ["Mean: geometric, over the shapes of op-float32 and op-bfloat16."],
        key="op-summary",
    )
