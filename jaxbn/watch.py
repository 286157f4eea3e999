"""Watching a training run: what its batch norm layers see and learn, as an aux of the jitted step.

On the devices a step returns `Record`s, O(C) numbers a layer; on the host `metrics` makes of them
the few figures a layer that `jaxbn.writers` writes.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxbn._inspection import hooks
from jaxbn._inspection.layers import find, is_nnx, nnx_layers
from jaxbn._op.state import Moments, Params, State
from jaxbn.health._distances import distance

EPSILON = 1e-5  # Flax's


class Record(NamedTuple):
    """What one batch norm layer saw and learned in a step; leaves [C], or stacked by a scan.

    >>> from jaxbn import watch
    >>> watch.Record._fields
    ('batch', 'state', 'params', 'grads')
    """

    batch: Moments  # of the layer's input, pooled as the layer pools
    state: State
    params: Params
    grads: Params  # dscale and dbias; either None where it is not known


def linen(apply: Callable[..., Any], on: bool = True) -> Callable[..., tuple[Any, Any]]:
    """A linen model's `apply` that returns `(what apply returns, what the layers saw)`.

    `on=False` calls apply itself, to the same compiled program, and no layer saw anything: a
    step that is written once serves as the watched one and as the plain one.

    Raises:
      TypeError: apply is a model, its variables, or anything else that is no function.
      ValueError: on, and apply passes through no batch norm layer.

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
    """Within it an nnx model is called as ever; after it, the dict holds what the layers saw.

    Stands inside the jitted step, around `nnx.value_and_grad`. `on` as in `linen`.

    Raises:
      TypeError: model is no nnx model.
      ValueError: on, and the model has no batch norm layer, or none was called.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from jaxbn import watch
    >>> model = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    >>> with watch.nnx(model) as seen:
    ...     y = model(jnp.eye(2))
    >>> seen[""].mean.tolist()
    [0.5, 0.5]
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
    """Path → `Record` of every layer that saw something; {} of nothing seen.

    Args:
      seen: from `linen` or `nnx`; or for `jaxbn.batch_norm` a dict, path → `jaxbn.moments(x)`.
      variables: linen's `{"params": …, "batch_stats": …}`, or the nnx model.
      grads: of the loss, in the structure of the parameters.

    Raises:
      TypeError: seen is no dict, path → `Moments`.
      ValueError: variables hold no running statistics for a layer that saw something.

    >>> import jax.numpy as jnp, jaxbn
    >>> from jaxbn import watch
    >>> params, state = jaxbn.init(2)
    >>> seen = {"bn": jaxbn.moments(jnp.eye(2))}
    >>> variables = {"params": {"bn": params}, "batch_stats": {"bn": state}}
    >>> recorded = watch.records(seen, variables, grads={"bn": params})
    >>> recorded["bn"].grads.scale.tolist()
    [1.0, 1.0]
    """
    _check("records", seen, Moments, "watch.records(seen, variables, grads)", "watch.linen")
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


def _check(call: str, by_path: Any, kind: type, write: str, source: str) -> None:
    """What came is a dict, path → `kind`, or an error that says where such a dict comes from."""
    if not isinstance(by_path, Mapping) or not all(isinstance(v, kind) for v in by_path.values()):
        raise TypeError(
            f"watch.{call}: called with {_kinds(by_path)}, expected a dict, path → {kind.__name__} "
            f"of each layer, as {source} gives; write {write}."
        )


def _kinds(v: Any) -> str:
    if not isinstance(v, Mapping):
        return type(v).__name__
    return f"{type(v).__name__} of {sorted({type(one).__name__ for one in v.values()})}"


Channels = dict[str, np.ndarray]


def channels(record: Record) -> Channels:
    """The arrays of a record on the host, flat, in float64 or complex128; None left out.

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
    return {
        name: np.asarray(v, complex if np.iscomplexobj(v) else float).reshape(-1)
        for name, v in arrays.items()
        if v is not None
    }


def metrics(records: Mapping[str, Record]) -> dict[str, dict[str, float]]:
    """Path → name → figure, for each of `METRICS` that the layer has the arrays for.

    Computed on the host in float64. Variances take epsilon 1e-5 before they divide, Flax's
    default, so that a constant channel gives a large figure and not NaN. The symmetric KL
    divergence is that of `jaxbn.health.distance`, in nats. Figures of a layer that was stacked
    by a scan are over the whole stack.

    >>> import jax.numpy as jnp, jaxbn
    >>> from jaxbn import watch
    >>> params, state = jaxbn.init(2)
    >>> seen = {"bn": jaxbn.moments(2.0 + 4 * jnp.eye(2))}
    >>> variables = {"params": {"bn": params}, "batch_stats": {"bn": state}}
    >>> figures = watch.metrics(watch.records(seen, variables))["bn"]
    >>> figures["batch_var_min"], round(figures["mean_over_sd_max"], 3)
    (4.0, 2.0)
    """
    _check("metrics", records, Record, "watch.metrics(records)", "watch.records")
    with np.errstate(all="ignore"):  # what overflows or is NaN is reported as such
        return {path: _figures(record) for path, record in jax.device_get(dict(records)).items()}


def _figures(record: Record) -> dict[str, float]:
    arrays = channels(record)
    arrays["count"] = np.asarray(record.batch.count, float).reshape(-1)
    return {
        name: float(metric.of(*(arrays[need] for need in metric.needs)))
        for name, metric in METRICS.items()
        if arrays.keys() >= set(metric.needs)
    }


class Metric(NamedTuple):
    """One figure of a layer.

    >>> from jaxbn import watch
    >>> watch.METRICS["scale_abs_min"].help
    'Smallest |scale|.'
    """

    help: str
    needs: tuple[str, ...]  # names of `channels`, and count
    of: Callable[..., Any]


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
