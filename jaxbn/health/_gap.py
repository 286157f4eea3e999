"""How far each layer's output in eval mode is from its output in train mode, and why."""

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._inspection import hooks, layers
from jaxbn._misuse import misuse
from jaxbn._op.axes import resolve, wide
from jaxbn._op.devices import sharded_as
from jaxbn._op.state import Moments
from jaxbn._text import aligned, printable
from jaxbn.health._distances import divergence, rows_of, values_of
from jaxbn.health._findings import (
    ERROR,
    RECALIBRATE,
    WARNING,
    Finding,
    Limits,
    Setting,
    check_limits,
    setting_of,
    worst_first,
)
from jaxbn.health._layer import of_layer


class LayerGap(NamedTuple):
    """One layer's output in train mode against its output in eval mode.

    Of a layer that is called several times, the figures and the cause are those of the call with
    the largest own gap; `gap` is the largest of all calls.

    >>> from jaxbn import health
    >>> health.LayerGap("bn", gap=0.4, own=0.1, limit=0.3, cause=None).gap  # from layers before it
    0.4
    """

    layer: str  # the path
    gap: float  # RMS of train output minus eval output of the whole model, in sd of train's output
    own: float  # the same for one x, that of train mode, in both modes: the layer's own share
    limit: float  # for `own`, by the number of rows of the batch
    cause: Finding | None  # why `own` is above its limit


class Gap(NamedTuple):
    """What `gap` returns: the layers in the order of their calls, and the first with a gap.

    >>> from jaxbn import health
    >>> fine = health.LayerGap("bn", 0.1, 0.1, 0.3, None)
    >>> health.Gap((fine,), None, (), {}).first is None
    True
    """

    layers: tuple[LayerGap, ...]
    first: LayerGap | None  # the first layer whose own gap is above its limit
    findings: tuple[Finding, ...]  # causes of gaps first, then the layers' other findings
    outputs: dict[str, tuple[jax.Array, jax.Array]]  # path → y in train mode, y in eval mode

    def __str__(self) -> str:
        rows = [("layer", "gap", "own", "limit", "cause")]
        rows += [
            (
                of.layer,
                *(f"{of.gap:.2g}", f"{of.own:.2g}", f"{of.limit:.2g}"),
                of.cause.kind if of.cause else "-",
            )
            for of in self.layers
        ]
        if self.first:
            last = f"the gap opens at {printable(self.first.layer)}"
        else:
            last = "no gap: the own gap of each layer is within its limit"
        return "\n".join([*aligned(rows), last])


class _TrainCall(NamedTuple):
    """What one call of a layer gave while the model ran in train mode."""

    y: jax.Array
    y_eval: jax.Array  # of the same x in eval mode
    valid: jax.Array  # broadcasts to y: True for the cells that the mask takes
    power: jax.Array  # []: the variance of y in train mode within a channel, mean over channels
    moments: Moments
    other: Moments  # with a mask: of all cells; without: of the cells that are not trailing padding


