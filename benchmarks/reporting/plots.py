"""The charts of a benchmark as one picture: a row of dots for each shape or network."""

import math
import os
import pathlib
from collections.abc import Sequence

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


def draw(charts: Sequence[Chart], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(2, len(charts))
    lines = math.ceil(len(charts) / columns)
    labels = [list(dict.fromkeys(k for of in c.points.values() for k in of)) for c in charts]
    heights = [
        1.3 + 0.3 * max(len(row) for row in labels[i : i + columns])
        for i in range(0, len(charts), columns)
    ]
    longest = max(len(label) for row in labels for label in row)
    figure, axes = plt.subplots(
        lines,
        columns,
        squeeze=False,
        figsize=(columns * (4.5 + 0.075 * longest), sum(heights) + 0.6),
        height_ratios=heights,
        layout="constrained",
    )
    handles = {}
    for axis, chart, rows in zip(axes.flat, charts, labels, strict=False):
        # A little apart, for equal values to be seen.
        for i, (library, of) in enumerate(chart.points.items()):
            apart = 0.08 * (i - (len(chart.points) - 1) / 2)
            color, marker = STYLES.get(library, OTHER)
            handles[library] = axis.scatter(
                list(of.values()),
                [rows.index(label) + apart for label in of],
                s=60 if library == "jaxbn" else 34,
                c=color,
                marker=marker,
                edgecolors="white",
                linewidths=0.5,
                zorder=4 if library == "jaxbn" else 3,
            )
        if chart.line is not None:
            axis.axvline(chart.line, color="black", linewidth=1, linestyle="--", zorder=1)
        axis.set_title(chart.title, fontsize=11)
        axis.set_xlabel(chart.unit)
        axis.set_yticks(range(len(rows)), rows, fontsize=9)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        scale(axis, [v for of in chart.points.values() for v in of.values()])
        for odd in range(1, len(rows), 2):
            axis.axhspan(odd - 0.5, odd + 0.5, color="#f3f3f3", zorder=-1)
        axis.grid(color="#dddddd", zorder=0)
    for axis in axes.flat[len(charts) :]:
        axis.set_axis_off()
    names = [name for name in (*STYLES, *handles) if name in handles]
    if len(handles) > 1:
        names = list(dict.fromkeys(names))
        figure.legend(
            [handles[name] for name in names],
            names,
            loc="outside upper center",
            ncols=min(len(names), 4 * columns),  # a legend wider than the figure is cut off
            frameon=False,
        )
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
    os.replace(temporary, path)


def scale(axis, values) -> None:
    """Logarithmic, with plain numbers, where values span between 3 and 1000."""
    from matplotlib import ticker

    span = max(values) / min(values) if min(values) > 0 else math.inf
    if 3 < span < 1000:
        subs = (1, 1.5, 2, 3, 4, 6, 8) if span < 10 else (1, 2, 5)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=subs))
        axis.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
