"""The training op and its derivative: what is kept for backward, and what crosses devices.

With n the pooled count, m = mean, r = rstd, d = x - m, a = r * scale, and t the tangent of x,

    S1 = Σ t / n                      (the tangent of mean)
    S2 = Σ Re(conj(d) t) / n          (half the tangent of var; that of r is -r³ S2)

and y = d * a + bias has the tangent

    ty = a t + d (r tscale - a r² S2) + (tbias - a S1),

Σ running over the valid cells of all devices. JAX transposes that map to

    dx = a (dy - Σdy / n - d r² Σ(dy d) / n),   dscale = r Σ(dy d),   dbias = Σdy,

which is Ioffe & Szegedy 2015, section 3 in two sums over dy.

The rule is a JVP, so forward mode works as reverse mode does, and the residuals are functions
of x inside it, so every higher derivative is right. Two things keep it small:

* `jax.checkpoint` around the tangent map: kept for backward are its inputs, x in its own dtype
  and mean, rstd and scale [C], never a float32 copy of x. `prevent_cse=False`, because its
  barrier would hold on to x as well.
* no two of the three x - mean (forward's, that of the sums, that of dx) share their mean, but
  for a barrier: else XLA finds them equal, and keeps that array alive from one to the next.

With both, the compiled temporary memory of a small ResNet step on CPUs is 0.67 of Flax's; with dx
and the sums sharing theirs, 0.99 (`python -m benchmarks memory`).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxbn._op import devices
from jaxbn._op.axes import Axes, wide
from jaxbn._op.checkpoint_policy import named
from jaxbn._op.devices import Pool
from jaxbn._op.moments import divisor, of
from jaxbn._op.normalize import normalize, rstd
from jaxbn._op.pooling import across
from jaxbn._op.state import Moments, Params
from jaxbn._op.sums import affine, real_product


class Spec(NamedTuple):
    """Everything about one call that is known before it runs."""

    axes: Axes
    epsilon: float  # 0 where it is traced, and so an argument
    pool: Pool | None
    dtype: jnp.dtype  # of y
    mapped: bool = False  # whether this is called under `vmap`


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def normalize_by_batch(
    spec: Spec,
    x: jax.Array,
    params: Params,
    mask: jax.Array | None,
    epsilon: jax.Array | None = None,
) -> tuple[jax.Array, Moments]:
    """Equals `normalize(x, *moments)` and the pooled moments it used.

    Where no device has a valid cell, rstd is taken as 0, so y is bias and gradients are finite.
    """
    y, m, _ = _forward(spec, x, params, mask, epsilon)
    return y, m


def _forward(
    spec: Spec, x: jax.Array, params: Params, mask: jax.Array | None, epsilon: jax.Array | None
) -> tuple[jax.Array, Moments, jax.Array]:
    m = named(across(of(x, spec.axes, mask, spec.mapped), spec.pool))
    added = spec.epsilon if epsilon is None else epsilon
    r = jnp.where(m.count > 0, rstd(m.var, added), 0)
    # Behind a barrier: this x - mean is not to be merged with that of backward's sums.
    mean, r_of_y = lax.optimization_barrier((m.mean, r))
    return normalize(x, mean, r_of_y, params, spec.axes, spec.dtype, mask), m, r


@normalize_by_batch.defjvp
def _jvp(spec, primals, tangents):  # type: ignore[no-untyped-def]
    x, params, mask, epsilon = primals
    # A copy by name only, which no policy keeps: else a checkpoint around the one below, whose
    # policy keeps x, would keep it twice, once for itself and once to hand it down.
    x = checkpoint_name(x, "batch_norm_x")
    tx, tparams, _, tepsilon = tangents
    y, m, r = _forward(spec, x, params, mask, epsilon)
    tangent = jax.checkpoint(functools.partial(_tangent, spec), prevent_cse=False)
    ty, tm = tangent(x, mask, m.count, m.mean, r, params.scale, tx, tparams, tepsilon)
    return (y, m), (ty, tm)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _tangent(spec, x, mask, count, mean, r, scale, tx, tparams, tepsilon):  # type: ignore[no-untyped-def]
    """The map above, linear in the tangents. [C] unless said otherwise."""
    axes = spec.axes
    kind = wide(x.dtype)
    x, tx = x.astype(kind), tx.astype(kind)  # [..., C]
    n = divisor(count).astype(kind)
    r = r.astype(kind)
    a = r if scale is None else r * scale.astype(kind)

    d, t = x - axes.expand(mean), tx
    if mask is not None:
        d, t = jnp.where(mask, d, 0), jnp.where(mask, t, 0)
    s1, s2 = t.sum(axes.reduced), real_product(d, t).sum(axes.reduced).astype(kind)
    if spec.pool is not None:
        s1, s2 = devices.totals((s1, s2), spec.pool)
    s1, s2 = s1 / n, s2 / n

    half = s2 if tepsilon is None else s2 + tepsilon.astype(kind) / 2  # of var + epsilon's tangent
    by_d = -a * r * r * half
    by_1 = -a * s1
    if tparams.scale is not None:
        by_d = by_d + r * tparams.scale.astype(kind)
    if tparams.bias is not None:
        by_1 = by_1 + tparams.bias.astype(kind)
    if spec.pool is not None:
        by_d, by_1 = devices.varying(jnp.stack([by_d, by_1]), spec.pool)

    mean, a = lax.optimization_barrier((mean, a))
    d = x - axes.expand(mean)
    if mask is not None:
        # A cell outside the mask that holds NaN must not reach dscale through 0 * NaN.
        d = jnp.where(mask | jnp.isfinite(x), d, 0)
    ty = axes.expand(a) * tx + affine(by_1, by_d, d, axes)
    return ty.astype(spec.dtype), Moments(jnp.zeros_like(count), s1, 2 * s2.real)