def gap(model: Any, *args: Any, limits: Limits = Limits(), **kwargs: Any) -> Gap:  # noqa: B008
    """How far every batch norm layer's output in eval mode is from that in train mode, and why.

    Use it when a model does well in training and badly in evaluation. The model runs twice on the
    batch: once with all its batch norm layers in train mode, once with all in eval mode, whatever
    mode the call asks for. The model and its statistics do not change.

    Args:
      model: linen's `model.apply`, or an nnx model.
      *args: the arguments of the model: linen's variables and the batch, or the batch for nnx.
      limits: the thresholds.
      **kwargs: keywords of the model: `gap(model.apply, variables, x, train=False)`.

    Returns:
      A `Gap`. `first` is the layer where the gap opens; its `cause` says why.

    Raises:
      TypeError: model is neither of the two, or the variables or the batch are missing.
      ValueError: the model has no batch norm layer, or the batch has no rows.

    >>> import jax, jax.numpy as jnp, flax.linen as nn, jaxbn
    >>> model = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True)])
    >>> x = 9 * jax.random.normal(jax.random.key(0), (64, 3))
    >>> gap = jaxbn.health.gap(model.apply, model.init(jax.random.key(1), x), x)
    >>> gap.first.layer, gap.first.cause.kind
    ('layers_1', 'never_updated')
    """
    _check_model(model, args, kwargs)
    check_limits("gap", limits)
    run, held = _runner(model, args, kwargs)
    # Path → how the layer is used. The hook fills it in the order of the calls, which the records
    # do not keep.
    used: dict[str, tuple[Setting, bool]] = {}

    def train(call: hooks.Call, run: Callable[[bool], jax.Array]) -> tuple[jax.Array, Any]:
        _refuse_empty(call.x)
        layer, x = call.layer, call.x
        setting = setting_of(layer, Setting(rows=x.shape[0] if x.ndim > 1 else None))
        used[call.path] = setting._replace(dtype=x.dtype), getattr(layer, "unbiased", False)
        other = _no_padding(x, layer.axis) if call.mask is None else None
        of_x, of_others = (hooks.pooled(call, mask) for mask in (call.mask, other))
        # As many axes as x has, so that the calls of a scanned layer stack alike.
        shape = () if call.mask is None else call.mask.shape
        valid = jnp.ones((), bool) if call.mask is None else call.mask
        valid = valid.reshape((1,) * (x.ndim - len(shape)) + shape)
        y_eval = run(False)  # before train mode, which updates the statistics
        y = run(True)
        return y, (_TrainCall(y, y_eval, valid, _power(layer, of_x), of_x, of_others),)

    def evaluate(_: hooks.Call, run: Callable[[bool], jax.Array]) -> tuple[jax.Array, Any]:
        y = run(False)
        return y, (y,)

    seen, evaluated = run(train), run(evaluate)
    if not seen:
        raise ValueError(
            "gap: the model called no batch norm layer; expected a model with Flax's BatchNorm, "
            "jaxbn.linen.BatchNorm or jaxbn.nnx.BatchNorm."
        )
    reports, causes, others, outputs = [], [], [], {}
    for path, (setting, unbiased) in used.items():
        layer, pairs = held[path], list(zip(seen[path], evaluated[path], strict=True))
        # NumPy's maxima, because a NaN is the largest there, in whichever call it is.
        whole = float(np.max([_relative(one, y) for one, y in pairs]))
        # What is said of a layer that is called several times is about the call with most gap.
        owns = [_relative(one, one.y_eval) for one, _ in pairs]
        worst = int(np.argmax(owns))
        own, (call, y_eval) = owns[worst], pairs[worst]
        limit = math.sqrt(limits.gap**2 + limits.gap_noise / rows_of(call.moments, setting))
        found = [
            *_padding(path, layer, call, setting, limits),
            *(_unbiased(path, call.moments, limits) if unbiased else ()),
            *of_layer(path, layer, call.moments, setting, limits),
        ]
        cause = None if own <= limit else _cause(path, found, own, limit)
        reports.append(LayerGap(path, whole, own, limit, cause))
        outputs[path] = call.y, y_eval
        causes += [cause] if cause else []
        others += [finding for finding in found if finding is not cause]
    opens = next((report for report in reports if report.cause), None)
    return Gap(tuple(reports), opens, (*causes, *worst_first(others)), outputs)


def _check_model(model: Any, args: Any, kwargs: Any) -> None:
    if layers.is_nnx(model):
        fits = bool(args or kwargs)
    else:
        fits = callable(model) and not hasattr(model, "apply")
        fits = fits and len(args) + len(kwargs) > 1 and isinstance((*args, None)[0], Mapping)
    if not fits:
        expected = "linen's apply, its variables and a batch, or an nnx model and a batch"
        write = "gap(model.apply, variables, x) or gap(model, x)"
        raise misuse("gap", (model, *args), expected, write)


def _runner(model: Any, args: Any, kwargs: Any) -> tuple[Callable[[hooks.Hook], Any], Any]:
    """`run(hook)`, which runs the model and returns the records, and the layers' `Layer`s."""
    if layers.is_nnx(model):
        from flax import nnx

        def run_nnx(hook: hooks.Hook) -> dict[str, Any]:
            copy = nnx.clone(model)  # train mode updates it
            with hooks.hooked_nnx(copy, hook, operator.add) as seen:
                copy(*args, **kwargs)
            return seen

        return run_nnx, layers.find(model)

    def run_linen(hook: hooks.Hook) -> dict[str, Any]:
        return hooks.hooked_apply(model, hook, operator.add)(*args, **kwargs)[1]

    return run_linen, layers.find(args[0])


