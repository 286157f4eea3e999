"""The plain formula, in float32 or wider, cast once at the end."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn.axes import Axes, promote
from jaxbn.state import Params


def rstd(var: jax.Array, epsilon: float) -> jax.Array:
    """Equals `1 / sqrt(var + epsilon)`, in float32 or wider."""
    var = var.astype(promote(var.dtype, jnp.float32))
    return lax.rsqrt(var + epsilon)


def normalize(
    x: jax.Array,
    mean: jax.Array,
    rstd: jax.Array,
    params: Params,
    axes: Axes,
    dtype: jnp.dtype,
) -> jax.Array:
    """Equals `(x - mean) * (rstd * scale) + bias` per channel, cast to dtype.

    In this order and no other: `x * a + (bias - mean * a)` cancels at large means, and a
    constant channel would not give bias exactly.
    """
    scale, bias = params
    wide = promote(x.dtype, dtype, rstd.dtype)
    a = rstd.astype(wide) if scale is None else rstd.astype(wide) * scale.astype(wide)
    y = (x.astype(wide) - axes.expand(mean.astype(wide))) * axes.expand(a)
    if bias is not None:
        y = y + axes.expand(bias.astype(wide))
    return y.astype(dtype)
