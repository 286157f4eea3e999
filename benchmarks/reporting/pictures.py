"""`python -m benchmarks.reporting.pictures [NAME …]`: draws the pictures of the pages into
`docs/pictures`.

Each picture shows one fact, with units on its axes and few series. Everything is computed when it
is drawn, but for `memory`, which reads the newest files of results; `house` reads the
imports of the source. A CPU and a minute are enough.
"""

import functools
import itertools
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import jaxbn
from benchmarks.reporting import command, plots, results
from benchmarks.subjects import peers
from tests.support.house import FILES, LINE, ROOMS, imports, parts

FOLDER = pathlib.Path(__file__).parents[2] / "docs" / "pictures"
OURS, FLAX, GREY = plots.STYLES["jaxbn"][0], plots.STYLES["Flax linen"][0], plots.INK


def variance():
    """How wrong the variance is, by how far the mean lies from 0."""
    ratios = 10.0 ** np.arange(0, 6.5, 0.5)
    figure, axis = plots.axes(
        "Variance of one batch of 256 rows, float32",
        "mean of x, in standard deviations",
        "relative error of the variance",
    )
    curves = []  # libraries whose curves coincide are one line
    for name, batch_norm in peers.installed().items():
        if batch_norm is None:
            continue
        errors = np.array([_variance_error(batch_norm, ratio) for ratio in ratios])
        same = (names for names, of in curves if np.abs(np.log(of / errors)).max() < np.log(2))
        if (names := next(same, None)) is None:
            curves.append(([name], errors))
        else:
            names.append(name)
    for names, errors in curves:
        color, marker = plots.STYLES[names[0]]
        axis.loglog(
            ratios,
            errors,
            color=color,
            marker=marker,
            label=", ".join(names),
            linewidth=2.5 if "jaxbn" in names else 1.5,
            zorder=4 if "jaxbn" in names else 3,
        )
    axis.axhline(1, color=GREY, linestyle="--", linewidth=1)
    axis.text(
        ratios[0], 1.5, "the error is as large as the variance itself", color=GREY, fontsize=9
    )
    axis.legend(frameon=False)
    return figure


def _variance_error(batch_norm, ratio):
    x = np.random.default_rng(0).normal(ratio, 1, (256, 64)).astype(np.float32)
    state = (jnp.zeros(64), jnp.ones(64))
    params = (jnp.ones(64), jnp.zeros(64))
    _, (_, var) = batch_norm(jnp.asarray(x), params, state, train=True, momentum=0.0)
    true = x.astype(np.float64).var(0)
    return max(float(np.abs(np.asarray(var) / true - 1).max()), 1e-7)  # some rounding there is


def few_values():
    """How far a batch's own standard deviation lies from the truth, by values per channel."""
    sizes = 2 ** np.arange(1, 12)
    rng, tried = np.random.default_rng(0), 2000
    low, middle, high = [], [], []
    for n in sizes:
        var = jaxbn.moments(jnp.asarray(rng.normal(size=(n, tried)), jnp.float32)).var
        for values, percent in ((low, 5), (middle, 50), (high, 95)):
            values.append(float(np.percentile(np.sqrt(var), percent)))
    figure, axis = plots.axes(
        "What a batch says of the standard deviation, normal x",
        "values per channel in the batch (rows x height x width)",
        "standard deviation of the batch",
    )
    axis.fill_between(sizes, low, high, color=FLAX, alpha=0.25, label="9 of 10 batches lie here")
    axis.plot(sizes, middle, color=FLAX, label="median")
    axis.axhline(1, color="black", linestyle="--", linewidth=1, label="true standard deviation")
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, sizes)
    axis.set_ylim(0, 2)
    axis.legend(frameon=False)
    return figure


def uneven():
    """The pooled mean of two devices that hold different numbers of valid rows."""
    first, second, rows = 0.0, 6.6, np.arange(5)
    found = {"Flax linen": [], "jaxbn": []}
    for name, means in found.items():
        batch_norm = peers.installed()[name]
        for valid in rows:
            means.append(_pooled_mean(batch_norm, first, second, int(valid)))
    true = [(4 * first + n * second) / (4 + n) for n in rows]
    figure, axis = plots.axes(
        "Rows of 0 on one device, rows of 6.6 on another, the rest masked",
        "valid rows on the second device (the first has 4)",
        "pooled mean",
    )
    axis.plot(rows, true, "k--", label="true mean of all valid rows", zorder=5)
    for name, means in found.items():
        color, marker = plots.STYLES[name]
        axis.plot(rows, means, color=color, marker=marker, label=name, linewidth=1.5)
    if not np.isfinite(found["Flax linen"][0]):
        axis.annotate("NaN at 0 rows", (0.06, 3.1), color=FLAX)
    axis.set_xticks(rows)
    axis.legend(frameon=False)
    return figure


