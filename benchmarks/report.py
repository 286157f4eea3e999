"""A table, how it is printed, and what it takes to get its numbers again."""

import datetime
import importlib.metadata
import json
import math
import os
import platform
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import rich.box
import rich.console
import rich.table

import jaxbn

PACKAGES = ("jax", "flax", "dm-haiku", "equinox", "keras", "torch")
WIDTH = 180  # fixed, so that a pipe or a narrow terminal does not break columns


class Table(NamedTuple):
    """Cells are words or plain numbers; numbers are rounded when printed, not before."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float]]
    notes: Sequence[str] = ()


def show(table: Table) -> None:
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
    return "NaN" if math.isnan(value) else f"{value:.3g}"


def environment() -> dict[str, str]:
    """Device, versions and command of this run."""
    versions = [f"python {platform.python_version()}", f"jaxbn {jaxbn.__version__}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    return {
        "device": f"{jax.devices()[0].device_kind}: {processor()}, {os.cpu_count()} cores",
        "load": f"{os.getloadavg()[0]:.1f}, average of the last minute, this run included",
        "versions": ", ".join(versions),
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
    }


def processor() -> str:
    """The processor's name; on Linux `platform` does not know it."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(": ")[1].strip() for line in file if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def show_environment() -> None:
    for key, value in environment().items():
        print(f"{key:9} {value}")


def write(path: str, tables: Sequence[Table]) -> None:
    record = environment() | {"tables": [table._asdict() for table in tables]}
    with open(path, "w") as file:
        json.dump(record, file, indent=1)
