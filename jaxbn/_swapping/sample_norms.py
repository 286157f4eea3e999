"""`swap` to norms of one sample: GroupNorm, LayerNorm and InstanceNorm need no batch."""

import functools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._inspection import layers, nnx_classes
from jaxbn._inspection.hooks import Call, hooked_apply
from jaxbn._inspection.layers import Layer
from jaxbn._inspection.selection import Where
from jaxbn._op.batch_norm import finish
from jaxbn._swapping.standardized import Standardizing, convolutions_of, standardized_call
from jaxbn._swapping.swapped import Swapped, SwappedLayer, check_tables, names
from jaxbn._text import listed

NORMS = {"group": "GroupNorm", "layer": "LayerNorm", "instance": "InstanceNorm"}
TABLES = ("affine_per_domain", "classes")  # what these norms do not have; they need no statistics


def as_sample_norms(
    model: Any,
    variables: Any,
    to: str,
    chosen: Mapping[str, Layer],
    groups: int | None,
    standardize: Where | None,
) -> Swapped:
    """The model with Flax's norms of that name at these paths."""
    nnx_model = layers.is_nnx(model)
    grouped = _groups(to, chosen, groups)
    convolutions: Mapping[str, Any] = {}
    if standardize is not None:
        convolutions = convolutions_of(model if nnx_model else variables["params"], standardize)
    report = {
        path: SwappedLayer(NORMS[to], grouped[path], names(layer.params), names(layer.state))
        for path, layer in chosen.items()
    }
    if not nnx_model:
        kept = {**variables, "batch_stats": _without_layers(variables["batch_stats"], chosen)}
        # No closure: this pickles where apply does.
        swapped = functools.partial(_apply_swapped, model, to, grouped, frozenset(convolutions))
        return Swapped(swapped, type(variables)(kept), report)
    found = {path: layer for path, layer in layers.nnx_layers(model) if path in chosen}
    _check_last(to, {path: layer.axis for path, layer in found.items()})
    for path, layer in found.items():
        check_tables(path, layer, TABLES)
    for path, layer in found.items():
        new = _new_nnx_norm(layer, to, grouped[path])
        nnx_classes.exchange(layer, type(new))
        vars(layer).clear()
        vars(layer).update(vars(new))
    for convolution in convolutions.values():
        convolution.promote_dtype = Standardizing(convolution.promote_dtype)
    return Swapped(model, None, report)


def _groups(to: str, chosen: Mapping[str, Layer], groups: int | None) -> dict[str, int | None]:
    """Path → number of groups; one error names every layer that the number does not fit."""
    features = {path: layer.state.mean.shape[-1] for path, layer in chosen.items()}
    if to != "group":
        return dict.fromkeys(features)
    if groups is None:
        return {path: _most_groups(n) for path, n in features.items()}
    bad = [f"{path} ({n})" for path, n in features.items() if groups < 1 or n % groups]
    if bad:
        common = math.gcd(*features.values())
        fitting = [d for d in range(1, common + 1) if common % d == 0]
        raise ValueError(
            f"swap: groups={groups} does not divide the features of {listed(bad)}; expected one of "
            f"{fitting}, which divide the features of all layers, or None to choose for each layer."
        )
    return dict.fromkeys(features, groups)


