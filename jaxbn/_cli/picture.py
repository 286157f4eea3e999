"""A picture of the batch norm layers of a checkpoint: a dot for every channel."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxbn._extras import need
from jaxbn._files import check_place, replacing
from jaxbn._inspection.layers import Layer
from jaxbn._text import printable
from jaxbn.health._findings import ERROR, Finding

HEALTHY, SICK = "#3b6ea5", "#c8102e"
SHADES = {"error": "#f7c6c6", "warning": "#fbe7b5"}


def plot(
    path: str | os.PathLike[str],
    title: str,
    layers: Mapping[str, Layer],
    findings: Iterable[Finding] = (),
) -> None:
    """Writes a PNG with the means, variances and scales of every layer, a dot for each channel.

    Channels with a finding are red crosses. Layers with a finding as a whole are shaded. A value
    that an axis cannot show (not finite, or a variance that is not positive) is put on the edge.

    Args:
      path: ends in `.png`. An older file is replaced once the new one is complete.
      title: the text above the picture.
      layers: path → layer, as `jaxbn._checkpoints.norm_layers.norms_in` returns them.
      findings: the findings of `jaxbn.health.check` about these layers.

    Raises:
      ValueError: the suffix is another.
      OSError: the file cannot be written.
      ModuleNotFoundError: matplotlib is not installed.

    >>> import tempfile, pathlib, numpy as np, jaxbn
    >>> from jaxbn._cli import picture
    >>> picture.plot("bn.jpg", "", {})
    Traceback (most recent call last):
        ...
    ValueError: plot: bn.jpg ends in .jpg, expected .png
    """
    path = Path(path)
    if path.suffix != ".png":
        raise ValueError(
            f"plot: {printable(path)} ends in {printable(path.suffix) or 'nothing'}, expected .png"
        )
    check_place("plot", path)
    figure_of = need("plot", "matplotlib.figure").Figure
    findings = list(findings)
    names = list(layers)
    width = float(np.clip(0.3 * len(names) + 2, 8, 40))
    figure = figure_of((width, 9), layout="constrained")
    figure.suptitle(_tail(title, 100), fontsize=10, parse_math=False)
    axes: Any = figure.subplots(3, sharex=True)
    sick = {name: _channels(name, findings) for name in names}
    panels: dict[str, dict[str, Any]] = {
        "mean": {name: layer.state.mean for name, layer in layers.items()},
        "var": {name: layer.state.var for name, layer in layers.items()},
        "scale": {name: layer.params.scale for name, layer in layers.items()},
    }
    for ax, (what, values) in zip(axes, panels.items(), strict=True):
        _shade(ax, names, findings)
        _panel(ax, what, [values[name] for name in names], list(sick.values()))
    step = -(-len(names) // 100)
    labels = [_tail(name, 40) for name in names][::step]
    axes[-1].set_xlim(-0.6, len(names) - 0.4)
    axes[-1].set_xticks(range(0, len(names), step), labels, rotation=90, parse_math=False)
    _legend(figure, findings)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)


def _tail(text: str, most: int) -> str:
    text = printable(text)
    return text if len(text) <= most else f"…{text[1 - most :]}"


def _channels(name: str, findings: Iterable[Finding]) -> set[int]:
    return {channel for f in findings if f.layer == name for channel in f.channels}


def _shade(ax: Any, names: list[str], findings: Iterable[Finding]) -> None:
    """Shades each layer that has a finding as a whole, by the worst of its findings."""
    whole: dict[str, str] = {}
    for finding in findings:
        if not finding.channels and whole.get(finding.layer) != ERROR:
            whole[finding.layer] = finding.severity
    for i, name in enumerate(names):
        if name in whole:
            ax.axvspan(i - 0.5, i + 0.5, color=SHADES[whole[name]], lw=0, zorder=0)


def _panel(ax: Any, what: str, values: list[Any], sick: list[set[int]]) -> None:
    """Draws a dot for each channel, the channels of a layer side by side."""
    xs, ys, marks = [], [], []
    for i, (v, bad) in enumerate(zip(values, sick, strict=True)):
        if v is None:
            continue
        v = np.asarray(v).reshape(-1)
        v = (np.abs(v) if np.iscomplexobj(v) else v).astype(np.float64)
        xs.append(i + (np.arange(v.size) + 0.5) / max(v.size, 1) * 0.8 - 0.4)
        ys.append(v)
        marks.append(np.isin(np.arange(v.size), list(bad)))
    if not xs:
        return
    x, y, red = np.concatenate(xs), np.concatenate(ys), np.concatenate(marks)
    shown = np.isfinite(y) & ((y > 0) | (what != "var"))
    if what == "var":
        ax.set_yscale("log")
    elif shown.any() and np.abs(y[shown]).max() > 20:
        ax.set_yscale("symlog", linthresh=1)
    ax.set_ylabel(what)
    ax.grid(axis="y", color="0.9")
    ax.set_axisbelow(True)
    size = float(np.clip(2000 / max(len(y), 1), 2, 12))
    ax.scatter(x[shown & ~red], y[shown & ~red], size, HEALTHY, lw=0)
    ax.scatter(x[shown & red], y[shown & red], 24, SICK, "x", lw=1.2, zorder=3)
    if lost := int((~shown).sum()):
        ax.margins(y=0.12)  # keeps other values off the edge
        edge = ax.get_xaxis_transform()  # y as a fraction of the axis
        y = np.full(lost, 0.03)
        ax.scatter(x[~shown], y, 24, SICK, "x", lw=1.2, zorder=3, transform=edge)
        why = "not finite or not positive" if what == "var" else "not finite"
        ax.set_title(f"{lost} {why}: on the lower edge", loc="right", fontsize=8, color=SICK)


def _legend(figure: Any, findings: list[Finding]) -> None:
    """Explains the marks that are in the picture, and no others."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    def mark(marker: str, color: str, label: str) -> Any:
        return Line2D([], [], ls="", marker=marker, color=color, label=label, markersize=5)

    handles = [mark("o", HEALTHY, "channel")]
    if any(finding.channels for finding in findings):
        handles.append(mark("x", SICK, "channel with a finding"))
    whole = {finding.severity for finding in findings if not finding.channels}
    shades = {word: shade for word, shade in SHADES.items() if word in whole}
    handles += [Patch(color=shade, label=f"layer: {word}") for word, shade in shades.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
