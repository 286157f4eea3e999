"""Other norms in place of a model's batch norms: other batch norms, or norms of one sample."""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import EllipsisType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbn._inspection import layers, nnx_classes, stand_ins
from jaxbn._inspection.hooks import Call, check_apply, hooked_apply
from jaxbn._inspection.layers import Layer
from jaxbn._inspection.selection import Where, select, selects
from jaxbn._op.arguments import check_numbers
from jaxbn._op.axes import is_integer
from jaxbn._op.batch_norm import finish
from jaxbn._op.standardize import standardize as standardize_kernel
from jaxbn._text import listed

NORMS = {"group": "GroupNorm", "layer": "LayerNorm", "instance": "InstanceNorm"}  # without a batch
BATCH_NORMS = ("batch", "flax")
# Option → the batch norms that have it.
OPTIONS = {
    "axis_name": BATCH_NORMS,
    "momentum": BATCH_NORMS,
    "unbiased": ("batch",),
    "virtual_batch_size": ("batch",),
}


class SwappedLayer(NamedTuple):
    """What `swap` did to one layer."""

    norm: str  # the name of Flax's class; with to="batch" jaxbn.linen.BatchNorm, or nnx'
    groups: int | None  # None for a norm other than GroupNorm
    kept: tuple[str, ...]  # names of the parameters and statistics, which the new norm uses
    dropped: tuple[str, ...]  # names of the statistics, which the new norm does not have


class Swapped(NamedTuple):
    """What `swap` returns."""

    model: Any  # for linen, a function to call in place of net.apply; or the nnx model
    variables: Any  # linen's, with the statistics that the new norms have; None for nnx
    report: dict[str, SwappedLayer]  # by path


