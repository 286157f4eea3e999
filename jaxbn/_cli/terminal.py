"""Rows and findings of `jaxbn.health` as text for people, and as JSON for programs."""

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from jaxbn._extras import need
from jaxbn._text import printable, short
from jaxbn.health import Row
from jaxbn.health._findings import ERROR, KINDS, Finding

COLORS = {"error": "red", "warning": "yellow"}
FIGURES = ("mean_max", "var_min", "var_max", "scale_min", "scale_max")
HEADERS = ("|mean|\n/ sd", "var\nmin", "var\nmax", "scale\nmin", "scale\nmax")  # of |scale|

NARROWEST = 8  # characters of the layers' names, which are wrapped


def show(
    source: str,
    rows: Sequence[Row],
    findings: Sequence[Finding],
    *,
    momentum: float | None = None,
) -> None:
    """Prints a table with a row for each layer, the findings, and what was not judged.

    The output has colour on a terminal. Findings of one kind with one remedy are printed once, with
    the figure of the worst.

    Args:
      source: the name of the checkpoint.
      rows: the rows of `health.summary`, worst first.
      findings: the findings of `health.check`, worst first.
      momentum: the momentum that `health.check` was given.

    Raises:
      ModuleNotFoundError: rich is not installed.

    >>> from jaxbn import health
    >>> from jaxbn._cli import terminal
    >>> terminal.show("net", [health.Row("bn", (8,), None, None, 0, {"var_min": 0.5})], [])
    net: 1 batch norm layer, healthy
    <BLANKLINE>
            |mean| var var scale scale
    layer C   / sd min max   min   max finding
    bn    8      - 0.5   -     -     - -
    <BLANKLINE>
    not judged without a batch: stale, and hardly_updated in 1 layer
    """
    console = need("show", "rich.console").Console(highlight=False, markup=False)
    with console.capture() as text:
        _print(console, source, rows, findings)
        console.print()
        console.print(unjudged(rows, momentum), soft_wrap=True)
    print(re.sub(" +$", "", text.get(), flags=re.MULTILINE), end="")


def show_findings(source: str, findings: Sequence[Finding]) -> None:
    """Prints findings about a network, without a table of its layers.

    Args:
      source: the name of the network.
      findings: the findings of `health.lint`, worst first.

    Raises:
      ModuleNotFoundError: rich is not installed.

    >>> from jaxbn._cli import terminal
    >>> terminal.show_findings("resnets:training", [])
    resnets:training: healthy
    """
    from rich.text import Text

    console = need("show", "rich.console").Console(highlight=False, markup=False)
    with console.capture() as text:
        color = COLORS[findings[0].severity] if findings else "green"
        console.print(Text(f"{printable(source)}: {verdict(findings)}", color), soft_wrap=True)
        _print_findings(console, findings)
    print(re.sub(" +$", "", text.get(), flags=re.MULTILINE), end="")


def unjudged(rows: Sequence[Row], momentum: float | None = None) -> str:
    """One line that names the findings which need more than the arrays of a checkpoint.

    Args:
      rows: the rows of `health.summary`.
      momentum: the momentum that `health.check` was given.

    >>> from jaxbn._cli import terminal
    >>> terminal.unjudged([])
    'not judged without a batch: stale'
    """
    text = "not judged without a batch: stale"
    counted = [row for row in rows if row.count is not None and momentum is None]
    if unknown := [*counted, *(row for row in rows if row.count is None)]:
        text += f", and hardly_updated in {_number_of(len(unknown), 'layer')}"
    if counted:
        text += f"; --momentum tells of {len(counted)}"
    return text


def _print(console: Any, source: str, rows: Sequence[Row], findings: Sequence[Finding]) -> None:
    from rich.text import Text

    title = f"{printable(source)}: {_number_of(len(rows), 'batch norm layer')}, {verdict(findings)}"
    color = COLORS[findings[0].severity] if findings else "green"
    console.print(Text(title, color), soft_wrap=True)
    console.print()
    gap = 2 if console.width >= 100 else 1
    table = _table(rows, gap)
    # No column is dropped in a terminal that is too narrow: lines are wrapped instead.
    given = console.width
    console.width = max(given, sum(column.min_width + gap for column in table.columns))
    console.print(table)
    console.width = given
    _print_findings(console, findings)


def _print_findings(console: Any, findings: Sequence[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.severity, finding.kind, finding.remedy), []).append(finding)
    for (severity, kind, remedy), group in groups.items():
        text = Text.assemble((kind, "bold"), f" in {short(_layer(f) for f in group)}\n")
        text.append(f"{_of(group[0], len(group) > 1)}\n")
        text.append(f"remedy: {remedy}")
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True, min_width=max(map(len, COLORS)))
        grid.add_column(overflow="fold")
        grid.add_row(Text(severity, COLORS[severity]), text)
        console.print()
        console.print(grid)


