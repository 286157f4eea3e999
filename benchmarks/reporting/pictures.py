"""`python -m benchmarks.reporting.pictures [NAME …]`: draws the pictures of the pages into
`docs/pictures`.

Each picture shows one fact, with units on its axes and few series. Everything is computed when it
is drawn, but for `memory`, which reads the newest files of results. A CPU and a minute are enough.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import jaxbn
from benchmarks.reporting import plots, results
from benchmarks.subjects import peers

FOLDER = pathlib.Path(__file__).parents[2] / "docs" / "pictures"
OURS, FLAX, GREY = plots.STYLES["jaxbn"][0], plots.STYLES["Flax linen"][0], "#888888"


def variance(plt):
    """How wrong the variance is, by how far the mean lies from 0."""
    ratios = 10.0 ** np.arange(0, 6.5, 0.5)
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    curves = []  # libraries whose curves coincide are one line
    for name, batch_norm in peers.installed().items():
        if batch_norm is None or name == "torch":
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
    axis.set_xlabel("mean of x, in standard deviations")
    axis.set_ylabel("relative error of the variance")
    axis.set_title("Variance of one batch of 256 rows, float32")
    axis.grid(color="#e5e5e5")
    axis.legend(frameon=False)
    return figure


def _variance_error(batch_norm, ratio):
    x = np.random.default_rng(0).normal(ratio, 1, (256, 64)).astype(np.float32)
    state = (jnp.zeros(64), jnp.ones(64))
    params = (jnp.ones(64), jnp.zeros(64))
    _, (_, var) = batch_norm(jnp.asarray(x), params, state, train=True, momentum=0.0)
    true = x.astype(np.float64).var(0)
    return max(float(np.abs(np.asarray(var) / true - 1).max()), 1e-7)  # some rounding there is


def few_values(plt):
    """How far a batch's own standard deviation lies from the truth, by values per channel."""
    sizes = 2 ** np.arange(1, 12)
    rng, tried = np.random.default_rng(0), 2000
    low, middle, high = [], [], []
    for n in sizes:
        var = jaxbn.moments(jnp.asarray(rng.normal(size=(n, tried)), jnp.float32)).var
        for values, percent in ((low, 5), (middle, 50), (high, 95)):
            values.append(float(np.percentile(np.sqrt(var), percent)))
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axis.fill_between(sizes, low, high, color=FLAX, alpha=0.25, label="9 of 10 batches lie here")
    axis.plot(sizes, middle, color=FLAX, label="median")
    axis.axhline(1, color="black", linestyle="--", linewidth=1, label="true standard deviation")
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, sizes)
    axis.set_xlabel("values per channel in the batch (rows x height x width)")
    axis.set_ylabel("standard deviation of the batch")
    axis.set_ylim(0, 2)
    axis.set_title("What a batch says of the standard deviation, normal x")
    axis.grid(color="#e5e5e5")
    axis.legend(frameon=False)
    return figure


def uneven(plt):
    """The pooled mean of two devices that hold different numbers of valid rows."""
    first, second, rows = 0.0, 6.6, np.arange(5)
    found = {"Flax linen": [], "jaxbn": []}
    for name, means in found.items():
        batch_norm = peers.installed()[name]
        for valid in rows:
            means.append(_pooled_mean(batch_norm, first, second, int(valid)))
    true = [(4 * first + n * second) / (4 + n) for n in rows]
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axis.plot(rows, true, color="black", linestyle="--", label="true mean of all valid rows")
    for name, means in found.items():
        color, marker = plots.STYLES[name]
        axis.plot(rows, means, color=color, marker=marker, label=name, linewidth=1.5)
    if not np.isfinite(found["Flax linen"][0]):
        axis.annotate("NaN at 0 rows", (0.06, 3.1), color=FLAX)
    axis.set_xticks(rows)
    axis.set_xlabel("valid rows on the second device (the first has 4)")
    axis.set_ylabel("pooled mean")
    axis.set_title("Rows of 0 on one device, rows of 6.6 on another, the rest masked")
    axis.grid(color="#e5e5e5")
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


def one_nan(plt):
    """The running variance through one batch that holds a NaN."""
    steps, bad = 60, 20
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
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
    axis.set_xlabel("training step")
    axis.set_ylabel("running variance (true: 4)")
    axis.set_title("A single NaN among 64 values")
    axis.grid(color="#e5e5e5")
    axis.legend(frameon=False, loc="lower right")
    return figure