def _pooled_mean(batch_norm, first, second, valid):
    x = jnp.stack([jnp.full((4, 1), first), jnp.full((4, 1), second)])
    mask = jnp.ones((2, 4, 1), bool).at[1, valid:].set(False)
    params, state = (jnp.ones(1), jnp.zeros(1)), (jnp.zeros(1), jnp.ones(1))

    def shard(x, mask):
        options = {"train": True, "momentum": 0.0, "mask": mask, "axis_name": "shards"}
        return batch_norm(x, params, state, **options)

    _, (mean, _) = jax.vmap(shard, axis_name="shards")(x, mask)
    return float(mean[0, 0])


def one_nan():
    """The running variance through one batch that holds a NaN."""
    steps, bad = 60, 20
    figure, axis = plots.axes(
        "A single NaN among 64 values", "training step", "running variance (true: 4)"
    )
    for name in ("Flax linen", "jaxbn"):
        batch_norm, rng = peers.installed()[name], np.random.default_rng(0)
        params, state = (jnp.ones(1), jnp.zeros(1)), (jnp.zeros(1), jnp.ones(1))
        seen = []
        for step in range(steps):
            x = rng.normal(0, 2, (64, 1)).astype(np.float32)
            if step == bad:
                x[3] = np.nan
            _, state = batch_norm(jnp.asarray(x), params, state, train=True, momentum=0.9)
            seen.append(float(state[1][0]))
        color, _ = plots.STYLES[name]
        style = {"linewidth": 5, "alpha": 0.4} if name != "jaxbn" else {"linewidth": 1.8}
        axis.plot(seen, color=color, label=name, **style)
    axis.axvline(bad, color=GREY, linestyle="--", linewidth=1)
    axis.text(bad + 0.7, 1.6, "one NaN in this batch;\nFlax's line ends: NaN for good", fontsize=9)
    axis.legend(frameon=False, loc="lower right")
    return figure


def behind():
    """How much of the way running statistics have gone, by updates and momentum."""
    updates = np.unique(np.logspace(0, 3.5, 200).astype(int))
    figure, axis = plots.axes(
        "What eval mode knows of the data",
        "training steps since the start",
        "weight of what was seen, % (rest: mean 0, var 1)",
    )
    for momentum, color in ((0.9, "#2ca02c"), (0.99, FLAX), (0.999, "#9467bd")):
        axis.plot(updates, 100 * (1 - momentum**updates), color=color, label=f"momentum {momentum}")
    axis.plot(updates, np.full(len(updates), 100), color=OURS, label="momentum=None (cumulative)")
    axis.set_xscale("log")
    axis.set_xticks((1, 10, 100, 1000), ("1", "10", "100", "1000"))
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def memory():
    """Temporary memory of a training step, over that with Flax's norm, by device."""
    rows = []
    for device, name, key, column in (
        ("cpu", "2 CPU cores, small ResNet", "memory-step", 4),
        ("compiled-for-h100", "H100 (compiled), ResNet-50", "compiled-step", 5),
        ("compiled-for-v5e", "TPU v5e (compiled), ResNet-50", "compiled-step", 5),
    ):
        for row in _rows(device, key):
            dtype, norm = row[0].split(", ", 1)
            if norm == "jaxbn":
                rows.append((f"{name}, {dtype}", row[column]))
    names, values = zip(*rows, strict=True)
    figure, axis = plots.axes(
        "Temporary memory of a training step, by device",
        "memory with jaxbn, over that with Flax linen",
        height=1.4 + 0.4 * len(rows),
    )
    bars = axis.barh(names, values, color=OURS, height=0.6)
    axis.bar_label(bars, fmt="%.2f", padding=-32, color="white")
    axis.axvline(1, color=FLAX, linewidth=2, label="Flax linen = 1")
    axis.set_xlim(0, 1.2)
    axis.invert_yaxis()
    figure.legend(loc="outside upper right", frameon=False)
    return figure


