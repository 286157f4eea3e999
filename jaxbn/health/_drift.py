"""Does served data still look as the running statistics say? A test on a stream of rows."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxbn._op.state import Moments
from jaxbn.health._findings import WARNING, Finding
from jaxbn.health._rows import Seen, merge, rows_in, seen

# What clean data may be off by, in sd. Against running statistics, which are of augmented and of
# earlier data, and against a reference of clean data, whose own noise is accounted for.
FROM_STATE, FROM_REFERENCE = 0.1, 0.05


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


def drift(
    state: Any,
    batches: Mapping[str, Moments] | Iterable[Mapping[str, Moments]],
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
        for x in data)`, or that of one batch. Rows should be independent: not frames of one
        video.
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
    for rows in [batches] if isinstance(batches, Mapping) else batches:
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
        rows = float(np.min(rows_in(own)))
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


def _difference(own: Seen, other: Seen | None, name: str) -> tuple[np.ndarray, np.ndarray]:
    """What is seen beside what should be, and the standard error, per channel."""
    mean: Any = 0.0
    squared: Any = 0.0
    for sign, stream in ((1, own), (-1, other)):
        if stream is not None:
            of_rows, rows = getattr(stream, name), rows_in(stream)
            mean = mean + sign * np.asarray(of_rows.mean, np.float64).ravel()
            squared = squared + np.asarray(of_rows.var, np.float64).ravel() / (rows - 1)
    # Of a channel that never changes the error is 0: then whatever is beyond is beyond.
    return mean, np.sqrt(np.maximum(squared, 1e-12))


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
