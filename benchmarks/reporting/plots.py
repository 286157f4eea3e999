"""`python -m benchmarks.reporting.plots [FILE …]`: draws the charts of files of results again.

A chart is drawn in one of three ways, by how much it holds: one series as bars with their values;
few labels as a row of dots for each; many labels as a row of dots for each series, with its mean.
"""

import io
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.reporting import command, report, results
from benchmarks.reporting.report import Chart

STYLES = {  # colour and marker of each library, the same in every picture
    "jaxbn": ("#d62728", "o"),
    "Flax linen": ("#1f77b4", "s"),
    "Flax nnx": ("#17becf", "D"),
    "Haiku": ("#2ca02c", "^"),
    "Equinox": ("#9467bd", "v"),
    "Keras": ("#8c564b", "p"),
    "torch": ("#ff7f0e", "X"),
}
OTHER = ("#555555", "*")
FEW = 8  # labels that a chart names one by one
MEAN = "\nsmall: each of {} shapes; large: their geometric mean"
INK, GRID = "#888888", "#e5e5e5"


def figure(width: float, height: float):
    """An empty figure of this many inches."""
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained")


def axes(title: str, x: str, y: str = "", height: float = 4.2):
    """A figure with one pair of axes, named, with their units; 7 inches wide."""
    drawn = figure(7, height)
    axis = drawn.subplots()
    axis.set(title=title, xlabel=x, ylabel=y)
    axis.grid(color=GRID)
    axis.set_axisbelow(True)
    return drawn, axis


def save(drawn, path: pathlib.Path) -> None:
    """A PNG of few colours, whole or not at all."""
    from PIL import Image

    with io.BytesIO() as buffer:
        drawn.savefig(buffer, dpi=110, format="png")
        picture = Image.open(buffer).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    temporary = path.with_name(f".{path.name}")
    picture.save(temporary, format="png", optimize=True)
    os.replace(temporary, path)


def draw(charts: Sequence[Chart], path: pathlib.Path) -> None:
    columns = min(2, len(charts))
    rows = [charts[i : i + columns] for i in range(0, len(charts), columns)]
    heights = [1.5 + 0.34 * max(len(_rows(chart)) for chart in row) for row in rows]
    longest = max(len(name) for chart in charts for name in _rows(chart))
    drawn = figure(columns * (5 + 0.075 * longest), sum(heights) + 0.6)
    panels = drawn.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    handles = {}
    for axis, chart in zip(panels.flat, charts, strict=False):
        handles |= _drawn(axis, chart)
        mean = "" if _labels(chart) == _rows(chart) else MEAN.format(len(_labels(chart)))
        axis.set(title=chart.title, xlabel=f"{chart.unit}{mean}")
        axis.grid(color=GRID)
        axis.set_axisbelow(True)
        if chart.line is not None:
            axis.axvline(chart.line, color="black", linewidth=1, linestyle="--", zorder=1)
            axis.annotate(
                f" {chart.aim}", (chart.line, 0), xycoords=("data", "axes fraction"), va="bottom"
            )
    for axis in panels.flat[len(charts) :]:
        axis.set_axis_off()
    if handles:
        names = [name for name in (*STYLES, *handles) if name in handles]
        names = list(dict.fromkeys(names))
        drawn.legend(
            [handles[name] for name in names],
            names,
            loc="outside upper center",
            ncols=min(len(names), 4 * columns),  # a legend wider than the figure is cut off
            frameon=False,
        )
    save(drawn, path)


def _labels(chart: Chart) -> list[str]:
    return list(dict.fromkeys(label for of in chart.points.values() for label in of))


def keep(
    folder: pathlib.Path | None, name: str, record: dict[str, Any], charts: Sequence[Chart]
) -> None:
    """Writes a benchmark's record and draws its charts; prints the device and the file."""
    report.show_environment(record["environment"])
    if folder:
        path = results.write(folder, name, record)
        if charts:
            draw(charts, path.with_name(f"{path.stem}_{name}.png"))
        print(f"written   {path}")
    print(flush=True)


