"""Records of layers that `nn.scan`, `nn.vmap`, `nnx.scan` or `nnx.vmap` stack, on any axis.

A transform stacks all arrays of a collection on one axis, which may be any axis of the layer's
statistics. The arrays of a record have other ranks. So each array travels with an axis of size 1
for every axis of the statistics, before its own axes and behind them. Arrays without values travel
beside the record: their shapes say afterwards on which axes the transforms have stacked.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbn._op.state import Moments

# What Flax and JAX say of a record that a transform has no axis for.
NO_PLACE = (
    "broadcasted variable has a data dependency on the scan body",  # nn.scan, variable_broadcast
    "out_axes is None",  # nn.vmap
    "got axis spec None but output was batched",  # nnx.vmap
    "must have the same pytree structure",  # carried by a scan or a loop, or in one branch of cond
)


@contextmanager
def a_place_for_each() -> Iterator[None]:
    """A context that says what to write if a transform has no place for the record of each call."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if not any(words in str(error) for words in NO_PLACE):
            raise
        raise ValueError(
            "calls: a transform shares or carries batch_stats (variable_broadcast, variable_carry, "
            "None, nnx.Carry, cond), expected an axis where the record of each turn has its place; "
            'write variable_axes={"batch_stats": 0} in nn.scan and nn.vmap, nnx.StateAxes({nnx.'
            "BatchStat: 0, ...: None}) in nnx's, or a loop in Python."
        ) from error


class Travelling(NamedTuple):
    """A record, and two arrays without values, whose shapes change as those of their likes do."""

    statistics: jax.Array  # as many axes as the layer's statistics
    leaf: jax.Array  # as many axes as a leaf of the record that has one axis of its own
    record: Any


def feature_axes(count: tuple[int, ...], mean: tuple[int, ...]) -> range:
    """The axes that the mean of a layer has and its count of updates lacks, of their two shapes.

    Axes of layers and domains come before the features; layers that are stacked on axis -1, after.

    >>> from jaxbn._inspection import stacking
    >>> stacking.feature_axes((2,), (2, 3)), stacking.feature_axes((2,), (3, 2))
    (range(1, 2), range(0, 1))
    """
    more = len(mean) - len(count)
    fits = (n for n in range(len(count), -1, -1) if count == (*mean[:n], *mean[n + more :]))
    first = next(fits, len(count))
    return range(first, first + more)


def packed(record: Any, rank: int) -> Travelling:
    """The record of a layer whose statistics have this rank, ready to be stacked on any axis.

    >>> import jax, jax.numpy as jnp
    >>> from jaxbn._inspection import stacking
    >>> one_layer = lambda x: stacking.packed(x.sum(), rank=1)
    >>> stacked = jax.vmap(one_layer, out_axes=1)(jnp.eye(3))
    >>> stacking.unpacked(stacked).shape
    (3,)
    """
    around = tuple(range(rank))

    def wide(leaf: Any) -> jax.Array:
        leaf = jnp.asarray(leaf)
        return jnp.expand_dims(leaf, (*around, *(rank + leaf.ndim + a for a in around)))

    statistics, leaf = (jnp.zeros((0,) * axes) for axes in (rank, 2 * rank + 1))
    return Travelling(statistics, leaf, jax.tree.map(wide, record))


def unpacked(travelling: Travelling) -> Any:
    """The record as it was, with the axes of the transforms: [layers, …] in each array.

    `Moments` are stacked as the layer's statistics are, so that their mean has the shape of the
    running mean. Their count is [layers, …] too where the layers are on the first axis; else it
    has as many axes as their mean, and broadcasts to it.
    """
    statistics, where, record = travelling
    stacked = [a for a, size in enumerate(where.shape) if size]
    rest = [a for a, size in enumerate(where.shape) if not size]
    own = rest[len(rest) // 2]  # where a leaf has its own axes
    before = [a for a in stacked if a < own]
    behind = [a - where.ndim for a in stacked if a > own]
    # Among the axes of the statistics, counted from the same end.
    among = [*before, *(a % max(statistics.ndim, 1) for a in behind)]
    if sorted(among) != [a for a, size in enumerate(statistics.shape) if size]:
        raise ValueError(
            "calls: nested transforms stack batch_stats on axes that they count from both ends, "
            "expected one end; write axes of variable_axes and StateAxes from 0 up."
        )

    def layers_first(leaf: jax.Array) -> jax.Array:
        more = leaf.ndim - where.ndim
        leaf = leaf.squeeze(tuple(a if a < own else a + more for a in rest if a != own))
        return jnp.moveaxis(leaf, range(-len(behind), 0), range(len(before), len(stacked)))

    def as_statistics(node: Any) -> Any:
        if not isinstance(node, Moments):
            return layers_first(node)
        count, mean, var = map(layers_first, node)
        if among == list(range(len(stacked))):
            return Moments(count, mean, var)
        missing = mean.ndim - count.ndim
        count = jnp.expand_dims(count, range(len(stacked), len(stacked) + missing))
        return Moments(*(jnp.moveaxis(v, range(len(stacked)), among) for v in (count, mean, var)))

    return jax.tree.map(as_statistics, record, is_leaf=lambda v: isinstance(v, Moments))