def plain(findings: Sequence[Finding]) -> list[str]:
    """The findings as lines for a log, without colour and without rich.

    >>> from jaxbn import health
    >>> from jaxbn._cli import terminal
    >>> finding = health.Finding("result", "row_order", "error", 0.5, 1e-4, (), "sort nothing")
    >>> print(*terminal.plain([finding]), sep=chr(10))
    error row_order in result
      largest change of a row's result as the rows change places: 0.5, threshold 0.0001
      remedy: sort nothing
    """
    return [
        line
        for finding in findings
        for line in (
            f"{finding.severity} {finding.kind} in {_layer(finding)}",
            f"  {_of(finding, False)}",
            f"  remedy: {printable(finding.remedy)}",
        )
    ]


def verdict(findings: Sequence[Finding]) -> str:
    """The number of errors and of warnings.

    >>> from jaxbn._cli import terminal
    >>> terminal.verdict([])
    'healthy'
    """
    errors = sum(finding.severity == ERROR for finding in findings)
    parts = [(errors, "error"), (len(findings) - errors, "warning")]
    return ", ".join(_number_of(n, word) for n, word in parts if n) or "healthy"


def as_json(
    source: str,
    rows: Sequence[Row],
    findings: Sequence[Finding],
    *,
    momentum: float | None = None,
) -> str:
    """One JSON object: `checkpoint`, `healthy`, `judged` (the number of layers), and lists.

    Every layer has all keys. A missing figure, NaN and infinity are null.

    >>> from jaxbn._cli import terminal
    >>> print(terminal.as_json("net", [], []))
    {
     "checkpoint": "net",
     "healthy": true,
     "judged": 0,
     "unjudged": "not judged without a batch: stale",
     "layers": [],
     "findings": []
    }
    """

    def layer(row: Row) -> dict[str, Any]:
        figures = {name: _finite(row.figures.get(name)) for name in FIGURES}
        worst = None if row.worst is None else row.worst.kind
        return {**row._asdict(), "worst": worst, "figures": figures}

    content = {
        "checkpoint": source,
        "healthy": not findings,
        "judged": len(rows),
        "unjudged": unjudged(rows, momentum),
        "layers": list(map(layer, rows)),
        "findings": list(map(_told, findings)),
    }
    return json.dumps(content, indent=1, allow_nan=False)


def findings_as_json(source: str, findings: Sequence[Finding]) -> str:
    """One JSON object: `model`, `healthy`, and the list of findings.

    >>> from jaxbn._cli import terminal
    >>> print(terminal.findings_as_json("resnets:training", []))
    {
     "model": "resnets:training",
     "healthy": true,
     "findings": []
    }
    """
    content = {
        "model": source,
        "healthy": not findings,
        "findings": list(map(_told, findings)),
    }
    return json.dumps(content, indent=1, allow_nan=False)


def _told(finding: Finding) -> dict[str, Any]:
    figures = {name: _finite(getattr(finding, name)) for name in ("figure", "threshold")}
    return {**finding._asdict(), **figures}


def _table(rows: Sequence[Row], gap: int) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
    counted = any(row.count is not None for row in rows)
    table.add_column("layer", overflow="fold", vertical="top")
    for header in ("C", *["updates"] * counted, *HEADERS):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("finding", no_wrap=True)
    for column in table.columns:
        column.header = Text("\n" * (str(column.header).count("\n") == 0) + str(column.header))
    for row in rows:
        updates = ["-" if row.count is None else str(row.count)] * counted
        cells = [_number(row.figures.get(name)) for name in FIGURES]
        worst, style = Text("-"), ""
        if row.worst is not None:
            more = f" +{row.findings - 1}" if row.findings > 1 else ""
            worst = Text(f"{row.worst.kind}{more}")
            style = COLORS[row.worst.severity]
        size = "x".join(map(str, row.features)) or "1"
        table.add_row(Text(printable(row.layer) or "."), size, *updates, *cells, worst, style=style)
    for column in table.columns:
        lines = (line for v in (column.header, *column.cells) for line in str(v).split("\n"))
        longest = max(map(len, lines))
        column.min_width = longest if column.no_wrap else min(longest, NARROWEST)
    return table


def _of(worst: Finding, several: bool) -> str:
    """The figure of a finding, its threshold, and the channels."""
    text = f"{KINDS[worst.kind]}: {_number(worst.figure)}"
    layers_own = worst.kind in (
        "never_updated",
        "no_statistics",
    )  # the same figure in every layer, and no threshold
    if not layers_own:
        text += f", threshold {_number(worst.threshold)}"
    if worst.channels:
        word = "channel" if len(worst.channels) == 1 else "channels"
        text += f", {word} {short(map(str, worst.channels), 8)}"
    return text + (f" (of {_layer(worst)})" if several and not layers_own else "")


def _layer(finding: Finding) -> str:
    return printable(finding.layer) or "."


def _number(v: float | None) -> str:
    """Two digits, or all digits before the point: at most 7 characters."""
    if v is None:
        return "-"
    if 99.5 <= abs(v) < 1e5:
        return f"{v:.0f}"
    return re.sub(r"e([-+])0*", lambda m: "e-" if m[1] == "-" else "e", f"{v:.2g}")


def _number_of(n: int, word: str) -> str:
    return f"{n} {word}{'s' * (n != 1)}"


def _finite(v: float | None) -> float | None:
    return v if v is not None and math.isfinite(v) else None
