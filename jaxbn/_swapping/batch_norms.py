"""`swap` to batch norms: this library's in place of Flax's, and back."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._inspection import layers, nnx_classes, stand_ins
from jaxbn._inspection.layers import Layer
from jaxbn._op.batch_norm import finish
from jaxbn._swapping.swapped import Swapped, SwappedLayer, check_tables, names
from jaxbn._text import a_kind, listed

TABLES = ("domains", "classes")  # what Flax's batch norm does not have


def as_batch_norms(
    model: Any, variables: Any, to: str, chosen: Mapping[str, Layer], options: Mapping[str, Any]
) -> Swapped:
    """The model with this library's batch norms at these paths, or with Flax's."""
    library = "nnx" if layers.is_nnx(model) else "linen"
    counted = [path for path, layer in chosen.items() if layer.state.count is not None]
    if to == "flax" and options.get("momentum", ...) is None:
        raise ValueError(
            "swap: momentum=None with to='flax', whose norm has no cumulative average; write "
            "momentum=0.99."
        )
    if to == "flax" and counted and "momentum" not in options:
        raise ValueError(
            f"swap: {listed(counted)} have momentum=None, the cumulative average, which Flax's "
            f"BatchNorm does not have; write momentum=0.99."
        )
    counts = options["momentum"] is None if "momentum" in options else None
    report = {
        path: SwappedLayer(
            "BatchNorm" if to == "flax" else f"jaxbn.{library}.BatchNorm",
            None,
            (*names(layer.params), "mean", "var", *["count"] * _counts(layer, counts)),
            ("count",) if path in counted and not _counts(layer, counts) else (),
        )
        for path, layer in chosen.items()
    }
    if library == "linen":
        stats = _with_counts(variables["batch_stats"], chosen, counts)
        if stats is not variables["batch_stats"]:
            variables = type(variables)({**variables, "batch_stats": stats})
        apply = functools.partial(_apply_as, model, to, frozenset(chosen), dict(options))
        return Swapped(apply, variables, report)
    found = {path: layer for path, layer in layers.nnx_layers(model) if path in chosen}
    for path, layer in found.items():
        _check_own_call(path, layer)
        check_tables(path, layer, TABLES if to == "flax" else ())
    for layer in found.values():
        _exchange_nnx(layer, to, options)
    return Swapped(model, None, report)


def _counts(layer: Layer, counts: bool | None) -> bool:
    """Whether the layer has a count afterwards; None leaves it as it is."""
    return layer.state.count is not None if counts is None else counts


def _with_counts(stats: Any, paths: Collection[str], counts: bool | None, at: str = "") -> Any:
    """batch_stats whose layers at these paths have a count, or none; None leaves them as they are.

    A new count is 0, so the next batch's statistics replace those that are there.
    """
    if counts is None or not isinstance(stats, Mapping):
        return stats
    like: Any = type(stats)
    if at not in paths:
        keys = ((k, layers.join(at, k)) for k in stats)
        return like({k: _with_counts(stats[k], paths, counts, path) for k, path in keys})
    if not counts:
        return like({k: v for k, v in stats.items() if k != "count"})
    # Scanned layers hold arrays [layers, C].
    shape = layers.unboxed(stats["mean"]).shape[:-1]
    return like({"count": jnp.zeros(shape, jnp.int32), **stats})


def _apply_as(
    apply: Callable[..., Any],
    to: str,
    paths: Collection[str],
    options: Mapping[str, Any],
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """What a linen model's apply returns, with other batch norms at these paths."""

    def other_batch_norm(path: str, layer: Any) -> Any:
        return _linen_batch_norm(path, layer, to, options) if path in paths else layer

    with stand_ins.changed(other_batch_norm):
        return apply(*args, **kwargs)


def _linen_batch_norm(path: str, layer: Any, to: str, options: Mapping[str, Any]) -> Any:
    """A batch norm of the other library in the layer's scope, with all that the layer was given."""
    import flax.linen as nn

    import jaxbn.linen

    _check_own_call(path, layer)
    check_tables(path, layer, TABLES if to == "flax" else ())
    cls: Any = nn.BatchNorm if to == "flax" else jaxbn.linen.BatchNorm
    fields = {field.name for field in dataclasses.fields(cls)} - {"parent", "name"}
    kept = {name: getattr(layer, name) for name in fields if hasattr(layer, name)}
    new = cls(**kept | _options_of(layer, options), parent=layer.scope)
    if to == "flax":  # for whoever calls the layer, see `stand_ins`
        object.__setattr__(new, "activation", getattr(layer, "activation", None))
    return new


def _options_of(layer: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options; groups of devices go with the axis whose indices they are."""
    own = options.get("axis_name", layer.axis_name) == layer.axis_name
    return {**options, **({} if own else {"axis_index_groups": None})}


def _exchange_nnx(layer: Any, to: str, options: Mapping[str, Any]) -> None:
    """Gives an nnx layer the other library's class, with the same variable objects."""
    from flax import nnx

    import jaxbn.nnx

    ours = isinstance(layer, jaxbn.nnx.BatchNorm)
    new = {"virtual_batch_size": None, "unbiased": False, "activation": None, "renorm": None}
    new |= {"domains": None, "affine_per_domain": False, "classes": None}
    if to == "batch":
        nnx_classes.exchange(layer, jaxbn.nnx.BatchNorm)
        options = {**{name: v for name, v in new.items() if not hasattr(layer, name)}, **options}
    elif ours:
        nnx_classes.exchange(layer, nnx_classes.subclass(nnx.BatchNorm, "BatchNorm", _flax_call))
        for name in new.keys() - {"activation"}:
            delattr(layer, name)
    for name, value in _options_of(layer, options).items():
        setattr(layer, name, value)
    if layer.momentum is None and not hasattr(layer, "count"):
        mean = layer.mean.get_value()
        layer.count = nnx.BatchStat(jnp.zeros(mean.shape[:-1], jnp.int32))
    elif layer.momentum is not None and hasattr(layer, "count"):
        del layer.count


def _flax_call(cls: Any) -> Callable[..., jax.Array]:
    """The call of Flax's batch norm with the arguments of this library's."""

    def __call__(  # noqa: N807
        self: Any,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: Any = None,
        residual: Any = None,
    ) -> jax.Array:
        y = cls.__call__(self, x, use_running_average, mask=mask)
        return finish(y, self.activation, residual)

    return __call__


def _check_own_call(path: str, layer: Any) -> None:
    """Refuses a layer whose class computes something of its own around a batch norm."""
    if layers.is_nnx(layer):
        from flax.nnx import BatchNorm as Flax

        from jaxbn.nnx import BatchNorm as Ours
    else:
        from flax.linen import BatchNorm as Flax  # type: ignore[assignment]

        from jaxbn.linen import BatchNorm as Ours  # type: ignore[assignment]

    known = type(layer).__call__ in (Flax.__call__, Ours.__call__)
    if not known and not nnx_classes.has_class_of(layer, _flax_call):
        raise ValueError(
            f"swap: layer {path!r} is {a_kind(layer)} with a call of its own, which would "
            f"be lost; call jaxbn.unfreeze(model) first if the layer is frozen, or leave the layer "
            f"out by where=."
        )
