"""Collectives per layer, and the bytes they carry, read from the compiled module."""

import functools
import re

import jax
import jax.numpy as jnp

from benchmarks.reporting.report import Table
from benchmarks.studies import targets
from benchmarks.subjects import peers
from benchmarks.subjects.roads import DEVICES, Road, roads, training

C = 64
ROWS = 4 * DEVICES
COLLECTIVE = re.compile(
    r"= (.*?) (?:all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
)

NORMS = {
    "jaxbn": peers.ours,
    "Flax, fast": peers.linen,
    "Flax, slow": functools.partial(peers.linen, use_fast_variance=False),
}


def collectives(f, *arguments) -> tuple[int, int]:
    """How many, and the bytes of what they return to one device."""
    results = COLLECTIVE.findall(jax.jit(f).lower(*arguments).compile().as_text())
    return len(results), sum(map(targets.size, results))


def of_layer(road: Road, norm) -> list[str]:
    """Collectives and bytes of forward, forward + backward, and eval."""
    x, vector = jnp.ones((ROWS, 4, 4, C)), jnp.ones(C)
    arguments = road.place(x, (vector, vector), (vector, vector), None, x)
    train = road.build(functools.partial(norm, train=True))
    infer = road.build(functools.partial(norm, train=False))
    cells = []
    for f, used in ((train, 4), (training(train), 5), (infer, 4)):
        try:
            number, size = collectives(f, *arguments[:used])
            cells.append(f"{number} / {size:,} B" if number else "0")
        except NotImplementedError:
            cells.append("refused")
        except TypeError:
            cells.append("none")
    return cells


def run(names=None) -> list[Table]:
    # vmap has one device and no collectives.
    table = {name: road for name, road in roads(ROWS // DEVICES).items() if "vmap" not in name}
    rows = []
    for name in names or table:
        cells = zip(*(of_layer(table[name], norm) for norm in NORMS.values()), strict=True)
        rows.append([name, *(cell for kind in cells for cell in kind)])
    kinds = ("\nforward", "forward +\nbackward", "\neval")
    return [
        Table(
            "Collectives of one layer, and bytes they return to a device",
            ["road", *(f"{kind}\n{norm}" for kind in kinds for norm in NORMS)],
            rows,
            [
                "refused: not implemented on that road; none: no such option.",
                f"Compiled for {DEVICES} devices, x float32 {(ROWS, 4, 4, C)}. Forward + backward "
                "ends with dx, dscale and dbias summed over devices.",
                f"Ghost batches of {ROWS // DEVICES} rows lie within the shards: y needs no "
                "collective, the running statistics of the whole batch do.",
            ],
            key="collectives",
        )
    ]
