"""Everything that can be wrong with a call, refused before any work.

Every check here reads shapes, dtypes and Python numbers only, so a bad call is refused
before any work, under `jit` as in eager code.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from jaxbn._op import axes as axes_
from jaxbn._op.arguments.cells import check_cells, check_residual
from jaxbn._op.arguments.choices import by_row, check_domain, check_labels, check_one_domain
from jaxbn._op.arguments.pools import check_count, check_ghosts, resolve
from jaxbn._op.arguments.values import (
    array,
    check_activation,
    check_flag,
    check_numbers,
    check_train,
    check_y,
)
from jaxbn._op.arguments.variables import (
    check_eval,
    check_features,
    check_kind,
    check_renorm,
    settle,
    spread_count,
)
from jaxbn._op.axes import Axes, check_dtype
from jaxbn._op.devices import Pool, by_features
from jaxbn._op.renorm import Renorm
from jaxbn._op.state import Moments, Params, State
from jaxbn._op.tables import Index, Rows, taken


class Checked(NamedTuple):
    """The arguments of one call of `batch_norm`, found good, in the form that the op works with."""

    x: jax.Array
    params: Params  # each leaf an array or None; [C], or as `rows` reads them
    state: Any  # State in the types that both modes return; Moments; or None; of the domain of x
    table: Any  # of all domains, where x belongs to one; else as state
    domain: Index | None  # the domain that all of x belongs to
    domains: jax.Array | None  # [rows]: the domain of each row of x
    rows: Rows | None  # where rows of x have a domain, a scale or a bias of their own
    axes: Axes
    momentum: Any
    epsilon: Any  # a float, or traced
    mask: jax.Array | None  # booleans of x's rank: the cells that count, by mask and by weights
    weights: jax.Array | None  # of x's rank; 0 where the mask is False
    dtype: Any  # of y
    residual: jax.Array | None  # in dtype
    renorm: Renorm | None  # None in eval mode
    pool: Pool | None  # the devices whose statistics are one; None in eval mode
    batch_axis: int  # the axis that ghost batches divide, where there are any
    ghosts: int  # number of ghost batches; 0 where there are none


def check(
    call: str,
    x: Any,
    params: Any,
    state: Any,
    *,
    train: Any,
    axis: Any,
    momentum: Any,
    epsilon: Any,
    unbiased: Any,
    axis_name: Any,
    axis_index_groups: Any,
    virtual_batch_size: Any,
    mask: Any,
    dtype: Any,
    activation: Any,
    residual: Any,
    renorm: Any,
    weights: Any,
    domain: Any,
    labels: Any,
) -> Checked:
    """The arguments of `batch_norm`, or an error that says what to write."""
    x = array(call, "x", x)
    axes = axes_.resolve(call, x, axis)
    momentum, epsilon = check_numbers(call, momentum, epsilon)
    check_train(call, train)
    check_flag(call, "unbiased", unbiased, "Write unbiased=False.")
    params = Params(None, None) if params is None else check_kind(call, Params, params)
    gathers = isinstance(state, Moments)
    state = None if state is None else check_kind(call, Moments if gathers else State, state)
    domain = None if domain is None else check_domain(call, domain, state, x, axes)
    any_ = params.scale is not None or params.bias is not None
    labels = check_labels(call, labels, params, x, axes) if any_ and labels is not None else None
    check_features(call, params, state, x, axes, domain is not None, labels is not None)
    params, rows = by_row(params, domain, labels, x, axes)
    if isinstance(state, State):
        state = settle(call, state, momentum, x, axes, domain is not None)
    elif gathers:
        state = state if domain is None else state._replace(count=spread_count(state))
        state = Moments(*(by_features(v, x, axes.features) if v.ndim else v for v in state))
    table = state
    if domain is not None and not np.ndim(domain):
        state = jax.tree.map(lambda v: taken(v, domain), table)
    dtype = x.dtype if dtype is None else dtype
    dtype = check_dtype(call, "values of y", dtype, "leave dtype out for that of x")
    check_activation(call, activation)
    residual = None if residual is None else check_residual(call, residual, x)
    mean = state.mean if isinstance(state, State) else None
    check_y(call, dtype, x=x, residual=residual, mean=mean, **params._asdict())
    residual = None if residual is None else residual.astype(dtype)
    mask, weights = check_cells(call, mask, weights, x)
    limits = None if renorm is None else check_renorm(call, renorm, state, x)
    pool, batch_axis, ghosts = None, 0, 0
    if rows is not None and virtual_batch_size is not None:
        raise ValueError(
            f"{call}: virtual_batch_size={virtual_batch_size} where each row of x has a domain, a "
            f"scale or a bias of its own, expected one or the other; leave virtual_batch_size out."
        )
    if not train:
        check_eval(call, state)
    else:
        pool = resolve(call, axis_name, axis_index_groups)
        values = axes.count(x) * (pool.devices if pool else 1)
        if virtual_batch_size is not None and x.size:
            batch_axis, ghosts = check_ghosts(call, x, axes, virtual_batch_size)
            values = axes.count(x) // ghosts
        if pool is not None:
            check_one_domain(call, domain, pool)
        if mask is None:
            check_count(call, x, values, virtual_batch_size if ghosts else None)
    return Checked(
        x=x,
        params=params,
        state=state,
        table=table,
        domain=None if np.ndim(domain) else domain,
        domains=domain if np.ndim(domain) else None,
        rows=rows,
        axes=axes,
        momentum=momentum,
        epsilon=epsilon,
        mask=mask,
        weights=weights,
        dtype=dtype,
        residual=residual,
        renorm=Renorm(state.mean, state.var, *limits) if limits and train else None,
        pool=pool,
        batch_axis=batch_axis,
        ghosts=ghosts,
    )
