"""What can be wrong with one batch norm layer, as data: pure functions of what the layer holds.

Everything here is NumPy float64 on the host: a checkpoint is small, and its own dtype is one of
the things in doubt.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxbn.collectives import one_row_a_device
from jaxbn.layers import Layer
from jaxbn.state import Moments, Params, State

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
    v, w = _wide(batch.var) + epsilon, _wide(running.var) + epsilon
    with np.errstate(all="ignore"):  # of what is not finite, or negative
        d = np.abs(difference := _wide(running.mean) - _wide(batch.mean))
        divergence = ((v - w) ** 2 / (v * w) + d**2 / v + d**2 / w) / 2
        return Distance(divergence, difference / np.sqrt(v), np.log(w / v))


def of_layer(
    path: str,
    layer: Layer,
    moments: Moments | None = None,
    setting: Setting = Setting(),  # noqa: B008
    limits: Limits = Limits(),  # noqa: B008
) -> list[Finding]:
    """All findings about one layer; `jaxbn.health.check` asks it of every layer.

    Args:
      path: of the layer, for the findings.
      layer: what it holds; arrays of which devices hold copies are compared.
      moments: of the x that came to it, for what only a batch can tell.
      setting: how the layer is used.
      limits: the thresholds.
    """
    copies = Layer(Params(*map(_copies, layer.params)), State(*map(_copies, layer.state)))

    def found(
        kind: str, severity: str, figure: Any, threshold: float, remedy: str, bad: Any = None
    ) -> Finding:
        where = () if bad is None else np.nonzero(bad.reshape(len(bad), -1).any(0))[0]
        channels = tuple(map(int, where))
        return Finding(path, kind, severity, float(figure), float(threshold), channels, remedy)

    # What is not finite makes every other figure void, and so do the initial values.
    if broken := _not_finite(copies, found):
        return broken
    findings = [] if moments is None else _batch(moments, setting, limits, found)
    findings += _replicas(copies, setting, limits, found)
    if new := _updates(copies.state, setting, limits, found):
        findings += new
        if new[0].kind == "never_updated":
            return findings
    elif moments is not None:
        first = State(copies.state.mean[0], copies.state.var[0], None)
        findings += _stale(first, moments, setting, limits, found)
    return findings + _values(copies, setting, limits, found)


Found = Callable[..., Finding]


def _not_finite(layer: Layer, found: Found) -> list[Finding]:
    mean, var = layer.state.mean, layer.state.var
    arrays = [v for v in (mean, var, *layer.params) if v is not None]
    bad = [~np.isfinite(v) for v in arrays]
    findings = []
    if number := sum(int(b.sum()) for b in bad):
        where = np.concatenate(
            [b.reshape(len(b), -1) for b in bad if b.shape[1:] == mean.shape[1:]]
        )
        lost = not all(b is None or np.isfinite(b).all() for b in layer.params)
        remedy = (
            "load an earlier checkpoint: scale or bias is lost"
            if lost
            else f"{RECALIBRATE}; jaxbn's BatchNorm lets no NaN of a batch into its statistics"
        )
        findings += [found("not_finite", ERROR, number, 0, remedy, where)]
    with np.errstate(invalid="ignore"):
        if (var < 0).any():
            least = np.nanmin(var)
            findings += [
                found(
                    "negative_variance",
                    ERROR,
                    least,
                    0,
                    f"{RECALIBRATE}; it is no update's "
                    "doing: look at the conversion or the averaging of the weights",
                    var < 0,
                )
            ]
    return findings


def _updates(state: Any, setting: Setting, limits: Limits, found: Found) -> list[Finding]:
    """Statistics that never moved, or kept too much of where they began."""
    count = None if state.count is None else int(np.min(state.count))
    initial = bool((state.mean == 0).all() and (state.var == 1).all())
    if count == 0 or (count is None and initial):
        remedy = (
            'train with mutable=["batch_stats"] and keep what apply returns (nnx: model.train()), '
            f"or {RECALIBRATE}"
        )
        return [found("never_updated", ERROR, 0, 0, remedy)]
    if count is None or setting.momentum is None:
        return []
    return _hardly(setting.momentum**count, setting.momentum, limits, found)


def _hardly(share: float, momentum: float | None, limits: Limits, found: Found) -> list[Finding]:
    if share <= limits.initial_share:
        return []
    severity = ERROR if share > 0.5 else WARNING
    more = "more updates"
    if momentum is not None and 0 < momentum < 1:
        updates = math.ceil(math.log(limits.initial_share) / math.log(momentum))
        more = f"{updates} updates at momentum {momentum:g}"
    remedy = f"{more}, a smaller momentum, momentum=None (cumulative average), or {RECALIBRATE}"
    return [found("hardly_updated", severity, share, limits.initial_share, remedy)]


def _batch(moments: Moments, setting: Setting, limits: Limits, found: Found) -> list[Finding]:
    """Statistics of the batch that are no statistics, or over too little."""
    bad = ~(np.isfinite(_wide(moments.mean)) & np.isfinite(_wide(moments.var)))
    if bad.any():
        remedy = "look at the data, and at the layers before: what comes to this one is not finite"
        return [found("not_finite", ERROR, bad.sum(), 0, remedy, bad[None])]
    n = float(np.min(_wide(moments.count), initial=np.inf))
    if not 0 < n < limits.values:
        return []
    remedy = "a larger batch, axis_name= to pool over devices, or jaxbn.merge_updates"
    return [found("few_values", WARNING, n, limits.values, remedy)]


def _stale(
    state: Any, moments: Moments, setting: Setting, limits: Limits, found: Found
) -> list[Finding]:
    """Running statistics far from those of the batch, and whether their start explains it."""
    figure, limit, apart = divergence(state, moments, setting, limits)
    if not figure > limit:
        return []
    share = initial_share(state, moments, setting.epsilon)
    if limits.initial_share < share < 1:
        mean, var = state.mean / (1 - share), (state.var - share) / (1 - share)
        if (var >= 0).mean() >= 0.75:
            learned = State(mean, np.maximum(var, 0), None)
            if divergence(learned, moments, setting, limits)[0] <= limit:
                return _hardly(share, setting.momentum, limits, found)
    remedy = f"{RECALIBRATE}, of the data that it will serve"
    severity = ERROR if figure > 1 + limit else WARNING
    return [found("stale", severity, figure, limit, remedy, (apart > limit)[None])]


def divergence(
    running: Any,
    batch: Moments,
    setting: Setting = Setting(),  # noqa: B008
    limits: Limits = Limits(),  # noqa: B008
) -> tuple[float, float, np.ndarray]:
    """Upper quartile of the channels' divergences, what it may be for so many rows, and all [C].

    Of one row, which has no variance to speak of, it may be anything. A quartile and not the
    mean, so that no single channel decides: one that is rarely active may be anywhere.

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
    limit = limits.divergence + noise if rows > 1 else math.inf
    return float(np.quantile(apart, 0.75)) if apart.size else 0.0, limit, apart


