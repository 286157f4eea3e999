"""Does served data still look as the running statistics say? A test on a stream, layer by layer.

Values of one image are no independent sample: neighbouring pixels agree. So the unit here is the
row (the image): each gives one mean and one variance per channel, and how much these differ from
row to row says what their average is worth.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn import calls, layers
from jaxbn.axes import resolve
from jaxbn.findings import WARNING, Finding
from jaxbn.moments import merge as merge_moments
from jaxbn.moments import moments
from jaxbn.state import Moments, State

# What clean data may be off by, in sd. Against running statistics, which are of augmented and of
# earlier data, and against a reference of clean data, whose own noise is accounted for.
FROM_STATE, FROM_REFERENCE = 0.1, 0.05


class Seen(NamedTuple):
    """What has come to one layer, in running sd: of rows, weighed by their valid cells."""

    weight2: jax.Array  # [C]: sum of the squared weights
    shift: Moments  # [C]: over rows, of (row mean - mean) / sd
    spread: Moments  # [C]: over rows, of (mean square distance from mean - var) / sd²


class LayerDrift(NamedTuple):
    """One layer's incoming data against what it should be."""

    layer: str
    alarm: bool
    figure: float  # what is beyond the tolerance, in standard errors: RMS over channels
    threshold: float
    shift: float  # of the mean, in sd: RMS over channels
    spread: float  # of the variance, as a share of it: RMS over channels
    rows: float  # independent rows
    values: float  # independent values of a channel that these rows are worth, median


class Drift(NamedTuple):
    """Whether the stream has drifted."""

    alarm: bool
    layers: tuple[LayerDrift, ...]  # in the model's order
    findings: tuple[Finding, ...]  # a finding of kind "drift" for each alarm
    seen: dict[str, Seen]  # to be merged, or to be the reference of later streams


def row_moments(call: calls.Call, run: Callable[[bool], jax.Array]) -> tuple[jax.Array, Any]:
    """The hook that runs a layer in eval mode and records the moments of each row [C, rows].

    >>> import jaxbn, jax.numpy as jnp
    >>> from jaxbn import calls, drift
    >>> call = calls.Call(jaxbn.linen.BatchNorm(), jnp.array([[[1.0], [3.0]]]), None, False)
    >>> rows = drift.row_moments(call, lambda train: call.x)[1]
    >>> rows.mean.shape, float(rows.mean[0, 0]), float(rows.var[0, 0])
    ((1, 1), 2.0, 1.0)
    """
    x, mask = call.x, call.mask
    features = resolve("drift", x, call.layer.axis).features
    if 0 in features or x.shape[0] == 0:
        raise ValueError(
            f"drift: x of a batch norm layer has shape {x.shape} with features on axis "
            f"{call.layer.axis}, expected rows (images) on axis 0, and at least one."
        )
    axis = tuple(a - 1 for a in features)
    if mask is None:
        return run(False), jax.vmap(lambda x: moments(x, axis), out_axes=-1)(x)
    mask = jnp.broadcast_to(mask, (x.shape[0], *mask.shape[1:]))
    return run(False), jax.vmap(lambda x, mask: moments(x, axis, mask), out_axes=-1)(x, mask)


def incoming(model: Any) -> Callable[..., tuple[Any, dict[str, Moments]]]:
    """The model in eval mode that returns `(y, path → moments of each row that came there)`.

    May be jitted: `jax.jit(incoming(model.apply))`, or within an `nnx.jit` of the model.

    Args:
      model: linen's `model.apply`, or an nnx model.

    >>> import jax, jax.numpy as jnp, flax.linen as nn, jaxbn
    >>> model = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True)])
    >>> variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
    >>> y, rows = jaxbn.health.incoming(model.apply)(variables, jnp.ones((8, 3)))
    >>> rows["layers_1"].mean.shape
    (4, 8)
    """
    if not layers.is_nnx(model):
        return calls.hooked_apply(model, row_moments, _more_rows)

    def call(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, Moments]]:
        with calls.hooked_nnx(model, row_moments, _more_rows) as rows:
            y = model(*args, **kwargs)
        return y, rows

    return call


def seen(state: Any, rows: Mapping[str, Moments], *, epsilon: float = 1e-5) -> dict[str, Seen]:
    """What one batch of rows says of the running statistics; a few numbers per channel.

    Args:
      state: the running statistics: linen's variables, an nnx model, or as `jaxbn.layers.find`.
      rows: path → `Moments` of each row, [C, rows], as `incoming` gives them; of an x without a
        model `jax.vmap(jaxbn.moments, out_axes=-1)(x)`.
      epsilon: the layers'.

    Raises:
      ValueError: a path or a shape does not fit the state.

    >>> import jax, jax.numpy as jnp, jaxbn
    >>> state = {"bn": jaxbn.State(jnp.zeros(1), jnp.ones(1), None)}
    >>> rows = jax.vmap(jaxbn.moments, out_axes=-1)(jnp.ones((4, 2, 1)))
    >>> round(float(jaxbn.health.seen(state, {"bn": rows})["bn"].shift.mean[0]), 4)
    1.0
    """
    held = layers.find(state)
    for path, of_rows in rows.items():
        _check_fits(held, path, of_rows)
    return {path: _seen(held[path].state, of_rows, epsilon) for path, of_rows in rows.items()}


