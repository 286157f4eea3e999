"""Every road over eight devices against one device: forward, running state, all gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.reporting.report import Table, track
from benchmarks.subjects import meshes, peers
from benchmarks.subjects.roads import DEVICES, Road, roads, training

C = 6
GHOST = 4  # rows of a ghost batch: half of it on one device, half on the next
QUANTITIES = ("y", "state", "dx", "dscale", "dbias")


def ours(
    x, params, state, *, mask, axis_name=None, axis_index_groups=None, virtual_batch_size=None
):
    return peers.ours(
        x,
        params,
        state,
        train=True,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        virtual_batch_size=virtual_batch_size,
    )


def batch(mean=3.0, rows=2 * DEVICES, side=4):
    """(x, dy); channels differ in mean by their own sd."""
    rng = np.random.default_rng(0)
    shape = (rows, side, side, C)
    x = rng.normal(mean, 1, shape) + rng.normal(size=C)
    return jnp.asarray(x, jnp.float32), jnp.asarray(rng.normal(size=shape), jnp.float32)


def uneven():
    x, dy = batch()
    return x, jnp.asarray(np.random.default_rng(1).random((*x.shape[:-1], 1)) < 0.3), dy


def empty_shard():
    x, mask, dy = uneven()
    return x, mask.at[4:6].set(False), dy


def unmasked(**options):
    x, dy = batch(**options)
    return x, None, dy


CASES = {  # (x, mask, dy)
    "even": unmasked,
    "uneven": uneven,
    "an empty shard": empty_shard,
    "one row a device": lambda: unmasked(rows=DEVICES, side=1),
    "mean/sd = 1e4": lambda: unmasked(mean=1e4),
}


def arguments(case):
    """x, params, state, mask, dy of a case."""
    rng = np.random.default_rng(2)
    params = tuple(jnp.asarray(rng.normal(size=C), jnp.float32) for _ in range(2))
    x, mask, dy = CASES[case]()
    return x, params, (jnp.zeros(C), jnp.ones(C)), mask, dy


@functools.cache
def expected(case, reference):
    return jax.jit(training(reference(ours)))(*arguments(case))


def errors(road: Road, case: str) -> dict[str, float]:
    """Largest error of each quantity, relative to its largest value."""
    got = jax.jit(training(road.build(ours)))(*road.place(*arguments(case)))

    def error(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return float(np.abs(a - b).max() / np.abs(b).max())

    return {
        name: max(jax.tree.leaves(jax.tree.map(error, a, b)))
        for name, a, b in zip(QUANTITIES, got, expected(case, road.reference), strict=True)
    }


def over_meshes(chosen=None) -> Table:
    """A row for each kind of mesh, split, transform and place of the state; a column a caller."""
    chosen = chosen or meshes.roads()
    rows, lie, before, failed = {}, 0, None, []
    for road in track(chosen, "Parity over meshes"):
        if road[:2] != before:  # or a thousand programs fill the memory
            jax.clear_caches()
            before = road[:2]
        row = rows.setdefault(road._replace(caller=""), dict.fromkeys(meshes.CALLERS, ""))
        try:
            got = meshes.value(road)
        except Exception as error:  # the other roads are worth knowing
            row[road.caller] = type(error).__name__
            failed.append(f"Failed: {', '.join(road)}: {str(error).splitlines()[0]}")
            continue
        lie += meshes.lie_as_features(road, got)
        row[road.caller] = meshes.error(road, got)
    return Table(
        "Parity over meshes: largest relative error against one device",
        ["axes, split, transform, state", *meshes.CALLERS],
        [[", ".join(filter(None, road)), *row.values()] for road, row in rows.items()],
        [
            f"Statistics lie as the features do on {lie} of {len(chosen)} roads.",
            "The largest over y, statistics and their count, dx, dscale and dbias; float32, a mesh "
            "of 2 x 2 x 2 devices.",
            "functional: train and eval mode. mask: of rows, and of cells. watch: linen and nnx. "
            "gap: and the moments that drift is measured by, under a mask.",
            *failed,
        ],
        key="parity-meshes",
    )


def run(names=None, cases=tuple(CASES)) -> list[Table]:
    by_case, by_quantity = [], []
    for name in names or roads(GHOST):
        measured = {case: errors(roads(GHOST)[name], case) for case in cases}
        by_case.append([name, *(max(e.values()) for e in measured.values())])
        measured.pop("mean/sd = 1e4", None)
        by_quantity.append([name, *(max(e[q] for e in measured.values()) for q in QUANTITIES)])
    tables = [
        Table(
            "Parity: largest relative error against one device",
            ["road", *cases],
            by_case,
            [
                "The largest over y, running state, dx, dscale and dbias; float32, "
                f"{DEVICES} devices.",
                "At mean/sd = 1e4, half a unit in the last place of the mean is 5e-4 of an sd.",
            ],
            key="parity",
        ),
        Table(
            "Parity: the same by quantity, the largest over all cases but mean/sd = 1e4",
            ["road", *QUANTITIES],
            by_quantity,
            key="parity-quantity",
        ),
    ]
    return tables if names else [*tables, over_meshes()]
