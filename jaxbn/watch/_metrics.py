"""The figures of a record, computed on the host."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxbn._misuse import check_by_path, misuse
from jaxbn._op.state import Moments, State
from jaxbn.health._distances import distance, seen_in, values_of
from jaxbn.health._findings import Limits
from jaxbn.health._shards import bounds, spread
from jaxbn.watch._records import Record

EPSILON = 1e-5  # Flax's

Channels = dict[str, np.ndarray]


def channels(record: Record) -> Channels:
    """The arrays of a record as flat NumPy arrays of float64 or complex128, by name.

    `jaxbn.writers` get them for histograms. Use it for figures of your own.

    Args:
      record: with arrays [C], or [layers, C] of a scanned layer.

    Returns:
      Name → [C] or [layers · C], without the arrays that are None. Of a layer with domains, batch
      and running statistics are those of the domains in this batch. `x` has [64], values of the
      layer's input that are equally probable, if the step was watched with `histogram=True`.

    Raises:
      TypeError: record is no `Record`.

    >>> import jax.numpy as jnp, jaxbn
    >>> from jaxbn import watch
    >>> params, state = jaxbn.init(2)
    >>> record = watch.Record(jaxbn.moments(jnp.eye(2)), state, params, jaxbn.Params(None, None))
    >>> list(watch.channels(record))
    ['batch_mean', 'batch_var', 'running_mean', 'running_var', 'scale', 'bias']
    """
    if not isinstance(record, Record):
        write = "watch.channels(records[path])"
        raise misuse("watch.channels", [record], "the Record of one layer", write)
    arrays = {
        "batch_mean": record.batch.mean,
        "batch_var": record.batch.var,
        "running_mean": record.state.mean,
        "running_var": record.state.var,
        "scale": record.params.scale,
        "bias": record.params.bias,
        "dscale": record.grads.scale,
        "dbias": record.grads.bias,
        "x": record.quantiles,
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
    check_by_path("watch.metrics", records, (Record,), "watch.metrics(records)", "watch.records")
    with np.errstate(all="ignore"):  # figures show overflows and NaNs
        return {path: _figures(record) for path, record in jax.device_get(dict(records)).items()}


def _figures(record: Record) -> dict[str, float]:
    arrays: dict[str, Any] = {**channels(record)}
    arrays["count"] = np.asarray(values_of(record.batch))
    if record.shards is not None:
        arrays["shards"] = record.shards
    if record.kernel is not None:
        arrays["kernel"] = record.kernel
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
    # The names of the arrays, as in `channels`; or "count", "shards", "kernel".
    needs: tuple[str, ...]
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
    "shard_mean_spread": Metric(
        "RMS distance of the shards' means over what chance gives.",
        ("shards",),
        lambda shards: spread(shards.mean),
    ),
    "shard_sd_spread": Metric(
        "RMS distance of the shards' sds over what chance gives.",
        ("shards",),
        lambda shards: spread(shards.sd),
    ),
    "shard_spread_limit": Metric(
        "Spread above which shards are skewed.",
        ("shards",),
        lambda shards: bounds(shards, Limits().shards)[1],
    ),
    "kernel_grad_norm": Metric(
        "Euclidean norm of the gradient of the kernel before the layer.",
        ("kernel",),
        lambda kernel: kernel.grad_norm,
    ),
    "effective_rate": Metric(
        "Norm of the gradient of the kernel before the layer over the norm of the kernel.",
        ("kernel",),
        lambda kernel: kernel.grad_norm / kernel.norm,
    ),
}
