"""`batch_norm`, the entry point of the op.

It checks the arguments, takes the batch's moments, normalizes, and updates the running state.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._op import arguments
from jaxbn._op.arguments import Checked
from jaxbn._op.axes import promote
from jaxbn._op.devices import Pool
from jaxbn._op.normalize import normalize_lean, rstd
from jaxbn._op.pooling import across, merge, merge_all
from jaxbn._op.state import Moments, Params, State, blend
from jaxbn._op.training import Spec, normalize_by_batch

S = TypeVar("S", bound=State | Moments | None)  # what comes in, and in the same kind goes out


@arguments.names_keywords
def batch_norm(
    x: jax.Array,
    params: Params | None,
    state: S,
    *,
    train: bool,
    axis: int | Sequence[int] = -1,
    momentum: float | None = 0.99,
    epsilon: float = 1e-5,
    unbiased: bool = False,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    virtual_batch_size: int | None = None,
    mask: jax.Array | None = None,
    dtype: Any = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    residual: jax.Array | None = None,
) -> tuple[jax.Array, S]:
    """Equals `(x - mean) / sqrt(var + epsilon) * scale + bias` per channel.

    With `activation` or `residual` it equals `activation(that + residual)`.

    In training, mean and biased var are those of x over every axis but `axis`, and the running
    state moves towards them: `momentum * state + (1 - momentum) * moments`. In eval mode, mean and
    var come from `state`, and `state` is returned unchanged. Ioffe & Szegedy 2015, Alg. 1 and 2.

    Args:
      x: any rank from 1 up, float16, bfloat16, float32, float64 or complex.
      params: `Params(scale, bias)`, each [C] or None; or None for neither.
      state: `State(mean, var, count)`; count may be None where updates need no counting. In
        training, state may also be None for no running statistics, or a `Moments`: this batch's
        moments are merged into it, and `momentum` and `unbiased` are ignored.
      train: normalize by the batch and update the state, or by the state. A Python bool.
      axis: feature axis, or a tuple of them; statistics have these axes' sizes, in x's order.
      momentum: fraction of the old state kept, as in Flax and Keras; None for the cumulative
        average of all updates. PyTorch's momentum is 1 minus this.
      epsilon: added to var; may be traced. With 0, y of a constant channel is bias.
      unbiased: the running var takes n / (n - 1) times the batch's, as PyTorch's does.
      axis_name: mapped axis or axes (pmap, shard_map, vmap) to pool statistics over, each
        device weighted by its count. Under plain jit on sharded arrays statistics are global
        without it.
      axis_index_groups: pool within these subgroups of the axis.
      virtual_batch_size: normalize by statistics of groups of this many consecutive rows
        (ghost batch norm, Hoffer et al. 2017), without any collective. The running state still
        learns the moments of the whole batch, pooled over `axis_name` where it is given.
      mask: broadcastable to x. False cells take no part in the statistics; y is normalized
        everywhere, as if x were the mean where such a cell is NaN or infinite. With no valid cell
        at all, y is bias and the state stays. Numbers do as well, 0 and 1 alone.
      dtype: of y; x's by default.
      activation: a function that is applied to y last, such as `jax.nn.relu`.
      residual: an array of x's shape that is added to y, in y's dtype, before the activation.

    Returns:
      `(y, state)`: y with x's shape; the state in both modes with mean and var in float32 or
      wider, also where they came in narrower, and count int32; gradient stopped. A channel whose
      moments are not finite in this batch keeps its statistics, bit for bit, and the others
      learn; with `momentum=None`, where one count serves all channels, none does.

    Raises:
      TypeError: x, dtype or statistics are not floating or complex, x or dtype has fewer than 16
        bits, train is no bool, or params, state or a number is something else.
      ValueError: shapes, axes, mask, groups or numbers do not fit, or training statistics
        would be over one value per channel.
      NotImplementedError: under `jax.experimental.jet`, which cannot; `jax.jvp` nests.

    >>> import jax.numpy as jnp, jaxbn
    >>> params, state = jaxbn.init(2)
    >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
    >>> y, state = jaxbn.batch_norm(x, params, state, train=True)
    >>> print(y.round(3).tolist(), [round(float(m), 2) for m in state.mean])
    [[-1.0, -1.0], [1.0, 1.0]] [0.02, 0.2]
    """
    c = arguments.check(
        "batch_norm",
        x,
        params,
        state,
        train=train,
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        virtual_batch_size=virtual_batch_size,
        mask=mask,
        dtype=dtype,
        activation=activation,
        residual=residual,
    )
    new: Any = c.state
    if not train:
        r = rstd(c.state.var, c.epsilon)
        y = normalize_lean(c.x, c.state.mean, r, c.params, c.axes, c.dtype, c.mask)
    else:
        y, moments = _by_ghosts(c) if c.ghosts else _by_batch(c)
        if isinstance(new, Moments):
            new = _gathered(new, moments)
        elif new is not None:
            new = blend(new, moments, c.momentum, unbiased)
    return finish(y, activation, c.residual), new


def finish(y: jax.Array, activation: Any, residual: jax.Array | None) -> jax.Array:
    """Equals `activation(y + residual)`; either may be None."""
    y = y if residual is None else y + residual.astype(y.dtype)
    return y if activation is None else activation(y)


def _by_batch(c: Checked) -> tuple[jax.Array, Moments]:
    """Normalizes x by the moments of the batch, pooled over devices; returns those moments too."""
    return normalize_by_batch(_spec(c, c.pool), c.x, c.params, c.mask, _traced(c.epsilon))


def _by_ghosts(c: Checked) -> tuple[jax.Array, Moments]:
    """Each ghost batch normalized by its own moments; the moments of all of them, pooled."""
    spec, at = _spec(c, None)._replace(mapped=True), c.batch_axis

    def split(v: jax.Array) -> jax.Array:
        before, after = v.shape[:at], v.shape[at + 1 :]
        return v.reshape(*before, c.ghosts, v.shape[at] // c.ghosts, *after)

    each = jax.vmap(
        lambda x, mask: normalize_by_batch(spec, x, c.params, mask, _traced(c.epsilon)),
        in_axes=(at, at),
        out_axes=(at, 0),
    )
    mask = None if c.mask is None else split(jnp.broadcast_to(c.mask, c.x.shape))
    y, moments = each(split(c.x), mask)
    return y.reshape(c.x.shape), across(merge_all(moments), c.pool)


def _spec(c: Checked, pool: Pool | None) -> Spec:
    """What is known of the call before it runs; a traced epsilon is an operand instead."""
    return Spec(c.axes, 0.0 if _traced(c.epsilon) is not None else c.epsilon, pool, c.dtype)


def _traced(epsilon: Any) -> Any:
    """Epsilon where it is traced, else None."""
    return None if isinstance(epsilon, float) else epsilon


def _gathered(state: Any, moments: Moments) -> Moments:
    """Two `Moments` merged, in the wider of their dtypes; no gradient passes."""
    kinds = [promote(a.dtype, b.dtype) for a, b in zip(state, moments, strict=True)]
    both = (Moments(*map(lax.convert_element_type, m, kinds)) for m in (state, moments))
    return jax.tree.map(lax.stop_gradient, merge(*both))
