"""`python -m benchmarks tables [PAGE …]`: puts the newest results into pages, between markers.

    <!-- table: cpu/op-summary -->     the table; `cpu` begins its file's name
    <!-- end -->
    <!-- notes: cpu/op-float32 -->     its notes, as a list
    <!-- end -->
    <!-- figure: cpu/op -->            the picture of that benchmark
    <!-- end -->

What stands between a marker and its end is replaced. A page is written when all of its markers
are found, or not at all.
"""

import json
import os
import pathlib
import re
import sys

from benchmarks.reporting import command, report, results, views
from benchmarks.reporting.report import Table, cell

ROOT = pathlib.Path(__file__).parents[2]
PAGES = (ROOT / "docs" / "benchmarks.md",)
OPEN = re.compile(r"^<!-- (table|notes|figure): (\S+?)/(\S+) -->\n", re.MULTILINE)
END = "<!-- end -->"
VERSIONS = ("python", "jax", "flax", "dm-haiku", "equinox", "keras", "torch", "libtpu")


def markdown(table: Table) -> str:
    """A column is to the right if it holds numbers."""

    def line(cells):
        return f"| {' | '.join(cells)} |"

    numbers = [
        any(not isinstance(row[i], str) for row in table.rows) for i in range(len(table.columns))
    ]
    return "\n".join(
        [
            line(" ".join(column.split()) for column in table.columns),
            line("---:" if number else "---" for number in numbers),
            *(line(map(cell, row)) for row in table.rows),
        ]
    )


def source(environment: dict[str, str]) -> str:
    """What it takes to get the numbers again, in one sentence."""
    versions = [
        version for version in environment["versions"].split(", ") if version.split()[0] in VERSIONS
    ]
    device, host = environment["device"], environment["host"]
    where = host if device.startswith("cpu") else f"{device} ({host})"
    return (
        f"<sub>`{environment['command']}`, {environment['date']}, {where}, "
        f"load before {environment['load'].split(',')[0]}; {', '.join(versions)}.</sub>"
    )


def content(kind: str, device: str, key: str, page: pathlib.Path, folder: pathlib.Path) -> str:
    """What stands between a marker and its end."""
    path = results.newest(folder, device)
    if kind == "figure":
        figure = path.with_name(f"{path.stem}_{key}.png")
        if not figure.exists():
            raise FileNotFoundError(
                f"tables: no {figure.name} beside {path.name}, expected the picture that "
                f"`python -m benchmarks {key}` draws."
            )
        relative = os.path.relpath(figure, page.parent).replace(os.sep, "/")
        return f"![{key}, measured on {device}]({relative})"
    table, environment = views.find(json.loads(path.read_text()), key)
    if kind == "notes":
        return "\n".join(f"- {note}" for note in table.notes)
    return f"{markdown(table)}\n\n{source(environment)}"


def fill(page: pathlib.Path, folder: pathlib.Path = results.FOLDER) -> int:
    """Writes the page with every marker filled in; how many there were.

    Raises:
      ValueError: a marker has no end.
      FileNotFoundError, KeyError: results lack what a marker names.
    """
    text, parts, at = page.read_text(), [], 0
    markers = list(OPEN.finditer(text))
    for i, marker in enumerate(markers):
        stop = markers[i + 1].start() if i + 1 < len(markers) else len(text)
        end = text.find(END, marker.end(), stop)
        if end < 0:
            raise ValueError(
                f"tables: {page.name} has {marker[0].strip()} without its end; write a line "
                f"{END} below it."
            )
        parts += [text[at : marker.end()], content(*marker.groups(), page, folder), "\n"]
        at = end
    report.replace(page, "".join([*parts, text[at:]]))
    return len(markers)


def main(arguments) -> int:
    parser = command.parser("benchmarks tables", __doc__)
    parser.add_argument("pages", nargs="*", type=pathlib.Path, metavar="PAGE", help="else all")
    parser.add_argument(
        "--results",
        type=pathlib.Path,
        default=results.FOLDER,
        metavar="FOLDER",
        help="of results",
    )
    options = parser.parse_args(arguments)
    for page in options.pages or PAGES:
        try:
            print(f"{page}: {fill(page, options.results)} tables and figures")
        except (FileNotFoundError, KeyError, ValueError) as error:
            print(error.args[0], file=sys.stderr)
            return 1
    return 0