def merge(a: Mapping[str, Seen], b: Mapping[str, Seen]) -> dict[str, Seen]:
    """Equals what both streams have seen, put together; `{}` has seen nothing.

    >>> from jaxbn import health
    >>> health.merge({}, {})
    {}
    """
    both = {**a, **b}
    for path in a.keys() & b.keys():
        v, w = a[path], b[path]
        shift, spread = merge_moments(v.shift, w.shift), merge_moments(v.spread, w.spread)
        both[path] = Seen(v.weight2 + w.weight2, shift, spread)
    return both


def drift(
    state: Any,
    batches: Iterable[Mapping[str, Moments]],
    *,
    reference: Drift | None = None,
    false_alarm: float = 1e-3,
    tolerance: float | None = None,
    epsilon: float = 1e-5,
) -> Drift:
    """Whether the data that comes to the batch norm layers is what their running statistics say.

    For each layer, of the channels' means (and likewise of their variances, over sd², with twice
    the tolerance)::

        figure = sqrt(mean over channels of (max(|shift| - tolerance, 0) / standard error)²)

    with the shift in running sd and its standard error from the spread of the rows. Alarm where
    figure > t, Student's quantile at false_alarm / (2 · layers), two-sided. Whatever way channels
    depend on one another, a mean of squared Gaussians exceeds t² no oftener than one squared
    Gaussian (Székely & Bakirov 2003), so the chance that a stream without drift beyond the
    tolerance raises any alarm is `false_alarm` at most, for rows enough that their average is
    Gaussian: docs/drift.md has the rates measured. Memory is constant in the number of batches.

    Args:
      state: the running statistics: linen's variables, an nnx model, or as `jaxbn.layers.find`.
      batches: of each batch path → moments of its rows: `(incoming(model.apply)(variables, x)[1]
        for x in data)`. Rows should be independent: not frames of one video.
      reference: the `Drift` of clean data, which then takes the place of the running statistics:
        finer, for these are of augmented data and of a network that was still learning.
      false_alarm: chance of an alarm where nothing drifted, for the whole call.
      tolerance: shift of the mean, in sd, that is no drift; None: 0.1, or 0.05 with a reference.
      epsilon: the layers'.

    Raises:
      ValueError: no batches, fewer than 2 rows, or what does not fit the state.

    >>> import jax, jax.numpy as jnp, jaxbn
    >>> state = {"bn": jaxbn.State(jnp.zeros(8), jnp.ones(8), None)}
    >>> x = jax.random.normal(jax.random.key(0), (2, 256, 8)) + jnp.array([0.0, 0.5])[:, None, None]
    >>> rows = [{"bn": jax.vmap(jaxbn.moments, out_axes=-1)(v)} for v in x]
    >>> jaxbn.health.drift(state, rows[:1]).alarm, jaxbn.health.drift(state, rows[1:]).alarm
    (False, True)
    """
    total: dict[str, Seen] = {}
    for rows in batches:
        total = merge(total, seen(state, rows, epsilon=epsilon))
    return decide(total, reference=reference, false_alarm=false_alarm, tolerance=tolerance)


def decide(
    total: Mapping[str, Seen],
    *,
    reference: Drift | None = None,
    false_alarm: float = 1e-3,
    tolerance: float | None = None,
) -> Drift:
    """The verdict of `drift` on what has been seen so far, for a stream that goes on.

    Args:
      total: of `seen`, put together by `merge`.
      reference: as in `drift`.
      false_alarm: as in `drift`.
      tolerance: as in `drift`.

    Raises:
      ValueError: nothing was seen, or fewer than 2 rows, or the reference is of other layers.

    >>> import jax, jax.numpy as jnp, jaxbn
    >>> state = {"bn": jaxbn.State(jnp.zeros(8), jnp.ones(8), None)}
    >>> total = {}
    >>> for key in jax.random.split(jax.random.key(0), 4):
    ...     rows = jax.vmap(jaxbn.moments, out_axes=-1)(jax.random.normal(key, (64, 8)))
    ...     total = jaxbn.health.merge(total, jaxbn.health.seen(state, {"bn": rows}))
    >>> jaxbn.health.decide(total).layers[0].rows
    256.0
    """
    from scipy.special import stdtrit  # type: ignore[import-untyped]  # jax depends on scipy

    _check(total, reference, false_alarm)
    if tolerance is None:
        tolerance = FROM_STATE if reference is None else FROM_REFERENCE
    reports, findings = [], []
    for path, own in total.items():
        other = None if reference is None else reference.seen[path]
        rows = float(np.min(_rows(own)))
        if rows < 2:
            raise ValueError(
                f"drift: {rows:g} rows came to layer {path!r}, expected 2 at least, better 128: "
                f"how much they differ is what the test is made of; merge more batches."
            )
        t = float(stdtrit(rows - 1, 1 - false_alarm / (4 * len(total))))
        shift, error = _difference(own, other, "shift")
        spread, spread_error = _difference(own, other, "spread")
        beyond = np.stack(
            [
                np.maximum(np.abs(shift) - tolerance, 0) / error,
                np.maximum(np.abs(spread) - 2 * tolerance, 0) / spread_error,
            ]
        )
        figure = float(np.sqrt((beyond**2).mean(1)).max())
        report = LayerDrift(
            path,
            not figure <= t,
            figure,
            t,
            float(np.sqrt((shift**2).mean())),
            float(np.sqrt((spread**2).mean())),
            rows,
            float(np.median(1 / error**2)),
        )
        reports.append(report)
        if report.alarm:
            channels = tuple(map(int, np.nonzero(~(beyond <= t).all(0))[0]))
            findings.append(Finding(path, "drift", WARNING, figure, t, channels, REMEDY))
    return Drift(bool(findings), tuple(reports), tuple(findings), dict(total))


