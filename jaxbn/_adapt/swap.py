"""Batch norm out, one of Flax's norms of a single sample in, for batches that are too small."""

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
from jaxbn._text import listed

NORMS = {"group": "GroupNorm", "layer": "LayerNorm", "instance": "InstanceNorm"}


class Row(NamedTuple):
    """What became of one layer."""

    norm: str  # Flax's class
    groups: int | None  # of a GroupNorm
    kept: tuple[str, ...]  # parameters
    dropped: tuple[str, ...]  # statistics, which the new norm has none of


class Swapped(NamedTuple):
    """What `swap` returns."""

    model: Any  # in place of net.apply; or the nnx model
    variables: Any  # linen's; None for nnx
    report: dict[str, Row]  # path → row


def swap(
    model: Any,
    variables: Any = None,
    to: str = "group",
    where: Where = "*",
    *,
    groups: int | None = None,
) -> Swapped:
    """The model with Flax's own GroupNorm, LayerNorm or InstanceNorm in place of batch norm.

    Scale, bias, epsilon, the dtypes and the masks of the calls stay, under the same names: an
    optimizer, a checkpoint and the model's source are used as they were. Running statistics
    go, and with them what is about a batch: momentum, axis_name, the mode of the call. The
    network is another function and wants training. Wu & He 2018, "Group Normalization".

    Args:
      model: linen's `net.apply`, or an nnx model, which is changed.
      variables: linen's.
      to: "group"; "layer" (over the features of each position, as in a transformer), or
        "instance" (over the positions of each feature, of which there must be some).
      where: the layers to swap: a glob over the paths, several, or a predicate.
      groups: how many in a GroupNorm; None for the most, up to 32, that divide the features
        into groups of 8 or more.

    Returns:
      `Swapped(model, variables, report)`.

    Raises:
      TypeError: linen's apply without variables, or a linen model or its variables as model.
      ValueError: no such layer, an unknown norm, or groups that do not divide the features;
        features that are not on the last axis, when linen's apply is called.

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
            f'apply and its variables, "params" and "batch_stats": swap(net.apply, variables).'
        )
    if to not in NORMS:
        raise ValueError(f"swap: to={to!r}, expected one of {list(NORMS)}.")
    if not nnx_model:
        check_apply("swap", model, "swap(net.apply, variables)")
    chosen = select("swap", model if nnx_model else variables, where)
    grouped = _groups(to, chosen, groups)
    report = {
        path: Row(
            NORMS[to],
            grouped[path],
            tuple(name for name, v in layer.params._asdict().items() if v is not None),
            tuple(name for name, v in layer.state._asdict().items() if v is not None),
        )
        for path, layer in chosen.items()
    }
    if not nnx_model:
        kept = {**variables, "batch_stats": _without(variables["batch_stats"], chosen)}
        # No closure: this pickles where apply does.
        swapped = functools.partial(_apply_swapped, model, to, grouped)
        return Swapped(swapped, type(variables)(kept), report)
    found = {path: layer for path, layer in layers.nnx_layers(model) if path in chosen}
    _check_last(to, {path: layer.axis for path, layer in found.items()})
    for path, layer in found.items():
        new = _nnx(layer, to, grouped[path])
        # The object stays, for lists, dicts and other layers that hold it.
        nnx_classes.exchange(layer, type(new))
        vars(layer).clear()
        vars(layer).update(vars(new))
    return Swapped(model, None, report)


def _groups(to: str, chosen: Mapping[str, Layer], groups: int | None) -> dict[str, int | None]:
    """Path → number of groups; every layer that refuses it in one error."""
    features = {path: layer.state.mean.shape[-1] for path, layer in chosen.items()}
    if to != "group":
        if groups is not None:
            raise ValueError(f'swap: groups={groups} with to={to!r}, which has none; to="group".')
        return dict.fromkeys(features)
    if groups is None:
        return {path: _sensible(n) for path, n in features.items()}
    bad = [f"{path} ({n})" for path, n in features.items() if groups < 1 or n % groups]
    if bad:
        common = math.gcd(*features.values())
        fitting = [d for d in range(1, common + 1) if common % d == 0]
        raise ValueError(
            f"swap: groups={groups} does not divide the features of {listed(bad)}; expected one of "
            f"{fitting}, which divide those of all, or None to choose for each layer."
        )
    return dict.fromkeys(features, groups)


def _sensible(features: int) -> int:
    """The most groups, up to 32 as in the paper, that leave 8 features or more in each.

    Fewer than that make of a dense layer's few values little but their signs.
    """
    most = max(1, min(32, features // 8))
    return max(d for d in range(1, most + 1) if features % d == 0)


def _options(layer: Any, to: str, groups: int | None) -> dict[str, Any]:
    """What the new norm takes from the old one."""
    names = ("epsilon", "dtype", "param_dtype", "use_bias", "use_scale", "bias_init", "scale_init")
    options = {name: getattr(layer, name) for name in names if hasattr(layer, name)}
    # E[x²] - E[x]² cancels at large means; jaxbn's layers never computed it.
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
        # In the layer's own scope, so that it finds scale and bias where they are.
        norm = getattr(nn, NORMS[to])(
            **_options(call.layer, to, groups[call.path]),
            force_float32_reductions=call.layer.force_float32_reductions,
            parent=call.layer.scope,
        )
        return norm(call.x, mask=_full(call.mask, call.x)), None

    out, _ = hooked_apply(apply, other_norm)(variables, *args, mutable=mutable, **kwargs)
    if mutable is False or not in_filter(mutable, "batch_stats"):
        return out
    # A training step that asks for the new batch_stats gets them, with nothing in them.
    return out[0], {"batch_stats": {}, **out[1]}


def _nnx(layer: Any, to: str, groups: int | None) -> Any:
    """The new norm, with the very variables of the old one."""
    from flax import nnx

    options = _options(layer, to, groups) | {"promote_dtype": layer.promote_dtype}
    cls: Any = nnx_classes.subclass(getattr(nnx, NORMS[to]), NORMS[to], _swapped_call, to)
    new = cls(layer.num_features, **options, rngs=nnx.Rngs(0))
    new.scale, new.bias = layer.scale, layer.bias
    return new


def _swapped_call(cls: Any, to: str) -> Callable[..., jax.Array]:
    """The call of Flax's own norm with the arguments of a batch norm."""

    def __call__(  # noqa: N807
        self: Any, x: jax.Array, use_running_average: bool | None = None, *, mask: Any = None
    ) -> jax.Array:
        _check_last(to, {}, x)
        return cls.__call__(self, x, mask=_full(mask, x))

    return __call__


