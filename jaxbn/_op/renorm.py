"""Batch renormalization: y in training as near to that of eval as its limits allow.

With mean and var of the batch, and the state before the batch,

    r = clip(sqrt(var + epsilon) / sqrt(state.var + epsilon), 1 / r_max, r_max)
    d = clip((mean - state.mean) / sqrt(state.var + epsilon), -d_max, d_max)
    y = (xhat * r + d) * scale + bias,

r and d constants to every derivative. Where neither is clipped, y is that of eval by the state.
With r_max = 1 and d_max = 0, y is that of batch norm. Ioffe 2017, "Batch Renormalization".
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._op.axes import promote
from jaxbn._op.normalize import rstd
from jaxbn._op.state import Moments, Params


class Renorm(NamedTuple):
    """The statistics that y is drawn to, and how far."""

    mean: jax.Array  # [C], of the state before the batch
    var: jax.Array  # [C], likewise
    r_max: jax.Array  # []
    d_max: jax.Array  # []


def renormalized(
    renorm: Renorm | None, m: Moments, r: jax.Array, epsilon: float | jax.Array
) -> Callable[[Params], Params]:
    """The function of scale and bias to `(scale * r, scale * d + bias)`, r the rstd at first.

    y is then renormalized by what comes after xhat. Without renorm the function returns what it
    takes; where no value is valid, r is 1 and d is 0, so that y is bias.
    """
    if renorm is None:
        return lambda params: params
    kind = promote(r.dtype, renorm.var.dtype)
    m, r, (mean, var, r_max, d_max) = jax.tree.map(
        lambda v: lax.stop_gradient(v.astype(kind)), (m, r, renorm)
    )
    near = rstd(var, epsilon)
    d = jnp.clip((m.mean - mean) * near, -d_max, d_max)
    d = jnp.where(m.count > 0, d, 0)
    r = jnp.clip(jnp.where(r > 0, near / r, 1), 1 / r_max, r_max)

    def change(params: Params) -> Params:
        both = promote(kind, *(v.dtype for v in params if v is not None))
        by_r, by_d = r.astype(both), d.astype(both)
        if params.scale is not None:
            by_r, by_d = (v * params.scale.astype(both) for v in (by_r, by_d))
        if params.bias is not None:
            by_d = by_d + params.bias.astype(both)
        return Params(by_r, by_d)

    return change
