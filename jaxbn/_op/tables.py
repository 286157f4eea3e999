"""Statistics of several domains, scale and bias of several classes: which of them x takes.

Both are tables with C columns: mean and var [domains, C], scale and bias [classes, C]. Where the
whole of x is of one domain, its row is read before the op and written after, and the op sees [C].
Where each row of x has a domain of its own, the moments are those of the rows of each domain,

    mean[k] = Σ w x / Σ w,    var[k] = Σ w |x - mean[k]|² / Σ w,

Σ running over the cells of the rows i with domain[i] = k, and row i is normalized by those of
domain[i]. What the rows take is then [rows, C], as if the rows were features.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxbn._op.axes import Axes
from jaxbn._op.devices import spread, typed

Index = int | jax.Array  # one row of a table for all of x, or one [rows] for each row of x


class Rows(NamedTuple):
    """How the rows of x take numbers of their own."""

    axes: Axes  # of x, with the rows among the features
    at: int  # which of the features the rows are

    def each(self, v: jax.Array) -> jax.Array:
        """Equals v [rows, *features] with its axes in x's order."""
        return jnp.moveaxis(v, 0, self.at)

    def read(self, v: jax.Array, index: jax.Array | None) -> jax.Array:
        """Equals the row of a table v that each row of x takes; without index, v [C] for all."""
        return jnp.expand_dims(v, self.at) if index is None else self.each(taken(v, index))

    def read_all(self, tree: Any, index: jax.Array | None) -> Any:
        """Equals `read` of each table in a tree; numbers stay."""
        return jax.tree.map(lambda v: self.read(v, index) if v.ndim else v, tree)


def rows_of(axes: Axes) -> Rows:
    """The rows of x lie along the first axis that is reduced."""
    batch, *inner = axes.reduced
    features = tuple(sorted((batch, *axes.features)))
    return Rows(Axes(features, tuple(inner)), features.index(batch))


class Domains(NamedTuple):
    """As `Axes` of x where each row of x has a domain of its own: statistics are [domains, C]."""

    rows: Rows
    domain: jax.Array  # [rows]
    number: int

    def expand(self, v: jax.Array) -> jax.Array:
        """Equals v [domains, C], for each row of x that of its domain, to broadcast against x."""
        return self.rows.axes.expand(self.rows.read(v, self.domain))

    def total(self, v: jax.Array) -> jax.Array:
        """The sum of v over the cells of each domain: [domains, C]."""
        return self.added(self.rows.axes.total(v))

    def added(self, v: jax.Array) -> jax.Array:
        """The sum over the rows of each domain, of v [rows, C] in x's order."""
        v = jnp.moveaxis(v, self.rows.at, 0)
        # A select and no product, so that NaN in one domain does not reach another.
        here = self.domain[:, None] == jnp.arange(self.number)[None]
        here = jnp.expand_dims(here, range(2, 1 + v.ndim))
        return jnp.where(here, v[:, None], 0).sum(0)


def taken(table: jax.Array, index: Index) -> jax.Array:
    """Equals table[index]; NaN where a traced index is out of range."""
    if isinstance(index, int):
        return lax.index_in_dim(table, index, keepdims=False)
    if not index.ndim and typed(table):  # JAX 0.12 cannot transpose an index into sharded columns
        here = jnp.expand_dims(jnp.arange(len(table)) == index, range(1, table.ndim))
        return _selected(table, here, 0)
    sharding = None
    if index.ndim and typed(index):
        sharding = jax.typeof(index).sharding
        sharding = sharding.update(spec=P(*sharding.spec, *jax.typeof(table).sharding.spec[1:]))
        if sharding.mesh.manual_axes:
            # JAX cannot differentiate a shard_map over some axes of an Explicit mesh where the
            # shard_map indexes by what is sharded by type.
            rows, *columns = sharding.spec
            each = jnp.broadcast_to(table[None], (len(index), *table.shape))
            each = jax.sharding.reshard(each, sharding.update(spec=P(rows, None, *columns)))
            here = index[:, None] == jnp.arange(len(table))[None]
            return _selected(each, jnp.expand_dims(here, range(2, each.ndim)), 1)
    return table.at[index].get(mode="fill", wrap_negative_indices=False, out_sharding=sharding)


def _selected(rows: jax.Array, here: jax.Array, axis: int) -> jax.Array:
    """The one along this axis that is here, without an index; as "fill" has it where none is."""
    here = spread(here, rows)
    inexact = jnp.issubdtype(rows.dtype, jnp.inexact)
    none = jnp.asarray(jnp.nan if inexact else jnp.iinfo(rows.dtype).min, rows.dtype)
    one = jnp.where(here, rows, 0).sum(axis, dtype=rows.dtype)
    return jnp.where(here.any(axis), one, none)


def alone(row: jax.Array, index: Index, number: int) -> jax.Array:
    """A table with this row, and 0 in all others."""
    here = jnp.expand_dims(jnp.arange(number) == index, range(1, 1 + row.ndim))
    return jnp.where(here, row[None], 0)


def put(table: jax.Array, index: Index, row: jax.Array) -> jax.Array:
    """The table with another row there; the same table where a traced index is out of range.

    By a select: a scatter takes no row that is sharded by type into a table on no mesh.
    """
    each = jnp.broadcast_to(row[None], table.shape)
    here = jnp.expand_dims(jnp.arange(len(table)) == index, range(1, table.ndim))
    return jnp.where(spread(here, each), each, table)
