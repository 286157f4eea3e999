"""How far running statistics are from those of a batch, and how far chance may put them."""

import math
from typing import Any, NamedTuple

import numpy as np

from jaxbn._op.arguments.values import check_numbers
from jaxbn._op.state import Moments
from jaxbn.health._findings import Limits, Setting


class Distance(NamedTuple):
    """How far running statistics are from those of a batch, per channel [C], float64.

    >>> import numpy as np, jaxbn
    >>> from jaxbn import health
    >>> running = jaxbn.State(np.zeros(1), np.ones(1), None)
    >>> health.distance(running, jaxbn.Moments(64, np.ones(1), np.ones(1)), 0.0)
    Distance(divergence=array([1.]), shift=array([-1.]), log_ratio=array([0.]))
    """

    divergence: np.ndarray  # symmetric KL divergence of the two Gaussians, in nats
    shift: np.ndarray  # (running mean - batch mean) / batch sd
    log_ratio: np.ndarray  # log(running var / batch var)


def distance(running: Any, batch: Moments, epsilon: float = 1e-5) -> Distance:
    """Equals, with the batch's Gaussian p and the running Gaussian q of each channel::

        divergence = KL(p‖q) + KL(q‖p) = (v_p/v_q + v_q/v_p + d²/v_p + d²/v_q) / 2 - 1

    v is var + epsilon, which x is divided by, and d is the difference of the means. Use it for your
    own measure of staleness; `divergence` sums it up for a layer.

    Args:
      running: anything with `mean` and `var` [C]: a `State`, or `Moments`.
      batch: the moments to compare with, [C].
      epsilon: of the layer.

    Returns:
      A `Distance`, NaN or infinite where a variance is negative or a value is not finite.

    >>> import numpy as np, jaxbn
    >>> from jaxbn import health
    >>> running = jaxbn.State(np.zeros(2), np.array([1.0, 2.0]), None)
    >>> d = health.distance(running, jaxbn.Moments(64, np.array([0.5, 0.0]), np.ones(2)))
    >>> d.divergence.round(3).tolist(), d.shift.round(3).tolist(), d.log_ratio.round(3).tolist()
    ([0.25, 0.25], [-0.5, 0.0], [0.0, 0.693])
    """
    check_numbers("distance", None, epsilon)
    v, w = in_double(batch.var) + epsilon, in_double(running.var) + epsilon
    with np.errstate(all="ignore"):  # values may be negative or not finite
        d = np.abs(difference := in_double(running.mean) - in_double(batch.mean))
        divergence = ((v - w) ** 2 / (v * w) + d**2 / v + d**2 / w) / 2
        return Distance(divergence, difference / np.sqrt(v), np.log(w / v))


def divergence(
    running: Any,
    batch: Moments,
    setting: Setting = Setting(),  # noqa: B008
    limits: Limits = Limits(),  # noqa: B008
) -> tuple[float, float, np.ndarray]:
    """The upper quartile of the channels' divergences, its limit, and the divergences [C].

    `check` calls statistics stale if the quartile is above the limit. The quartile is used and not
    the mean, so that a few channels cannot decide: the statistics of a channel that is rarely
    active differ much from batch to batch. The limit grows with 1 / rows. With one row, or with
    fewer than `limits.values` values, it is infinite: a variance of so few values says nothing. A
    channel without a value in the batch, as a domain without a row has, has divergence 0 and does
    not count.

    Args:
      running: anything with `mean` and `var` [C].
      batch: the moments to compare with, [C].
      setting: how the layer is used; epsilon and rows are read.
      limits: the thresholds.

    Returns:
      `(quartile, limit, divergences)`. The quartile of a layer without channels is 0.

    >>> import numpy as np, jaxbn
    >>> from jaxbn import health
    >>> batch = jaxbn.Moments(110, np.zeros(10), np.ones(10))
    >>> figure, limit, _ = health.divergence(jaxbn.State(np.ones(10), np.ones(10), None), batch)
    >>> round(figure, 3), round(limit, 3)
    (1.0, 0.4)
    """
    seen = seen_in(batch)
    apart = np.where(seen, distance(running, batch, setting.epsilon).divergence, 0)
    rows = rows_of(batch, setting)
    noise = limits.divergence_noise * (1 + 5 / max(int(seen.sum()), 1)) / rows
    enough = rows > 1 and values_of(batch) >= limits.values
    limit = limits.divergence + noise if enough else math.inf
    return float(np.quantile(apart[seen], 0.75)) if seen.any() else 0.0, limit, apart