def swap(
    model: Any,
    variables: Any = None,
    to: str = "group",
    where: Where = "*",
    *,
    groups: int | None = None,
    standardize: Where | None = None,
    axis_name: str | Sequence[str] | EllipsisType | None = ...,
    virtual_batch_size: int | EllipsisType | None = ...,
    unbiased: bool | EllipsisType = ...,
    momentum: float | EllipsisType | None = ...,
) -> Swapped:
    """The model with other norms in place of its batch norms; the model's source stays as it is.

    `to="batch"` puts this library's BatchNorm in place of Flax's, or gives this library's layers
    other options. Use it for a model that you did not write: its statistics are then those of all
    devices (`axis_name`, as PyTorch's `convert_sync_batchnorm` does), of ghost batches, or right
    at large means. Parameters, statistics and everything else that a layer was given stay. The
    network computes what it computed, but for the options and for where Flax's numbers are wrong.
    `to="flax"` is the way back to Flax's BatchNorm.

    `to="group"`, "layer" and "instance" put Flax's own norms of these names in place. Use them when
    batches are too small for their statistics. The new norms use the old scale, bias, epsilon and
    dtypes, and the masks of the calls. The running statistics go, and momentum, axis_name and the
    mode of the call have no effect any more. The network then computes another function and must be
    trained. Wu & He 2018, "Group Normalization".

    Parameters keep their names in either case, so the optimizer and checkpoints stay as they are.

    Args:
      model: linen's `net.apply`, or an nnx model, which is changed in place.
      variables: linen's variables.
      to: "batch", "flax", "group", "layer" (over the features of each position, as in a
        transformer) or "instance" (over the positions of each feature; x [N, ..., C] must have
        positions).
      where: the layers to swap: a glob over the paths, several globs, or a predicate.
      groups: the number of groups of a GroupNorm. None: the largest number up to 32 that divides
        the features into groups of 8 or more.
      standardize: with "group": the convolutions (Flax's Conv) whose kernels are standardized at
        every call, by `jaxbn.standardize`: as `where`, over the paths of the convolutions. Leave
        out those that no norm follows.
      axis_name: with "batch" or "flax": the mapped axes to pool statistics over, or None for those
        of each device. `...`, the default of this option and of those below, is what each layer
        says. Another axis drops the layer's axis_index_groups.
      virtual_batch_size: with "batch": normalize by statistics of groups of this many rows.
      unbiased: with "batch": the running var takes n / (n - 1) times the batch's.
      momentum: with "batch" or "flax": the fraction of the old statistics kept. With "batch" also
        None for the average of all batches from here on: the count of batches starts at 0.

    Returns:
      `Swapped(model, variables, report)`. Linen's model pickles if `net.apply` pickles.

    Raises:
      TypeError: linen's apply came without variables, or the model is a linen module or variables.
      ValueError: there is no such layer, norm or convolution, groups do not divide the features, an
        option is not one of the new norm, or a layer has a call of its own, which would be lost.
        Features are not on the last axis (not with "batch" or "flax"). For linen, what only a call
        shows is raised when the model is called.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbn
    >>> net = nn.Sequential([nn.Conv(16, (1, 1)), nn.BatchNorm(use_running_average=False)])
    >>> variables = net.init(jax.random.key(0), jnp.ones((1, 4, 4, 3)))
    >>> apply, variables, report = jaxbn.swap(net.apply, variables, "batch", axis_name="data")
    >>> y, updates = jax.vmap(  # 8 devices with a row each, as one batch of 8 rows
    ...     lambda x: apply(variables, x, mutable=["batch_stats"]), axis_name="data"
    ... )(jax.random.normal(jax.random.key(0), (8, 1, 4, 4, 3)))
    >>> print(jnp.ptp(updates["batch_stats"]["layers_1"]["mean"], axis=0).max())
    0.0
    >>> apply, variables, report = jaxbn.swap(net.apply, variables, "group")
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
    if to not in (*BATCH_NORMS, *NORMS):
        raise ValueError(f"swap: to={to!r}, expected one of {[*BATCH_NORMS, *NORMS]}.")
    given = {
        "axis_name": axis_name,
        "momentum": momentum,
        "unbiased": unbiased,
        "virtual_batch_size": virtual_batch_size,
    }
    options = {name: v for name, v in given.items() if v is not ...}
    _check_options(to, options, groups, standardize)
    if not nnx_model:
        check_apply("swap", model, "swap(net.apply, variables)")
    chosen = select("swap", model if nnx_model else variables, where)
    if to in BATCH_NORMS:
        return _as_batch_norms(model, variables, to, chosen, options)
    grouped = _groups(to, chosen, groups)
    convolutions: Mapping[str, Any] = {}
    if standardize is not None:
        convolutions = _convolutions(model if nnx_model else variables["params"], standardize)
    report = {
        path: SwappedLayer(NORMS[to], grouped[path], _names(layer.params), _names(layer.state))
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
        _check_tables(path, layer, to)
    for path, layer in found.items():
        new = _new_nnx_norm(layer, to, grouped[path])
        nnx_classes.exchange(layer, type(new))
        vars(layer).clear()
        vars(layer).update(vars(new))
    for convolution in convolutions.values():
        convolution.promote_dtype = Standardizing(convolution.promote_dtype)
    return Swapped(model, None, report)


def _names(held: Any) -> tuple[str, ...]:
    """The names of what a layer has, of its `Params` or `State`."""
    return tuple(name for name, v in held._asdict().items() if v is not None)


def _check_options(
    to: str, options: Mapping[str, Any], groups: int | None, standardize: Where | None
) -> None:
    """Refuses options that the new norm does not have, and values that no layer takes."""
    if standardize is not None and to != "group":
        raise ValueError(
            f'swap: standardize={standardize!r} with to={to!r}, expected to="group"; standardized '
            f"kernels make GroupNorm as good as batch norm on small batches; leave standardize out."
        )
    if groups is not None and to != "group":
        raise ValueError(
            f"swap: groups={groups} with to={to!r}, which has no groups; write "
            f'to="group", or leave groups out.'
        )
    for name, value in options.items():
        if to not in OPTIONS[name]:
            raise ValueError(
                f"swap: {name}={value!r} with to={to!r}, whose norm has no {name}; write "
                f'to="batch", or leave {name} out.'
            )
    axis_name = options.get("axis_name")
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    if names is not None and not (isinstance(names, list | tuple) and names):
        raise TypeError(
            f"swap: axis_name={axis_name!r}, expected the name of a mapped axis, several in a "
            f'tuple, or None for statistics of each device; write axis_name="data".'
        )
    rows = options.get("virtual_batch_size")
    if rows is not None and not (is_integer(rows) and rows > 0):
        raise ValueError(
            f"swap: virtual_batch_size={rows!r}, expected how many rows a group has, an integer "
            f"of at least 1, or None for no groups; write virtual_batch_size=32."
        )
    if not isinstance(unbiased := options.get("unbiased", False), bool):
        raise TypeError(
            f"swap: unbiased={unbiased!r}, expected True or False; write unbiased=True for the "
            f"running variance of PyTorch."
        )
    if "momentum" in options:
        check_numbers("swap", options["momentum"], 0.0)


# Batch norm for batch norm


def _as_batch_norms(
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
            (*_names(layer.params), "mean", "var", *["count"] * _counts(layer, counts)),
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
        _check_tables(path, layer, to)
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
    _check_tables(path, layer, to)
    cls: Any = nn.BatchNorm if to == "flax" else jaxbn.linen.BatchNorm
    names = {field.name for field in dataclasses.fields(cls)} - {"parent", "name"}
    kept = {name: getattr(layer, name) for name in names if hasattr(layer, name)}
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


def _check_tables(path: str, layer: Any, to: str) -> None:
    """Refuses a layer whose domains or classes the new norm cannot have."""
    names = {"flax": ("domains", "classes"), "batch": ()}.get(to, ("affine_per_domain", "classes"))
    for name in names:
        if held := getattr(layer, name, None):
            raise ValueError(
                f"swap: layer {path!r} has {name}={held}, which Flax's norms do not have; leave "
                f"the layer out by where=, or take the arrays of one, as "
                f"jax.tree.map(lambda v: v[0], batch_stats) does, into a model without them."
            )


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
            f"swap: layer {path!r} is a {type(layer).__name__} with a call of its own, which would "
            f"be lost; call jaxbn.unfreeze(model) first if the layer is frozen, or leave the layer "
            f"out by where=."
        )


# Norms that need no batch


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
    names = ("epsilon", "dtype", "param_dtype", "use_bias", "use_scale", "bias_init", "scale_init")
    options = {name: getattr(layer, name) for name in names if hasattr(layer, name)}
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
        _check_tables(call.path, call.layer, to)
        # The norm works in the old layer's scope, so it finds scale and bias under their paths.
        norm = getattr(nn, NORMS[to])(
            **_kept_options(call.layer, to, groups[call.path]),
            force_float32_reductions=call.layer.force_float32_reductions,
            parent=call.layer.scope,
        )
        y = norm(call.x, mask=_full_mask(call.mask, call.weights, call.x))
        return finish(y, getattr(call.layer, "activation", None), call.residual), None

    with nn.intercept_methods(functools.partial(_standardized_call, convolutions)):
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


# Standardized kernels


class Standardizing:
    """The `promote_dtype` of a convolution whose kernel is standardized first."""

    def __init__(self, promote_dtype: Callable[..., Any]):
        self.promote_dtype = promote_dtype

    def __call__(self, *arrays: Any, **options: Any) -> Any:
        """Linen passes x, kernel and bias as they are, nnx as one tuple."""
        x, kernel, bias = arrays[0] if len(arrays) == 1 else arrays
        new = x, standardize_kernel(kernel), bias
        return self.promote_dtype(*((new,) if len(arrays) == 1 else new), **options)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Standardizing) and self.promote_dtype == other.promote_dtype

    def __hash__(self) -> int:
        return hash((Standardizing, self.promote_dtype))


def _standardized_call(
    paths: Collection[str], call: Any, args: Any, kwargs: Any, context: Any
) -> Any:
    """The call of linen's convolution, with a standardized kernel at these paths."""
    import flax.linen as nn

    layer = context.module
    its_call = isinstance(layer, nn.Conv) and context.method_name == "__call__"
    if not its_call or layers.join("", *layer.path) not in paths:
        return call(*args, **kwargs)
    plain = layer.promote_dtype
    object.__setattr__(layer, "promote_dtype", Standardizing(plain))
    try:
        return call(*args, **kwargs)
    finally:
        object.__setattr__(layer, "promote_dtype", plain)


