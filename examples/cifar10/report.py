# What a run leaves behind: metrics.jsonl and curves.png in its folder, a table on the screen.

import json
from pathlib import Path

from command import new_file
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table


def progress(console: Console) -> Progress:
    """The bar of a whole run. Where output is not a terminal only the epochs' lines are printed."""
    return Progress(
        SpinnerColumn(),
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


HEADER = "epoch  train loss  accuracy   test loss  accuracy   images/s  seconds  minutes left"


def line(m: dict, left: float) -> str:
    return (
        f"{m['epoch']:5d}  {m['train_loss']:10.4f}  {m['train_accuracy']:8.2%}   "
        f"{m['test_loss']:9.4f}  {m['test_accuracy']:8.2%}   "
        f"{m['images_per_s']:8,.0f}  {m['seconds']:7.1f}  {left / 60:12.1f}"
    )


FIELDS = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy")
FIELDS += ("test_images", "images_per_s", "seconds")


class Log:
    """metrics.jsonl: one JSON object an epoch, of FIELDS."""

    def __init__(self, path: Path, epochs: int, writes: bool = True):
        """
        Goes on after `epochs` epochs. Lines of later ones, which a kill left, are dropped, and so
        are lines that are none of ours: a file of figures keeps no run from going on.
        """
        self.path, self.writes, self.rows = path, writes, []
        try:
            text = path.read_text(errors="replace") if epochs else ""
        except FileNotFoundError:
            text = ""
        for row in filter(None, map(parsed, text.splitlines())):
            if len(self.rows) < row["epoch"] <= epochs:
                self.rows.append(row)
        self.missing = epochs - len(self.rows)
        if writes:
            write(path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, metrics: dict) -> None:
        self.rows.append(metrics)
        if self.writes:
            with open(self.path, "a") as file:
                file.write(json.dumps(metrics) + "\n")


def parsed(line: str) -> dict | None:
    """A line of metrics.jsonl; None for any other."""
    try:
        row = json.loads(line)
        numbers = {name: float(row[name]) for name in FIELDS}
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
        return None
    return row if len(row) == len(numbers) and float.is_integer(numbers["epoch"]) else None


def write(path: Path, text: str) -> None:
    with new_file(path) as part:
        part.write_text(text)


def table(title: str, rows: list[tuple[str, str, str]]) -> Table:
    """(what, number, unit), the numbers flush right."""
    out = Table(title=title, title_justify="left", show_header=False)
    out.add_column()
    out.add_column(justify="right")
    out.add_column()
    for row in rows:
        out.add_row(*row)
    return out


def curves(path: Path, rows: list[dict], title: str) -> None:
    """Loss and accuracy by epoch; the training set's with augmentation and smoothed labels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    epochs = [row["epoch"] for row in rows]
    for axes, what in ((left, "loss"), (right, "accuracy")):
        for split, label in (("train", "train (augmented, smoothed)"), ("test", "test")):
            values = [row[f"{split}_{what}"] for row in rows]
            axes.plot(epochs, values, "o-", ms=3, label=label)
        axes.set(xlabel="epoch", ylabel=what)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.suptitle(title, fontsize=10)
    with new_file(path) as part:
        figure.savefig(part, format="png", dpi=150)
    plt.close(figure)
