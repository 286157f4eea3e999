"""`python -m benchmarks [accuracy|memory|op|parity|collectives|all]`."""

import argparse
import importlib

import jax

NAMES = ("accuracy", "memory", "op", "parity", "collectives")

parser = argparse.ArgumentParser(
    prog="python -m benchmarks", description="What the library claims, measured beside its peers."
)
parser.add_argument("name", nargs="?", default="all", choices=(*NAMES, "all"))
parser.add_argument("--json", metavar="FILE", help="write the tables there too, unrounded")
parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="for op")
parser.add_argument("--repeats", type=int, default=25, help="for op: timed calls of each")

if __name__ == "__main__":
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)  # `op` measures in a process of its own, on one
    from benchmarks import report

    tables = []
    for name in NAMES if arguments.name == "all" else (arguments.name,):
        options = {}
        if name == "op":
            options = {"dtype": arguments.dtype, "repeats": arguments.repeats}
        for table in importlib.import_module(f"benchmarks.{name}").run(**options):
            report.show(table)
            tables.append(table)
    report.show_environment()
    if arguments.json:
        report.write(arguments.json, tables)
