"""`python -m benchmarks.reporting.gallery [NAME …]`: draws a picture of each example script into
`docs/pictures/gallery`.

Scripts that take seconds are run: `first_steps`, `devices`, `train`, `predict`, `served`,
`torch_roundtrip`, `fold_report`, `watched`. The others take minutes, or CIFAR-10; their pictures
are drawn from the tables of results in the pages, which name the command. A CPU and two minutes are
enough.
"""

import contextlib
import functools
import importlib
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable

import numpy as np

from benchmarks.reporting import command, plots

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "pictures" / "gallery"
BLUE, RED, GREY = "#1f77b4", "#d62728", plots.INK


def table(page: str, first: str) -> list[list[str]]:
    """The rows of a page's table by its first column's name; an empty cell as the cell above."""
    text = (ROOT / page).read_text()
    found = re.search(
        rf"^\| {re.escape(first)} +\|.*\n\|[-:| ]+\|\n((?:\|.*\n)+)", text, re.MULTILINE
    )
    if found is None:
        raise ValueError(f"{page}: no table whose first column is {first!r}, expected one to draw.")
    rows: list[list[str]] = []
    for line in found[1].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows.append([cells[0] or rows[-1][0], *cells[1:]])
    return rows


def number(text: str) -> float:
    """The first number of a cell."""
    return float(re.search(r"-?[\d,]+\.?\d*(e-\d+)?", text)[0].replace(",", ""))


