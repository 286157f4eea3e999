"""What passes through the batch norm layers of a Flax model, seen without changing the model.

For Flax's own layers and for those of this library, linen and nnx.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax

from jaxbn.layers import nnx_layers
from jaxbn.moments import merge, moments
from jaxbn.state import Moments

OBSERVED = "jaxbn_observed"  # the variable beside a layer's mean and var, while it is observed
PATH = "jaxbn_path"  # an attribute of an nnx layer meanwhile: its place, which it knows not itself


class Call(NamedTuple):
    """One call of a batch norm layer."""

    layer: Any  # the Flax module: axis, momentum, epsilon, axis_name, …
    x: jax.Array
    mask: jax.Array | None
    train: bool  # by statistics of the batch
    path: str = ""  # as in layers.find


Hook = Callable[[Call, Callable[[bool], jax.Array]], tuple[jax.Array, Any]]


def batch_moments(call: Call, run: Callable[[bool], jax.Array]) -> tuple[jax.Array, Any]:
    """The hook that changes nothing and records the moments of x, over devices as the layer does.

    >>> import jaxbn, jax.numpy as jnp
    >>> from jaxbn import calls
    >>> call = calls.Call(jaxbn.linen.BatchNorm(), jnp.eye(2), None, True)
    >>> y, seen = calls.batch_moments(call, lambda train: call.x)
    >>> seen.mean.tolist()
    [0.5, 0.5]
    """
    return run(call.train), pooled(call, call.mask)


def pooled(call: Call, mask: jax.Array | None) -> Moments:
    """The moments of the cells of x that the mask takes, over devices as the layer does."""
    layer = call.layer
    groups = layer.axis_index_groups
    return moments(call.x, layer.axis, mask, axis_name=layer.axis_name, axis_index_groups=groups)


def hooked_apply(
    apply: Callable[..., Any], hook: Hook = batch_moments, combine: Callable[..., Any] = merge
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """A linen model's `apply` that returns `(what apply returns, path → what the hook recorded)`.

    `hook(call, run)` returns `(y, record)`: `run(train)` is the layer itself, in either mode; in
    train mode it updates the statistics, so where both are wanted eval mode comes first. Records
    of a layer that is called twice are combined. Works under every Flax and JAX transform,
    `nn.scan` (records stacked as its variables are), `nn.remat` and `nn.vmap` among them, and for
    a model that was called in eval mode.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from jaxbn import calls
    >>> model = nn.Sequential([nn.BatchNorm(use_running_average=True)])
    >>> variables = model.init(jax.random.key(0), jnp.ones((1, 2)))
    >>> y, seen = calls.hooked_apply(model.apply)(variables, jnp.eye(2))
    >>> seen["layers_0"].mean.tolist()
    [0.5, 0.5]
    """
    import flax.linen as nn
    from flax.core.scope import in_filter, union_filters

    def intercept(layer_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        its_call = isinstance(layer, nn.BatchNorm) and context.method_name == "__call__"
        if not its_call or layer.is_initializing():
            return layer_call(*args, **kwargs)
        x, given, mask, more = _arguments(*args, **kwargs)
        constructed = layer.use_running_average
        mode = nn.merge_param("use_running_average", constructed, given)

        def run(train: bool) -> jax.Array:
            # A mode in the constructor refuses another one in the call.
            object.__setattr__(layer, "use_running_average", None)
            try:
                return layer_call(x, not train, mask=mask, **more)
            finally:
                object.__setattr__(layer, "use_running_average", constructed)
                # As Flax after a call: a second one meets the variables of the first.
                object.__setattr__(layer, "scope", layer.scope.rewound())

        y, record = hook(Call(layer, x, mask, not mode, "/".join(layer.path)), run)
        if record is not None:
            # In batch_stats, for that is the collection every transform of the model carries.
            if layer.has_variable("batch_stats", OBSERVED):
                record = combine(layer.get_variable("batch_stats", OBSERVED), record)
            layer.put_variable("batch_stats", OBSERVED, record)
        return y

    @functools.wraps(apply)
    def hooked(variables: Any, *args: Any, mutable: Any = False, **kwargs: Any) -> Any:
        with nn.intercept_methods(intercept):
            out, updates = apply(
                variables, *args, mutable=union_filters(mutable, ["batch_stats"]), **kwargs
            )
        updates = dict(updates)
        stats, seen = _without_records(updates.get("batch_stats", {}))
        if mutable is False:
            return out, seen
        if in_filter(mutable, "batch_stats") and stats:
            updates["batch_stats"] = stats
        else:
            updates.pop("batch_stats", None)
        return (out, updates), seen

    return hooked


@contextmanager
def hooked_nnx(
    model: Any, hook: Hook = batch_moments, combine: Callable[..., Any] = merge
) -> Iterator[dict[str, Any]]:
    """Within it, calls of an nnx model go through the hook; after it, the dict holds the records.

    The model itself, not a copy: its variables, statistics and gradients are its own. May stand
    inside a jitted step. `hook` and `combine` as in `hooked_apply`; give the same function each
    time, or `nnx.jit` compiles anew.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from jaxbn import calls
    >>> model = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    >>> with calls.hooked_nnx(model) as seen:
    ...     y = model(jnp.eye(2))
    >>> seen[""].mean.tolist()
    [0.5, 0.5]
    """
    found = list(nnx_layers(model))
    classes = [type(layer) for _, layer in found]
    named = [layer for _, layer in found if not hasattr(layer, PATH)]  # not by a hook around this
    seen: dict[str, Any] = {}
    for path, layer in found:
        cls: Any = type(layer)
        object.__setattr__(layer, "__class__", _hooked_class(cls, hook, combine))
        setattr(layer, PATH, path)
    try:
        yield seen
    finally:
        for (path, layer), cls in zip(found, classes, strict=True):
            object.__setattr__(layer, "__class__", cls)
            if hasattr(layer, OBSERVED):
                seen[path] = getattr(layer, OBSERVED).get_value()
                delattr(layer, OBSERVED)
        for layer in named:
            delattr(layer, PATH)


@functools.lru_cache(maxsize=64)
def _hooked_class(cls: Any, hook: Hook, combine: Callable[..., Any]) -> Any:
    from flax import nnx

    def __call__(self: Any, *args: Any, **kwargs: Any) -> jax.Array:  # noqa: N807
        x, given, mask, more = _arguments(*args, **kwargs)
        mode = nnx.module.first_from(
            given, self.use_running_average, error_msg="BatchNorm: use_running_average is not set"
        )
        call = Call(self, x, mask, not mode, getattr(self, PATH))

        def run(train: bool) -> jax.Array:
            return cls.__call__(self, x, not train, mask=mask, **more)

        y, record = hook(call, run)
        if record is not None:
            if hasattr(self, OBSERVED):
                record = combine(getattr(self, OBSERVED).get_value(), record)
            setattr(self, OBSERVED, nnx.Intermediate(record))
        return y

    # No mixin: Python refuses to assign a class of another layout to an object.
    return type(cls.__name__, (cls,), {"__call__": __call__, "__module__": cls.__module__})


def _arguments(
    x: Any, use_running_average: Any = None, *, mask: Any = None, **more: Any
) -> tuple[Any, ...]:
    return x, use_running_average, mask, more


def _without_records(stats: Any, path: str = "") -> tuple[Any, dict[str, Any]]:
    """batch_stats as the model keeps them, and path → record."""
    if not isinstance(stats, Mapping):
        return stats, {}
    kept, seen = {}, {}
    for key, node in stats.items():
        if key == OBSERVED:
            seen[path] = node
            continue
        kept[key], inner = _without_records(node, f"{path}/{key}".lstrip("/"))
        seen |= inner
    return kept, seen
