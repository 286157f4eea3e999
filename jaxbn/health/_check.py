"""What is wrong with what the layers hold: `check`, `summary`."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxbn._inspection import layers
from jaxbn._op.state import Moments
from jaxbn.health._findings import (
    Finding,
    Limits,
    Setting,
    setting_of,
    worst_first,
)
from jaxbn.health._layer import of_layer


def check(
    tree: Any,
    moments: Mapping[str, Moments] | None = None,
    *,
    momentum: float | None = None,
    epsilon: float = 1e-5,
    dtype: Any = np.float32,
    rows: int | None = None,
    limits: Limits = Limits(),  # noqa: B008
) -> list[Finding]:
    """What is wrong with the batch norm layers of a model or a checkpoint, worst first.

    An empty list is a healthy one. Pure: nothing is changed, no model is run.

    Args:
      tree: linen's variables or batch_stats, an nnx module or state, or any tree with `State` or
        mappings that hold "mean" and "var" (`jaxbn.layers.find`). Of an nnx module, momentum,
        epsilon and dtype are its layers' own.
      moments: path → moments of the x that came to the layer, from
        `jaxbn.calls.hooked_apply(model.apply)(variables, x)` or `hooked_nnx`; some layers or all.
        Of train mode: in eval mode sick statistics change what comes to the layers after.
      momentum: the one of the training, for counted statistics; None where unknown or cumulative.
      epsilon: the layers'.
      dtype: of x, in which large means cost digits.
      rows: independent rows (images, not pixels) behind the moments; None: each value is one.
      limits: the thresholds, `Limits()._replace(dead_sd=0.01)`.

    Raises:
      ValueError: the tree holds no batch norm layer, or moments of another model.

    >>> import jax.numpy as jnp, jaxbn
    >>> stats = {"bn": {"mean": jnp.zeros(3), "var": jnp.array([1.0, -2.0, 1.0])}}
    >>> (finding,) = jaxbn.health.check({"batch_stats": stats})
    >>> finding.layer, finding.kind, finding.severity, finding.figure, finding.channels
    ('bn', 'negative_variance', 'error', -2.0, (1,))
    """
    found = _layers("check", tree)
    moments = {} if moments is None else moments
    for path, of_x in moments.items():
        if path not in found:
            raise ValueError(
                f"check: moments are of a layer {path!r}, but the layers are {list(found)}; pass "
                f"what calls.hooked_apply(model.apply)(variables, x) returned for this model."
            )
        shape = np.shape(found[path].state.mean)
        if np.shape(of_x.mean) != shape:
            raise ValueError(
                f"check: moments of {path!r} have shape {np.shape(of_x.mean)}, but its statistics "
                f"have shape {shape}; pass what calls.hooked_apply(model.apply)(variables, x) "
                f"returned for this model."
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
    """One layer in one line of a table.

    >>> from jaxbn import health
    >>> health.Row("bn", (64,), None, None, 0, {"var_min": 0.5}).layer
    'bn'
    """

    layer: str
    features: tuple[int, ...]
    count: int | None  # type: ignore[assignment]  # updates; None where they are not counted
    worst: Finding | None
    findings: int
    figures: dict[
        str, float
    ]  # mean_max (in sd), var_min, var_max, scale_min, scale_max (of |scale|)


def summary(tree: Any, findings: Sequence[Finding] = (), *, epsilon: float = 1e-5) -> list[Row]:
    """A row a layer, those with the worst findings first, the others as they stand in the tree.

    Args:
      tree: as in `check`.
      findings: those of `check`, about layers of this tree.
      epsilon: the layers'.

    Raises:
      ValueError: the tree holds no batch norm layer.

    >>> import jax.numpy as jnp, jaxbn
    >>> stats = {"bn": {"mean": jnp.zeros(3), "var": jnp.ones(3)}}
    >>> (row,) = jaxbn.health.summary(stats, jaxbn.health.check(stats))
    >>> row.layer, row.features, row.count, row.worst.kind, row.figures["var_max"]
    ('bn', (3,), None, 'never_updated', 1.0)
    """
    rows = []
    order = worst_first(findings)
    for path, (params, state) in _layers("summary", tree).items():
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


def _layers(call: str, tree: Any) -> dict[str, layers.Layer]:
    found = layers.find(tree)
    if not found:
        raise ValueError(
            f"{call}: no batch norm layer in a tree with {len(jax.tree.leaves(tree))} leaves; "
            f"expected linen's "
            f'variables, an nnx model, or a tree with a State (or a mapping with "mean" and '
            f'"var") for each layer; write {call}(variables).'
        )
    return found
