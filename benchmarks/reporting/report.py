"""A table, how it is printed, and what it takes to get its numbers again."""

import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

PACKAGES = ("jax", "jaxlib", "flax", "dm-haiku", "equinox", "keras", "torch")
WIDTH = 200  # fixed, so that a pipe or a narrow terminal does not break columns


class Chart(NamedTuple):
    """One picture of a table, which a reader understands without the table."""

    title: str
    unit: str  # of the horizontal axis
    points: dict[str, dict[str, float]]  # series, a library say → label, a shape say → value
    line: float | None = None  # a value to compare with
    aim: str = ""  # what that value is


class Table(NamedTuple):
    """Cells are words or plain numbers; numbers are rounded when printed, not before."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float]]
    notes: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    key: str = ""  # by which a page asks for it


def show(table: Table) -> None:
    import rich.box
    import rich.console
    import rich.table

    console = rich.console.Console(width=WIDTH, highlight=False)
    console.print(table.title, style="bold", markup=False)
    grid = rich.table.Table(box=rich.box.SIMPLE, pad_edge=False)
    for i, column in enumerate(table.columns):
        grid.add_column(column, no_wrap=True, justify="right" if i else "left")
    for row in table.rows:
        grid.add_row(*map(cell, row))
    console.print(grid)
    for note in table.notes:
        console.print(note, markup=False, soft_wrap=True)
    console.print()


def cell(value: str | float) -> str:
    if isinstance(value, str):
        return value
    if value == 0 or math.isnan(value):
        return "0" if value == 0 else "NaN"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def track(steps: Sequence[Any], description: str) -> Iterable[Any]:
    """The steps, with a progress bar on standard error where that is a terminal."""
    import rich.console
    import rich.progress

    console = rich.console.Console(stderr=True)
    return rich.progress.track(steps, description, console=console, disable=not console.is_terminal)


def environment(command: str | None = None, load: float | None = None) -> dict[str, str]:
    """Device, versions and command of this run, and how busy the machine was."""
    import jax

    import jaxbn

    versions = [f"python {platform.python_version()}", f"jaxbn {jaxbn.__version__}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    kind = jax.devices()[0].device_kind
    return {
        "device": f"{kind} {processor()}" if kind == "cpu" else kind,
        "host": f"{processor()}, {os.cpu_count()} cores",
        "load": f"{os.getloadavg()[0]:.1f}, average of the last minute, this run included"
        if load is None
        else f"{load:.1f}, average of the minute before",
        "versions": ", ".join(versions),
        "command": command or " ".join(["python -m", running(), *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
    }


def running() -> str:
    """The module that this process runs, as `python -m` takes the name."""
    spec = sys.modules["__main__"].__spec__
    return spec.name.removesuffix(".__main__") if spec else "benchmarks"


def processor() -> str:
    """The processor's name; on Linux `platform` does not know it."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(": ")[1].strip() for line in file if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def show_environment(values: dict[str, str] | None = None) -> None:
    for key, value in (values or environment()).items():
        print(f"{key:9} {value}")


def write(path: str | os.PathLike[str], tables: Sequence[Table]) -> None:
    """All tables and the environment as JSON."""
    record = environment() | {"tables": [as_json(table) for table in tables]}
    replace(pathlib.Path(path), json.dumps(record, indent=1) + "\n")


def as_json(table: Table) -> dict[str, Any]:
    return table._asdict() | {"charts": [chart._asdict() for chart in table.charts]}


def from_json(values: dict[str, Any]) -> Table:
    return Table(**values | {"charts": [Chart(**chart) for chart in values["charts"]]})


def replace(path: pathlib.Path, text: str) -> None:
    """Writes all of it or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        error.filename = os.fspath(path)  # a full disk names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)
