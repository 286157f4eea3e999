"""`batch_norm`: the one door. Checks, then moments, normalize and blend; nothing else."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxbn._op import arguments
from jaxbn._op import axes as axes_
from jaxbn._op.normalize import normalize_lean, rstd
from jaxbn._op.pooling import across, merge, merge_all
from jaxbn._op.state import Moments, Params, State, blend, check_kind, settle
from jaxbn._op.training import Operands, Spec, normalize_by_batch

S = TypeVar("S", bound=State | Moments | None)  # what comes in, and in the same kind goes out
F = TypeVar("F", bound=Callable[..., Any])

# Keywords of other libraries' batch norms, and the ones they are here.
ELSEWHERE = {
    "eps": "epsilon={}",
    "training": "train={}",
    "is_training": "train={}",
    "use_running_average": "train=not {}",
    "decay_rate": "momentum={}",
}


def _keywords_of_its_own(f: F) -> F:
    """F, with an error that names the right keyword for one of another library's.

    A wrapper, since `**kwargs` in the signature would hide all typing errors from type checkers.
    """

    @functools.wraps(f)
    def call(*args: Any, **kwargs: Any) -> Any:
        for name, given in kwargs.items():
            if name in ELSEWHERE:
                raise TypeError(
                    f"{f.__name__}: {name}={given!r} is another library's keyword; write "
                    f"{ELSEWHERE[name].format(repr(given))}."
                )
        return f(*args, **kwargs)

    return cast(F, call)


@_keywords_of_its_own
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

    And `activation(that + residual)` where they are given.

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
      activation: applied to y last, as `activation(y)`. For `jax.nn.relu` (which Flax's are too)
        backward makes its sign again, of x, or of y where there is a residual: on a GPU that is
        less to read and write than relu apart. Any other function is called as it is.
      residual: of x's shape, added to y before the activation, in y's dtype.

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
    call = "batch_norm"
    x = arguments.array(call, "x", x)
    axes = axes_.resolve(call, x, axis)
    momentum, epsilon = arguments.check_numbers(call, momentum, epsilon)
    if not isinstance(train, bool | np.bool_):
        raise TypeError(
            f"{call}: train={train!r}, expected True or False, known when tracing. Both return "
            f"the same types, so a traced flag can choose: jax.lax.cond(flag, train_step, "
            f"eval_step, x)."
        )
    weights = Params(None, None) if params is None else check_kind(call, Params, params)
    gathers = isinstance(state, Moments)
    old: Any = state if state is None or gathers else check_kind(call, State, state)
    arguments.check_features(call, weights, old, x, axes)
    weights = Params(*(None if leaf is None else jnp.asarray(leaf) for leaf in weights))
    if isinstance(old, State):
        if old.count is None and momentum is None:
            raise ValueError(
                f"{call}: state.count=None with momentum=None, but the cumulative average weighs "
                f"by the updates so far; start from jaxbn.init(features), or write momentum=0.99."
            )
        old = settle(call, old, x, axes)
    dtype = x.dtype if dtype is None else jnp.dtype(dtype)
    arguments.check_dtype(call, "values of y", dtype, "leave dtype out for that of x")
    if activation is not None and not callable(activation):
        raise TypeError(
            f"{call}: activation={activation!r}, expected None or a function of y; write "
            f"activation=jax.nn.relu."
        )
    if residual is not None:
        residual = arguments.check_residual(call, residual, x, dtype)

    if mask is not None:
        mask = arguments.check_mask(call, mask, x)
    if not train:
        if old is None:
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
        y = normalize_lean(x, old.mean, rstd(old.var, epsilon), weights, axes, dtype, mask)
        return finished(y, activation, residual), old

    pool = arguments.resolve(call, axis_name, axis_index_groups)
    known, traced = (epsilon, None) if isinstance(epsilon, float) else (0.0, epsilon)
    relu = activation is jax.nn.relu and not jnp.issubdtype(dtype, jnp.complexfloating)
    near = None if old is None else old.mean
    v = Operands(x, weights, mask, traced, residual if relu else None, near)
    if virtual_batch_size is None or x.size == 0:
        if mask is None:
            arguments.check_count(call, x, axes.count(x) * (pool.devices if pool else 1), None)
        spec = Spec(axes, known, pool, dtype, relu)
        y, moments = normalize_by_batch(spec, v)
    else:
        batch_axis, ghosts = arguments.check_ghosts(call, x, axes, virtual_batch_size)
        if mask is None:
            arguments.check_count(call, x, axes.count(x) // ghosts, virtual_batch_size)
        spec = Spec(axes, known, None, dtype, relu)
        y, moments = _by_ghosts(spec, v, batch_axis, ghosts)
        moments = across(moments, pool)
    new: Any = None
    if old is not None:
        new = _gathered(old, moments) if gathers else blend(old, moments, momentum, unbiased)
    return y if relu else finished(y, activation, residual), new


def finished(y: jax.Array, activation: Any, residual: jax.Array | None) -> jax.Array:
    """Equals `activation(y + residual)`, each where it is given, and in y's dtype until then."""
    y = y if residual is None else y + residual.astype(y.dtype)
    return y if activation is None else activation(y)


def _gathered(state: Any, moments: Moments) -> Moments:
    """Two `Moments` merged, in the wider of their dtypes; no gradient passes."""
    kinds = [axes_.promote(a.dtype, b.dtype) for a, b in zip(state, moments, strict=True)]
    both = (Moments(*map(lax.convert_element_type, m, kinds)) for m in (state, moments))
    return jax.tree.map(lax.stop_gradient, merge(*both))


def _by_ghosts(spec: Spec, v: Operands, batch_axis: int, ghosts: int) -> tuple[jax.Array, Moments]:
    """Each ghost batch normalized by its own moments; the moments of all of them, pooled."""

    def split(v: jax.Array) -> jax.Array:
        before, after = v.shape[:batch_axis], v.shape[batch_axis + 1 :]
        return v.reshape(*before, ghosts, v.shape[batch_axis] // ghosts, *after)

    large = {"x": v.x}
    if v.mask is not None:
        large["mask"] = jnp.broadcast_to(v.mask, v.x.shape)
    if v.residual is not None:
        large["residual"] = v.residual
    each = jax.vmap(
        lambda large: normalize_by_batch(spec, v._replace(**large)),
        in_axes=batch_axis,
        out_axes=(batch_axis, 0),
    )
    y, moments = each({name: split(leaf) for name, leaf in large.items()})
    return y.reshape(v.x.shape), merge_all(moments)