def _refuse_empty(x: jax.Array) -> None:
    if x.size == 0:
        raise ValueError(
            f"gap: x of a batch norm layer has shape {x.shape}, which holds no values; pass a "
            f"batch as in training."
        )


def _no_padding(x: jax.Array, axis: Any) -> jax.Array:
    """The cells that differ from the last cell. Padding is at the end, and its cells are equal."""
    axes = resolve("gap", x, axis)
    # On a mesh with Explicit axes JAX refuses to slice an axis that is sharded, so the reduced axes
    # are gathered first.
    last = sharded_as(x, x, [a if a in axes.features else None for a in range(x.ndim)])
    for a in axes.reduced:
        last = jax.lax.slice_in_dim(last, -1, None, axis=a)
    return (x != last).any(axes.features, keepdims=True)


def _power(layer: Any, of_x: Moments) -> jax.Array:
    """The mean over channels of scale² var / (var + epsilon)."""
    var = of_x.var
    power = jnp.broadcast_to(var / (var + layer.epsilon), var.shape)
    if (scale := _scale(layer)) is not None:
        square = jnp.abs(scale.astype(wide(scale.dtype))) ** 2
        power *= square if square.shape == var.shape else square.mean(0)  # of all classes
    seen = jnp.broadcast_to(of_x.count > 0, var.shape)
    return power.mean(where=seen)


def _scale(layer: Any) -> jax.Array | None:
    """The scale of a layer of either API that is being called; None if it has none."""
    if layers.is_nnx(layer):
        return layers.unboxed(layer.scale)
    if not layer.has_variable("params", "scale"):
        return None
    return layers.unboxed(layer.get_variable("params", "scale"))


def _relative(call: _TrainCall, y: jax.Array) -> float:
    """RMS of y in train mode - y over the valid cells, in sd of y in train mode."""
    d = np.where(call.valid, np.abs(np.asarray(call.y - y)), 0).astype(np.float64)
    apart = float(np.sqrt((d**2).sum() / np.broadcast_to(call.valid, d.shape).sum()))
    sd = float(np.sqrt(np.mean(call.power)))
    return 0.0 if apart == 0 else apart / sd if sd else math.inf


def _padding(
    path: str, layer: layers.Layer, seen: _TrainCall, setting: Setting, limits: Limits
) -> list[Finding]:
    """Statistics that fit the batch if the mask is dropped, or if its padding is masked."""
    n, others = map(values_of, (seen.moments, seen.other))
    if not others or abs(others - n) < 2:
        return []
    own, limit, _ = divergence(layer.state, seen.moments, setting, limits)
    other, other_limit, _ = divergence(layer.state, seen.other, setting, limits)
    if not (own > limit and other <= other_limit):
        return []
    share = abs(n - others) / max(n, others)
    remedy = (
        "pass mask= here as well: the batch ends in padding that the statistics never saw"
        if n > others
        else f"pass mask= in training too, or {RECALIBRATE} with it: the statistics hold padding"
    )
    return [Finding(path, "padding", ERROR, share, 0.0, (), remedy)]


def _unbiased(path: str, of_x: Moments, limits: Limits) -> list[Finding]:
    """A running var that is n / (n - 1) times the batch's, with an n small enough to matter."""
    n = rows_of(of_x, Setting())
    factor = math.sqrt(n / (n - 1)) if n > 1 else math.inf
    if not limits.bessel < factor - 1 < math.inf:
        return []
    remedy = "unbiased=False in training, or a larger batch: eval divides by a larger sd than train"
    return [Finding(path, "unbiased", WARNING, factor - 1, limits.bessel, (), remedy)]


CAUSES = (
    *("not_finite", "negative_variance", "never_updated", "padding", "unbiased"),
    *("hardly_updated", "stale", "replicas_differ", "few_values"),
)


def _cause(path: str, found: list[Finding], own: float, limit: float) -> Finding:
    """The finding that explains a layer's gap; a finding "gap" if no other does."""
    causes = sorted((f for f in found if f.kind in CAUSES), key=lambda f: CAUSES.index(f.kind))
    if causes:
        return causes[0]
    return Finding(path, "gap", WARNING, own, limit, (), RECALIBRATE)