def script(path: str):
    """An example's module, imported as a run of it imports its neighbours, without its output."""
    folder, name = os.path.split(path)
    sys.path.insert(0, str(ROOT / "examples" / folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def quiet(f: Callable, *arguments):
    """f(*arguments); what f prints is dropped."""
    with contextlib.redirect_stdout(io.StringIO()):
        return f(*arguments)


def before_and_after(rows, title, x):
    """A line from a ring to a dot for each (name, before, after)."""
    names, before, after = zip(*rows, strict=True)
    figure, axis = plots.axes(title, x, height=1.5 + 0.36 * len(rows))
    places = range(len(rows))
    axis.hlines(places, before, after, color=GREY, linewidth=1.5)
    axis.scatter(before, places, facecolors="white", edgecolors=RED, s=60, zorder=3, label="before")
    axis.scatter(after, places, color=BLUE, s=60, zorder=3, label="after")
    axis.set_yticks(places, names)
    axis.invert_yaxis()
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    return figure


def first_steps():
    """Test accuracy by epoch of the smallest example."""
    with tempfile.TemporaryDirectory() as folder:
        scores, _ = quiet(script("first_steps").main, 10, pathlib.Path(folder) / "state.npz")
    figure, axis = plots.axes(
        "A network with one norm on handwritten digits", "epoch", "test accuracy, %"
    )
    axis.plot(range(1, len(scores) + 1), [100 * v for v in scores], color=BLUE, marker="o")
    return figure


def devices():
    """How far a training step by each road is from that of one device."""
    command = [sys.executable, "examples/devices/all.py"]  # a process of its own: eight devices
    shown = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    rows = re.findall(r"│ (\w+) +│ [\d.]+ │ ([\d.]+) roundings", shown)
    figure, axis = plots.axes(
        "One training step on eight CPU devices, beside one device",
        "largest difference of a number, in roundings of float32",
        height=1.5 + 0.4 * len(rows),
    )
    bars = axis.barh([name for name, _ in rows], [float(off) for _, off in rows], color=BLUE)
    axis.bar_label(bars, padding=3)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    return figure


def train():
    """Accuracy by epoch on the digits."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["examples/cifar10/train.py", "--data", "digits", "--epochs", "6"]
        command += ["--name", "run", "--runs", folder]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
        lines = (pathlib.Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    figure, axis = plots.axes("ResNet-9 on handwritten digits", "epoch", "accuracy, %")
    epochs = [row["epoch"] for row in rows]
    for name, color in (("train", GREY), ("test", BLUE)):
        values = [100 * row[f"{name}_accuracy"] for row in rows]
        axis.plot(epochs, values, color=color, marker="o", label=f"{name} images")
    axis.legend(frameon=False)
    return figure


def predict():
    """The top classes of images of digits, by a network that is trained for half a minute."""
    from PIL import Image
    from sklearn.datasets import load_digits

    script("cifar10/model_linen")  # which predict.py imports late, after script
    module = script("cifar10/predict")
    with tempfile.TemporaryDirectory() as folder:
        command = ["examples/cifar10/train.py", "--data", "digits", "--epochs", "10"]
        command += ["--name", "run", "--runs", folder]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
        paths = [pathlib.Path(folder) / f"{i}.png" for i in (0, 5, 25)]
        for path in paths:
            digit = np.rint(load_digits().images[int(path.stem)] * (255 / 16)).astype(np.uint8)
            Image.fromarray(digit.repeat(4, 0).repeat(4, 1)).save(path)
        images, probabilities, classes = module.predictions(pathlib.Path(folder) / "run", paths)
    return module.drawn(images, probabilities, classes, 3)


def ship():
    """Accuracy and size of a network at each stage on its way to a file."""
    rows = [row for row in table("docs/export.md", "stage") if row[0] != "folded"]
    figure = plots.figure(7, 3.4)
    left, right = figure.subplots(1, 2, sharey=True)
    names = [row[0] for row in rows]
    for axis, column, title, form in (
        (left, 1, "accuracy on CIFAR-10, %", "%.2f"),
        (right, 4, "size, kB", "%d"),
    ):
        bars = axis.barh(names, [number(row[column]) for row in rows], color=BLUE, height=0.6)
        axis.bar_label(bars, fmt=form, padding=3, fontsize=9)
        axis.set_xlabel(title)
        axis.margins(x=0.25)
    left.invert_yaxis()
    figure.suptitle("A ResNet-9 from a checkpoint to an int8 file")
    return figure


def speedrun():
    """Test accuracy of the speedrun beside the reference in PyTorch, a dot a seed."""
    rows = table("examples/cifar10/README.md", "recipe")
    figure, axis = plots.axes(
        "Speedrun at a quarter of the width, 9.9 epochs",
        "test accuracy, CIFAR-10 as JPEG, %",
        height=2.6,
    )
    for i, (name, dtype, _, mean, each) in enumerate(rows):
        values = [float(v) for v in re.findall(r"\d+\.\d+", each or mean)]
        color = RED if "speedrun" in name else GREY
        axis.scatter(values, [i] * len(values), color=color, s=60, zorder=3)
        rows[i] = f"{name.strip('`')}\n{dtype}"
    axis.set_yticks(range(len(rows)), rows)
    axis.set(xlim=(84, 85.2), ylim=(len(rows) - 0.5, -0.5))
    return figure


def torch_roundtrip():
    """Where each array of a PyTorch file goes in the variables of Flax."""
    import jax
    from safetensors.numpy import save_file

    from jaxbn import convert

    network = script("convert/torchvision_resnet").ResNet(blocks=[1, 1, 1, 1], width=8, classes=10)
    x = np.zeros((1, 64, 64, 3), np.float32)
    variables = network.init(jax.random.key(0), x)
    state, _ = convert.to_torch(variables)
    with tempfile.TemporaryDirectory() as folder:
        save_file(state, path := f"{folder}/resnet.safetensors")
        _, report = convert.from_torch(path, variables)
    order = {move.target: i for i, move in enumerate(sorted(report.moves, key=lambda m: m.target))}
    figure, axis = plots.axes(
        "Where each array of a PyTorch ResNet goes in Flax",
        "array in PyTorch's file, in alphabetical order",
        "array in Flax's variables",
    )
    kinds: dict[str, list[tuple[int, int]]] = {}
    for i, move in enumerate(sorted(report.moves, key=lambda m: m.source)):
        kind = move.target.rsplit("/", 1)[-1]
        kinds.setdefault(kind, []).append((i, order[move.target]))
    for (kind, points), (color, marker) in zip(kinds.items(), plots.STYLES.values(), strict=False):
        axis.scatter(*np.transpose(points), c=color, marker=marker, s=30, label=kind)
    axis.legend(frameon=False, title="what the array is", ncols=2)
    return figure


def zoo():
    """Errors of converted networks in linen, in nnx, and folded."""
    rows = table("docs/convert.md", "network")
    figure, axis = plots.axes(
        "Five networks by torchvision's names, in float32",
        "largest error over the largest result, from float64",
        height=2.8,
    )
    stages = {"linen": 2, "nnx": 3, "folded": 5}
    for (stage, column), (color, marker) in zip(
        stages.items(), plots.STYLES.values(), strict=False
    ):
        errors = [number(row[column]) for row in rows]
        axis.scatter(errors, range(len(rows)), c=color, marker=marker, s=40, label=stage)
    axis.set_xscale("log")
    axis.set_yticks(range(len(rows)), [row[0] for row in rows])
    axis.set(xlim=(1e-7, 1e-5), ylim=(len(rows) - 0.5, -0.5))
    axis.legend(frameon=False)
    return figure


def alarms():
    """Accuracy falls, and alarms rise, with what is done to the images."""
    rows = table("docs/drift.md", "images")
    (clean,) = [row for row in rows if row[0] == "clean"]
    panels: dict[str, list[list[str]]] = {}
    for row in rows:
        if row is not clean:
            panels.setdefault(row[0], [clean]).append(row)
    figure = plots.figure(9, 3.6)
    series = (
        ("accuracy", "black", "o"),
        ("windows with an alarm: held against running statistics", BLUE, "s"),
        ("windows with an alarm: held against a reference of clean data", "#ff7f0e", "^"),
    )
    for axis, (name, found) in zip(
        figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True
    ):
        severity = [number(row[1] or "0") for row in found]
        for column, (label, color, marker) in enumerate(series, start=2):
            values = [number(row[column]) for row in found]
            axis.plot(severity, values, color=color, marker=marker, markersize=5, label=label)
        axis.set(xlabel=name, ylim=(-3, 103))
        axis.grid(color=plots.GRID)
    figure.axes[0].set_ylabel("%")
    figure.suptitle("Corrupted CIFAR-10: accuracy, and alarms of health.drift without labels")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False)
    return figure


def false_alarms():
    """Alarms where nothing drifts, beside the rate that was asked for."""
    rows = table("docs/drift.md", "rows of a window")
    figure, axis = plots.axes(
        "False alarms of health.drift, no tolerance, 1000 windows",
        "rows of a window",
        "share of windows with an alarm",
    )
    for name, (color, marker) in zip(
        dict.fromkeys(row[1] for row in rows), plots.STYLES.values(), strict=False
    ):
        found = [row for row in rows if row[1] == name]
        rates = [number(row[2]) for row in found]
        axis.plot([row[0] for row in found], rates, color=color, marker=marker, label=name)
    axis.axhline(0.1, color="black", linestyle="--", linewidth=1, label="asked for: 0.1")
    axis.legend(frameon=False, title="values of a row")
    return figure


def served():
    """A served model under fading light: accuracy, and the figure that raises the alarm."""
    decisions = quiet(script("drift/served").main)
    figure, axis = plots.axes(
        "Served digits: the light fades from window 6 on", "window of 128 images", "accuracy, %"
    )
    windows = np.arange(1, len(decisions) + 1)
    accuracy = [100 * hits for _, hits, _ in decisions]
    axis.plot(windows, accuracy, color="black", marker="o", label="accuracy (not known in service)")
    for window, (_, _, verdict) in zip(windows, decisions, strict=True):
        if verdict.alarm:
            axis.axvspan(window - 0.5, window + 0.5, color=RED, alpha=0.2, linewidth=0)
    axis.fill_between([], [], color=RED, alpha=0.2, label="alarm of health.drift, without labels")
    axis.set(ylim=(0, 100), xticks=windows)
    axis.legend(frameon=False, loc="lower left")
    return figure


def stale():
    """How often right statistics are called stale, by rows of the batch."""
    rows = table("docs/health.md", "rows")
    figure, axis = plots.axes(
        "Right statistics called stale by health.check",
        "batches of 100,000",
        height=1.5 + 0.5 * len(rows),
    )
    names = [f"{size} rows, {name}" for size, name, *_ in rows]
    for i, (channels, color) in enumerate((("1", BLUE), ("8", "#17becf"), ("64", GREY))):
        values = [number(row[2 + i]) for row in rows]
        places = np.arange(len(rows)) + 0.25 * (i - 1)
        bars = axis.barh(places, values, height=0.25, color=color, label=f"channels: {channels}")
        axis.bar_label(bars, fmt="%d", padding=3, fontsize=8)
    axis.set_yticks(range(len(rows)), names)
    axis.invert_yaxis()
    axis.margins(x=0.1)
    axis.legend(frameon=False)
    return figure


def failures():
    """Fourteen failures: test accuracy with the failure, and after its cure."""
    rows = [
        (re.search(r"\[(.*?)\]", row[0])[1], 100 * number(row[3]), 100 * number(row[5]))
        for row in table("docs/troubleshooting.md", "failure")
    ]
    return before_and_after(
        rows, "Fourteen failures and their cures", "test accuracy, %, mean of 10 seeds"
    )


def finetune():
    """Accuracy after fine-tuning by what the norms did."""
    rows = table("docs/freeze.md", "batch norm")
    figure, axis = plots.axes(
        "Four new classes from 20 images each",
        "test accuracy, %: mean and range of 3 draws",
        height=3,
    )
    for i, (_, *cells) in enumerate(rows):
        mean, least, most = map(number, cells)
        axis.hlines(i, least, most, color=GREY, linewidth=2)
        axis.scatter(mean, i, color=BLUE, s=60, zorder=3)
    axis.set_yticks(range(len(rows)), [row[0] for row in rows])
    axis.invert_yaxis()
    return figure


def recalibrate():
    """Accuracy before and after recalibration."""
    rows = [
        (f"{images}", number(before), number(after))
        for _, images, before, after in table("docs/recalibrate.md", "weights")
        if after
    ]
    rows[0] = ("all, weights averaged", *rows[0][1:])
    title = "jaxbn.recalibrate: a ResNet-9, CIFAR-10"
    return before_and_after(rows, title, "accuracy on these test images, %")


def swap():
    """Test accuracy by rows in a batch: batch norm, and group norm in its place."""
    rows = table("docs/swap.md", "rows in a batch")
    figure, axis = plots.axes(
        "ResNet-9 on digits, batch norm swapped", "rows in a batch", "test accuracy, % (s.e. 0.5)"
    )
    for column, (name, color) in enumerate((("BatchNorm", BLUE), ("GroupNorm", RED)), start=1):
        values = [number(row[column]) for row in rows]
        axis.plot([row[0] for row in rows], values, color=color, marker="o", label=name)
    axis.set_ylim(90, 100)
    axis.legend(frameon=False)
    return figure


def ranges(axis, rows, series):
    """For rows (label, a cell of each series): a dot at each mean, and a line over its range."""
    for i, (name, color) in enumerate(series.items()):
        cells = [re.findall(r"\d+\.?\d*", row[1 + i]) for row in rows]
        mean, least, most = np.transpose([[float(v) for v in cell] for cell in cells])
        places = np.arange(len(rows)) + 0.18 * (i - (len(series) - 1) / 2)
        axis.hlines(places, least, most, color=color, linewidth=2)
        axis.scatter(mean, places, color=color, s=40, zorder=3, label=name)
    axis.set_yticks(range(len(rows)), [row[0] for row in rows])
    axis.invert_yaxis()


def accuracies(title, rows, series, legend):
    """A figure of `ranges`, where each cell is an accuracy; `legend` is a place in it."""
    figure, axis = plots.axes(title, "test accuracy, %: mean and range of 3 seeds", height=3)
    ranges(axis, rows, series)
    axis.legend(loc=legend, frameon=False)
    return figure


def renorm():
    """Accuracy with batch norm and with renormalization, for three kinds of batches."""
    rows = table("docs/renorm.md", "a batch of")
    series = {"BatchNorm": GREY, "with renorm": BLUE}
    return accuracies("Small batches, and batches of few classes", rows, series, "lower left")


def domains():
    """Accuracy by day and by night, with one set of statistics and with one for each."""
    rows = table("docs/domains.md", "a batch")
    rows = [(f"a batch {kind}, tested {when}", *cells) for kind, when, *cells in rows]
    series = {"one set": GREY, "a set for each": BLUE}
    return accuracies("Images by day and by night", rows, series, "upper left")


def tent():
    """Errors on corrupted images by what the norms normalize by, for two sizes of a batch."""
    found = table("docs/adapt.md", "a batch of")
    series = {"source": GREY, "batch": "#17becf", "blend": BLUE, "TENT": RED}
    figure = plots.figure(9, 4)
    sizes = list(dict.fromkeys(row[0] for row in found))
    for axis, size in zip(figure.subplots(1, len(sizes), sharey=True), sizes, strict=True):
        ranges(axis, [row[1:] for row in found if row[0] == size], series)
        axis.set_xlabel(f"error, %, in batches of {size}")
        axis.grid(color=plots.GRID)
    figure.axes[0].invert_yaxis()  # shared, and so inverted twice
    figure.suptitle("Corrupted CIFAR-10 without labels: mean and range of 3 networks")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False, ncols=4)
    return figure


def weights():
    """Errors after recalibration on images of mostly one class, with weights and without."""
    rows = table("docs/weights.md", "images")
    figure, axis = plots.axes(
        "Statistics of images of mostly one class",
        "error on all classes, %: mean and range of 3 networks",
        height=3.8,
    )
    names = ("source", "unweighted", "weights by guesses", "weights by labels")
    ranges(axis, rows, dict(zip(names, (GREY, RED, "#17becf", BLUE), strict=True)))
    figure.legend(loc="outside lower center", frameon=False, ncols=4)
    return figure


def generator():
    """How many of the generated digits are of the class that was asked for."""
    rows = table("docs/domains.md", "the label is")
    figure, axis = plots.axes(
        "Digits of a class", "of that class, %: mean and range of 3 seeds", height=2.5
    )
    for i, (_, cell, _) in enumerate(rows):
        mean, *ends = map(float, re.findall(r"[\d.]+", cell))
        axis.hlines(i, *(ends or (mean, mean)), color=BLUE, linewidth=2)
        axis.scatter(mean, i, color=BLUE if ends else GREY, s=60, zorder=3)
    axis.set_yticks(range(len(rows)), [row[0] for row in rows])
    axis.invert_yaxis()
    return figure


def fold_report():
    """Operations of norms in a network, as written and folded."""
    import jax

    import jaxbn

    x = jax.random.normal(jax.random.key(2), (4, 16, 16, 3))
    count = script("fold/fold_report").norm_operations
    names, before, after = [], [], []
    for name, fn in script("fold/resnets").networks(x).items():
        names.append(name)
        before.append(count(fn, x))
        after.append(count(jaxbn.fold(fn, x)[0], x))
    figure, axis = plots.axes(
        "jaxbn.fold: one ResNet as each library writes it", "", "operations of norms in the program"
    )
    places = np.arange(len(names))
    for offset, values, color, label in (
        (-0.2, before, GREY, "as written"),
        (0.2, after, BLUE, "folded"),
    ):
        bars = axis.bar(places + offset, values, 0.38, color=color, label=label)
        axis.bar_label(bars, padding=2)
    axis.set_xticks(places, names)
    axis.margins(y=0.25)
    axis.legend(frameon=False, ncols=2)
    return figure


def study(name: str, *tables: str):
    """A study's picture, drawn by its script from the tables of the page."""
    return script(f"studies/{name}").picture(*(table("docs/studies.md", t) for t in tables))


def learning_rate():
    """Steps to a target by learning rate, and loss and gradient ahead."""
    ahead = [f"step length, {what} ahead" for what in ("loss", "gradient")]
    return study("learning_rate", "learning rate", *ahead)


def batch_size():
    """Accuracy by the images in a batch, for three norms."""
    return study("batch_size", "images in a batch")


def placement():
    """Accuracy by depth and by where the norm of a residual block goes."""
    return study("placement", "convolutions, rate 0.1", "convolutions, rate 1")


def synchronized():
    """Accuracy by what a device normalizes by."""
    return study("synchronized", "a device normalizes by")


def momentum():
    """Accuracy and error of running statistics by updates."""
    return study("momentum", "updates", "after updates")


def freeze_when():
    """Accuracy after fine-tuning by what is frozen, and when."""
    return study("freeze_when", "frozen in fine-tuning", "best rate, by what is frozen")


def watched():
    """How far running statistics are from those of the batch, by step."""
    with tempfile.TemporaryDirectory() as folder:
        quiet(script("watch/watched").main, folder, 500, 0)
        lines = (pathlib.Path(folder) / "watch.jsonl").read_text().splitlines()
    figure, axis = plots.axes(
        "A watched training run, a line a layer",
        "training step",
        "running statistics off by, nats (worst channel)",
    )
    layers: dict[str, list[tuple[int, float]]] = {}
    for row in map(json.loads, lines):
        for layer, figures in row["layers"].items():
            layers.setdefault(layer, []).append((row["step"], figures["symmetric_kl_max"]))
    for (layer, points), (color, marker) in zip(
        layers.items(), plots.STYLES.values(), strict=False
    ):
        axis.semilogy(*np.transpose(points), color=color, marker=marker, label=layer)
    axis.legend(frameon=False)
    return figure


PICTURES: dict[str, Callable] = {
    drawn.__name__: drawn
    for drawn in (
        *(first_steps, devices),
        *(train, predict, ship, speedrun, failures, alarms, served, false_alarms, stale),
        *(recalibrate, tent, weights, domains, generator, finetune, renorm),
        *(
            swap,
            fold_report,
            torch_roundtrip,
            zoo,
            watched,
            learning_rate,
            batch_size,
            placement,
            synchronized,
        ),
        *(momentum, freeze_when),
    )
}

main = functools.partial(plots.drawing, "gallery", PICTURES, FOLDER)


if __name__ == "__main__":
    command.end(main)
