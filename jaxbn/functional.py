"""`batch_norm`: the one door. Checks, then moments, normalize and blend; nothing else."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn import axes as axes_
from jaxbn import collectives
from jaxbn.derivative import Spec, normalize_by_batch
from jaxbn.moments import across, merge, merge_all
from jaxbn.normalize import normalize, rstd
from jaxbn.state import Moments, Params, State, blend, settle


def batch_norm(
    x: jax.Array,
    params: Params | None,
    state: State | None,
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
) -> tuple[jax.Array, Any]:
    """Equals `(x - mean) / sqrt(var + epsilon) * scale + bias` per channel.

    In training, mean and biased var are those of x over every axis but `axis`, and the running
    state moves towards them: `momentum * state + (1 - momentum) * moments`. In eval they are
    the state's, which returns as it came. Ioffe & Szegedy 2015, Alg. 1 and 2.

    Args:
      x: any rank from 1 up, float16, bfloat16, float32, float64 or complex.
      params: `Params(scale, bias)`, each [C] or None; or None for neither.
      state: `State(mean, var, count)`, count None where updates need no counting; or None for no
        running statistics (training only); or a `Moments` to gather those of all calls, for
        which momentum and unbiased mean nothing (training only).
      train: normalize by the batch and update the state, or by the state. A Python bool.
      axis: feature axis, or a tuple of them; statistics have these axes' sizes, in x's order.
      momentum: fraction of the old state kept, as in Flax and Keras; None for the cumulative
        average of all updates. PyTorch's momentum is 1 minus this.
      epsilon: added to var.
      unbiased: the running var takes n / (n - 1) times the batch's, as PyTorch's does.
      axis_name: mapped axis or axes (pmap, shard_map, vmap) to pool statistics over, each
        device weighted by its count. Under plain jit on sharded arrays statistics are global
        without it.
      axis_index_groups: pool within these subgroups of the axis.
      virtual_batch_size: normalize by statistics of groups of this many consecutive rows
        (ghost batch norm, Hoffer et al. 2017), without any collective. The running state still
        learns the moments of the whole batch, pooled over `axis_name` where it is given.
      mask: broadcastable to x. False cells take no part in the statistics; y is normalized
        everywhere. With no valid cell at all, y is bias and the state stays.
      dtype: of y; x's by default.

    Returns:
      `(y, state)`: y with x's shape, the state with the dtypes that came in, gradient stopped.
      A batch whose moments are not finite leaves the state bit for bit as it was.

    Raises:
      TypeError: x or dtype is not floating or complex, or train is no Python bool.
      ValueError: shapes, axes, mask, groups or numbers do not fit, or training statistics
        would be over one value per channel.

    >>> import jax.numpy as jnp, jaxbn
    >>> params, state = jaxbn.init(2)
    >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
    >>> y, state = jaxbn.batch_norm(x, params, state, train=True)
    >>> print(y.round(3).tolist(), [round(float(m), 2) for m in state.mean])
    [[-1.0, -1.0], [1.0, 1.0]] [0.02, 0.2]
    """
    call = "batch_norm"
    x = jnp.asarray(x)
    axes = axes_.resolve(call, x, axis)
    axes_.check_numbers(call, momentum, epsilon)
    if not isinstance(train, bool):
        raise TypeError(
            f"{call}: train={train!r}, expected True or False, known when tracing. Both return "
            f"the same types, so a traced flag can choose: jax.lax.cond(flag, train_step, "
            f"eval_step, x)."
        )
    params = Params(None, None) if params is None else axes_.check_kind(call, Params, params)
    for name, leaf in zip(params._fields, params, strict=True):
        if leaf is not None:
            axes_.check_features(call, f"params.{name}", leaf, x, axes)
    params = Params(*(None if leaf is None else jnp.asarray(leaf) for leaf in params))
    if state is not None:
        gathers = isinstance(state, Moments)
        state = state if gathers else axes_.check_kind(call, State, state)
        axes_.check_features(call, "state.mean", state.mean, x, axes)
        axes_.check_features(call, "state.var", state.var, x, axes)
        if state.count is None and momentum is None:
            raise ValueError(
                f"{call}: state.count=None with momentum=None, but the cumulative average weighs "
                f"by the updates so far; start from jaxbn.init(features), or write momentum=0.99."
            )
        state = state if gathers else settle(state, x)
    dtype = x.dtype if dtype is None else jnp.dtype(dtype)
    axes_.check_dtype(call, dtype)

    if not train:
        if state is None:
            raise ValueError(
                f"{call}: state=None with train=False, but eval normalizes by the running "
                f"statistics; pass the State that training returned, or write train=True."
            )
        if gathers:
            raise ValueError(
                f"{call}: state is a Moments with train=False, but moments are gathered, as "
                f"jaxbn.recalibrate does, of batches in training; write train=True, or pass a "
                f"State."
            )
        y = normalize(x, state.mean, rstd(state.var, epsilon), params, axes, dtype)
        return y, state

    if mask is not None:
        mask = axes_.check_mask(call, mask, x)
    pool = collectives.resolve(call, axis_name, axis_index_groups)
    if virtual_batch_size is None or x.size == 0:
        if mask is None:
            axes_.check_count(call, x, axes.count(x) * (pool.devices if pool else 1), None)
        spec = Spec(axes, epsilon, pool, dtype)
        y, moments = normalize_by_batch(spec, x, params, mask)
    else:
        batch_axis, ghosts = axes_.check_ghosts(call, x, axes, virtual_batch_size)
        if mask is None:
            axes_.check_count(call, x, axes.count(x) // ghosts, virtual_batch_size)
        spec = Spec(axes, epsilon, None, dtype)
        y, moments = _by_ghosts(spec, x, params, mask, batch_axis, ghosts)
        moments = across(moments, pool)
    if state is None:
        return y, None
    if gathers:
        return y, _gathered(state, moments)
    return y, blend(state, moments, momentum, unbiased)


def _gathered(state: Any, moments: Moments) -> Moments:
    """Two `Moments` merged, in the wider of their dtypes; no gradient passes."""
    kinds = [axes_.promote(a.dtype, b.dtype) for a, b in zip(state, moments, strict=True)]
    both = (Moments(*map(lax.convert_element_type, m, kinds)) for m in (state, moments))
    return jax.tree.map(lax.stop_gradient, merge(*both))


def _by_ghosts(
    spec: Spec, x: jax.Array, params: Params, mask: jax.Array | None, batch_axis: int, ghosts: int
) -> tuple[jax.Array, Moments]:
    """Each ghost batch normalized by its own moments; the moments of all of them, pooled."""

    def split(v: jax.Array) -> jax.Array:
        before, after = v.shape[:batch_axis], v.shape[batch_axis + 1 :]
        return v.reshape(*before, ghosts, v.shape[batch_axis] // ghosts, *after)

    each = jax.vmap(
        lambda x, mask: normalize_by_batch(spec, x, params, mask),
        in_axes=(batch_axis, batch_axis),
        out_axes=(batch_axis, 0),
    )
    y, moments = each(split(x), None if mask is None else split(jnp.broadcast_to(mask, x.shape)))
    return y.reshape(x.shape), merge_all(moments)
