"""What a finding is, and the thresholds of all findings.

All of `jaxbn.health` computes in NumPy float64 on the host. A checkpoint is small, and its own
dtype may be what is wrong with it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxbn._text import a_kind

ERROR, WARNING = "error", "warning"  # eval is wrong; accuracy or capacity is lost
RECALIBRATE = "jaxbn.recalibrate(apply, variables, batches)"


class Finding(NamedTuple):
    """One thing that is wrong with one layer.

    >>> import jax.numpy as jnp, jaxbn
    >>> stats = {"bn": {"mean": jnp.array([500.0, 1.0]), "var": jnp.ones(2)}}
    >>> (finding,) = jaxbn.health.check(stats, dtype=jnp.bfloat16)
    >>> finding.kind, finding.severity, finding.channels
    ('large_mean', 'warning', (0,))
    """

    layer: str  # the path, as in `jaxbn.layers.find`
    kind: str  # a key of KINDS
    severity: str  # "error": eval is wrong; "warning": accuracy or capacity is lost
    figure: float  # of the worst channel, or of the layer
    threshold: float  # the limit that the figure is beyond
    channels: tuple[int, ...]  # the bad channels, counted in C order; () for the whole layer
    remedy: str  # one line


KINDS = {  # kind → what its figure is; the worst kinds first
    "not_finite": "number of NaN and infinite values",
    "negative_variance": "smallest running variance",
    "no_statistics": "arrays mean and var that the layer holds",
    "never_updated": "updates that were learned",
    "hardly_updated": "share of the initial mean 0 and var 1 left in the statistics",
    "stale": "symmetric KL divergence of running and batch statistics, upper quartile of channels",
    "replicas_differ": "largest distance of a replica's mean or sd from those of another, in sd",
    "narrow_statistics": "eps of the dtype that mean and var are stored in",
    "large_mean": "largest |mean| / sd",
    "exploding": "largest |scale| or |bias|",
    "dead": "smallest sd of the normalized x, or smallest |scale| beside the layer's rms",
    "few_values": "values per channel behind the batch's statistics",
    # From `jaxbn.health.shards`:
    "skewed_shards": "RMS distance of the shards' means or sds over what chance gives",
    "repeated_shards": "RMS distance of the shards' means or sds over what chance gives",
    # From `jaxbn.health.gap`:
    "padding": "share of the cells that are padding",
    "unbiased": "excess of eval's sd over train's, which n / (n - 1) causes",
    "gap": "RMS of train output minus eval output, in sd of train's output",
    # From `jaxbn.health.drift`:
    "drift": "shift beyond the tolerance, in standard errors",
    # From `jaxbn.health.serving`, over the largest value of the result:
    "not_deterministic": "largest difference of two runs on one batch",
    "batch_dependent": "largest change of a row's result as other rows change",
    "row_order": "largest change of a row's result as the rows change places",
    "batch_of_one": "largest change of a row's result as the row is alone",
    # From `jaxbn.health.lint`:
    "train_in_inference": "share of the batch in the statistics that x is normalized by",
    "one_value": "values per channel that the batch's statistics are of",
    "eval_in_training": "share of the batch in the statistics that x is normalized by",
    "multiplied_by_zero": "number of channels that no result will ever depend on",
    "dropout_before_norm": "variance in training over variance in eval, of an x with mean 0",
    "late_cast": "operations on integers before the cast",
    "lost_bias": "number of biases that the mean takes away",
    "relu_before_norm": "share of an x with median 0 that relu makes 0",
}


class Limits(NamedTuple):
    """The thresholds of all findings. docs/health.md says where each comes from.

    >>> import jax.numpy as jnp, jaxbn
    >>> from jaxbn import health
    >>> stats = {"bn": {"mean": jnp.ones(1), "var": jnp.array([1e-5])}}
    >>> [finding.kind for finding in health.check(stats, epsilon=1e-3)]
    ['dead']
    >>> health.check(stats, epsilon=1e-3, limits=health.Limits()._replace(dead_sd=0.01))
    []
    """

    divergence: float = 0.25  # a shift of the mean by sd / 2, or variances apart by a factor 2
    # Times (1 + 5 / channels) / rows, added to `divergence`. 11 is 4 times the upper quartile of
    # chi² with 2 degrees of freedom; the factor allows for few channels. Of sound batches of 16
    # rows with the long tails of Laplace's distribution, 4 in 10,000 are beyond.
    divergence_noise: float = 11.0
    # As momentum**count: three time constants, or 3 / (1 - momentum) updates.
    initial_share: float = 0.05
    values: int = 16  # below, the batch's sd is off by 18 % or more: docs/advise.md
    dead_sd: float = 0.1  # of the normalized x, sqrt(var / (var + epsilon)): var is epsilon / 99
    dead_scale: float = 1e-5  # times the rms of the layer's scales
    rounding: float = 0.1  # error of x, in sd, by one rounding of x or of its variance
    exploding: float = 100.0  # float16 overflows at 655 sd, which one in 430,000 values can reach
    replica: float = 0.0  # replicas are copies, so they must not differ at all
    gap: float = 0.25  # relative RMS between train and eval output, in size like `divergence`
    gap_noise: float = 6.0  # divided by rows, added to gap²: 4 times the 3 / 2 of Gaussian rows
    shards: float = 1e-5  # chance that a layer of sound shards is called skewed, at one look
    bessel: float = 0.05  # sqrt(n / (n - 1)) - 1, which 10 values or fewer exceed


def check_limits(call: str, limits: Any) -> None:
    """Raises unless these are `Limits`.

    >>> from jaxbn.health import _findings
    >>> _findings.check_limits("gap", 0.5)
    Traceback (most recent call last):
        ...
    TypeError: gap: limits is a float, expected health.Limits; write limits=health.Limits(gap=0.5).
    """
    if not isinstance(limits, Limits):
        raise TypeError(
            f"{call}: limits is {a_kind(limits)}, expected health.Limits; write "
            f"limits=health.Limits(gap=0.5)."
        )


class Setting(NamedTuple):
    """How a layer is used, as far as that is known.

    >>> import numpy as np, jaxbn
    >>> from jaxbn import health
    >>> batch = jaxbn.Moments(64 * 100, np.zeros(10), np.ones(10))  # of 64 images of 100 pixels
    >>> running = jaxbn.State(np.zeros(10), np.ones(10), None)
    >>> values, images = health.Setting(), health.Setting(rows=64)
    >>> [round(health.divergence(running, batch, s)[1], 3) for s in (values, images)]  # the limits
    [0.253, 0.508]
    """

    momentum: float | None = None  # None: unknown, or the cumulative average
    epsilon: float = 1e-5
    dtype: Any = np.float32  # of x
    exact: bool = False  # whether the variance is right at any mean, as jaxbn's is
    rows: int | None = None  # independent rows (images) behind the moments; None: each value is one


def setting_of(layer: Any, given: Setting) -> Setting:
    """The setting that a Flax module says it has; what it does not say is as given.

    >>> import jaxbn
    >>> from jaxbn.health import _findings
    >>> _findings.setting_of(jaxbn.linen.BatchNorm(momentum=0.9), _findings.Setting()).momentum
    0.9
    """
    return given._replace(
        momentum=layer.momentum,
        epsilon=layer.epsilon,
        dtype=given.dtype if layer.dtype is None else layer.dtype,
        exact=hasattr(layer, "unbiased"),  # an option of this library's modules; Flax's have none
    )


def worst_first(findings: Sequence[Finding]) -> list[Finding]:
    """The findings in order: errors first, then by the order of KINDS, then by size.

    Size is how far the figure is beyond its threshold. Use it when you put findings of several
    calls together.

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