def values_of(moments: Moments) -> float:
    """The number of values behind the moments, in the channel with the fewest but none.

    0 where no channel has a value, infinite where there is no channel.
    """
    count = in_double(moments.count)
    some = count[count > 0]
    return float(some.min(initial=np.inf)) if some.size or not count.size else 0.0


def seen_in(moments: Moments) -> np.ndarray:
    """Whether there is a value behind each mean and var; of several domains, some may lack rows."""
    count, shape = np.asarray(moments.count), np.shape(moments.mean)
    count = count.reshape(count.shape + (1,) * (len(shape) - count.ndim))
    return np.broadcast_to(count > 0, shape)


def rows_of(moments: Moments, setting: Setting) -> float:
    """The number of independent rows behind the moments, at least 1."""
    n = values_of(moments)
    return max(1.0, n if setting.rows is None else min(n, setting.rows))


def initial_share(running: Any, batch: Moments, epsilon: float = 1e-5) -> float:
    """The share of the initial statistics (mean 0, var 1) in the running statistics.

    Equals the s that fits `running = s * initial + (1 - s) * batch` best, by least squares over
    channels in units of the batch's sd. `count` updates with one momentum leave
    `s = momentum**count`. Use it to see whether a model was updated too few times.

    Args:
      running: anything with `mean` and `var` [C].
      batch: the moments of data as in training, [C].
      epsilon: of the layer.

    Returns:
      s; 0 if the batch has mean 0 and var 1 itself.

    >>> import numpy as np, jaxbn
    >>> from jaxbn import health
    >>> batch = jaxbn.Moments(64, np.array([3.0, -2.0]), np.array([4.0, 0.5]))
    >>> running = jaxbn.State(0.4 * batch.mean, 0.6 + 0.4 * batch.var, None)
    >>> round(health.initial_share(running, batch), 6)
    0.6
    """
    seen = seen_in(batch)
    (mean, var), (running_mean, running_var) = (
        (in_double(m.mean)[seen], in_double(m.var)[seen]) for m in (batch, running)
    )
    v = var + epsilon
    to_batch = np.stack([mean / np.sqrt(v), (var - 1) / v])
    gone = np.stack([running_mean / np.sqrt(v), (running_var - 1) / v])
    whole = np.vdot(to_batch, to_batch).real
    return float(1 - np.vdot(to_batch, gone).real / whole) if whole else 0.0


def relative_error(y: Any, reference: Any, of: Any = None) -> float:
    """The largest |y - reference| over the largest finite |reference|.

    Equal infinities do not differ, nor do two NaNs. Of integers and booleans the share that
    differs.

    Args:
      y: an array.
      reference: an array. If the shapes differ, or if one value alone is NaN, the error is
        infinite.
      of: the array whose largest value counts, if reference is a part of an array.

    >>> from jaxbn.health import _distances
    >>> _distances.relative_error([1.0, 2.5], [1.0, 2.0]), _distances.relative_error([1, 2], [1, 3])
    (0.25, 0.5)
    """
    y, reference = np.asarray(y), np.asarray(reference)
    if y.shape != reference.shape:
        return math.inf
    if not reference.size:
        return 0.0
    if y.dtype.kind in "biu" and reference.dtype.kind in "biu":
        return float((y != reference).mean())
    y, reference = in_double(y), in_double(reference)
    size = np.abs(reference if of is None else in_double(of))
    with np.errstate(all="ignore"):
        same = (y == reference) | (np.isnan(y) & np.isnan(reference))
        error = float(np.where(same, 0, np.abs(y - reference)).max())
    largest = float(size[np.isfinite(size)].max(initial=0))
    if error == 0:
        return 0.0
    return error / largest if largest and not math.isnan(error) else math.inf


def in_double(v: Any) -> np.ndarray:
    """Equals v as a NumPy array of float64 or complex128."""
    v = np.asarray(v)
    return v.astype(np.complex128 if np.iscomplexobj(v) else np.float64)
