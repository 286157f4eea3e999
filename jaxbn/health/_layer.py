"""What is wrong with one batch norm layer: pure functions of what it holds, and of moments."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxbn._inspection.layers import Layer
from jaxbn._op.devices import one_row_a_device
from jaxbn._op.state import Moments, Params, State
from jaxbn.health._distances import divergence, in_double, initial_share, values_of
from jaxbn.health._findings import ERROR, RECALIBRATE, WARNING, Finding, Limits, Setting

# With momentum 1 an update is counted and changes nothing.
BELOW_1 = "a momentum below 1, the share of the old statistics that an update keeps"


def of_layer(
    path: str,
    layer: Layer,
    moments: Moments | None = None,
    setting: Setting = Setting(),  # noqa: B008
    limits: Limits = Limits(),  # noqa: B008
) -> list[Finding]:
    """All findings about one layer, in no order.

    `jaxbn.health.check` calls it for every layer. Use it for a layer outside of a tree.

    Args:
      path: of the layer, for the findings.
      layer: what the layer holds, arrays [C] or, of a scanned layer, [layers, C]. If devices hold
        copies of an array, the copies are compared. `state.mean` is None if a checkpoint has no
        statistics.
      moments: of the x that reaches the layer, [C]; None leaves out what only a batch can tell.
      setting: how the layer is used.
      limits: the thresholds.

    Returns:
      A list of `Finding`; empty if nothing is wrong.

    >>> import jax.numpy as jnp, jaxbn
    >>> from jaxbn import health
    >>> params, state = jaxbn.init(2)
    >>> layer = jaxbn.layers.Layer(params, state._replace(count=jnp.asarray(3)))
    >>> [finding.kind for finding in health.of_layer("bn", layer)]
    ['never_updated']
    """
    if layer.state.mean is None:
        remedy = (
            "save batch_stats (nnx: nnx.state(model)) beside params; a norm without a batch's "
            "statistics, LayerNorm say, has none to save"
        )
        return [Finding(path, "no_statistics", ERROR, 0.0, 2.0, (), remedy)]
    copies = Layer(Params(*map(_copies, layer.params)), State(*map(_copies, layer.state)))

    def found(
        kind: str, severity: str, figure: Any, threshold: float, remedy: str, bad: Any = None
    ) -> Finding:
        where = () if bad is None else np.nonzero(bad.reshape(len(bad), -1).any(0))[0]
        channels = tuple(map(int, where))
        return Finding(path, kind, severity, float(figure), float(threshold), channels, remedy)

    # Where values are not finite, or are the initial ones, the other figures mean nothing.
    narrow = _narrow(layer.state, found)
    if broken := _not_finite(copies, found):
        return broken + narrow
    findings = narrow + ([] if moments is None else _batch(moments, setting, limits, found))
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
    """Values that are NaN or infinite, and variances below 0."""
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
            remedy = (
                f"{RECALIBRATE}; no update makes a variance negative: check the conversion or the "
                f"averaged weights"
            )
            findings += [found("negative_variance", ERROR, least, 0, remedy, var < 0)]
    return findings


def _narrow(state: State, found: Found) -> list[Finding]:
    """Statistics in a dtype too narrow for updates: small changes are rounded away."""
    eps = max(_rounding(v) for v in (state.mean, state.var))
    widest = float(np.finfo(np.float32).eps)
    if eps <= widest:
        return []
    remedy = (
        "cast mean and var to float32 before training goes on, or updates are rounded away; "
        f"if updates were rounded away already, {RECALIBRATE}"
    )
    severity = ERROR if eps >= 1 else WARNING  # eps of integers is 1
    return [found("narrow_statistics", severity, eps, widest, remedy)]


def _rounding(v: Any) -> float:
    """The eps of v's dtype; 1 for integers."""
    dtype = getattr(v, "dtype", np.float64)
    return float(jax.numpy.finfo(dtype).eps) if jax.numpy.issubdtype(dtype, np.inexact) else 1.0


