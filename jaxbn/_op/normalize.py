"""The plain formula, in float32 or wider, cast once at the end."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._op.axes import Axes, promote, wide
from jaxbn._op.state import Params


def rstd(var: jax.Array, epsilon: float | jax.Array) -> jax.Array:
    """Equals `1 / sqrt(var + epsilon)`, in float32 or wider; 0 where both are 0.

    So `epsilon=0` gives bias for a constant channel, and not 0 · inf.
    """
    var = var.astype(wide(var.dtype))
    if isinstance(epsilon, jax.Array):
        epsilon = epsilon.astype(var.dtype)
    elif epsilon:
        return lax.rsqrt(var + epsilon)
    sum_ = var + epsilon
    return lax.rsqrt(jnp.where(sum_ == 0, jnp.inf, sum_))


def normalize(
    x: jax.Array,
    mean: jax.Array,
    rstd: jax.Array,
    params: Params,
    axes: Axes,
    dtype: jnp.dtype,
    mask: jax.Array | None = None,
    relu: bool = False,
) -> jax.Array:
    """Equals `(x - mean) * (rstd * scale) + bias` per channel, cast to dtype; or relu of that.

    In this order and no other: `x * a + (bias - mean * a)` cancels at large means, and a
    constant channel would not give bias exactly. A cell outside the mask that is not finite is
    taken for the mean, or its 0 · NaN would reach the gradients of what comes after.
    """
    scale, bias = params
    kind = promote(x.dtype, dtype, rstd.dtype)
    a = rstd.astype(kind) if scale is None else rstd.astype(kind) * scale.astype(kind)
    d = x.astype(kind) - axes.expand(mean.astype(kind))
    if mask is not None:
        d = jnp.where(mask | jnp.isfinite(x), d, 0)
    y = d * axes.expand(a)
    if bias is not None:
        y = y + axes.expand(bias.astype(kind))
    # Before the cast, or XLA's GPU back end writes y out where else it would make it again.
    y = jnp.maximum(y, 0) if relu else y
    return y.astype(dtype)


# For eval. What is kept for its gradients is x in its own dtype, and nothing where the parameters
# need none; plain differentiation would keep x - mean, in float32.
normalize_lean = jax.checkpoint(normalize, static_argnums=(4, 5))