def _check_last(to: str, axes: Mapping[str, Any], x: jax.Array | None = None) -> None:
    """Features are on the last axis, and an instance has positions."""
    last = (-1,) if x is None else (-1, x.ndim - 1)
    bad = [f"{path} (axis={axis})" for path, axis in axes.items() if axis not in last]
    if bad:
        raise ValueError(
            f"swap: {NORMS[to]} has its features on the last axis, but not so {listed(bad)}; write "
            f"axis=-1 where they are, or leave the layers out by where=."
        )
    if to == "instance" and x is not None and x.ndim < 3:
        raise ValueError(
            f"swap: InstanceNorm of x with shape {x.shape}, but it normalizes over the positions "
            f'between the first axis and the last, and there are none; write to="group".'
        )


def _full(mask: Any, x: jax.Array) -> Any:
    """Flax's GroupNorm reshapes the mask as it does x."""
    return None if mask is None else jnp.broadcast_to(jnp.asarray(mask, bool), x.shape)


def _without(stats: Any, paths: Mapping[str, Any], at: str = "") -> Any:
    """batch_stats without those of the layers at these paths, nor what is empty then."""
    if at in paths:
        return {}
    if not isinstance(stats, Mapping):
        return stats
    like: Any = type(stats)
    inner = {k: _without(v, paths, layers.join(at, k)) for k, v in stats.items()}
    return like({k: v for k, v in inner.items() if not isinstance(v, Mapping) or v})
