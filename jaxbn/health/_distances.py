"""How far statistics are apart, and what rounding and few rows explain."""

import math
from typing import Any, NamedTuple

import numpy as np

from jaxbn._op.state import Moments
from jaxbn.health._findings import Limits, Setting


class Distance(NamedTuple):
    """How far running statistics are from those of a batch, per channel [C], float64."""

    divergence: np.ndarray  # symmetric KL of the two Gaussians
    shift: np.ndarray  # (running mean - batch mean) / batch sd
    log_ratio: np.ndarray  # log(running var / batch var)


def distance(running: Any, batch: Moments, epsilon: float = 1e-5) -> Distance:
    """Equals, with p the batch's and q the running Gaussian of each channel::

        divergence = KL(p‖q) + KL(q‖p) = (v_p/v_q + v_q/v_p + d²/v_p + d²/v_q) / 2 - 1

    with `v = var + epsilon`, which is what x is divided by, and `d` the difference of the means.

    Args:
      running: anything with `mean` and `var` [C]: a `State`, or `Moments`.
      batch: the moments it is held against.
      epsilon: the layer's.

    >>> import numpy as np, jaxbn
    >>> from jaxbn import health
    >>> running = jaxbn.State(np.zeros(2), np.array([1.0, 2.0]), None)
    >>> d = health.distance(running, jaxbn.Moments(64, np.array([0.5, 0.0]), np.ones(2)))
    >>> d.divergence.round(3).tolist(), d.shift.round(3).tolist(), d.log_ratio.round(3).tolist()
    ([0.25, 0.25], [-0.5, 0.0], [0.0, 0.693])
    """
    v, w = wide(batch.var) + epsilon, wide(running.var) + epsilon
    with np.errstate(all="ignore"):  # of what is not finite, or negative
        d = np.abs(difference := wide(running.mean) - wide(batch.mean))
        divergence = ((v - w) ** 2 / (v * w) + d**2 / v + d**2 / w) / 2
        return Distance(divergence, difference / np.sqrt(v), np.log(w / v))


def divergence(
    running: Any,
    batch: Moments,
    setting: Setting = Setting(),  # noqa: B008
    limits: Limits = Limits(),  # noqa: B008
) -> tuple[float, float, np.ndarray]:
    """Upper quartile of the channels' divergences, what it may be for so many rows, and all [C].

    Of one row, or of fewer values than `limits.values`, it may be anything: their variance is no
    statistic, and may be near 0. A quartile and not the mean, so that no single channel decides:
    one that is rarely active may be anywhere.

    Args:
      running: anything with `mean` and `var` [C].
      batch: the moments it is held against.
      setting: how the layer is used: epsilon and rows.
      limits: the thresholds.

    >>> import numpy as np, jaxbn
    >>> from jaxbn import health
    >>> batch = jaxbn.Moments(110, np.zeros(10), np.ones(10))
    >>> figure, limit, _ = health.divergence(jaxbn.State(np.ones(10), np.ones(10), None), batch)
    >>> round(figure, 3), round(limit, 3)
    (1.0, 0.4)
    """
    apart = distance(running, batch, setting.epsilon).divergence
    rows = rows_of(batch, setting)
    noise = limits.divergence_noise * (1 + 5 / max(apart.size, 1)) / rows
    enough = rows > 1 and values_of(batch) >= limits.values
    limit = limits.divergence + noise if enough else math.inf
    return float(np.quantile(apart, 0.75)) if apart.size else 0.0, limit, apart


def values_of(moments: Moments) -> float:
    """Values behind the moments of a channel, of that which has fewest."""
    return float(np.min(wide(moments.count), initial=np.inf))


def rows_of(moments: Moments, setting: Setting) -> float:
    """Independent rows behind the moments, at least 1."""
    n = values_of(moments)
    return max(1.0, n if setting.rows is None else min(n, setting.rows))


def initial_share(running: Any, batch: Moments, epsilon: float = 1e-5) -> float:
    """Equals the s of least squares in `running = s * initial + (1 - s) * batch`.

    The initial statistics are mean 0 and var 1; channels are weighed by the batch's sd. Updates
    of one momentum leave `s = momentum**count`.

    Args:
      running: anything with `mean` and `var` [C].
      batch: the moments of data as in training.
      epsilon: the layer's.

    >>> import numpy as np, jaxbn
    >>> from jaxbn import health
    >>> batch = jaxbn.Moments(64, np.array([3.0, -2.0]), np.array([4.0, 0.5]))
    >>> running = jaxbn.State(0.4 * batch.mean, 0.6 + 0.4 * batch.var, None)
    >>> round(health.initial_share(running, batch), 6)
    0.6
    """
    v = wide(batch.var) + epsilon
    to_batch = np.stack([wide(batch.mean) / np.sqrt(v), (wide(batch.var) - 1) / v])
    gone = np.stack([wide(running.mean) / np.sqrt(v), (wide(running.var) - 1) / v])
    whole = np.vdot(to_batch, to_batch).real
    return float(1 - np.vdot(to_batch, gone).real / whole) if whole else 0.0


def wide(v: Any) -> np.ndarray:
    """V on the host, in float64 or complex128."""
    v = np.asarray(v)
    return v.astype(np.complex128 if np.iscomplexobj(v) else np.float64)
