"""What an import costs beyond `import jax`, each in a fresh process."""

import importlib.util
import os
import subprocess
import sys

import numpy as np

from benchmarks.reporting.report import Chart, Table, track

GOAL = 50.0  # ms that `import jaxbn` may add
# What is timed → what is imported before it, outside of the time.
MODULES = {
    "jax": "sys",
    "jaxbn": "jax",
    "jaxbn.linen": "jax, flax.linen",
    "jaxbn.nnx": "jax, flax.nnx",
    "flax.linen": "jax",
    "flax.nnx": "jax",
    "haiku": "jax",
    "equinox": "jax",
    "keras": "jax",
    "torch": "jax",
}
CODE = """
import time, {before}
start = time.perf_counter()
import {module}
print(time.perf_counter() - start)
"""
TIMES = {"tiny": 1, "usual": 5, "full": 15}


def milliseconds(module: str) -> float:
    code = CODE.format(before=MODULES[module], module=module)
    # With bytecode on disk, as after a user's first import.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    run = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, env=env)
    return 1e3 * float(run.stdout.split()[-1])


def run(size="usual", modules=tuple(MODULES)) -> list[Table]:
    installed = [m for m in modules if importlib.util.find_spec(m.split(".")[0])]
    ms: dict[str, list[float]] = {module: [] for module in installed}
    for i in track(range(-1, TIMES[size]), "imports"):
        for module in installed:
            once = milliseconds(module)
            if i >= 0:  # the first reads the files from disk, and compiles them
                ms[module].append(once)
    rows: list[list[str | float]] = []
    for module in modules:
        if module not in ms:
            rows.append([module, MODULES[module], "not installed", ""])
            continue
        low, median, high = np.percentile(ms[module], (25, 50, 75))
        rows.append([module, MODULES[module], median, (high - low) / median])
    points = {row[0]: row[2] for row in rows if not isinstance(row[2], str)}
    return [
        Table(
            "Time of an import",
            ("module", "imported before", "ms", "spread"),
            rows,
            [
                f"Median of {TIMES[size]} fresh processes in turn, after an untimed one; spread: "
                f"between the quartiles, over the median. Goal for jaxbn: {GOAL:g} ms.",
            ],
            [Chart("Time of an import", "ms, beyond what is imported before", {"import": points})],
            "imports",
        )
    ]
