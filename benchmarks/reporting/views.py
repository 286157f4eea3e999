"""Tables made of other tables, for pages: a function of a file of results for each."""

from typing import Any

from benchmarks.reporting import report
from benchmarks.reporting.report import Table, cell

OURS, FLAX = "jaxbn", "Flax linen"
CASES = {  # of the table of accuracy → how the first table puts it
    "float32 N(1e4, 1), 256 rows: relative error of var": (
        "relative error of var, float32 N(1e4, 1), 256 rows"
    ),
    "4 valid rows on one shard, 1 on the other: mean": (
        "mean of 4 valid rows on one device and 1 on another (true: 1.32)"
    ),
    "one NaN in the batch: running statistics after": (
        "running statistics after a batch with a NaN"
    ),
    "bfloat16 x: bytes kept for backward per element": (
        "bytes kept for backward, per element of bfloat16 x"
    ),
}


def find(record: dict[str, Any], key: str) -> tuple[Table, dict[str, str]]:
    """The table of this key and its environment, from any benchmark of a file, or a view."""
    if key in VIEWS:
        source, view = VIEWS[key]
        return view(record), find(record, source)[1]
    for benchmark in record.values():
        for values in benchmark["tables"]:
            if values["key"] == key:
                return report.from_json(values), benchmark["environment"]
    known = [values["key"] for b in record.values() for values in b["tables"]]
    raise KeyError(
        f"tables: no table {key!r} in these results, expected one of: "
        f"{', '.join([*known, *VIEWS])}; the benchmark that makes it may not have been run."
    )


def headline(record) -> Table:
    """What the library claims, beside Flax."""
    accuracy, *_ = find(record, "accuracy")
    ours, flax = (accuracy.columns.index(name) for name in (OURS, FLAX))
    rows = [
        [CASES[row[0]], cell(row[ours]), cell(row[flax])]
        for row in accuracy.rows
        if row[0] in CASES
    ]
    memory, *_ = find(record, "memory-step")
    shares = {row[0]: row[-1] for row in memory.rows}
    for dtype in ("float32", "bfloat16"):
        share = cell(shares[f"{dtype}, {OURS}"])
        rows.append(
            [f"temporary memory of a small ResNet's step, {dtype}", f"{share} of Flax's", "1"]
        )
    summary, *_ = find(record, "op-summary")
    for dtype, direction, library, mean, worst, _, best, _ in summary.rows:
        if library == FLAX:
            ratio = f"{cell(mean)} of Flax's ({cell(best)} to {cell(worst)})"
            rows.append([f"time of the op, {direction}, {dtype} (best, worst shape)", ratio, "1"])
    steps, *_ = find(record, "step")
    of = {(row[0], row[1]): row for row in steps.rows}
    for network in dict.fromkeys(row[0] for row in steps.rows):
        (_, _, ms, _, _, _, mb, _), theirs = of[network, OURS], of[network, FLAX]
        rows.append([f"training step of {network}: ms", cell(ms), cell(theirs[2])])
        rows.append(["its peak memory, MB", cell(mb), cell(theirs[6])])
    imports, *_ = find(record, "imports")
    ms = {row[0]: cell(row[2]) for row in imports.rows}
    rows.append(["import, beyond that of jax: ms", ms["jaxbn"], ms["flax.linen"]])
    return Table("What is claimed", ("measured", OURS, FLAX), rows)


def side_by_side(direction: int, dtype: str):
    """A row a shape: ours in ms, and each peer's time over ours."""

    def view(record) -> Table:
        table, _ = find(record, f"op-{dtype}")
        peers = [name for name in dict.fromkeys(row[1] for row in table.rows) if name != OURS]
        by_shape: dict[str, dict[str, list[Any]]] = {}
        for shape, library, *cells in table.rows:
            by_shape.setdefault(shape, {})[library] = cells[4 * direction : 4 * direction + 4]
        rows = []
        for shape, of in by_shape.items():
            ms, spread, _, floor = of[OURS]
            theirs = [
                of[name][0] if isinstance(of[name][0], str) else of[name][2] for name in peers
            ]
            rows.append([shape, ms, spread, floor, *theirs])
        columns = ("shape", "ours, ms", "spread", "floor / ours", *(f"{p} / ours" for p in peers))
        return Table(table.title, columns, rows)

    return view


def compiled_for(record) -> Table:
    """A row a shape: kernels of ours and Flax's, bytes that every library moves, TPU's cycles."""
    table, _ = find(record, "compiled-op")
    libraries = list(dict.fromkeys(row[2] for row in table.rows))
    of: dict[Any, dict[str, list[Any]]] = {}
    for dtype, shape, library, *cells in table.rows:
        of.setdefault((dtype, shape), {})[library] = cells
    has_cycles = any(by[OURS][3] != "" for by in of.values())
    rows = []
    for (dtype, shape), by in of.items():
        row = [dtype, shape]
        for at in (0, 4):  # forward, forward + backward
            row.append(" / ".join(cell(by[name][at]) for name in (OURS, FLAX)))
            row += [by[name][at + 1] if len(by[name]) > at else "" for name in libraries]
            row += [by[OURS][at + 3]] if has_cycles else []
        rows.append(row)
    columns = ["dtype", "shape"]
    for direction in ("forward", "both"):
        columns += [f"{direction}: kernels, ours / Flax's", *(f"{name}, N" for name in libraries)]
        columns += ["cycles, of Flax's"] if has_cycles else []
    return Table(table.title, columns, rows, table.notes)


VIEWS = {  # key → (the table whose environment it has, the view)
    "headline": ("op-summary", headline),
    "compiled-by-shape": ("compiled-op", compiled_for),
    "op-forward-float32": ("op-float32", side_by_side(0, "float32")),
    "op-forward-bfloat16": ("op-bfloat16", side_by_side(0, "bfloat16")),
    "op-both-float32": ("op-float32", side_by_side(1, "float32")),
    "op-both-bfloat16": ("op-bfloat16", side_by_side(1, "bfloat16")),
}
