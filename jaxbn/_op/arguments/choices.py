"""Domains and labels: which rows of the tables x takes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._op.arguments.values import array, first
from jaxbn._op.axes import Axes, check_number, is_integer
from jaxbn._op.devices import Pool, by_features, sharded_as, varying_axes
from jaxbn._op.state import Params
from jaxbn._op.tables import Index, Rows, rows_of, taken


def check_domain(call: str, domain: Any, state: Any, x: jax.Array, axes: Axes) -> Index:
    """A domain for all of x, or one for each row, among those of the state."""
    features = tuple(x.shape[a] for a in axes.features)
    size = features[0] if len(features) == 1 else features
    if state is None:
        raise ValueError(
            f"{call}: domain= with state=None, but domains are sets of running statistics; start "
            f"from params, state = jaxbn.init({size}, domains=2)."
        )
    shape = np.shape(state.mean)
    if shape == features:
        raise ValueError(
            f"{call}: domain= with state.mean of shape {shape}, which is one set of statistics; "
            f"write jaxbn.init({size}, domains=2) for two, or leave domain out."
        )
    return check_index(call, "domain", domain, shape[0] if shape else 0, x, axes)


def check_labels(call: str, labels: Any, params: Params, x: jax.Array, axes: Axes) -> Index:
    """A label for all of x, or one for each row, among the scales and biases of params."""
    features = tuple(x.shape[a] for a in axes.features)
    tables = [np.shape(leaf) for leaf in params if leaf is not None]
    numbers = {shape[0] for shape in tables if shape[1:] == features}
    if len(numbers) != 1:
        size = features[0] if len(features) == 1 else features
        raise ValueError(
            f"{call}: labels= with scale and bias of shape {tables}, expected a table "
            f"{('classes', *features)}, with a row for each label; write "
            f"jaxbn.init({size}, classes=10), or leave labels out."
        )
    return check_index(call, "labels", labels, numbers.pop(), x, axes)


def check_index(call: str, name: str, index: Any, number: int, x: jax.Array, axes: Axes) -> Index:
    """An index into a table of `number` rows: an int for all of x, a traced one, or one a row."""
    if not is_integer(index):
        index = array(call, name, index)
    dtype = getattr(index, "dtype", np.dtype(int))
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(
            f"{call}: {name} has dtype {dtype}, expected an integer, or integers, one for each row "
            f"of x; write jnp.asarray({name}, jnp.int32)."
        )
    rows = tuple(x.shape[a] for a in axes.reduced[:1])
    if np.shape(index) not in ((), rows):
        expected = f"() or {rows}, one for each row" if rows else "()"
        raise ValueError(
            f"{call}: {name} has shape {np.shape(index)} but x has shape {x.shape}; expected "
            f"{expected}; write {name}=0, or jnp.full({rows[0] if rows else 1}, 0)."
        )
    if seen := first(index, lambda v: (v < 0) | (v >= number)):
        holds, what = (" holds ", "domains") if name == "domain" else (" hold ", "classes")
        more = f"for the last, or {what}={seen[0] + 1} where they are made"
        raise ValueError(
            f"{call}: {name}{holds if np.shape(index) else '='}{seen[0]}, expected 0 to "
            f"{number - 1}, one of {number} {what}; write {name}={number - 1} "
            f"{more if seen[0] > 0 else 'for the last'}."
        )
    if is_integer(index):
        return int(index)
    index = index.astype(int)  # as `jnp.arange` is, with which it is compared
    return sharded_as(index, x, axes.reduced[:1]) if index.ndim else index


def check_one_domain(call: str, domain: Index | None, pool: Pool) -> None:
    """Refuses devices that pool their statistics and are seen to have different domains."""
    if not isinstance(domain, jax.Array) or domain.ndim:
        return
    if apart := sorted(varying_axes(domain) & set(pool.axis_name)):
        raise ValueError(
            f"{call}: domain differs over mapped axis {apart[0]!r}, over which the statistics are "
            f"pooled; write domain=jnp.full(len(x), domain), one for each row."
        )


def by_row(
    params: Params, domain: Index | None, labels: Index | None, x: jax.Array, axes: Axes
) -> tuple[Params, Rows | None]:
    """Scale and bias that x takes, [C]; or as `Rows` has them, where rows of x differ.

    Where shardings are types, they are sharded as x is.
    """
    features = tuple(x.shape[a] for a in axes.features)

    def is_table(leaf: jax.Array) -> bool:
        return labels is not None and leaf.shape[1:] == features

    def is_of_rows(leaf: jax.Array) -> bool:
        return not is_table(leaf) and leaf.shape != features

    def placed(leaf: jax.Array | None) -> jax.Array | None:
        if leaf is None:
            return None
        if is_of_rows(leaf):
            return sharded_as(leaf, x, range(x.ndim))
        return by_features(leaf, x, axes.features)

    params = Params(*map(placed, params))
    each = any(np.ndim(index) for index in (domain, labels) if index is not None)
    each |= any(is_of_rows(leaf) for leaf in params if leaf is not None)
    rows = rows_of(axes) if each else None

    def read(leaf: jax.Array | None) -> jax.Array | None:
        if leaf is None:
            return None
        if rows is not None and is_of_rows(leaf):
            return jnp.squeeze(leaf, rows.axes.reduced)
        index = labels if is_table(leaf) else None
        if isinstance(index, jax.Array) and index.ndim:
            assert rows is not None
            return rows.read(leaf, index)
        leaf = leaf if index is None else taken(leaf, index)
        return leaf if rows is None else rows.read(leaf, None)

    return Params(*map(read, params)), rows


class Tables(NamedTuple):
    """Sizes of the axis before the features in a Flax layer's variables; () where there is none."""

    statistics: tuple[int, ...]
    affine: tuple[int, ...]


def check_tables(call: str, domains: Any, affine_per_domain: bool, classes: Any) -> Tables:
    """The tables that a layer's constructor asks for."""
    statistics, affine = (
        () if number is None else (check_number(call, name, number),)
        for name, number in (("domains", domains), ("classes", classes))
    )
    if affine_per_domain and affine:
        raise ValueError(
            f"{call}: affine_per_domain=True with classes={classes}, but scale and bias are by "
            f"domain or by label; leave one of them out."
        )
    if affine_per_domain and not statistics:
        raise ValueError(
            f"{call}: affine_per_domain=True without domains; write domains=2, or classes=2 for a "
            f"scale and a bias by labels."
        )
    return Tables(statistics, statistics if affine_per_domain else affine)


def check_choices(call: str, domains: Any, classes: Any, domain: Any, labels: Any) -> None:
    """A layer's call chooses from the tables that the layer has, and from these alone."""
    for name, given, table, number in (
        ("domain", domain, "domains", domains),
        ("labels", labels, "classes", classes),
    ):
        if given is None and number is not None:
            raise ValueError(
                f"{call}: the layer has {table}={number} and its call no {name}; write "
                f"bn(x, {name}=0), or one for each row of x."
            )
        if given is not None and number is None:
            raise ValueError(
                f"{call}: {name}= in the call of a layer without {table}; write {table}=2 in the "
                f"constructor, or leave {name} out."
            )
