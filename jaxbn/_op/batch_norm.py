"""`batch_norm`, the entry point of the op.

It checks the arguments, takes the batch's moments, normalizes, and updates the running state.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn import _elsewhere
from jaxbn._op.arguments import Checked, check
from jaxbn._op.arguments.values import check_activated
from jaxbn._op.axes import promote
from jaxbn._op.devices import spread
from jaxbn._op.normalize import normalize_lean, rstd
from jaxbn._op.pooling import across, merge, merge_all, with_one_count
from jaxbn._op.state import Moments, Params, State, blend
from jaxbn._op.tables import put
from jaxbn._op.training import Operands, Spec, normalize_by_batch

S = TypeVar("S", bound=State | Moments | None)  # the state goes out in the kind that came in


@_elsewhere.names_keywords("batch_norm", _elsewhere.KEYWORDS)
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
    renorm: tuple[float | jax.Array, float | jax.Array] | None = None,
    weights: jax.Array | None = None,
    domain: int | jax.Array | None = None,
    labels: int | jax.Array | None = None,
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
      activation: applied to y last, as `activation(y)`. For `jax.nn.relu`, which is also Flax's
        relu, the backward pass decides the sign again, from x, or from y with a residual: a GPU
        then reads and writes less than for a relu apart. Any other function is called as it is.
      residual: of x's shape, added to y before the activation, in y's dtype.
      renorm: `(r_max, d_max)`, batch renormalization (Ioffe 2017): in training y is
        `(xhat * r + d) * scale + bias`, with xhat by the batch and r and d such that y is nearly
        that of eval: `r = clip(sqrt(var + epsilon) / sqrt(state.var + epsilon), 1/r_max, r_max)`
        and `d = clip((mean - state.mean) / sqrt(state.var + epsilon), -d_max, d_max)`, of the
        state before this batch, constants to every derivative. `(1.0, 0.0)` is batch norm. Both
        may be traced, so that a schedule runs inside jit. For batches of 4 to 16. Ignored in eval
        mode, and where state is a `Moments`.
      weights: broadcastable to x, at least 0: the share that each cell has in the statistics. The
        count is Σw, mean Σwx / Σw and var Σw|x - mean|² / Σw, over all devices; mask and weights
        multiply, and a cell of weight 0 is as one outside the mask. y and the state have
        derivatives of x, and y of the weights too. `unbiased` takes n = Σw.
      domain: which of several sets of running statistics x belongs to, where state has mean and
        var [domains, C], as `init(C, domains=n)` makes it: an integer for all of x, or one for
        each row, on the first axis that is reduced; either may be traced. In training with one
        for each row, a row is normalized by the moments of the rows of its domain, over all
        devices. Domains without a row keep their state. A traced domain out of range changes no
        statistics; what would be read from them is NaN, in y too.
      labels: which of several scales and biases x takes, where params are tables [classes, C]: an
        integer for all of x, or one for each row; either may be traced. With one that is out of
        range y is NaN. Without labels, scale and bias may have x's rank and one for each row,
        [rows, 1, …, C] (conditional batch norm).

    Returns:
      `(y, state)`: y with x's shape; the state in both modes with mean and var in float32 or
      wider, also where they came in narrower, and count int32; gradient stopped. A channel whose
      moments are not finite in this batch keeps its statistics, bit for bit, and the others
      learn; with `momentum=None`, where one count serves all channels, none does.

    Raises:
      TypeError: x, dtype or statistics are not floating or complex, x or dtype has fewer than 16
        bits, y would lose the imaginary part of an array, train or unbiased is no bool, the
        activation returns no array, or params, state, an array or a number is something else.
      ValueError: shapes, axes, mask, groups or numbers do not fit, or training statistics
        would be over one value per channel.
      NotImplementedError: under `jax.experimental.jet`, which cannot; `jax.jvp` nests. Also where
        axis_name is of a vmap and a shard_map has check_vma=True: JAX has no collectives there.

    >>> import jax.numpy as jnp, jaxbn
    >>> params, state = jaxbn.init(2)
    >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
    >>> y, state = jaxbn.batch_norm(x, params, state, train=True)
    >>> print(y.round(3).tolist(), [round(float(m), 2) for m in state.mean])
    [[-1.0, -1.0], [1.0, 1.0]] [0.02, 0.2]
    """
    c = check(
        "batch_norm",
        x,
        params,
        state,
        train=train,
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        unbiased=unbiased,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        virtual_batch_size=virtual_batch_size,
        mask=mask,
        dtype=dtype,
        activation=activation,
        residual=residual,
        renorm=renorm,
        weights=weights,
        domain=domain,
        labels=labels,
    )
    if not train:
        axes, mean, r = c.axes, c.state.mean, rstd(c.state.var, c.epsilon)
        if c.rows is not None:
            axes, (mean, r) = c.rows.axes, c.rows.read_all((mean, r), c.domains)
        y = normalize_lean(c.x, mean, r, c.params, axes, c.dtype, c.mask)
        return finish(y, activation, c.residual), c.table
    new: Any = c.state
    relu = activation is jax.nn.relu and not jnp.issubdtype(c.dtype, jnp.complexfloating)
    relu &= c.weights is None and c.rows is None
    y, moments = _by_batch(c, relu)
    if isinstance(new, Moments):
        new = _gathered(new, with_one_count(moments, c.mask, c.weights))
    elif new is not None:
        learn = functools.partial(blend, momentum=c.momentum, unbiased=unbiased)
        new = (learn if c.domains is None else jax.vmap(learn))(new, moments)
    if (domain := c.domain) is not None:
        new = jax.tree.map(lambda v, row: put(v, domain, row), c.table, new)
    return y if relu else finish(y, activation, c.residual), new


