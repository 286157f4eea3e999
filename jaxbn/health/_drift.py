"""Does served data still have the moments that the running statistics say? A statistical test."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxbn._misuse import check_batches, check_by_path, takes
from jaxbn._op.arguments.values import check_real
from jaxbn._op.state import Moments
from jaxbn._text import a_kind, aligned
from jaxbn.health._findings import WARNING, Finding
from jaxbn.health._rows import Seen, merge, rows_in, seen

# How far clean data may be off, in sd. Running statistics come from augmented data and from earlier
# weights. A reference of clean data does not, and the test accounts for its noise.
FROM_STATE, FROM_REFERENCE = 0.1, 0.05


class LayerDrift(NamedTuple):
    """The verdict on one layer.

    >>> from jaxbn import health
    >>> layer = health.LayerDrift("bn", True, 9.0, 3.9, shift=0.5, spread=0.1, rows=256, values=300)
    >>> layer.alarm == (layer.figure > layer.threshold)
    True
    """

    layer: str  # the path
    alarm: bool
    figure: float  # drift beyond the tolerance, in standard errors: RMS over channels
    threshold: float
    shift: float  # of the mean, in sd: RMS over channels
    spread: float  # change of the variance, as a share of it: RMS over channels
    rows: float  # number of independent rows
    values: float  # how many independent values of a channel these rows are worth: median


class Drift(NamedTuple):
    """What `drift` returns: whether the stream has drifted, and the verdict on each layer.

    >>> import jax, jax.numpy as jnp, jaxbn
    >>> state = {"bn": jaxbn.State(jnp.zeros(8), jnp.ones(8), None)}
    >>> x = jax.random.normal(jax.random.key(0), (256, 8)) + 1.0
    >>> rows = {"bn": jax.vmap(jaxbn.moments, out_axes=-1)(x)}
    >>> verdict = jaxbn.health.drift(state, rows)
    >>> verdict.alarm, [finding.kind for finding in verdict.findings]
    (True, ['drift'])
    """

    alarm: bool  # whether any layer alarms
    layers: tuple[LayerDrift, ...]  # in the model's order
    findings: tuple[Finding, ...]  # a finding "drift" for each alarm
    seen: dict[str, Seen]  # to merge with more data, or to use as reference for later streams

    def __str__(self) -> str:
        rows = [("layer", "verdict", "figure", "threshold", "shift", "spread", "rows")]
        rows += [
            (
                of.layer,
                "drift" if of.alarm else "-",
                *(f"{of.figure:.3g}", f"{of.threshold:.3g}"),
                *(f"{of.shift:.2g}", f"{of.spread:.2g}", f"{of.rows:.0f}"),
            )
            for of in self.layers
        ]
        return "\n".join(aligned(rows, right=5))


WRITE = "drift(variables, (health.incoming(model.apply)(variables, x)[1] for x in data))"


@takes("running statistics, and the moments of each batch", WRITE)
def drift(
    state: Any,
    batches: Mapping[str, Moments] | Iterable[Mapping[str, Moments]],
    *,
    reference: Drift | None = None,
    false_alarm: float = 1e-3,
    tolerance: float | None = None,
    epsilon: float = 1e-5,
) -> Drift:
    """Whether the data that reaches the batch norm layers has left their running statistics.

    Use it on a served model, to learn that its inputs have changed. The test computes for each
    layer, from the means of its channels::

        figure = sqrt(mean over channels of (max(|shift| - tolerance, 0) / standard error)²)

    `shift` is in running sd, and its standard error comes from the spread between rows. The
    variances are tested in the same way, with changes in units of sd² and twice the tolerance. A
    layer alarms if a figure exceeds t, Student's two-sided quantile at false_alarm / (2 · layers).

    However channels depend on one another, a mean of squared Gaussians exceeds t² at most as often
    as one squared Gaussian does (Székely & Bakirov 2003). So a stream without drift beyond the
    tolerance raises an alarm with a chance of at most `false_alarm`, if there are enough rows for
    their average to be Gaussian. docs/drift.md has measured rates. Memory does not grow with the
    number of batches.

    Args:
      state: the running statistics: linen's variables, an nnx model, or any tree that
        `jaxbn.layers.find` reads.
      batches: for each batch, path → moments of its rows [C, rows]:
        `(incoming(model.apply)(variables, x)[1] for x in data)`, or the moments of one batch. Rows
        should be independent, unlike the frames of one video. Rows of domain d of a layer with
        domains are compared with the statistics `v[d]` or `v[d : d + 1]`.
      reference: the `Drift` of clean data, to compare with in place of the running statistics. The
        test then finds smaller drift: running statistics come from augmented data and from a
        network that was still learning.
      false_alarm: the chance of an alarm without drift, for the whole call.
      tolerance: the shift of the mean, in sd, that does not count as drift; None: 0.1, or 0.05 with
        a reference.
      epsilon: of the layers.

    Returns:
      A `Drift`.

    Raises:
      TypeError: a batch is not a dict, path → `Moments`; reference is no `Drift`; or an option is
        no number.
      ValueError: there are no batches or fewer than 2 rows, the moments do not fit the state, or an
        option is out of its range.

    >>> import jax, jax.numpy as jnp, jaxbn
    >>> state = {"bn": jaxbn.State(jnp.zeros(8), jnp.ones(8), None)}
    >>> x = jax.random.normal(jax.random.key(0), (2, 256, 8)) + jnp.array([0.0, 0.5])[:, None, None]
    >>> rows = [{"bn": jax.vmap(jaxbn.moments, out_axes=-1)(v)} for v in x]
    >>> jaxbn.health.drift(state, rows[:1]).alarm, jaxbn.health.drift(state, rows[1:]).alarm
    (False, True)
    """
    _check_options(reference, false_alarm, tolerance)
    if not isinstance(batches, Mapping):
        check_batches("drift", batches, WRITE)
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
    """The verdict of `drift` on the rows seen so far.

    Use it for a stream that goes on: add each batch by `merge`, and decide from time to time.

    Args:
      total: path → `Seen`, from `seen` and `merge`.
      reference: as in `drift`.
      false_alarm: as in `drift`.
      tolerance: as in `drift`.

    Returns:
      A `Drift`.

    Raises:
      TypeError: total is not a dict, path → `Seen`.
      ValueError: nothing was seen, fewer than 2 rows were, or the reference lacks a layer.

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

    check_by_path("decide", total, (Seen,), "health.decide(total)", "health.merge")
    _check_options(reference, false_alarm, tolerance)
    _check_stream(total, reference)
    if tolerance is None:
        tolerance = FROM_STATE if reference is None else FROM_REFERENCE
    reports, findings = [], []
    for path, own in total.items():
        other = None if reference is None else reference.seen[path]
        rows = float(np.min(rows_in(own)))
        if rows < 2:
            raise ValueError(
                f"drift: {rows:g} rows came to layer {path!r}, expected 2 at least and better 128, "
                f"because the test needs the spread between rows; merge more batches."
            )
        t = float(stdtrit(rows - 1, 1 - false_alarm / (4 * len(total))))
        shift, error = _shift_and_error(own, other, "shift")
        spread, spread_error = _shift_and_error(own, other, "spread")
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


