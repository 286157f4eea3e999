"""One benchmark in this process; its words are NAME SIZE DEVICES COMMAND LOAD FILE.

`python -m benchmarks` starts the process with `timing.ENVIRONMENT`: Python and JAX read it at their
start.
"""

import importlib
import json
import signal
import sys

# Ctrl-C reaches the parent process too, which says that it has stopped.
signal.signal(signal.SIGINT, signal.SIG_DFL)

import jax  # noqa: E402

from benchmarks.reporting import report  # noqa: E402

SIZED = ("op", "memory", "step", "latency", "imports", "options")

if __name__ == "__main__":
    name, size, devices, command, load, path = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", int(devices))
    options = {"size": size} if name in SIZED else {}
    tables = importlib.import_module(f"benchmarks.measures.{name}").run(**options)
    record = {
        "environment": report.environment(command, float(load)),
        "tables": [report.as_json(table) for table in tables],
    }
    with open(path, "w") as file:
        json.dump(record, file)
