"""What is wrong with what the layers hold: `check`, `summary`."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxbn._inspection import layers
from jaxbn._misuse import check_by_path
from jaxbn._op.arguments.values import check_numbers
from jaxbn._op.state import Moments
from jaxbn.health._findings import (
    Finding,
    Limits,
    Setting,
    check_limits,
    setting_of,
    worst_first,
)
from jaxbn.health._layer import of_layer


def check(
    tree: Any,
    moments: Mapping[str, Any] | None = None,
    *,
    momentum: float | None = None,
    epsilon: float = 1e-5,
    dtype: Any = np.float32,
    rows: int | None = None,
    limits: Limits = Limits(),  # noqa: B008
) -> list[Finding]:
    """What is wrong with the batch norm layers of a model or a checkpoint, worst first.

    Use it after training, after a conversion, and before a checkpoint is served. The call reads
    arrays only: no model runs and nothing changes. docs/health.md explains each finding.

    Args:
      tree: linen's variables or batch_stats, an nnx module or state, or any tree that
        `jaxbn.layers.find` reads. The layers of an nnx module say their own momentum, epsilon and
        dtype.
      moments: path → moments [C] of the x that reaches the layer, from
        `jaxbn.calls.hooked_apply(model.apply)(variables, x)` or `hooked_nnx`, for some layers or
        all. Run the model in train mode: in eval mode a layer with wrong statistics changes what
        reaches the layers after it. What `jaxbn.watch.linen`, `nnx` and `records` give will do too.
      momentum: of the training, for statistics with a count; None if it is unknown, or for the
        cumulative average.
      epsilon: of the layers.
      dtype: of x. The narrower the dtype, the smaller the means that cost digits.
      rows: the number of independent rows (images, not pixels) behind the moments; None: each value
        is independent.
      limits: the thresholds, for example `Limits()._replace(dead_sd=0.01)`.

    Returns:
      A list of `Finding`; empty if nothing is wrong.

    Raises:
      TypeError: moments is not a dict, path → `Moments`.
      ValueError: the tree holds no batch norm layer, or the moments are of another model.

    >>> import jax.numpy as jnp, jaxbn
    >>> stats = {"bn": {"mean": jnp.zeros(3), "var": jnp.array([1.0, -2.0, 1.0])}}
    >>> (finding,) = jaxbn.health.check({"batch_stats": stats})
    >>> finding.layer, finding.kind, finding.severity, finding.figure, finding.channels
    ('bn', 'negative_variance', 'error', -2.0, (1,))
    """
    check_limits("check", limits)
    check_numbers("check", momentum, epsilon)
    found = _layers_of("check", tree)
    moments = {} if moments is None else moments
    if isinstance(moments, Mapping):  # a record of a watched step has the moments as its `batch`
        moments = {path: getattr(of, "batch", of) for path, of in moments.items()}
    source = "calls.hooked_apply(model.apply)(variables, x)[1]"
    check_by_path("check", moments, (Moments,), "check(variables, moments)", source)
    for path, of_x in moments.items():
        if path not in found:
            raise ValueError(
                f"check: moments are of a layer {path!r}, but the layers are {list(found)}; pass "
                f"the moments that calls.hooked_apply(model.apply)(variables, x) returns for this "
                f"model."
            )
        shape = np.shape(found[path].state.mean)
        if np.shape(of_x.mean) != shape:
            raise ValueError(
                f"check: moments of {path!r} have shape {np.shape(of_x.mean)}, but its statistics "
                f"have shape {shape}; pass the moments that "
                f"calls.hooked_apply(model.apply)(variables, x) returns for this model."
            )
    given = Setting(momentum, epsilon, dtype, False, rows)
    modules = layers.nnx_layers(tree) if layers.is_nnx(tree) else ()
    settings = {path: setting_of(layer, given) for path, layer in modules}
    return worst_first(
        [
            finding
            for path, layer in found.items()
            for finding in of_layer(
                path, layer, moments.get(path), settings.get(path, given), limits
            )
        ]
    )


class Row(NamedTuple):
    """One layer as a row of a table.

    >>> from jaxbn import health
    >>> health.Row("bn", (64,), None, None, 0, {"var_min": 0.5}).layer
    'bn'
    """

    layer: str
    features: tuple[int, ...]
    count: int | None  # type: ignore[assignment]  # updates; None if they are not counted
    worst: Finding | None
    findings: int
    # mean_max (of |mean|, in sd), var_min, var_max, scale_min, scale_max (of |scale|)
    figures: dict[str, float]


def summary(tree: Any, findings: Sequence[Finding] = (), *, epsilon: float = 1e-5) -> list[Row]:
    """The batch norm layers as rows of a table, those with the worst findings first.

    Use it to print or plot a model's layers. Layers without findings come last, in the tree's
    order.

    Args:
      tree: as in `check`.
      findings: what `check` returned for this tree.
      epsilon: of the layers.

    Returns:
      A list of `Row`, one for each layer.

    Raises:
      ValueError: the tree holds no batch norm layer.

    >>> import jax.numpy as jnp, jaxbn
    >>> stats = {"bn": {"mean": jnp.zeros(3), "var": jnp.ones(3)}}
    >>> (row,) = jaxbn.health.summary(stats, jaxbn.health.check(stats))
    >>> row.layer, row.features, row.count, row.worst.kind, row.figures["var_max"]
    ('bn', (3,), None, 'never_updated', 1.0)
    """
    check_numbers("summary", None, epsilon)
    rows = []
    order = worst_first(findings)
    for path, (params, state) in _layers_of("summary", tree).items():
        own = [finding for finding in order if finding.layer == path]
        ranges = {}
        if state.mean is not None:
            mean, var = np.abs(np.asarray(state.mean)), np.asarray(state.var)
            sd = np.sqrt(np.maximum(var.astype(np.float64), 0) + epsilon)
            ranges = {"mean": mean.astype(np.float64) / sd, "var": var}
        if params.scale is not None:
            ranges["scale"] = np.abs(np.asarray(params.scale))
        figures = {
            f"{name}_{end.__name__}": float(end(v))
            for name, v in ranges.items()
            if v.size
            for end in (np.min, np.max)
        }
        figures.pop("mean_min", None)
        count = None if state.count is None else int(np.min(state.count))
        worst = own[0] if own else None
        shape = np.shape(params.scale if state.mean is None else state.mean)
        rows.append(Row(path, shape, count, worst, len(own), figures))
    return sorted(rows, key=lambda r: len(order) if r.worst is None else order.index(r.worst))


def _layers_of(call: str, tree: Any) -> dict[str, layers.Layer]:
    found = layers.find(tree)
    if not found:
        raise ValueError(
            f"{call}: no batch norm layer in a tree with {len(jax.tree.leaves(tree))} leaves; "
            f"expected linen's variables, an nnx model, or a tree with a State (or a mapping with "
            f'"mean" and "var") for each layer; write {call}(variables).'
        )
    return found
