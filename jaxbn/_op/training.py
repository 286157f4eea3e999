"""The training op and its derivative: what is kept for backward, and what crosses devices.

With n the pooled count, m = mean, r = rstd, d = x - m, a = r * scale, and t the tangent of x,

    S1 = Σ t / n                      (the tangent of mean)
    S2 = Σ Re(conj(d) t) / n          (half the tangent of var; that of r is -r³ S2)

and y = d * a + bias has the tangent

    ty = a t + d (r tscale - a r² S2) + (tbias - a S1),

Σ running over the valid cells of all devices. JAX transposes that map to

    dx = a (dy - Σdy / n - d r² Σ(dy d) / n),   dscale = r Σ(dy d),   dbias = Σdy,

which is Ioffe & Szegedy 2015, section 3, with two sums over dy.

The rule is a JVP, so forward mode works as reverse mode does. The rule is a function of x alone, so
every higher derivative is right. Only the operations of `tangent` are as large as x, so backward
keeps x in its own dtype and numbers [C], never a float32 copy of x.

Three places compute x - mean: y, the sums, and dx. Barriers keep XLA's CPU back end from finding
them equal, since XLA would then keep that array alive between them. The compiled temporary memory
of a small ResNet step is 0.67 of Flax's; if dx and the sums shared x - mean, the memory would be
0.99 (`python -m benchmarks memory`).

Renormalization changes scale and bias by numbers that count as constants (see `renorm`): above,
scale and bias are what they are changed to.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbn._op import devices
from jaxbn._op.axes import Axes, wide
from jaxbn._op.checkpoint_policy import named, only_moments
from jaxbn._op.devices import Pool
from jaxbn._op.moments import divisor, over_devices, sums_about
from jaxbn._op.normalize import normalize, rstd
from jaxbn._op.renorm import Renorm, renormalized
from jaxbn._op.state import Moments, Params
from jaxbn._op.tables import Domains, Rows
from jaxbn._op.tangent import affine


class Spec(NamedTuple):
    """Everything about one call that is known before it runs."""

    axes: Axes
    epsilon: float  # 0 where it is traced, and so an operand
    pool: Pool | None
    dtype: jnp.dtype  # of y
    relu: bool = False  # whether y is relu of the rest
    rows: Rows | None = None  # where each row of x has its own statistics, scale or bias
    domains: int = 0  # the number of sets of statistics, where each row of x has its own


class Operands(NamedTuple):
    """The arrays of one call; all but x may be None."""

    x: jax.Array
    params: Params = Params(None, None)
    mask: jax.Array | None = None
    epsilon: jax.Array | None = None
    residual: jax.Array | None = None  # given only where relu follows; of y's dtype
    near: jax.Array | None = None  # the running mean: often near the batch's mean
    renorm: Renorm | None = None
    weights: jax.Array | None = None  # 0 where mask is False; without relu
    domain: jax.Array | None = None  # [rows]: the set of statistics of each row; without relu


# Not inlined, so that equal layers share one function and a second eager call compiles nothing.
@functools.partial(jax.jit, static_argnums=0)
def normalize_by_batch(spec: Spec, v: Operands) -> tuple[jax.Array, Moments]:
    """Equals `relu(normalize(x, *moments) + residual)`; returns the pooled moments too.

    Relu and residual take part only where the call asks for them. Where no device has a valid
    cell, rstd is 0, so y is bias and gradients are finite.
    """
    plain = v.weights is None and spec.rows is None
    return (_normalize_by_batch if plain else _normalize_by_weights)(spec, v)


@functools.partial(jax.checkpoint, static_argnums=(0,), policy=only_moments)
def _normalize_by_weights(spec: Spec, v: Operands) -> tuple[jax.Array, Moments]:
    """As JAX differentiates it, in the weights too, or with numbers of each row's own.

    Kept for backward are x, weights and the numbers of channels and rows.
    """
    y, m, *_ = _forward(spec, v)
    return y, m


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _normalize_by_batch(spec: Spec, v: Operands) -> tuple[jax.Array, Moments]:
    y, m, *_ = _forward(spec, v)
    return y, m


def _forward(
    spec: Spec, v: Operands
) -> tuple[jax.Array, Moments, jax.Array, Callable[[Params], Params]]:
    """Returns y, the moments, rstd, and what scale and bias are changed by."""
    domains = None
    if spec.rows is not None and v.domain is not None:
        domains = Domains(spec.rows, v.domain, spec.domains)
    m = named(over_devices(v.x, spec.axes, v.mask, v.near, v.weights, spec.pool, domains))
    epsilon = spec.epsilon if v.epsilon is None else v.epsilon
    r = rstd(m.var, epsilon)
    r = jnp.where(m.count > 0, r, 0)
    own, axes, renorm = m, spec.axes, v.renorm
    if spec.rows is not None:
        axes = spec.rows.axes
        own, r, renorm = spec.rows.read_all((m, r, renorm), v.domain)
    change = renormalized(renorm, own, r, epsilon)
    last = spec.relu and v.residual is None
    y = normalize(v.x, own.mean, r, change(v.params), axes, spec.dtype, v.mask, last)
    return y if v.residual is None else jnp.maximum(y + v.residual, 0), m, r, change


@_normalize_by_batch.defjvp
def _jvp(spec: Spec, primals: Any, tangents: Any) -> Any:
    """The map of this file's docstring, linear in the tangents t. Arrays are [C] or as noted."""
    (v,), (t,) = primals, tangents
    axes, pool, kind = spec.axes, spec.pool, wide(v.x.dtype)
    y, m, r, change = _forward(spec, v)
    params, tparams = jax.jvp(change, (v.params,), (t.params,))
    n = divisor(m.count).astype(kind)
    r = r.astype(kind)
    a = r if params.scale is None else r * params.scale.astype(kind)

    tx = t.x.astype(kind)  # [..., C]
    s1, s2 = sums_about(tx, v.x, m.mean, v.mask, axes, spec.relu)
    s2 = s2.astype(kind)
    if pool is not None:
        s1, s2 = devices.totals((s1, s2), pool)
    s1, s2 = s1 / n, s2 / n

    half = s2  # of the tangent of var + epsilon
    if t.epsilon is not None:
        half = half + t.epsilon.astype(kind) / 2
    by_d = -a * r * r * half
    by_1 = -a * s1
    if tparams.scale is not None:
        by_d = by_d + r * tparams.scale.astype(kind)
    if tparams.bias is not None:
        by_1 = by_1 + tparams.bias.astype(kind)
    if pool is not None and pool.axis_name:
        # One array, typed like x, so that the sums of backward are one collective.
        by_d, by_1 = devices.alike(jnp.stack([by_d, by_1]), v.x)[0]
    bias = None
    if spec.relu:
        bias = jnp.zeros_like(a) if params.bias is None else params.bias.astype(kind)
    others = a, v.x, m.mean, v.mask, bias, None if v.residual is None else y
    static = {"dtype": spec.dtype, "valid": False, "relu": spec.relu, "held": spec.relu}
    (ty,) = affine(tx, by_1, by_d, t.residual, *others, axes=axes, **static)
    return (y, m), (ty, Moments(jnp.zeros_like(m.count), s1, 2 * s2.real))