def rows_of(moments: Moments, setting: Setting) -> float:
    """Independent rows behind the moments, at least 1."""
    n = float(np.min(_wide(moments.count), initial=np.inf))
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
    v = _wide(batch.var) + epsilon
    to_batch = np.stack([_wide(batch.mean) / np.sqrt(v), (_wide(batch.var) - 1) / v])
    gone = np.stack([_wide(running.mean) / np.sqrt(v), (_wide(running.var) - 1) / v])
    whole = np.vdot(to_batch, to_batch).real
    return float(1 - np.vdot(to_batch, gone).real / whole) if whole else 0.0


def _replicas(layer: Layer, setting: Setting, limits: Limits, found: Found) -> list[Finding]:
    mean, var = layer.state.mean, layer.state.var
    if len(mean) == 1:
        return []
    sd = np.sqrt(np.abs(var) + setting.epsilon)
    apart = np.maximum(np.abs(mean - mean[:1]), np.abs(sd - sd[:1])) / sd[:1]
    if not (figure := float(apart.max(initial=0))) > limits.replica:
        return []
    remedy = "axis_name= in training, or once jaxbn.sync_state(state, axis_name)"
    return [found("replicas_differ", ERROR, figure, limits.replica, remedy, apart > limits.replica)]


def _values(layer: Layer, setting: Setting, limits: Limits, found: Found) -> list[Finding]:
    """Values that cost digits, overflow, or leave a channel without effect."""
    findings = []
    (mean, var, _), (scale, bias) = layer.state, layer.params
    sd = np.sqrt(np.maximum(var, 0) + setting.epsilon)
    eps = float(jax.numpy.finfo(setting.dtype).eps)
    # x itself is rounded by |mean| eps / 2; E[x²] - E[x]² in float32 by mean² eps.
    limit = 2 * limits.rounding / eps
    if not setting.exact:
        limit = min(limit, math.sqrt(limits.rounding / np.finfo(np.float32).eps))
    offset = np.abs(mean) / sd
    if (offset > limit).any():
        remedy = (
            "subtract a constant near the mean before the layer, or keep x in float32"
            if setting.exact
            else "jaxbn.linen.BatchNorm or jaxbn.nnx.BatchNorm, whose variance is right at any "
            "mean, on x in float32"
        )
        findings += [found("large_mean", WARNING, offset.max(), limit, remedy, offset > limit)]
    for v in (scale, bias):
        if v is not None and (np.abs(v) > limits.exploding).any():
            big = np.abs(v) > limits.exploding
            remedy = "a smaller learning rate, clipped gradients, or weight decay on scale and bias"
            findings += [
                found("exploding", WARNING, np.abs(v).max(), limits.exploding, remedy, big)
            ]
    left = np.sqrt(np.maximum(var, 0) / sd**2)
    if (left < limits.dead_sd).any():
        remedy = "the channel's x is constant: look at the layer before it, or prune the channel"
        findings += [
            found("dead", WARNING, left.min(), limits.dead_sd, remedy, left < limits.dead_sd)
        ]
    if scale is not None and scale.size:
        rms = float(np.sqrt((np.abs(scale) ** 2).mean()))
        bound = limits.dead_scale * rms
        if (small := np.abs(scale) <= bound).any():
            least = np.abs(scale).min() / rms if rms else 0.0
            remedy = "the channel gives bias alone: no decay of scale, by jaxbn.decay_mask(params)"
            findings += [found("dead", WARNING, least, limits.dead_scale, remedy, small)]
    return findings


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


def _copies(leaf: Any) -> Any:
    """What the devices hold of an array, [copies, ...] in float64; one copy where none is twice.

    Rows of an array [devices, ...] with a row on each are copies, as in `pmap`.
    """
    if leaf is None:
        return None
    if not isinstance(leaf, jax.Array) or len(leaf.sharding.device_set) == 1:
        return _wide(leaf)[None]
    if one_row_a_device(leaf):
        return _wide(np.concatenate([shard.data for shard in leaf.addressable_shards]))
    parts: dict[str, list[Any]] = {}
    for shard in leaf.addressable_shards:
        parts.setdefault(str(shard.index), []).append(shard)
    shape = (min(map(len, parts.values())), *leaf.shape)
    copies = np.zeros(shape, np.complex128 if np.iscomplexobj(leaf) else np.float64)
    for part in parts.values():
        for copy, shard in zip(copies, part, strict=False):
            copy[shard.index] = shard.data
    return copies


def _wide(v: Any) -> np.ndarray:
    v = np.asarray(v)
    return v.astype(np.complex128 if np.iscomplexobj(v) else np.float64)