def _shift_and_error(own: Seen, other: Seen | None, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The distance of `own` from the state, or from `other`, and its standard error, [C] each."""
    mean: Any = 0.0
    squared: Any = 0.0
    for sign, stream in ((1, own), (-1, other)):
        if stream is not None:
            of_rows, rows = getattr(stream, name), rows_in(stream)
            mean = mean + sign * np.asarray(of_rows.mean, np.float64).ravel()
            squared = squared + np.asarray(of_rows.var, np.float64).ravel() / (rows - 1)
    # If a channel never changes, its standard error is 0. With the floor of 1e-12 any shift beyond
    # the tolerance is an alarm, and none is 0 / 0.
    return mean, np.sqrt(np.maximum(squared, 1e-12))


def _check_options(reference: Any, false_alarm: Any, tolerance: Any) -> None:
    if not isinstance(reference, Drift | None):
        raise TypeError(
            f"drift: reference is {a_kind(reference)}, expected the Drift of clean data; write "
            f"{REFERENCE}."
        )
    # The bound on sums of squares holds for no larger chance.
    chance = "the chance of an alarm without drift, above 0 and at most 0.2"
    check_real("drift", "false_alarm", false_alarm, lambda v: 0 < v <= 0.2, chance, "0.001")
    if tolerance is not None:
        least = "the shift in sd that is no drift, a finite number of at least 0"
        check_real("drift", "tolerance", tolerance, lambda v: 0 <= v < math.inf, least, "0.1")


REFERENCE = "reference=health.drift(variables, clean_batches)"


def _check_stream(total: Mapping[str, Seen], reference: Drift | None) -> None:
    if not total:
        raise ValueError(
            "drift: no batches, or a model without batch norm; expected the result of "
            "health.incoming(model.apply)(variables, x)[1] for each batch."
        )
    if reference is not None and (missing := sorted(set(total) - set(reference.seen))):
        raise ValueError(
            f"drift: the reference has no layer {missing[0]!r}, it has {sorted(reference.seen)}; "
            f"write {REFERENCE}, with the same model."
        )
