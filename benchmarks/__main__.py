"""`python -m benchmarks [NAME …]`: measure, print, write `results/<device>_<date>.json`, draw.

`python -m benchmarks tables [PAGE …]` puts the newest results into pages: `tables.py`.
`python -m benchmarks gpu` is for the minutes that a GPU is there: `measures/gpu.py`.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile

from benchmarks.reporting import command, plots, report, results
from benchmarks.timing import ENVIRONMENT

DEVICES = {  # each benchmark, and the CPU devices it sees
    "op": 1,
    "memory": 1,
    "step": 1,
    "latency": 1,
    "imports": 1,
    "accuracy": 8,
    "parity": 8,
    "options": 8,
    "collectives": 8,
}


BUSY = 0.5  # load above which a time tells of other programs too


def measure(name: str, size: str, line: str, load: float, path: str) -> bool:
    """Runs one benchmark in a process of its own, started with ENVIRONMENT; True if it came."""
    child = [sys.executable, "-m", "benchmarks.child", name, size, str(DEVICES[name])]
    environment = os.environ | ENVIRONMENT
    return subprocess.run([*child, line, f"{load}", path], env=environment).returncode == 0


def measured(arguments: list[str]) -> int:
    """Measures, prints, and writes; the status of the process."""
    about = "What the library claims, measured beside its peers."
    parser = command.parser("benchmarks", about)
    parser.add_argument(
        "names",
        nargs="*",
        type=command.one_of([*DEVICES, "all"]),
        metavar="NAME",
        help=f"of {', '.join(DEVICES)}; all of them by default",
    )
    command.add_size(parser, full=True)  # see shapes.py, step.py, latency.py
    parser.add_argument(
        "--options", action="store_true", help="of parity: every option, in place of the cases"
    )
    results.add_option(parser)
    options = parser.parse_args(arguments)
    names = list(DEVICES) if options.names in ([], ["all"]) else options.names
    if options.options:
        if "parity" not in names:
            parser.error("--options: expected it after parity, write parity --options")
        names = ["options" if name == "parity" else name for name in names]
    line = " ".join(["python -m benchmarks", *arguments])
    load, failed = os.getloadavg()[0], []
    if load > BUSY:
        print(f"load {load:.1f}: other work runs here, and times will not be good for much")
    for name in names:
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            if not measure(name, options.size, line, load, file.name):
                failed.append(name)
                continue
            record = json.load(file)
        tables_of = [report.from_json(values) for values in record["tables"]]
        for table in tables_of:
            report.show(table)
        charts = [chart for table in tables_of for chart in table.charts]
        plots.keep(results.folder(options.results, options.size == "tiny"), name, record, charts)
    for name in failed:
        print(f"benchmark {name!r} failed; what it said stands above", file=sys.stderr)
    return 1 if failed else 0


COMMANDS = {"tables": "benchmarks.reporting.tables", "gpu": "benchmarks.measures.gpu"}


def main(arguments: list[str]) -> int:
    """Runs one of COMMANDS, or measures."""
    if arguments[:1] and arguments[0] in COMMANDS:
        return importlib.import_module(COMMANDS[arguments[0]]).main(arguments[1:])
    return measured(arguments)


if __name__ == "__main__":
    command.end(main)
