"""The plain formula, in float32 or wider, cast once at the end."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn.axes import Axes
from jaxbn.state import Params


def rstd(var: jax.Array, epsilon: float) -> jax.Array:
    """Equals `1 / sqrt(var + epsilon)`, in float32 or wider."""
    var = var.astype(jnp.promote_types(var.dtype, jnp.float32))
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
    wide = jnp.promote_types(jnp.promote_types(x.dtype, dtype), rstd.dtype)
    real = jnp.finfo(wide).dtype
    a = rstd.astype(real) if scale is None else rstd.astype(real) * scale.astype(wide)
    y = (x.astype(wide) - axes.expand(mean.astype(wide))) * axes.expand(a)
    if bias is not None:
        y = y + axes.expand(bias.astype(wide))
    return y.astype(dtype)