def _updates(state: Any, setting: Setting, limits: Limits, found: Found) -> list[Finding]:
    """Statistics that never changed, or still hold too much of the initial values."""
    count = None if state.count is None else int(np.min(state.count))
    initial = bool((state.mean == 0).all() and (state.var == 1).all())
    if count == 0 or initial:
        remedy = (
            f"{BELOW_1}, or {RECALIBRATE}"
            if count or setting.momentum == 1
            else 'train with mutable=["batch_stats"] and keep what apply returns (nnx: '
            f"model.train()), or {RECALIBRATE}"
        )
        return [found("never_updated", ERROR, 0, 0, remedy)]
    if count is None or setting.momentum is None:
        return []
    return _hardly(setting.momentum**count, setting.momentum, limits, found)


def _hardly(share: float, momentum: float | None, limits: Limits, found: Found) -> list[Finding]:
    """A share of the initial values above its limit."""
    if share <= limits.initial_share:
        return []
    severity = ERROR if share > 0.5 else WARNING
    more = BELOW_1 if momentum == 1 else "more updates"
    if momentum is not None and 0 < momentum < 1:
        updates = math.ceil(math.log(limits.initial_share) / math.log(momentum))
        more = f"{updates} updates at momentum {momentum:g}"
    remedy = f"{more}, a smaller momentum, momentum=None (cumulative average), or {RECALIBRATE}"
    return [found("hardly_updated", severity, share, limits.initial_share, remedy)]


def _batch(moments: Moments, setting: Setting, limits: Limits, found: Found) -> list[Finding]:
    """Moments of the batch that are not finite, or of too few values."""
    bad = ~(np.isfinite(in_double(moments.mean)) & np.isfinite(in_double(moments.var)))
    if bad.any():
        remedy = "look at the data and at the layers before: this layer's x is not finite"
        return [found("not_finite", ERROR, bad.sum(), 0, remedy, bad[None])]
    n = values_of(moments)
    if not 0 < n < limits.values:
        return []
    remedy = (
        'a larger batch, or jaxbn.swap: to="batch" with axis_name= pools over devices, to="group" '
        "needs no batch; jaxbn.health.advise(batch_per_device=...) tells which"
    )
    return [found("few_values", WARNING, n, limits.values, remedy)]


def _stale(
    state: Any, moments: Moments, setting: Setting, limits: Limits, found: Found
) -> list[Finding]:
    """Running statistics far from those of the batch; or too few updates, if those explain it."""
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
    remedy = f"{RECALIBRATE}, with batches of the data that the model will serve"
    severity = ERROR if figure > 1 + limit else WARNING
    return [found("stale", severity, figure, limit, remedy, (apart > limit)[None])]


def _replicas(layer: Layer, setting: Setting, limits: Limits, found: Found) -> list[Finding]:
    """Copies of the statistics that differ between devices."""
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
    """Values that lose digits, may overflow, or leave a channel without effect."""
    findings = []
    (mean, var, _), (scale, bias) = layer.state, layer.params
    sd = np.sqrt(np.maximum(var, 0) + setting.epsilon)
    eps = float(jax.numpy.finfo(setting.dtype).eps)
    # Rounding changes x by up to |mean| eps / 2, and E[x²] - E[x]² in float32 by mean² eps.
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
            remedy = "y is only the bias: take scale out of weight decay, jaxbn.decay_mask(params)"
            findings += [found("dead", WARNING, least, limits.dead_scale, remedy, small)]
    return findings


def _copies(leaf: Any) -> Any:
    """The copies of an array that devices hold, [copies, ...] in float64; one if there is one only.

    The rows of an array [devices, ...] with one row on each device are copies too, as in `pmap`.
    """
    if leaf is None:
        return None
    if not isinstance(leaf, jax.Array) or len(leaf.sharding.device_set) == 1:
        return in_double(leaf)[None]
    if one_row_a_device(leaf):
        return in_double(np.concatenate([shard.data for shard in leaf.addressable_shards]))
    parts: dict[str, list[Any]] = {}
    for shard in leaf.addressable_shards:
        parts.setdefault(str(shard.index), []).append(shard)
    shape = (min(map(len, parts.values())), *leaf.shape)
    copies = np.zeros(shape, np.complex128 if np.iscomplexobj(leaf) else np.float64)
    for part in parts.values():
        for i, shard in zip(range(shape[0]), part, strict=False):
            copies[i, *shard.index] = shard.data
    return copies
