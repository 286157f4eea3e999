"""Each pair of ways over a mesh equals one device: the roads of `benchmarks/subjects/meshes.py`."""

import functools
import itertools

import jax
import pytest
from jax.sharding import PartitionSpec as P

import jaxbn
from benchmarks.measures import parity
from benchmarks.subjects import meshes
from benchmarks.subjects.meshes import Road

# A road for each kind of mistake there can be, whatever the cover picks.
FIRST = [
    Road("Explicit", "features", "jit", "functional", "replicated"),
    Road("Explicit", "features", "jit", "mask", "as features"),
    Road("Explicit", "features", "jit", "recalibrate", "replicated"),
    Road("Explicit", "features", "eager", "recalibrate", "as features"),
    Road("Explicit", "height", "jit", "linen", "replicated"),
    Road("Explicit", "features", "shard_map, one axis", "functional", "as features"),
    Road("Explicit", "features", "vmap", "mask", "as features"),
    Road("Explicit", "several", "vmap", "functional", "as features"),
    Road("Explicit", "data", "vmap", "recalibrate", "replicated"),
    Road("Explicit", "several", "eager", "gap", "as features"),
]


def pairs(road):
    return set(itertools.combinations(enumerate(road), 2))


def cover():
    """Roads of which each pair of ways that any road has is one's."""
    roads, chosen = meshes.roads(), list(FIRST)
    left = set().union(*map(pairs, roads)) - set().union(*map(pairs, chosen))
    while left:
        chosen.append(max(roads, key=lambda road: len(pairs(road) & left)))
        left -= pairs(chosen[-1])
    return chosen


@pytest.mark.parametrize("road", cover(), ids="-".join)
def test_a_road_over_a_mesh_equals_one_device(road):
    got = meshes.value(road)
    # As sums over a channel round in another order; dscale is one of products.
    assert meshes.error(road, got) < 2 * 2.0**-23 * cells(road.split) ** 0.5
    assert meshes.lie_as_features(road, got)


def cells(split):
    """Values a channel."""
    shape, _ = meshes.SPLITS[split]
    return functools.reduce(int.__mul__, shape[:-1])


def test_both_modes_return_one_type():
    """So a traced flag can choose, though the state came replicated and features are sharded."""
    x, params, state, _, _ = meshes.placed(FIRST[0])

    @jax.jit
    def step(flag, x, params, state):
        modes = (functools.partial(jaxbn.batch_norm, train=train) for train in (True, False))
        return jax.lax.cond(flag, *modes, x, params, state)

    for flag in (True, False):
        y, new = step(flag, x, params, state)
        assert jax.typeof(y).sharding.spec == jax.typeof(x).sharding.spec
        assert jax.typeof(new.mean).sharding.spec == jax.typeof(new.var).sharding.spec == P("c")


def test_a_road_that_fails_leaves_the_others(monkeypatch):
    def value(road):
        raise ValueError("closed\nmore")

    monkeypatch.setattr(meshes, "value", value)
    table = parity.over_meshes(FIRST[:1])
    assert table.rows[0][1] == "ValueError"
    assert table.notes[-1] == ("Failed: Explicit, features, jit, functional, replicated: closed")


def test_the_table_has_a_row_a_road_and_a_column_a_caller():
    table = parity.over_meshes(FIRST[1:2])
    (row,) = table.rows
    cells = dict(zip(table.columns, row, strict=True))
    assert cells.pop(table.columns[0]) == "Explicit, features, jit, as features"
    error = cells.pop("mask")
    assert 0 <= error < 1e-6
    assert set(cells.values()) == {""}
    assert table.notes[0] == "Statistics lie as the features do on 1 of 1 roads."