def _rows(chart: Chart) -> list[str]:
    """What stands at the left, a row each."""
    return (
        _labels(chart) if len(_labels(chart)) <= FEW or len(chart.points) == 1 else [*chart.points]
    )


def _drawn(axis, chart: Chart):
    """Draws the points; the handles of a legend, where the rows do not name the series."""
    rows = _rows(chart)
    axis.set_yticks(range(len(rows)), rows)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    if len(chart.points) == 1:
        (of,) = chart.points.values()
        colors = [STYLES["jaxbn"][0] if label.startswith("jaxbn") else OTHER[0] for label in of]
        bars = axis.barh(range(len(of)), list(of.values()), color=colors)
        axis.bar_label(bars, [report.cell(value) for value in of.values()], padding=3)
        axis.margins(x=0.12)
        return {}
    handles = {}
    if rows == [*chart.points]:
        for i, (name, of) in enumerate(chart.points.items()):
            color, marker = STYLES.get(name, OTHER)
            values = np.array(list(of.values()))
            mean = float(np.exp(np.log(values).mean()))
            axis.scatter(values, [i] * len(values), s=14, c=color, alpha=0.35, linewidths=0)
            axis.scatter(mean, i, s=80, c=color, marker=marker, edgecolors="white", zorder=4)
            axis.annotate(f"{mean:.2f}", (mean, i - 0.3), ha="center", va="bottom", fontsize=9)
        axis.set_xscale("log")
        _plain(axis, chart)
        return {}
    for i, (name, of) in enumerate(chart.points.items()):
        apart = 0.08 * (i - (len(chart.points) - 1) / 2)  # equal values are seen
        color, marker = STYLES.get(name, OTHER)
        handles[name] = axis.scatter(
            list(of.values()),
            [rows.index(label) + apart for label in of],
            s=60 if name == "jaxbn" else 34,
            c=color,
            marker=marker,
            edgecolors="white",
            linewidths=0.5,
            zorder=4 if name == "jaxbn" else 3,
        )
    for odd in range(1, len(rows), 2):
        axis.axhspan(odd - 0.5, odd + 0.5, color="#f3f3f3", zorder=-1)
    _plain(axis, chart)
    return handles


def _plain(axis, chart: Chart) -> None:
    """Logarithmic where values span between 3 and 1000; plain numbers on any such axis."""
    from matplotlib import ticker

    values = [value for of in chart.points.values() for value in of.values()]
    span = max(values) / min(values) if min(values) > 0 else np.inf
    if 3 < span < 1000 or axis.get_xscale() == "log":
        subs = (1, 1.5, 2, 3, 4, 6, 8) if span < 10 else (1, 2, 5)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=subs))
        axis.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())


def drawing(name: str, pictures: dict[str, Callable], folder: pathlib.Path, arguments) -> int:
    """The command of a module of pictures: draws some of them, or all, into a folder."""
    shown = folder.relative_to(results.FOLDER.parents[1])
    parser = command.parser(f"benchmarks.reporting.{name}", f"Draws pictures into {shown}.")
    of = command.one_of(pictures)
    names = ", ".join(pictures)
    parser.add_argument("names", nargs="*", type=of, metavar="NAME", help=f"of {names}")
    parser.add_argument("--folder", type=pathlib.Path, default=folder, help="in its place")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    for asked in options.names or pictures:
        save(pictures[asked](), path := options.folder / f"{asked}.png")
        print(path, flush=True)
    return 0


def main(arguments) -> int:
    about = "Draws the charts of files of results again, beside the files."
    parser = command.parser("benchmarks.reporting.plots", about)
    newest = sorted(results.FOLDER.glob("*.json"))
    parser.add_argument("files", nargs="*", type=pathlib.Path, metavar="FILE", help="else all")
    for path in parser.parse_args(arguments).files or newest:
        for name, record in json.loads(path.read_text()).items():
            tables = [report.from_json(values) for values in record["tables"]]
            if charts := [chart for table in tables for chart in table.charts]:
                picture = path.with_name(f"{path.stem}_{name}.png")
                draw(charts, picture)
                print(picture, flush=True)
    return 0


if __name__ == "__main__":
    command.end(main)