REMEDY = (
    "look at the data; if it is here to stay, jaxbn.recalibrate(apply, variables, batches) on it"
)


def _more_rows(a: Moments, b: Moments) -> Moments:
    """Of a layer that is called twice, the rows of both calls."""
    return jax.tree.map(lambda v, w: jnp.concatenate([v, w], -1), a, b)


def _seen(state: State, rows: Moments, epsilon: float) -> Seen:
    n = rows.count
    weight = n.reshape(*n.shape[:-1], *(1,) * (rows.mean.ndim - n.ndim), n.shape[-1])
    weight = jnp.broadcast_to(weight.astype(rows.var.dtype), rows.mean.shape)
    var = state.var[..., None].astype(rows.var.dtype)
    sd = jnp.sqrt(var + epsilon)
    off = rows.mean - state.mean[..., None].astype(rows.mean.dtype)
    shift, spread = off / sd.astype(off.dtype), (rows.var + jnp.abs(off) ** 2 - var) / sd**2
    return Seen((weight**2).sum(-1), _over_rows(weight, shift.real), _over_rows(weight, spread))


def _over_rows(weight: jax.Array, v: jax.Array) -> Moments:
    total = weight.sum(-1)
    share = weight / jnp.where(total > 0, total, 1)[..., None]
    mean = (share * v).sum(-1)
    return Moments(total, mean, (share * (v - mean[..., None]) ** 2).sum(-1))


def _rows(seen: Seen) -> np.ndarray:
    """Rows of equal weight that an average over these is worth: (Σ w)² / Σ w² (Kish 1965)."""
    weight2 = np.asarray(seen.weight2, np.float64).ravel()
    total = np.asarray(seen.shift.count, np.float64).ravel()
    return total**2 / np.where(weight2 > 0, weight2, 1)


def _difference(own: Seen, other: Seen | None, name: str) -> tuple[np.ndarray, np.ndarray]:
    """What is seen beside what should be, and the standard error, per channel."""
    mean: Any = 0.0
    squared: Any = 0.0
    for sign, stream in ((1, own), (-1, other)):
        if stream is not None:
            of_rows, rows = getattr(stream, name), _rows(stream)
            mean = mean + sign * np.asarray(of_rows.mean, np.float64).ravel()
            squared = squared + np.asarray(of_rows.var, np.float64).ravel() / (rows - 1)
    # Of a channel that never changes the error is 0: then whatever is beyond is beyond.
    return mean, np.sqrt(np.maximum(squared, 1e-12))


def _check_fits(held: Mapping[str, layers.Layer], path: str, rows: Moments) -> None:
    if path not in held:
        raise ValueError(
            f"drift: moments came of a layer {path!r}, but the state has {sorted(held)}; pass what "
            f"health.incoming(model.apply)(variables, x)[1] gives for these variables."
        )
    shape, features = np.shape(rows.mean), np.shape(held[path].state.mean)
    if shape[:-1] != features:
        raise ValueError(
            f"drift: moments of {path!r} have shape {shape}, expected {(*features, 'rows')}: "
            f"those of each row, as health.incoming(model.apply) gives them, or "
            f"jax.vmap(jaxbn.moments, out_axes=-1)(x)."
        )


def _check(total: Mapping[str, Seen], reference: Drift | None, false_alarm: float) -> None:
    if not 0 < false_alarm <= 0.2:  # beyond, the bound on sums of squares does not hold
        raise ValueError(
            f"drift: false_alarm={false_alarm!r}, expected the chance of an alarm where nothing "
            f"drifted, above 0 and at most 0.2; write false_alarm=0.001."
        )
    if not total:
        raise ValueError(
            "drift: no batches, or a model without batch norm; expected of each batch what "
            "health.incoming(model.apply)(variables, x)[1] gives."
        )
    if reference is not None and (missing := sorted(set(total) - set(reference.seen))):
        raise ValueError(
            f"drift: the reference has no layer {missing[0]!r}, it has {sorted(reference.seen)}; "
            f"make it by health.drift(variables, clean_batches) of the same model."
        )