def behind(plt):
    """How much of the way running statistics have gone, by updates and momentum."""
    updates = np.unique(np.logspace(0, 3.5, 200).astype(int))
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for momentum, color in ((0.9, "#2ca02c"), (0.99, FLAX), (0.999, "#9467bd")):
        axis.plot(updates, 100 * (1 - momentum**updates), color=color, label=f"momentum {momentum}")
    axis.plot(updates, np.full(len(updates), 100), color=OURS, label="momentum=None (cumulative)")
    axis.set_xscale("log")
    axis.set_xticks((1, 10, 100, 1000), ("1", "10", "100", "1000"))
    axis.set_xlabel("training steps since the start")
    axis.set_ylabel("weight of what was seen, % (rest: mean 0, var 1)")
    axis.set_title("What eval mode knows of the data")
    axis.grid(color="#e5e5e5")
    axis.legend(frameon=False, loc="lower right")
    return figure


def memory(plt):
    """Temporary memory of a training step, over that with Flax's norm, by device."""
    rows = []
    for device, name, key, column in (
        ("cpu", "2 CPU cores,\nsmall ResNet", "memory-step", 4),
        ("compiled-for-h100", "H100 (compiled),\nResNet-50", "compiled-step", 5),
        ("compiled-for-v5e", "TPU v5e (compiled),\nResNet-50", "compiled-step", 5),
    ):
        for row in _rows(device, key):
            dtype, norm = row[0].split(", ", 1)
            if norm.startswith("jaxbn"):
                rows.append((f"{name}, {dtype}{norm.removeprefix('jaxbn')}", row[column]))
    figure, axis = plt.subplots(figsize=(7, 1.4 + 0.5 * len(rows)), layout="constrained")
    names, values = zip(*rows, strict=True)
    bars = axis.barh(names, values, color=OURS, height=0.6)
    axis.bar_label(bars, fmt="%.2f", padding=3)
    axis.axvline(1, color=FLAX, linewidth=2)
    axis.set_title("Flax linen: the line at 1", color=FLAX, fontsize=10, loc="right")
    axis.set_xlim(0, 1.2)
    axis.invert_yaxis()
    axis.set_xlabel("temporary memory of a training step, Flax's = 1 (less is better)")
    return figure


def _rows(device, key):
    import json

    record = json.loads(results.newest(results.FOLDER, device).read_text())
    tables = [table for part in record.values() for table in part["tables"]]
    return next(table["rows"] for table in tables if table["key"] == key)


def devices(plt):
    """What crosses devices in one training step of a norm."""
    figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
    axis.set_xlim(0, 10.6)
    axis.set_ylim(0, 6)
    axis.set_axis_off()
    box = {"boxstyle": "round,pad=0.5", "facecolor": "white"}
    for i, top in enumerate((4.9, 1.1)):
        axis.text(0.9, top, f"device {i}\nx [rows, …, C]", ha="center", va="center", bbox=box)
        axis.text(3.3, top, "count, mean, var\nof its own rows", ha="center", va="center", bbox=box)
        axis.text(7.2, top, "y, and the same\nstate [C]", ha="center", va="center", bbox=box)
        axis.text(9.4, top, "Σdy, Σdy·d\nfor dx", ha="center", va="center", bbox=box)
        for start, end in ((1.7, 2.4), (4.2, 6.4), (7.95, 8.75)):
            axis.annotate("", (end, top), (start, top), arrowprops={"arrowstyle": "->"})
    for x, text in (
        (5.2, "forward:\nonce, 2C + 1 numbers"),
        (9.4, "backward:\nonce, 2C numbers"),
    ):
        axis.annotate("", (x, 1.75), (x, 4.25), arrowprops={"arrowstyle": "<->", "color": OURS})
        axis.text(x, 3, text, ha="center", va="center", color=OURS, bbox={**box, "edgecolor": OURS})
    axis.set_title("Under shard_map and pmap with axis_name: C numbers cross devices, x never does")
    return figure


PICTURES: dict[str, Callable] = {
    drawn.__name__: drawn
    for drawn in (variance, few_values, uneven, one_nan, behind, memory, devices)
}


def draw(name: str, folder: pathlib.Path = FOLDER) -> pathlib.Path:
    """Draws one picture into the folder, whole or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = PICTURES[name](plt)
    folder.mkdir(parents=True, exist_ok=True)
    path, temporary = folder / f"{name}.png", folder / f".{name}.png"
    figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
    os.replace(temporary, path)
    return path


def main(arguments) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reporting.pictures",
        description="Draws the pictures of the pages.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PICTURES)}")
    parser.add_argument("--folder", type=pathlib.Path, default=FOLDER)
    options = parser.parse_args(arguments)
    for name in options.names or PICTURES:
        if name not in PICTURES:
            parser.error(f"picture {name!r}, expected some of: {', '.join(PICTURES)}")
    for name in options.names or PICTURES:
        print(draw(name, options.folder), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