def _most_groups(features: int) -> int:
    """The largest number of groups, up to 32 as in the paper, with 8 features or more in each.

    In a dense layer a group has only its features to normalize over. With very few of them, the
    normalized values are little more than signs.
    """
    most = max(1, min(32, features // 8))
    return max(d for d in range(1, most + 1) if features % d == 0)


def _kept_options(layer: Any, to: str, groups: int | None) -> dict[str, Any]:
    """The arguments that the new norm takes from the old layer."""
    taken = ("epsilon", "dtype", "param_dtype", "use_bias", "use_scale", "bias_init", "scale_init")
    options = {name: getattr(layer, name) for name in taken if hasattr(layer, name)}
    # Flax's fast variance is E[x²] - E[x]², which cancels at large means. jaxbn's layers do not.
    options["use_fast_variance"] = False
    return options | ({"num_groups": groups} if to == "group" else {})


def _apply_swapped(
    apply: Callable[..., Any],
    to: str,
    groups: Mapping[str, int | None],
    convolutions: Collection[str],
    /,
    variables: Any,
    *args: Any,
    mutable: Any = False,
    **kwargs: Any,
) -> Any:
    """What a linen model's apply returns, with the other norm at the paths of groups."""
    import flax.linen as nn
    from flax.core.scope import in_filter

    def other_norm(call: Call, run: Callable[[bool], jax.Array]) -> tuple[jax.Array, None]:
        if call.path not in groups:
            return run(call.train), None
        _check_last(to, {call.path: call.layer.axis}, call.x)
        check_tables(call.path, call.layer, TABLES)
        # The norm works in the old layer's scope, so it finds scale and bias under their paths.
        norm = getattr(nn, NORMS[to])(
            **_kept_options(call.layer, to, groups[call.path]),
            force_float32_reductions=call.layer.force_float32_reductions,
            parent=call.layer.scope,
        )
        y = norm(call.x, mask=_full_mask(call.mask, call.weights, call.x))
        return finish(y, getattr(call.layer, "activation", None), call.residual), None

    with nn.intercept_methods(functools.partial(standardized_call, convolutions)):
        out, _ = hooked_apply(apply, other_norm)(variables, *args, mutable=mutable, **kwargs)
    if mutable is False or not in_filter(mutable, "batch_stats"):
        return out
    # A training step that asks for updated batch_stats finds the key, with nothing in it.
    return out[0], {"batch_stats": {}, **out[1]}


def _new_nnx_norm(layer: Any, to: str, groups: int | None) -> Any:
    """The new norm, with the same variable objects as the old layer."""
    from flax import nnx

    options = _kept_options(layer, to, groups) | {"promote_dtype": layer.promote_dtype}
    cls: Any = nnx_classes.subclass(getattr(nnx, NORMS[to]), NORMS[to], _swapped_call, to)
    new = cls(layer.num_features, **options, rngs=nnx.Rngs(0))
    new.scale, new.bias = layer.scale, layer.bias
    new.activation = getattr(layer, "activation", None)
    return new


def _swapped_call(cls: Any, to: str) -> Callable[..., jax.Array]:
    """The call of Flax's own norm with the arguments of a batch norm."""

    def __call__(  # noqa: N807
        self: Any,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: Any = None,
        residual: Any = None,
        update_stats: bool = True,
        renorm: Any = None,
        weights: Any = None,
        domain: Any = None,
        labels: Any = None,
    ) -> jax.Array:
        _check_last(to, {}, x)
        y = cls.__call__(self, x, mask=_full_mask(mask, weights, x))
        return finish(y, self.activation, residual)

    return __call__


def _check_last(to: str, axes: Mapping[str, Any], x: jax.Array | None = None) -> None:
    """Refuses features that are not on the last axis, and InstanceNorm without positions."""
    last = (-1,) if x is None else (-1, x.ndim - 1)
    bad = [f"{path} (axis={axis})" for path, axis in axes.items() if axis not in last]
    if bad:
        raise ValueError(
            f"swap: {NORMS[to]} has its features on the last axis, but {listed(bad)} have theirs "
            f"elsewhere; write axis=-1 in the model, or leave these layers out by where=."
        )
    if to == "instance" and x is not None and x.ndim < 3:
        raise ValueError(
            f"swap: InstanceNorm of x with shape {x.shape}, but InstanceNorm normalizes over the "
            f'axes between the first and the last, and x has none; write to="group".'
        )


def _full_mask(mask: Any, weights: Any, x: jax.Array) -> Any:
    """The cells that count with x's shape: Flax's GroupNorm reshapes its mask as it reshapes x."""
    cells = [
        jnp.broadcast_to(jnp.asarray(v, bool), x.shape) for v in (mask, weights) if v is not None
    ]
    return functools.reduce(jnp.logical_and, cells) if cells else None


def _without_layers(stats: Any, paths: Mapping[str, Any], at: str = "") -> Any:
    """batch_stats without the layers at these paths, and without mappings that are then empty."""
    if at in paths:
        return {}
    if not isinstance(stats, Mapping):
        return stats
    like: Any = type(stats)
    inner = {k: _without_layers(v, paths, layers.join(at, k)) for k, v in stats.items()}
    return like({k: v for k, v in inner.items() if not isinstance(v, Mapping) or v})
