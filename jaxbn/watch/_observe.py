"""A training step that also returns what each batch norm layer saw."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax

from jaxbn._inspection import hooks
from jaxbn._inspection.layers import is_nnx, nnx_layers
from jaxbn._inspection.sketch import mixed, quantiles
from jaxbn._op.pooling import merge
from jaxbn._op.state import Moments
from jaxbn.health._shards import Shards, by_shard


class Observed(NamedTuple):
    """What one layer saw in a step that is watched with options; without, `Moments` alone.

    >>> from jaxbn import watch
    >>> watch.Observed._fields
    ('batch', 'shards', 'quantiles')
    """

    batch: Moments
    shards: Shards | None = None  # with `shards=`; of the first call, if a layer is called twice
    quantiles: jax.Array | None = None  # with `histogram=`


@functools.cache  # nnx.jit compiles a step again for a new hook
def _hook(shards: int | tuple[str, ...] | None, histogram: bool) -> hooks.Hook:
    def observe(call: hooks.Call, run: Callable[[bool], jax.Array]) -> tuple[jax.Array, Observed]:
        y, batch = hooks.batch_moments(call, run)
        return y, Observed(
            batch,
            None if shards is None else by_shard(call, shards),
            quantiles(call) if histogram else None,
        )

    return observe


def _observing(call: str, shards: Any, histogram: bool) -> dict[str, Any]:
    """The keywords of `hooked_apply` and `hooked_nnx` for what is to be observed."""
    if shards is None and not histogram:
        return {}
    names = (shards,) if isinstance(shards, str) else shards
    named = isinstance(names, (tuple, list)) and all(isinstance(name, str) for name in names)
    numbered = isinstance(shards, int) and shards > 0
    if shards is not None and not (numbered or (named and shards)):
        raise ValueError(
            f"{call}: shards={shards!r}, expected the number of parts that the rows are split "
            f"into, or the names of mapped axes; write shards=jax.device_count(), or "
            f'shards="data" under shard_map and pmap.'
        )
    hook = _hook(tuple(names) if named else shards, bool(histogram))
    return {"hook": hook, "combine": _both_calls}


def _both_calls(a: Observed, b: Observed) -> Observed:
    """What a layer that is called twice saw.

    The shards stay those of the first call. A second call brings the same rows: as further rows
    they would make chance look smaller than it is.
    """
    quantiles = a.quantiles
    if quantiles is not None and b.quantiles is not None:
        quantiles = mixed([quantiles, b.quantiles], [a.batch.count, b.batch.count])
    return Observed(merge(a.batch, b.batch), a.shards, quantiles)


def linen(
    apply: Callable[..., Any],
    on: bool = True,
    *,
    shards: int | str | Sequence[str] | None = None,
    histogram: bool = False,
) -> Callable[..., tuple[Any, Any]]:
    """A linen model's `apply` that also returns the moments of each layer's input.

    Call it in the jitted training step, and give the moments to `records`. One step serves with
    `on=True` on some steps and `on=False` on others.

    Args:
      apply: `model.apply`, or a function that passes its keywords on to it.
      on: False calls apply itself, which compiles to the program without watching, and returns {}
        for the moments.
      shards: also record what each shard of the batch holds, for `jaxbn.health.shards` and the
        spread in `metrics`. Under jit, the number of consecutive, equal parts of the rows:
        `jax.device_count()`, or `jax.process_count()` to compare hosts. Under shard_map, pmap and
        vmap, the mapped axes of which each device has a part. Rows are on axis 0 of each layer's x.
        Of a layer that is called twice they are those of the first call: each row counts once.
      histogram: also record how the values of each layer's x are distributed: 64 values that are
        equally probable, from a sample of some 4096. The histogram is `x` in `channels`, and in
        TensorBoard.

    Returns:
      A function with apply's arguments that returns `(what apply returns, path → Moments)`; with
      shards or histogram, path → `Observed`.

    Raises:
      TypeError: apply is a model, its variables, or anything else that is not a function.
      ValueError: shards are neither a number above 0 nor axes; or when called with on=True, apply
        passed through no batch norm layer, or the rows do not divide into shards.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from jaxbn import watch
    >>> model = nn.BatchNorm(use_running_average=False)
    >>> variables = model.init(jax.random.key(0), jnp.ones((1, 2)))
    >>> (y, updates), seen = watch.linen(model.apply)(
    ...     variables, jnp.eye(2), mutable=["batch_stats"]
    ... )
    >>> seen[""].mean.tolist()
    [0.5, 0.5]
    """
    hooks.check_apply("watch.linen", apply, "watch.linen(model.apply), or watch.nnx(model) of nnx")
    if not on:
        return lambda *args, **kwargs: (apply(*args, **kwargs), {})
    hooked = hooks.hooked_apply(apply, **_observing("watch.linen", shards, histogram))

    def watched(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        out, seen = hooked(*args, **kwargs)
        if not seen:
            raise ValueError(
                "watch.linen: apply passed through no batch norm layer, expected flax.linen."
                "BatchNorm or jaxbn.linen.BatchNorm in the model; write watch.linen(model.apply, "
                "on=False) for a model without them."
            )
        return out, seen

    return watched


@contextmanager
def nnx(
    model: Any,
    on: bool = True,
    *,
    shards: int | str | Sequence[str] | None = None,
    histogram: bool = False,
) -> Iterator[dict[str, Any]]:
    """A context for calls of an nnx model that collects the moments of each layer's input.

    Open it in the jitted training step, around `nnx.value_and_grad`, and give the moments to
    `records`.

    Args:
      model: an nnx model, which is called as usual.
      on: False does nothing and leaves the dict empty.
      shards: as in `linen`.
      histogram: as in `linen`.

    Yields:
      A dict that is filled when the context ends: path → `Moments`; with shards or histogram,
      path → `Observed`.

    Raises:
      TypeError: model is not an nnx model.
      ValueError: with on=True, the model has no batch norm layer, or none was called; or shards
        are wrong as in `linen`.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from jaxbn import watch
    >>> model = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    >>> with watch.nnx(model) as seen:
    ...     y = model(jnp.array([[1.0, 3.0], [5.0, 3.0]]))
    >>> watch.records(seen, model)[""].batch.var.tolist()
    [4.0, 0.0]
    """
    if not is_nnx(model):
        raise TypeError(
            f"watch.nnx: called with {type(model).__name__}, expected an nnx model; write with "
            f"watch.nnx(model) as seen: y = model(x), or watch.linen(model.apply) of linen."
        )
    if not on:
        yield {}
        return
    if not list(nnx_layers(model)):
        raise ValueError(
            f"watch.nnx: {type(model).__name__} has no batch norm layer, expected flax.nnx."
            f"BatchNorm or jaxbn.nnx.BatchNorm in the model; write watch.nnx(model, on=False) for "
            f"a model without them."
        )
    with hooks.hooked_nnx(model, **_observing("watch.nnx", shards, histogram)) as seen:
        yield seen
    if not seen:
        raise ValueError(
            f"watch.nnx: no batch norm layer of {type(model).__name__} was called, expected a "
            f"call of the model; write with watch.nnx(model) as seen: y = model(x)."
        )
