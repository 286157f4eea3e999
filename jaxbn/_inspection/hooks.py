"""A hook sees, and may answer, every call of a batch norm layer; the model stays as it is.

The layers may be Flax's own or those of this library, linen's or nnx's.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax

from jaxbn._inspection import nnx_classes
from jaxbn._inspection.layers import is_nnx, join, nnx_layers, unboxed
from jaxbn._inspection.stacking import a_place_for_each, packed, unpacked
from jaxbn._inspection.stand_ins import is_replaced
from jaxbn._misuse import misuse
from jaxbn._op.moments import moments
from jaxbn._op.pooling import merge
from jaxbn._op.state import Moments

# Name of the variable, beside mean and var, that holds the record; see `_own_name`.
OBSERVED = "jaxbn_observed"
PATH = "jaxbn_path"  # attribute of a hooked nnx layer: its path, which the layer does not know


class Call(NamedTuple):
    """One call of a batch norm layer, as a hook gets it.

    >>> from jaxbn import calls
    >>> calls.Call._fields[-2:]
    ('domain', 'labels')
    """

    layer: Any  # the Flax module, with axis, momentum, epsilon, axis_name
    x: jax.Array
    mask: jax.Array | None  # of the call; True for cells that count
    train: bool  # whether the model asked the layer to normalize by the batch
    path: str = ""  # as in `layers.find`
    residual: jax.Array | None = None  # of the call; added to y before the layer's activation
    update_stats: bool = True  # of the call; False: the layer learns nothing
    renorm: Any = None  # of the call; None: the layer's own
    weights: jax.Array | None = None  # of the call: the share of each cell in the statistics
    domain: Any = None  # of the call: the set of statistics of x, or of each row
    labels: Any = None  # of the call: the scale and bias of x, or of each row


Hook = Callable[[Call, Callable[..., jax.Array]], tuple[jax.Array, Any]]

_hooks_around: ContextVar[int] = ContextVar("jaxbn_hooks_around", default=0)


def batch_moments(call: Call, run: Callable[[bool], jax.Array]) -> tuple[jax.Array, Any]:
    """The default hook: run the layer as called, and record the moments of x.

    The moments are pooled over devices exactly where the layer pools its own.

    Args:
      call: the call of the layer.
      run: `run(train)` is the layer itself.

    Returns:
      `(y, Moments)`, with count [] and mean and var [C].

    >>> import jaxbn, jax.numpy as jnp
    >>> from jaxbn import calls
    >>> call = calls.Call(jaxbn.linen.BatchNorm(), jnp.eye(2), None, True)
    >>> y, seen = calls.batch_moments(call, lambda train: call.x)
    >>> seen.mean.tolist()
    [0.5, 0.5]
    """
    return run(call.train), pooled(call, call.mask)


def pooled(call: Call, mask: jax.Array | None) -> Moments:
    """The moments of those cells of x where the mask is True, under the weights of the call.

    The moments are pooled over devices exactly where the layer pools its own. Use it in a hook that
    needs another mask than the call's.

    Args:
      call: the call of the layer.
      mask: booleans that broadcast to the shape of x; None for all cells.

    Returns:
      `Moments` with count [] and mean and var [C]; of a layer with domains [domains, C] each, with
      count 0 where a domain has no row.

    >>> import jaxbn, jax.numpy as jnp
    >>> from jaxbn import calls
    >>> call = calls.Call(jaxbn.linen.BatchNorm(), jnp.eye(2), None, True)
    >>> calls.pooled(call, jnp.array([[True], [False]])).mean.tolist()
    [1.0, 0.0]
    """
    layer = call.layer
    return moments(
        call.x,
        layer.axis,
        mask,
        layer.axis_name,
        layer.axis_index_groups,
        call.weights,
        call.domain,
        getattr(layer, "domains", None),
    )


def check_apply(call: str, apply: Any, write: str) -> None:
    """Refuse what is not a linen model's `apply`; any function may be one.

    Args:
      call: the public call that was given `apply`, for the error.
      apply: what was given.
      write: the line to write instead, for the error.

    Raises:
      TypeError: apply is a module, or cannot be called, as variables cannot.

    >>> import jaxbn
    >>> from jaxbn import calls
    >>> calls.check_apply("watch", jaxbn.linen.BatchNorm().apply, "watch(model.apply)")
    """
    if not callable(apply) or is_nnx(apply) or hasattr(apply, "apply"):
        raise TypeError(
            f"{call}: called with {type(apply).__name__}, expected a linen model's apply; write "
            f"{write}."
        )


def hooked_apply(
    apply: Callable[..., Any], hook: Hook = batch_moments, combine: Callable[..., Any] = merge
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """A linen model's `apply` whose batch norm layers are run by a hook.

    Use it to look at what reaches the layers, or to let them answer otherwise. It works under every
    transform of Flax and JAX, `nn.scan`, `nn.remat` and `nn.vmap` among them.

    Args:
      apply: `net.apply`, or a function that passes its keywords on to it.
      hook: `hook(call, run)` returns `(y, record)`. `run(train)` is the layer itself, in the mode
        that you pass; keywords replace those of the call. Train mode updates the statistics, so a
        hook that wants both modes runs eval mode first. A record is a pytree of arrays, or None to
        record nothing.
      combine: `combine(record, record)` gives the record of a layer that is called twice.

    Returns:
      A function with apply's arguments that returns `(what apply returns, path → record)`. Under
      `nn.scan` and `nn.vmap`, on whichever axis they stack the variables, an array of a record is
      [layers, …]. `Moments` are stacked as the layer's statistics are, so that their mean has the
      shape of the running mean and their count broadcasts to it.

    Raises:
      TypeError: apply is a model, its variables, or anything else that is not a function; or, in
        the call, apply does not pass `mutable=` on, or returns something else.
      ValueError: a transform shares or carries batch_stats, so that the records of its turns have
        no place; or whatever the model raises.

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

    check_apply("hooked_apply", apply, "calls.hooked_apply(model.apply)")

    def intercept(name: str, layer_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        its_call = isinstance(layer, nn.BatchNorm) and context.method_name == "__call__"
        if not its_call or layer.is_initializing() or is_replaced(layer):
            return layer_call(*args, **kwargs)
        x, given, mask, more = _arguments(*args, **kwargs)
        constructed = layer.use_running_average
        mode = nn.merge_param("use_running_average", constructed, given)

        def run(train: bool, **changed: Any) -> jax.Array:
            # A layer with a mode in its constructor refuses a mode in its call.
            object.__setattr__(layer, "use_running_average", None)
            try:
                return layer_call(x, not train, mask=mask, **more | changed)
            finally:
                object.__setattr__(layer, "use_running_average", constructed)
                # Flax rewinds the scope after a call, so that a second call finds the variables
                # of the first. This does the same between two runs in one call.
                object.__setattr__(layer, "scope", layer.scope.rewound())

        y, record = hook(Call(layer, x, mask, not mode, join("", *layer.path), **_kept(more)), run)
        if record is not None:
            if not layer.is_mutable_collection("batch_stats"):
                raise _dropped("apply runs the model with batch_stats immutable")
            # The record is stored in batch_stats, because nn.scan, nn.vmap and nn.remat carry that
            # collection already. They would drop a collection of our own.
            if layer.has_variable("batch_stats", name):
                record = combine(unpacked(layer.get_variable("batch_stats", name)), record)
            mean = unboxed(layer.get_variable("batch_stats", "mean"))
            rank = 1 if mean is None else mean.ndim  # None: a norm of one sample stands in
            layer.put_variable("batch_stats", name, packed(record, rank))
        return y

    @functools.wraps(apply)
    def hooked(variables: Any, *args: Any, mutable: Any = False, **kwargs: Any) -> Any:
        with (
            _own_name() as name,
            nn.intercept_methods(functools.partial(intercept, name)),
            a_place_for_each(),
        ):
            pair = apply(
                variables, *args, mutable=union_filters(mutable, ["batch_stats"]), **kwargs
            )
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise _dropped(f"apply returned {'None' if pair is None else type(pair).__name__}")
        out, updates = pair[0], dict(pair[1])
        stats, seen = _without_records(updates.get("batch_stats", {}), name)
        if mutable is False:
            return out, seen
        if in_filter(mutable, "batch_stats") and stats:
            updates["batch_stats"] = stats
        else:
            updates.pop("batch_stats", None)
        return (out, updates), seen

    return hooked


def _dropped(what: str) -> TypeError:
    """The error for an apply that keeps `mutable=` to itself, or what linen returns for it."""
    return TypeError(
        f"hooked_apply: {what}, expected a function that passes mutable= on to linen and returns "
        f"(y, updates); write functools.partial(net.apply, train=False), or "
        f"lambda variables, batch, **kwargs: net.apply(variables, batch[0], **kwargs)."
    )


@contextmanager
def hooked_nnx(
    model: Any, hook: Hook = batch_moments, combine: Callable[..., Any] = merge
) -> Iterator[dict[str, Any]]:
    """A context in which a hook runs the batch norm layers of an nnx model.

    Use it for nnx as `hooked_apply` for linen. The model is not copied, so calls in the context
    update the model's own statistics. The context may stand inside a jitted step.

    Args:
      model: an nnx model.
      hook: as in `hooked_apply`. Pass the same function each time: nnx.jit compiles a step again
        for a new function.
      combine: as in `hooked_apply`.

    Yields:
      A dict that is filled when the context ends: path → record of each layer that was called.

    Raises:
      TypeError: model is not an nnx model.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from jaxbn import calls
    >>> model = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    >>> with calls.hooked_nnx(model) as seen:
    ...     y = model(jnp.eye(2))
    >>> seen[""].mean.tolist()
    [0.5, 0.5]
    """
    with _own_name() as name, a_place_for_each():
        yield from _hooked_layers(model, hook, combine, name)


def _hooked_layers(
    model: Any, hook: Hook, combine: Callable[..., Any], name: str
) -> Iterator[dict[str, Any]]:
    found = list(nnx_layers(model))
    if not (found or is_nnx(model)):
        write = "calls.hooked_nnx(model), or calls.hooked_apply(model.apply) of linen"
        raise misuse("hooked_nnx", [model], "an nnx model", write)
    # A context around this one has set its layers' paths already, and will delete them.
    named = [layer for _, layer in found if not hasattr(layer, PATH)]
    seen: dict[str, Any] = {}
    for path, layer in found:
        cls: Any = type(layer)
        nnx_classes.exchange(
            layer, nnx_classes.subclass(cls, cls.__name__, _hooked_call, hook, combine, name)
        )
        setattr(layer, PATH, path)
    try:
        yield seen
    finally:
        for path, layer in found:
            nnx_classes.restore(layer)
            if hasattr(layer, name):
                seen[path] = unpacked(getattr(layer, name).get_value())
                delattr(layer, name)
        for layer in named:
            delattr(layer, PATH)


@contextmanager
def _own_name() -> Iterator[str]:
    """The name of one hook's records. Hooks around this hook, and inside, have other names."""
    around = _hooks_around.get()
    token = _hooks_around.set(around + 1)
    try:
        yield f"{OBSERVED}_{around}" if around else OBSERVED
    finally:
        _hooks_around.reset(token)


def _hooked_call(
    cls: Any, hook: Hook, combine: Callable[..., Any], name: str
) -> Callable[..., Any]:
    """The `__call__` of an nnx layer that lets the hook run the layer, and keeps the record."""
    from flax import nnx

    def __call__(self: Any, *args: Any, **kwargs: Any) -> jax.Array:  # noqa: N807
        x, given, mask, more = _arguments(*args, **kwargs)
        mode = nnx.module.first_from(
            given, self.use_running_average, error_msg="BatchNorm: use_running_average is not set"
        )
        call = Call(self, x, mask, not mode, getattr(self, PATH), **_kept(more))

        def run(train: bool, **changed: Any) -> jax.Array:
            return cls.__call__(self, x, not train, mask=mask, **more | changed)

        y, record = hook(call, run)
        if record is not None:
            if hasattr(self, name):
                record = combine(unpacked(getattr(self, name).get_value()), record)
            # A `BatchStat`, so that nnx.scan and nnx.vmap put it on the axis of the statistics.
            setattr(self, name, nnx.BatchStat(packed(record, self.mean.get_value().ndim)))
        return y

    return __call__


def _arguments(
    x: Any, use_running_average: Any = None, *, mask: Any = None, **more: Any
) -> tuple[Any, ...]:
    return x, use_running_average, mask, more


def _kept(more: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of a layer's call that a `Call` has."""
    return {name: v for name, v in more.items() if name in Call._fields}


def _without_records(stats: Any, name: str, path: str = "") -> tuple[Any, dict[str, Any]]:
    """batch_stats without the records of this name, and the records: path → record."""
    if not isinstance(stats, Mapping):
        return stats, {}
    kept, seen = {}, {}
    for key, node in stats.items():
        if key == name:
            seen[path] = unpacked(node)
            continue
        kept[key], inner = _without_records(node, name, join(path, key))
        seen |= inner
    return kept, seen
