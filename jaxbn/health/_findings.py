"""What a finding is, and the thresholds of all of them.

Everything here is NumPy float64 on the host: a checkpoint is small, and its own dtype is one of
the things in doubt.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

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
    # channels share in it. Of batches of 16 rows with Laplace's tails 4 in 10,000 pass it.
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
    >>> from jaxbn.health import _findings
    >>> _findings.setting_of(jaxbn.linen.BatchNorm(momentum=0.9), _findings.Setting()).momentum
    0.9
    """
    return given._replace(
        momentum=layer.momentum,
        epsilon=layer.epsilon,
        dtype=given.dtype if layer.dtype is None else layer.dtype,
        exact=hasattr(layer, "unbiased"),  # a module of this library: Flax's have no such option
    )


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
