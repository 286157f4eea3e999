"""Arrays that lie beside x: residual, mask and weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._op.arguments.values import array, first
from jaxbn._op.axes import promote, wide
from jaxbn._op.devices import sharded_as


def check_residual(call: str, residual: Any, x: jax.Array) -> jax.Array:
    """`residual` as an array of x's shape, or an error with the line to write.

    Where shardings are types, its axes are sharded as those of x are.
    """
    residual = array(call, "residual", residual)
    if residual.shape != x.shape:
        raise ValueError(
            f"{call}: residual has shape {residual.shape} but x has shape {x.shape}; expected the "
            f"same. Project the shortcut as x is, or write "
            f"residual=jnp.broadcast_to(residual, x.shape) for one that repeats."
        )
    return sharded_as(residual, x, range(x.ndim))


def check_cells(
    call: str, mask: Any, weights: Any, x: jax.Array
) -> tuple[jax.Array | None, jax.Array | None]:
    """The cells that count, and how much: mask and weights multiply. None for what is not given."""
    mask = None if mask is None else check_mask(call, mask, x)
    if weights is None:
        return mask, None
    weights = check_weights(call, weights, x)
    weights = weights if mask is None else jnp.where(mask, weights, 0)
    return weights > 0, weights


def check_mask(call: str, mask: Any, x: jax.Array) -> jax.Array:
    """`mask` as booleans with x's rank; broadcastable to x, or an error with the line to write.

    Where shardings are types, its axes are sharded as those of x are.
    """
    given, mask = mask, array(call, "mask", mask)
    if mask.dtype != bool:
        if seen := first(given, lambda v: (v != 0) & (v != 1)):
            raise ValueError(
                f"{call}: mask holds {seen[0]}, expected True and False, or 1 and 0: a cell takes "
                f"part in the statistics or it does not; write mask > 0, or weights=mask for a "
                f"share."
            )
        mask = mask != 0
    return _of_xs_rank(call, "mask has", mask, x)


def check_weights(call: str, weights: Any, x: jax.Array) -> jax.Array:
    """`weights` in float32 or wider with x's rank; broadcastable to x, finite, not negative.

    Where shardings are types, their axes are sharded as those of x are.
    """
    given, weights = weights, array(call, "weights", weights)
    if jnp.iscomplexobj(weights):
        raise TypeError(
            f"{call}: weights have dtype {weights.dtype}, expected real numbers of at least 0; "
            f"write weights=jnp.abs(weights)."
        )
    if seen := first(given, lambda v: ~((v >= 0) & (v < np.inf))):
        raise ValueError(
            f"{call}: weights hold {seen[0]}, expected finite numbers of at least 0, the share "
            f"that a cell has in the statistics; write weights=jnp.clip(weights, 0, 1), or mask= "
            f"for cells that take no part."
        )
    kind = promote(weights.dtype, jnp.finfo(wide(x.dtype)).dtype)
    return _of_xs_rank(call, "weights have", weights.astype(kind), x)


def _of_xs_rank(call: str, what_has: str, v: jax.Array, x: jax.Array) -> jax.Array:
    """Equals v with ones before its axes up to the rank of x, sharded as x is; v must fit x."""
    tail = x.shape[x.ndim - v.ndim :] if v.ndim <= x.ndim else None
    if tail is None or any(m not in (1, n) for m, n in zip(v.shape, tail, strict=True)):
        what, _ = what_has.split()
        name, verb = ("A mask", "broadcasts") if what == "mask" else ("Weights", "broadcast")
        remedy = f"{name} {verb} as in NumPy, from the last axis backwards."
        if v.shape == x.shape[: v.ndim]:
            nones = ", ".join(["None"] * (x.ndim - v.ndim))
            remedy = f"{name} over the leading axes: {what}[..., {nones}]."
        raise ValueError(
            f"{call}: {what_has} shape {v.shape} but x has shape {x.shape}; expected a shape "
            f"that broadcasts to x. {remedy}"
        )
    v = jnp.expand_dims(v, tuple(range(x.ndim - v.ndim)))
    return sharded_as(v, x, range(x.ndim))