def finish(y: jax.Array, activation: Any, residual: jax.Array | None) -> jax.Array:
    """Equals `activation(y + residual)`; either may be None."""
    y = y if residual is None else y + residual.astype(y.dtype)
    return y if activation is None else check_activated("batch_norm", activation, activation(y))


def _by_batch(c: Checked, relu: bool) -> tuple[jax.Array, Moments]:
    """Normalizes x by the moments of the batch, or of each ghost batch.

    Returns y and the moments of all devices. With relu, y is `relu(bn(x) + residual)`.
    """
    known, traced = (c.epsilon, None) if isinstance(c.epsilon, float) else (0.0, c.epsilon)
    near = None if c.state is None or c.domains is not None else c.state.mean
    v = Operands(
        c.x,
        c.params,
        c.mask,
        traced,
        c.residual if relu else None,
        near,
        c.renorm,
        c.weights,
        c.domains,
    )
    if not c.ghosts:
        number = 0 if c.domains is None else len(c.state.mean)
        return normalize_by_batch(Spec(c.axes, known, c.pool, c.dtype, relu, c.rows, number), v)
    y, moments = _by_ghosts(Spec(c.axes, known, None, c.dtype, relu), v, c.batch_axis, c.ghosts)
    return y, across(moments, c.pool)


def _gathered(state: Any, moments: Moments) -> Moments:
    """Two `Moments` merged, in the wider of their dtypes; no gradient passes."""
    kinds = [promote(a.dtype, b.dtype) for a, b in zip(state, moments, strict=True)]
    both = (Moments(*map(lax.convert_element_type, m, kinds)) for m in (state, moments))
    return jax.tree.map(lax.stop_gradient, merge(*both))


def _by_ghosts(spec: Spec, v: Operands, batch_axis: int, ghosts: int) -> tuple[jax.Array, Moments]:
    """Each ghost batch normalized by its own moments; the moments of all of them, pooled."""

    def split(v: jax.Array) -> jax.Array:
        before, after = v.shape[:batch_axis], v.shape[batch_axis + 1 :]
        return v.reshape(*before, ghosts, v.shape[batch_axis] // ghosts, *after)

    large = {"x": v.x}
    for name in ("mask", "weights", "residual"):
        if (leaf := getattr(v, name)) is not None:
            large[name] = spread(leaf, v.x)
    each = jax.vmap(
        lambda large: normalize_by_batch(spec, v._replace(**large)),
        in_axes=batch_axis,
        out_axes=(batch_axis, 0),
    )
    y, moments = each({name: split(leaf) for name, leaf in large.items()})
    return y.reshape(v.x.shape), merge_all(moments)
