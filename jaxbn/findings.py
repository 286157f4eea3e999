"""What a finding is, the thresholds of all of them, and distances between statistics.

Everything here is NumPy float64 on the host: a checkpoint is small, and its own dtype is one of
the things in doubt.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxbn.state import Moments

ERROR, WARNING = "error", "warning"  # eval is wrong; accuracy or capacity is lost
RECALIBRATE = "jaxbn.recalibrate(apply, variables, batches)"


class Finding(NamedTuple):
    """One thing that is wrong with one layer."""

    layer: str  # its path, as in `jaxbn.layers.find`
    kind: str  # one of KINDS
    severity: str  # "error": eval is wrong; "warning": accuracy or capacity is lost
    figure: float  # of the worst channel, or of the layer
    threshold: float  # the bound that the figure has passed
    channels: tuple[int, ...]  # concerned, counted in C order; () for the layer as a whole
    remedy: str  # one line


KINDS = {  # worst first: what each figure is
    "not_finite": "number of NaN and infinite values the layer holds",
    "negative_variance": "smallest running variance",
    "never_updated": "updates so far",
    "hardly_updated": "share of the initial mean 0 and var 1 left in the statistics",
    "stale": "symmetric KL divergence of running and batch statistics, upper quartile of channels",
    "replicas_differ": "largest distance of a replica's mean or sd from those of another, in sd",
    "narrow_statistics": "eps of the dtype that mean and var are stored in",
    "large_mean": "largest |mean| / sd",
    "exploding": "largest |scale| or |bias|",
    "dead": "smallest sd of the normalized x, or smallest |scale| beside the layer's rms",
    "few_values": "values per channel behind the batch's statistics",
    # Of `jaxbn.health.gap`:
    "padding": "share of the cells that are padding",
    "unbiased": "by how much eval's sd is the larger for n / (n - 1)",
    "gap": "RMS of train minus eval output, by the sd of train's",
    # Of `jaxbn.health.drift`:
    "drift": "shift beyond the tolerance, in standard errors",
}


class Limits(NamedTuple):
    """The thresholds of all findings. Where each comes from: docs/health.md."""

    divergence: float = 0.25  # a shift by sd / 2, or variances apart by a factor 2
    # · (1 + 5 / channels) / rows, added: 4 times chi²_2's upper quartile, and more where few
    # channels share in it. Of batches of 16 rows with Laplace's tails 3 in 10,000 pass it.
    divergence_noise: float = 11.0
    initial_share: float = 0.05  # momentum**count: three time constants, 3 / (1 - momentum) updates
    values: int = 16  # below, the batch's sd is off by more than 18 %: 1 / sqrt(2 (n - 1))
    dead_sd: float = 0.1  # of the normalized x, sqrt(var / (var + epsilon)): var of epsilon / 99
    dead_scale: float = 1e-5  # of the rms of the layer's scales
    rounding: float = 0.1  # sd of x that one rounding of x, or of its variance, may be off
    exploding: float = 100.0  # float16 overflows at 655 sd, which 430,000 values can reach
    replica: float = 0.0  # replicas are copies: any difference
    gap: float = (
        0.25  # relative RMS between train and eval: the divergence above in a layer's output
    )
    gap_noise: float = 6.0  # / rows, added to the square: 4 times the 3 / 2 of Gaussian rows
    bessel: float = 0.05  # sqrt(n / (n - 1)) - 1: fewer than 11 values


class Distance(NamedTuple):
    """How far running statistics are from those of a batch, per channel [C], float64."""

    divergence: np.ndarray  # symmetric KL of the two Gaussians
    shift: np.ndarray  # (running mean - batch mean) / batch sd
    log_ratio: np.ndarray  # log(running var / batch var)


class Setting(NamedTuple):
    """How a layer is used, as far as it is known."""

    momentum: float | None = None  # None: unknown, or the cumulative average
    epsilon: float = 1e-5
    dtype: Any = np.float32  # of x
    exact: bool = False  # the variance is computed as jaxbn does, right at any mean
    rows: int | None = None  # independent rows (images) behind the moments; None: one a value


def setting_of(layer: Any, given: Setting) -> Setting:
    """What a Flax module says of itself; the rest as given.

    >>> import jaxbn
    >>> from jaxbn import findings
    >>> findings.setting_of(jaxbn.linen.BatchNorm(momentum=0.9), findings.Setting()).momentum
    0.9
    """
    return given._replace(
        momentum=layer.momentum,
        epsilon=layer.epsilon,
        dtype=given.dtype if layer.dtype is None else layer.dtype,
        exact=hasattr(layer, "unbiased"),  # a module of this library: Flax's have no such option
    )


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


def worst_first(findings: Sequence[Finding]) -> list[Finding]:
    """Errors before warnings, in the order of KINDS, the further past its threshold the earlier.

    >>> from jaxbn import health
    >>> a = health.Finding("a", "dead", "warning", 0.0, 0.1, (0,), "")
    >>> b = health.Finding("b", "never_updated", "error", 0.0, 0.0, (), "")
    >>> [finding.layer for finding in health.worst_first([a, b])]
    ['b', 'a']
    """
    order = list(KINDS)

    def key(f: Finding) -> tuple[Any, ...]:
        return f.severity != ERROR, order.index(f.kind), -abs(f.figure - f.threshold)

    return sorted(findings, key=key)


def wide(v: Any) -> np.ndarray:
    """V on the host, in float64 or complex128."""
    v = np.asarray(v)
    return v.astype(np.complex128 if np.iscomplexobj(v) else np.float64)
