"""Batch norm replaced by a norm that needs no batch: GroupNorm, LayerNorm or InstanceNorm."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbn._inspection import layers, nnx_classes
from jaxbn._inspection.hooks import Call, check_apply, hooked_apply
from jaxbn._inspection.layers import Layer
from jaxbn._inspection.selection import Where, select
from jaxbn._op.batch_norm import finish
from jaxbn._text import listed

NORMS = {"group": "GroupNorm", "layer": "LayerNorm", "instance": "InstanceNorm"}


class SwappedLayer(NamedTuple):
    """What `swap` did to one layer."""

    norm: str  # the name of Flax's class
    groups: int | None  # None for a norm other than GroupNorm
    kept: tuple[str, ...]  # names of the parameters, which the new norm uses
    dropped: tuple[str, ...]  # names of the statistics, which the new norm does not have


class Swapped(NamedTuple):
    """What `swap` returns."""

    model: Any  # for linen, a function to call in place of net.apply; or the nnx model
    variables: Any  # linen's, without the swapped layers' statistics; None for nnx
    report: dict[str, SwappedLayer]  # by path


def swap(
    model: Any,
    variables: Any = None,
    to: str = "group",
    where: Where = "*",
    *,
    groups: int | None = None,
) -> Swapped:
    """The model with Flax's own GroupNorm, LayerNorm or InstanceNorm in place of batch norm.

    Use it when batches are too small for their statistics. The new norms use the old scale, bias,
    epsilon and dtypes, and the masks of the calls. Parameters keep their names, so the optimizer,
    checkpoints and the model's source stay as they are. The running statistics go, and momentum,
    axis_name and the mode of the call have no effect any more. The network then computes another
    function and must be trained. Wu & He 2018, "Group Normalization".

    Args:
      model: linen's `net.apply`, or an nnx model, which is changed in place.
      variables: linen's variables.
      to: "group", "layer" (over the features of each position, as in a transformer) or "instance"
        (over the positions of each feature; x [N, ..., C] must have positions).
      where: the layers to swap: a glob over the paths, several globs, or a predicate.
      groups: the number of groups of a GroupNorm. None: the largest number up to 32 that divides
        the features into groups of 8 or more.

    Returns:
      `Swapped(model, variables, report)`. Linen's model pickles if `net.apply` pickles.

    Raises:
      TypeError: linen's apply came without variables, or the model is a linen module or variables.
      ValueError: there is no such layer or no such norm, or groups do not divide the features.
        Features are not on the last axis: for linen, this is raised when the model is called.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbn
    >>> net = nn.Sequential([nn.Conv(16, (1, 1)), nn.BatchNorm(use_running_average=False)])
    >>> variables = net.init(jax.random.key(0), jnp.ones((1, 4, 4, 3)))
    >>> apply, variables, report = jaxbn.swap(net.apply, variables)
    >>> report["layers_1"].groups, apply(variables, jnp.ones((1, 4, 4, 3))).shape
    (2, (1, 4, 4, 16))
    """
    nnx_model = layers.is_nnx(model)
    if not nnx_model and (variables is None or "params" not in variables):
        raise TypeError(
            f"swap: {type(model).__name__} without variables, expected an nnx model, or linen's "
            f'apply and its variables, "params" and "batch_stats"; write '
            f"swap(net.apply, variables)."
        )
    if to not in NORMS:
        raise ValueError(f"swap: to={to!r}, expected one of {list(NORMS)}.")
    if not nnx_model:
        check_apply("swap", model, "swap(net.apply, variables)")
    chosen = select("swap", model if nnx_model else variables, where)
    grouped = _groups(to, chosen, groups)
    report = {
        path: SwappedLayer(
            NORMS[to],
            grouped[path],
            tuple(name for name, v in layer.params._asdict().items() if v is not None),
            tuple(name for name, v in layer.state._asdict().items() if v is not None),
        )
        for path, layer in chosen.items()
    }
    if not nnx_model:
        kept = {**variables, "batch_stats": _without_layers(variables["batch_stats"], chosen)}
        # No closure: this pickles where apply does.
        swapped = functools.partial(_apply_swapped, model, to, grouped)
        return Swapped(swapped, type(variables)(kept), report)
    found = {path: layer for path, layer in layers.nnx_layers(model) if path in chosen}
    _check_last(to, {path: layer.axis for path, layer in found.items()})
    for path, layer in found.items():
        new = _new_nnx_norm(layer, to, grouped[path])
        nnx_classes.exchange(layer, type(new))
        vars(layer).clear()
        vars(layer).update(vars(new))
    return Swapped(model, None, report)


def _groups(to: str, chosen: Mapping[str, Layer], groups: int | None) -> dict[str, int | None]:
    """Path → number of groups; one error names every layer that the number does not fit."""
    features = {path: layer.state.mean.shape[-1] for path, layer in chosen.items()}
    if to != "group":
        if groups is not None:
            raise ValueError(
                f"swap: groups={groups} with to={to!r}, which has no groups; write "
                f'to="group", or leave groups out.'
            )
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
    names = ("epsilon", "dtype", "param_dtype", "use_bias", "use_scale", "bias_init", "scale_init")
    options = {name: getattr(layer, name) for name in names if hasattr(layer, name)}
    # Flax's fast variance is E[x²] - E[x]², which cancels at large means. jaxbn's layers do not.
    options["use_fast_variance"] = False
    return options | ({"num_groups": groups} if to == "group" else {})


def _apply_swapped(
    apply: Callable[..., Any],
    to: str,
    groups: Mapping[str, int | None],
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
        # The norm works in the old layer's scope, so it finds scale and bias under their paths.
        norm = getattr(nn, NORMS[to])(
            **_kept_options(call.layer, to, groups[call.path]),
            force_float32_reductions=call.layer.force_float32_reductions,
            parent=call.layer.scope,
        )
        y = norm(call.x, mask=_full_mask(call.mask, call.weights, call.x))
        return finish(y, getattr(call.layer, "activation", None), call.residual), None

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