def _convolutions(tree: Any, where: Where) -> dict[str, Any]:
    """The convolutions that `where` selects, at least one: nnx modules, or nodes of linen's params.

    A kernel with one value for each output is left as it is.
    """
    found: dict[str, Any]
    if layers.is_nnx(tree):
        from flax import nnx

        modules = ((layers.join("", *path), module) for path, module in nnx.iter_modules(tree))
        found = {path: m for path, m in modules if isinstance(m, nnx.Conv)}
        kernels = {path: module.kernel.get_value() for path, module in found.items()}
    else:
        found = dict(_with_kernels(tree))
        kernels = {path: layers.unboxed(node["kernel"]) for path, node in found.items()}
    found = {path: found[path] for path, v in kernels.items() if math.prod(v.shape[:-1]) > 1}
    if chosen := {path: node for path, node in found.items() if selects(where, path)}:
        return chosen
    raise ValueError(
        f"swap: standardize={where!r} selects none of the convolutions {listed(found)}; expected a "
        f'glob such as "*" for all, several of them, or a function of the path.'
    )


def _with_kernels(params: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The path and the node of each layer in linen's params that may be a convolution."""
    if not isinstance(params, Mapping):
        return
    kernel = layers.unboxed(params.get("kernel"))
    if len(getattr(kernel, "shape", ())) > 2:
        yield path, params
    for key, node in params.items():
        yield from _with_kernels(node, layers.join(path, key))
