"""What the batch norm layers of a training run see and learn.

A jitted step returns a `Record` for each layer, O(C) numbers, as an auxiliary result. On the host,
`metrics` turns each record into a few figures, which `jaxbn.writers` write.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxbn._inspection import hooks
from jaxbn._inspection.layers import find, is_nnx, nnx_layers
from jaxbn._op.state import Moments, Params, State
from jaxbn.health._distances import distance, seen_in, values_of

EPSILON = 1e-5  # Flax's


class Record(NamedTuple):
    """What one batch norm layer saw and learned in a step; arrays [C], or [layers, C] of a scan.

    >>> from jaxbn import watch
    >>> watch.Record._fields
    ('batch', 'state', 'params', 'grads')
    """

    batch: Moments  # of the layer's input, pooled over devices as the layer pools
    state: State
    params: Params
    grads: Params  # dscale and dbias; None for one that is not known


def linen(apply: Callable[..., Any], on: bool = True) -> Callable[..., tuple[Any, Any]]:
    """A linen model's `apply` that also returns the moments of each layer's input.

    Call it in the jitted training step, and give the moments to `records`. One step serves with
    `on=True` on some steps and `on=False` on others.

    Args:
      apply: `model.apply`, or a function that passes its keywords on to it.
      on: False calls apply itself, which compiles to the program without watching, and returns {}
        for the moments.

    Returns:
      A function with apply's arguments that returns `(what apply returns, path → Moments)`.

    Raises:
      TypeError: apply is a model, its variables, or anything else that is not a function.
      ValueError: when called with on=True, apply passed through no batch norm layer.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from jaxbn import watch
    >>> model = nn.BatchNorm(use_running_average=False)
    >>> variables = model.init(jax.random.key(0), jnp.ones((1, 2)))
    >>> (y, updates), seen = watch.linen(model.apply)(
    ...     variables, jnp.eye(2), mutable=["batch_stats"]
    ... )
    >>> seen[""].mean.tolist()
    [0.5, 0.5]
    """
    hooks.check_apply("watch.linen", apply, "watch.linen(model.apply), or watch.nnx(model) of nnx")
    if not on:
        return lambda *args, **kwargs: (apply(*args, **kwargs), {})
    hooked = hooks.hooked_apply(apply)

    def watched(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        out, seen = hooked(*args, **kwargs)
        if not seen:
            raise ValueError(
                "watch.linen: apply passed through no batch norm layer, expected flax.linen."
                "BatchNorm or jaxbn.linen.BatchNorm in the model; write watch.linen(model.apply, "
                "on=False) for a model without them."
            )
        return out, seen

    return watched


@contextmanager
def nnx(model: Any, on: bool = True) -> Iterator[dict[str, Any]]:
    """A context for calls of an nnx model that collects the moments of each layer's input.

    Open it in the jitted training step, around `nnx.value_and_grad`, and give the moments to
    `records`.

    Args:
      model: an nnx model, which is called as usual.
      on: False does nothing and leaves the dict empty.

    Yields:
      A dict that is filled when the context ends: path → `Moments`.

    Raises:
      TypeError: model is not an nnx model.
      ValueError: with on=True, the model has no batch norm layer, or none was called.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from jaxbn import watch
    >>> model = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    >>> with watch.nnx(model) as seen:
    ...     y = model(jnp.array([[1.0, 3.0], [5.0, 3.0]]))
    >>> watch.records(seen, model)[""].batch.var.tolist()
    [4.0, 0.0]
    """
    if not is_nnx(model):
        raise TypeError(
            f"watch.nnx: called with {type(model).__name__}, expected an nnx model; write with "
            f"watch.nnx(model) as seen: y = model(x), or watch.linen(model.apply) of linen."
        )
    if not on:
        yield {}
        return
    if not list(nnx_layers(model)):
        raise ValueError(
            f"watch.nnx: {type(model).__name__} has no batch norm layer, expected flax.nnx."
            f"BatchNorm or jaxbn.nnx.BatchNorm in the model; write watch.nnx(model, on=False) for "
            f"a model without them."
        )
    with hooks.hooked_nnx(model) as seen:
        yield seen
    if not seen:
        raise ValueError(
            f"watch.nnx: no batch norm layer of {type(model).__name__} was called, expected a "
            f"call of the model; write with watch.nnx(model) as seen: y = model(x)."
        )


def records(seen: Mapping[str, Moments], variables: Any, grads: Any = None) -> dict[str, Record]:
    """The `Record` of every layer that saw a batch: path → `Record`.

    Call it at the end of the jitted training step, and return the result beside the loss.

    Args:
      seen: path → `Moments`, from `linen` or `nnx`. With `jaxbn.batch_norm`, make the dict yourself
        from `jaxbn.moments(x)`.
      variables: linen's `{"params": …, "batch_stats": …}`, or the nnx model.
      grads: gradients of the loss, in the structure of the parameters; None leaves them out.

    Returns:
      Path → `Record`, for the paths in seen; {} if seen is empty.

    Raises:
      TypeError: seen is not a dict, path → `Moments`.
      ValueError: variables hold no running statistics for a layer in seen.

    >>> import jax.numpy as jnp, jaxbn
    >>> from jaxbn import watch
    >>> params, state = jaxbn.init(2)
    >>> seen = {"bn": jaxbn.moments(jnp.eye(2))}
    >>> variables = {"params": {"bn": params}, "batch_stats": {"bn": state}}
    >>> recorded = watch.records(seen, variables, grads={"bn": params})
    >>> recorded["bn"].grads.scale.tolist()
    [1.0, 1.0]
    """
    _check_by_path("records", seen, Moments, "watch.records(seen, variables, grads)", "watch.linen")
    found = find(variables)
    if missing := sorted(set(seen) - set(found)):
        raise ValueError(
            f"watch.records: no running statistics in variables for the layers {missing} that saw "
            f"the batch; expected the variables of the model that was called; write "
            f'watch.records(seen, {{"params": params, "batch_stats": batch_stats}}, grads), or '
            f"the nnx model in place of the variables."
        )
    stats = variables
    if isinstance(variables, Mapping):
        stats = variables.get("batch_stats", variables)
    slopes = find({"params": {} if grads is None else grads, "batch_stats": stats})
    return {
        path: Record(batch, found[path].state, found[path].params, slopes[path].params)
        for path, batch in seen.items()
    }


def _check_by_path(call: str, by_path: Any, kind: type, write: str, source: str) -> None:
    """Raises unless `by_path` is a dict, path → `kind`; the error says where to get such a dict."""
    if not isinstance(by_path, Mapping) or not all(isinstance(v, kind) for v in by_path.values()):
        raise TypeError(
            f"watch.{call}: called with {_types(by_path)}, expected a dict, path → {kind.__name__} "
            f"of each layer, as {source} gives; write {write}."
        )


def _types(v: Any) -> str:
    if not isinstance(v, Mapping):
        return type(v).__name__
    return f"{type(v).__name__} of {sorted({type(one).__name__ for one in v.values()})}"


Channels = dict[str, np.ndarray]


def channels(record: Record) -> Channels:
    """The arrays of a record as flat NumPy arrays of float64 or complex128, by name.

    `jaxbn.writers` get them for histograms. Use it for figures of your own.

    Args:
      record: with arrays [C], or [layers, C] of a scanned layer.

    Returns:
      Name → [C] or [layers · C], without the arrays that are None. Of a layer with domains, batch
      and running statistics are those of the domains in this batch.

    >>> import jax.numpy as jnp, jaxbn
    >>> from jaxbn import watch
    >>> params, state = jaxbn.init(2)
    >>> record = watch.Record(jaxbn.moments(jnp.eye(2)), state, params, jaxbn.Params(None, None))
    >>> list(watch.channels(record))
    ['batch_mean', 'batch_var', 'running_mean', 'running_var', 'scale', 'bias']
    """
    arrays = {
        "batch_mean": record.batch.mean,
        "batch_var": record.batch.var,
        "running_mean": record.state.mean,
        "running_var": record.state.var,
        "scale": record.params.scale,
        "bias": record.params.bias,
        "dscale": record.grads.scale,
        "dbias": record.grads.bias,
    }
    flat = {
        name: np.asarray(v, complex if np.iscomplexobj(v) else float).reshape(-1)
        for name, v in arrays.items()
        if v is not None
    }
    seen = seen_in(record.batch).reshape(-1)
    if np.shape(record.batch.count) == np.shape(record.batch.mean) and seen.any():
        flat |= {name: flat[name][seen] for name in _BOTH if name in flat}
    return flat


def metrics(records: Mapping[str, Record]) -> dict[str, dict[str, float]]:
    """The figures of each layer: path → name → figure, for the names in `METRICS`.

    Use it to log a training run with a logger of your own. The figures are computed on the host in
    float64. Where a variance divides, 1e-5 (Flax's default epsilon) is added, so that a constant
    channel gives a large figure and not NaN. The symmetric KL divergence is that of
    `jaxbn.health.distance`, in nats. A scanned layer has one figure for all its [layers, C].

    Args:
      records: path → `Record`, from `records`.

    Returns:
      Path → name → float. Figures whose arrays a record does not have are left out; values that
      are NaN or infinite stay in.

    Raises:
      TypeError: records is not a dict, path → `Record`.

    >>> import jax.numpy as jnp, jaxbn
    >>> from jaxbn import watch
    >>> params, state = jaxbn.init(2)
    >>> seen = {"bn": jaxbn.moments(2.0 + 4 * jnp.eye(2))}
    >>> variables = {"params": {"bn": params}, "batch_stats": {"bn": state}}
    >>> figures = watch.metrics(watch.records(seen, variables))["bn"]
    >>> figures["batch_var_min"], round(figures["mean_over_sd_max"], 3)
    (4.0, 2.0)
    """
    _check_by_path("metrics", records, Record, "watch.metrics(records)", "watch.records")
    with np.errstate(all="ignore"):  # figures show overflows and NaNs
        return {path: _figures(record) for path, record in jax.device_get(dict(records)).items()}


def _figures(record: Record) -> dict[str, float]:
    arrays = channels(record)
    arrays["count"] = np.asarray(values_of(record.batch))
    return {
        name: float(metric.of(*(arrays[need] for need in metric.needs)))
        for name, metric in METRICS.items()
        if arrays.keys() >= set(metric.needs)
    }


class Metric(NamedTuple):
    """How one figure is computed from the arrays of a record.

    >>> from jaxbn import watch
    >>> watch.METRICS["scale_abs_min"].help
    'Smallest |scale|.'
    """

    help: str
    needs: tuple[str, ...]  # the names of the arrays, as in `channels`, or "count"
    of: Callable[..., Any]  # of these arrays


def _mean_over_sd(mean: np.ndarray, var: np.ndarray) -> np.ndarray:
    return np.abs(mean) / np.sqrt(var + EPSILON)


def _symmetric_kl(mean: Any, var: Any, running_mean: Any, running_var: Any) -> np.ndarray:
    running, batch = State(running_mean, running_var, None), Moments(mean.size, mean, var)
    return distance(running, batch, EPSILON).divergence


_BATCH = ("batch_mean", "batch_var")
_BOTH = (*_BATCH, "running_mean", "running_var")

METRICS = {
    "batch_count": Metric("Values per channel behind the batch's moments.", ("count",), np.min),
    "mean_over_sd_max": Metric(
        "Largest |mean| / sd of the batch over channels.",
        _BATCH,
        lambda *v: _mean_over_sd(*v).max(),
    ),
    "batch_var_min": Metric("Smallest variance of the batch.", ("batch_var",), np.min),
    "batch_var_max": Metric("Largest variance of the batch.", ("batch_var",), np.max),
    "running_var_min": Metric("Smallest running variance.", ("running_var",), np.min),
    "running_var_max": Metric("Largest running variance.", ("running_var",), np.max),
    "symmetric_kl_max": Metric(
        "Largest symmetric KL divergence of running statistics and batch, nats.",
        _BOTH,
        lambda *v: _symmetric_kl(*v).max(),
    ),
    "symmetric_kl_mean": Metric(
        "Mean symmetric KL divergence of running statistics and batch, nats.",
        _BOTH,
        lambda *v: _symmetric_kl(*v).mean(),
    ),
    "scale_abs_min": Metric("Smallest |scale|.", ("scale",), lambda v: np.abs(v).min()),
    "scale_abs_max": Metric("Largest |scale|.", ("scale",), lambda v: np.abs(v).max()),
    "bias_abs_max": Metric("Largest |bias|.", ("bias",), lambda v: np.abs(v).max()),
    "dscale_norm": Metric("Euclidean norm of the gradient of scale.", ("dscale",), np.linalg.norm),
    "dbias_norm": Metric("Euclidean norm of the gradient of bias.", ("dbias",), np.linalg.norm),
    "nonfinite": Metric(
        "Moments and running statistics that are NaN or infinite.",
        _BOTH,
        lambda *v: sum(np.count_nonzero(~np.isfinite(part)) for part in v),
    ),
}
