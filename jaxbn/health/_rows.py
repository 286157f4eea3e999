"""What reaches the batch norm layers of a served model: the moments of rows, merged.

The values of one image are not independent, because neighbouring pixels are alike. So the unit here
is the row (the image). Each row gives one mean and one variance per channel. The spread of these
between rows gives the standard error of their average.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._inspection import hooks, layers
from jaxbn._misuse import check_by_path
from jaxbn._op.arguments.cells import check_cells
from jaxbn._op.arguments.values import check_numbers
from jaxbn._op.axes import resolve
from jaxbn._op.devices import sharded_as
from jaxbn._op.moments import moments
from jaxbn._op.pooling import merge as merge_moments
from jaxbn._op.state import Moments, State


class Seen(NamedTuple):
    """What has reached one layer: moments over rows, each weighted by its valid cells.

    mean, var and sd are the running ones.

    >>> import jax, jax.numpy as jnp, jaxbn
    >>> state = {"bn": jaxbn.State(jnp.zeros(1), jnp.ones(1), None)}
    >>> rows = jax.vmap(jaxbn.moments, out_axes=-1)(jnp.full((4, 2, 1), 0.5))
    >>> seen = jaxbn.health.seen(state, {"bn": rows}, epsilon=0.0)["bn"]
    >>> seen.shift.mean.tolist(), seen.spread.mean.tolist()
    ([0.5], [-0.75])
    """

    weight2: jax.Array  # [C]: the sum of the squared weights
    shift: Moments  # [C]: of (row's mean - mean) / sd
    spread: Moments  # [C]: of (row's mean square distance from mean - var) / sd²


def row_moments(call: hooks.Call, run: Callable[[bool], jax.Array]) -> tuple[jax.Array, Any]:
    """The hook that runs a layer in eval mode and records the moments [C, rows] of each row.

    >>> import jaxbn, jax.numpy as jnp
    >>> from jaxbn import calls
    >>> from jaxbn.health import _rows
    >>> call = calls.Call(jaxbn.linen.BatchNorm(), jnp.array([[[1.0], [3.0]]]), None, False)
    >>> rows = _rows.row_moments(call, lambda train: call.x)[1]
    >>> rows.mean.shape, float(rows.mean[0, 0]), float(rows.var[0, 0])
    ((1, 1), 2.0, 1.0)
    """
    return run(False), rows_of_call("drift", call)


def rows_of_call(name: str, call: hooks.Call) -> Moments:
    """The moments of each row of a layer's x: count [rows], mean and var [C, rows].

    Those of a layer with domains have an axis of size 1 for the domains: [1, C, rows].

    Args:
      name: of the public call, for errors.
      call: the call of the layer; its mask and weights count.

    Raises:
      ValueError: features are on axis 0, or there is no row.

    >>> import jaxbn, jax.numpy as jnp
    >>> from jaxbn import calls
    >>> from jaxbn.health import _rows
    >>> call = calls.Call(jaxbn.linen.BatchNorm(), jnp.array([[[1.0], [3.0]]]), None, False)
    >>> _rows.rows_of_call("drift", call).mean.tolist()
    [[2.0]]
    """
    x = call.x
    features = resolve(name, x, call.layer.axis).features
    if 0 in features or x.shape[0] == 0:
        raise ValueError(
            f"{name}: x of a batch norm layer has shape {x.shape} with features on axis "
            f"{call.layer.axis}, expected rows (images) on axis 0, and at least one."
        )
    axis = tuple(a - 1 for a in features)
    mask, weights = check_cells(name, call.mask, call.weights, x)

    def by_row(v: jax.Array | None) -> jax.Array | None:
        if v is None:
            return None
        return sharded_as(jnp.broadcast_to(v, (x.shape[0], *v.shape[1:])), x, range(x.ndim))

    of_a_row = jax.vmap(
        lambda x, mask, weights: moments(x, axis, mask, weights=weights), out_axes=-1
    )
    rows = of_a_row(x, by_row(mask), by_row(weights))
    if getattr(call.layer, "domains", None):
        # The axis that the statistics have too: both are then stacked on the same axes.
        rows = jax.tree.map(lambda v: v[None] if v.ndim > 1 else v, rows)
    return rows


def incoming(model: Any) -> Callable[..., tuple[Any, dict[str, Moments]]]:
    """The model in eval mode, which also returns the moments of each row at each layer.

    Use it in place of the model where the model is served, and give the moments to `drift` or
    `seen`. It may be jitted: `jax.jit(incoming(model.apply))`, or inside an `nnx.jit` of the model.

    Args:
      model: linen's `model.apply`, or an nnx model.

    Returns:
      A function with the model's arguments that returns `(y, path → Moments)`, with a count of
      [rows] and mean and var [C, rows]; of a layer with domains [1, C, rows]. Row i of a
      layer that is called several times has the values of row i of all calls, because each image is
      one row.

    Raises:
      TypeError: model is neither of the two.

    >>> import jax, jax.numpy as jnp, flax.linen as nn, jaxbn
    >>> model = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True)])
    >>> variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
    >>> y, rows = jaxbn.health.incoming(model.apply)(variables, jnp.ones((8, 3)))
    >>> rows["layers_1"].mean.shape
    (4, 8)
    """
    if not layers.is_nnx(model):
        hooks.check_apply("incoming", model, "health.incoming(model.apply)")
        return hooks.hooked_apply(model, row_moments, _both_calls)

    def call(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, Moments]]:
        with hooks.hooked_nnx(model, row_moments, _both_calls) as rows:
            y = model(*args, **kwargs)
        return y, rows

    return call


def seen(state: Any, rows: Mapping[str, Moments], *, epsilon: float = 1e-5) -> dict[str, Seen]:
    """The rows of one batch against the running statistics: path → `Seen`.

    Use it for a stream that goes on: merge the results of all batches, and give them to `decide`.

    Args:
      state: the running statistics: linen's variables, an nnx model, or any tree that
        `jaxbn.layers.find` reads.
      rows: path → `Moments` [C, rows] of each row, as `incoming` returns them; an axis of size 1
        where the layer has domains may be left out of the state. For an x without a model,
        `jax.vmap(jaxbn.moments, out_axes=-1)(x)`.
      epsilon: of the layers.

    Returns:
      Path → `Seen`, a few numbers per channel.

    Raises:
      TypeError: rows is not a dict, path → `Moments`.
      ValueError: a path or a shape does not fit the state.

    >>> import jax, jax.numpy as jnp, jaxbn
    >>> state = {"bn": jaxbn.State(jnp.zeros(1), jnp.ones(1), None)}
    >>> rows = jax.vmap(jaxbn.moments, out_axes=-1)(jnp.ones((4, 2, 1)))
    >>> round(float(jaxbn.health.seen(state, {"bn": rows})["bn"].shift.mean[0]), 4)
    1.0
    """
    write = "drift(variables, batches), or seen(variables, rows)"
    source = "health.incoming(model.apply)(variables, x)[1]"
    check_by_path("drift", rows, (Moments,), write, source)
    check_numbers("drift", None, epsilon)
    held = layers.find(state)
    fitted = {path: _fitted(held, path, of_rows) for path, of_rows in rows.items()}
    return {path: _seen(held[path].state, of_rows, epsilon) for path, of_rows in fitted.items()}


def merge(a: Mapping[str, Seen], b: Mapping[str, Seen]) -> dict[str, Seen]:
    """Equals `seen` of the rows of both streams; `{}` is a stream without rows.

    Args:
      a: path → `Seen`.
      b: path → `Seen`, of the same model.

    Returns:
      Path → `Seen`, for the layers of either.

    Raises:
      TypeError: a or b is not a dict, path → `Seen`.

    >>> from jaxbn import health
    >>> health.merge({}, {})
    {}
    """
    for part in (a, b):
        check_by_path("merge", part, (Seen,), "health.merge(a, b)", "health.seen")
    both = {**a, **b}
    for path in a.keys() & b.keys():
        v, w = a[path], b[path]
        shift, spread = merge_moments(v.shift, w.shift), merge_moments(v.spread, w.spread)
        both[path] = Seen(v.weight2 + w.weight2, shift, spread)
    return both


def rows_in(seen: Seen) -> np.ndarray:
    """The number of equally weighted rows that these are worth: (Σ w)² / Σ w² (Kish 1965)."""
    weight2 = np.asarray(seen.weight2, np.float64).ravel()
    total = np.asarray(seen.shift.count, np.float64).ravel()
    return total**2 / np.where(weight2 > 0, weight2, 1)


def _both_calls(a: Moments, b: Moments) -> Moments:
    """The rows of a layer that is called twice: row i of both calls is one row.

    A second call brings the same rows, and two rows of one image are not independent. A call with
    fewer rows has no values of the rows after its last.
    """
    rows = max(m.mean.shape[-1] for m in (a, b))

    def widened(v: jax.Array) -> jax.Array:
        return jnp.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, rows - v.shape[-1])])

    a, b = (jax.tree.map(widened, m) for m in (a, b))
    both = merge_moments(*(m._replace(count=_beside(m.count, m.mean)) for m in (a, b)))
    # [rows] again, unless the mask of a call differs by feature.
    return both._replace(count=both.count.reshape(max(a.count, b.count, key=jnp.ndim).shape))


def _beside(count: jax.Array, mean: jax.Array) -> jax.Array:
    """The counts [..., rows] with axes of size 1 for the features of mean [..., C, rows]."""
    return count.reshape(*count.shape[:-1], *(1,) * (mean.ndim - count.ndim), count.shape[-1])


def _seen(state: State, rows: Moments, epsilon: float) -> Seen:
    weight = _beside(rows.count, rows.mean).astype(rows.var.dtype)
    weight = jnp.broadcast_to(weight, rows.mean.shape)
    var = state.var[..., None].astype(rows.var.dtype)
    sd = jnp.sqrt(var + epsilon)
    off = rows.mean - state.mean[..., None].astype(rows.mean.dtype)
    shift, spread = off / sd.astype(off.dtype), (rows.var + jnp.abs(off) ** 2 - var) / sd**2
    return Seen((weight**2).sum(-1), over_rows(weight, shift.real), over_rows(weight, spread))


def over_rows(weight: jax.Array, v: jax.Array) -> Moments:
    """The moments [C] of v [C, rows], each row by its weight.

    >>> import jax.numpy as jnp
    >>> from jaxbn.health import _rows
    >>> _rows.over_rows(jnp.array([[1.0, 1.0, 0.0]]), jnp.array([[1.0, 3.0, 9.0]])).mean.tolist()
    [2.0]
    """
    total = weight.sum(-1)
    share = weight / jnp.where(total > 0, total, 1)[..., None]
    mean = (share * v).sum(-1)
    return Moments(total, mean, (share * (v - mean[..., None]) ** 2).sum(-1))


def _fitted(held: Mapping[str, layers.Layer], path: str, rows: Moments) -> Moments:
    """The rows, without an axis of domains where the statistics of one domain have none."""
    if path not in held:
        raise ValueError(
            f"drift: moments are of a layer {path!r}, but the state has {sorted(held)}; pass the "
            f"result of health.incoming(model.apply)(variables, x)[1] for these variables."
        )
    shape, features = np.shape(rows.mean), np.shape(held[path].state.mean)
    if shape[:-1] == features:
        return rows
    for axis, n in enumerate(shape[:-1]):
        if n == 1 and (*shape[:axis], *shape[axis + 1 : -1]) == features:
            return Moments(*(v.squeeze(axis) if v.ndim == len(shape) else v for v in rows))
    axes = range(len(features)) if len(features) > 1 else ()
    # `incoming` keeps the axis of domains; `jaxbn.moments` of one x has none.
    for axis, (kept, index) in itertools.product(axes, (((1,), ":1"), ((), "0"))):
        if shape[:-1] == (*features[:axis], *kept, *features[axis + 1 :]):
            first = ", ".join([":"] * axis + [index])
            raise ValueError(
                f"drift: the statistics of {path!r} have shape {features}, with domains on axis "
                f"{axis}, but moments of rows have shape {shape}; for the rows of domain 0 write "
                f"health.drift(jax.tree.map(lambda v: v[{first}], batch_stats), batches)."
            )
    raise ValueError(
        f"drift: moments of {path!r} have shape {shape}, expected {(*features, 'rows')}, "
        f"the moments of each row; write health.incoming(model.apply)(variables, x)[1], or "
        f"jax.vmap(jaxbn.moments, out_axes=-1)(x)."
    )