def _rows(device, key):
    import json

    record = json.loads(results.newest(results.FOLDER, device).read_text())
    tables = [table for part in record.values() for table in part["tables"]]
    return next(table["rows"] for table in tables if table["key"] == key)


def devices():
    """What crosses devices in one training step of a norm."""
    figure, axis = plots.axes(
        "One norm, one training step, axis_name: x never leaves its device", ""
    )
    axis.set(xlim=(0, 10), ylim=(0, 6))
    axis.set_axis_off()
    box = {"boxstyle": "round,pad=0.5", "facecolor": "white"}
    places = (0.9, 3.3, 6.0, 8.7)  # of the boxes' centres
    for i, height in enumerate((4.9, 1.1)):
        texts = (
            f"device {i}\nx [rows, …, C]",
            "count, mean, var\nof its own rows",
            "y, and the same\nstate [C]",
            "Σdy, Σdy·(x - mean)\nfor dx",
        )
        boxes = [
            axis.text(place, height, text, ha="center", va="center", bbox=box, fontsize=9)
            for place, text in zip(places, texts, strict=True)
        ]
        for start, end in itertools.pairwise(boxes):
            axis.annotate(
                "",
                (0, 0.5),
                (1, 0.5),
                xycoords=end.get_bbox_patch(),
                textcoords=start.get_bbox_patch(),
                arrowprops={"arrowstyle": "->"},
            )
    for place, text in (
        (places[1], "forward, once:\n2C + 1 numbers"),
        (places[3], "backward, once:\n2C numbers"),
    ):
        axis.annotate(
            "", (place, 1.8), (place, 4.2), arrowprops={"arrowstyle": "<->", "color": OURS}
        )
        edge = {**box, "edgecolor": OURS}
        axis.text(place, 3, text, ha="center", va="center", color=OURS, bbox=edge, fontsize=9)
    return figure


# So that no arrow passes behind a room, as if it led there.
ASIDE = {"writers": -2, "watch": 2, "nnx": 0.8}


def house():
    """The rooms of the package, and what each imports; an arrow that others imply is left out."""
    helpers = {room for room in LINE if LINE[room] < LINE["_op"]}
    needs = {room: set() for room in LINE}
    for file in FILES:
        needs[parts(file)[0]] |= {module[0] for module in imports(file)}
    needs = {room: others - helpers - {room} for room, others in needs.items()}
    beyond = {}  # what a room's imports import in turn; a room imports only lines before its own
    for room in LINE:
        beyond[room] = set().union(*(needs[other] | beyond[other] for other in needs[room]))
    figure = plots.figure(8, 7)
    axis = figure.subplots()
    axis.set(xlim=(0, 10), ylim=(len(ROOMS) - 0.2, -0.6))
    axis.set_axis_off()
    axis.set_title("The rooms of jaxbn: an arrow leads to a room that is imported")
    boxes = {}
    for line, rooms in enumerate(reversed(ROOMS)):
        for i, room in enumerate(rooms):
            aside = (-1.2) ** (line % 2) if len(rooms) == 1 else 0
            color = GREY if room[0] == "_" else OURS
            boxes[room] = axis.text(
                10 * (i + 0.5) / len(rooms) + ASIDE.get(room, aside),
                line,
                room,
                ha="center",
                va="center",
                bbox={"boxstyle": "round,pad=0.45", "facecolor": "white", "edgecolor": color},
                zorder=3,
            )
    for room, others in needs.items():
        for other in others - beyond[room]:
            axis.annotate(
                "",
                (0.5, 1),
                (0.5, 0),
                xycoords=boxes[other].get_bbox_patch(),
                textcoords=boxes[room].get_bbox_patch(),
                arrowprops={"arrowstyle": "->", "color": GREY, "shrinkA": 0, "shrinkB": 0},
                zorder=2,
            )
    note = f"red: public, grey: private; every room may import {', '.join(sorted(helpers))}"
    axis.text(5, len(ROOMS) - 0.4, note, ha="center", fontsize=9)
    return figure


PICTURES: dict[str, Callable] = {
    drawn.__name__: drawn
    for drawn in (variance, few_values, uneven, one_nan, behind, memory, devices, house)
}

main = functools.partial(plots.drawing, "pictures", PICTURES, FOLDER)


if __name__ == "__main__":
    command.end(main)
