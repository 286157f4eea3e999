"""The files of results: one for a device and a day, each benchmark of it with its environment."""

import argparse
import json
import pathlib
import re
from typing import Any

from benchmarks.reporting import report

FOLDER = pathlib.Path(__file__).parents[1] / "results"


def add_option(parser: argparse.ArgumentParser) -> None:
    """`--results`, of the commands that write tables."""
    parser.add_argument(
        "--results",
        type=pathlib.Path,
        metavar="FOLDER",
        help="where tables are written (benchmarks/results; with --tiny nowhere)",
    )


def folder(given: pathlib.Path | None, tiny: bool) -> pathlib.Path | None:
    """Where results go. A tiny run only shows that it runs, so the pages take nothing of it."""
    return given or (None if tiny else FOLDER)


def stem(environment: dict[str, str]) -> str:
    device = re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")
    return f"{device}_{environment['date']}"


def write(folder: pathlib.Path, name: str, record: dict[str, Any]) -> pathlib.Path:
    """Puts one benchmark's record into the file of its device and day; the others in it stay."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem(record['environment'])}.json"
    everything = json.loads(path.read_text()) if path.exists() else {}
    everything[name] = record
    report.replace(path, json.dumps(everything, indent=1) + "\n")
    return path


def newest(folder: pathlib.Path, device: str) -> pathlib.Path:
    """The latest file of a device, told by how its name begins.

    Raises:
      FileNotFoundError: there is none.
    """
    paths = [path for path in folder.glob("*_*.json") if path.name.startswith(device)]
    if not paths:
        raise FileNotFoundError(
            f"tables: no results of {device!r} in {folder}, expected a file {device}*_<date>.json; "
            f"write them by `make bench` on such a device."
        )
    return max(paths, key=lambda path: path.stem.rsplit("_", 1)[1])
