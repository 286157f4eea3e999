"""Frozen batch norm: statistics that stay."""

import functools
from collections.abc import Callable, Mapping, Set
from typing import Any

import jax
import numpy as np

from jaxbn._inspection import layers, nnx_classes
from jaxbn._inspection.hooks import Call, check_apply, hooked_apply
from jaxbn._inspection.selection import Where, select
from jaxbn._op.state import State
from jaxbn._text import listed


def freeze(
    model: Any, variables: Any = None, where: Where = "*", *, allow_untrained: bool = False
) -> Any:
    """The model with layers that normalize by their running statistics, in training too.

    Those layers are then `x * a + b` per channel with a and b constant but for scale and bias:
    no statistics of a batch, no update, whatever mode the model is called in. Scale and bias
    are the optimizer's: see `labels` for how they stay as well.

    Args:
      model: linen's `net.apply`, or an nnx model, which is changed.
      variables: linen's variables, to look at; what `apply` is called with later may differ.
      where: the layers to freeze: a glob over the paths (`"stage1/*"`), several, or a predicate.
      allow_untrained: do not refuse layers whose statistics no batch has ever updated.

    Returns:
      A function to use wherever `net.apply` was, which pickles where that does; or the nnx model.
      `unfreeze` undoes the latter.

    Raises:
      TypeError: linen's apply without variables, or a linen model or its variables as model.
      ValueError: no such layer; or some were never updated (count 0, or mean 0 and var 1), which
        would freeze the network at an arbitrary function.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbn
    >>> net = nn.BatchNorm(use_running_average=False)
    >>> variables = net.init(jax.random.key(0), jnp.ones((2, 1)))
    >>> stats = {"mean": jnp.array([1.0]), "var": jnp.array([4.0])}
    >>> apply = jaxbn.freeze(net.apply, variables | {"batch_stats": stats})
    >>> y = apply(variables | {"batch_stats": stats}, jnp.array([[3.0], [5.0]]))
    >>> y.round(3).tolist()
    [[1.0], [2.0]]
    """
    nnx_model = layers.is_nnx(model)
    if not nnx_model and variables is None:
        raise TypeError(
            f"freeze: {type(model).__name__} without variables, expected an nnx model, or linen's "
            f"apply and the variables whose statistics freeze: freeze(net.apply, variables)."
        )
    if not nnx_model:
        check_apply("freeze", model, "freeze(net.apply, variables)")
    chosen = select("freeze", model if nnx_model else variables, where)
    if not allow_untrained:
        _check_updated(chosen)
    if nnx_model:
        for path, layer in layers.nnx_layers(model):
            if path in chosen and not _is_frozen(layer):
                nnx_classes.exchange(layer, frozen_class(type(layer)))
        return model

    # No closure: this pickles where apply does.
    return functools.partial(_apply_frozen, model, frozenset(chosen))


def unfreeze(model: Any, where: Where = "*") -> Any:
    """The nnx model with layers that `freeze` froze as they were before.

    Raises:
      TypeError: it is no nnx model; a linen net's own `apply` was never frozen.
      ValueError: no such layer.

    >>> from flax import nnx
    >>> import jaxbn
    >>> model = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    >>> type(jaxbn.freeze(model, allow_untrained=True)).__name__
    'FrozenBatchNorm'
    >>> type(jaxbn.unfreeze(model)).__name__
    'BatchNorm'
    """
    if not layers.is_nnx(model):
        raise TypeError(
            f"unfreeze: {type(model).__name__} is no nnx model; of linen call net.apply again, "
            f"which freeze(net.apply, variables) left as it was."
        )
    chosen = select("unfreeze", model, where)
    for path, layer in layers.nnx_layers(model):
        if path in chosen and _is_frozen(layer):
            nnx_classes.restore(layer)
    return model


def _check_updated(chosen: Mapping[str, layers.Layer]) -> None:
    traced = [path for path, layer in chosen.items() if _is_traced(layer.state)]
    if traced:
        raise ValueError(
            f"freeze: the statistics of {listed(traced)} have no values while they are traced, so "
            f"nobody knows whether they were ever updated; freeze outside of jit and eval_shape, "
            f"or write allow_untrained=True."
        )
    if fresh := [path for path, layer in chosen.items() if _never_updated(layer.state)]:
        raise ValueError(
            f"freeze: the statistics of {listed(fresh)} were never updated (mean 0 and var 1, or "
            f"count 0), so the layers would be frozen at no normalization at all. Restore a "
            f"checkpoint with its statistics, train, or jaxbn.recalibrate first; or write "
            f"allow_untrained=True."
        )


def _is_traced(state: State) -> bool:
    return any(isinstance(v, (jax.core.Tracer, jax.ShapeDtypeStruct)) for v in state)


def _never_updated(state: State) -> bool:
    """Of any of the layers, where they are stacked [layers, C]."""
    if state.count is not None and np.any(np.asarray(state.count) == 0):
        return True
    mean, var = np.asarray(state.mean), np.asarray(state.var)
    return bool(np.any(np.all((mean == 0) & (var == 1), axis=-1)))


def _apply_frozen(apply: Callable[..., Any], frozen: Set[str], /, *args: Any, **kwargs: Any) -> Any:
    """What a linen model's apply returns, with the layers at these paths frozen."""

    def by_running_statistics(
        call: Call, run: Callable[[bool], jax.Array]
    ) -> tuple[jax.Array, None]:
        return run(call.train and call.path not in frozen), None

    return hooked_apply(apply, by_running_statistics)(*args, **kwargs)[0]


def frozen_class(cls: Any) -> Any:
    """The nnx layer's class, called by its running statistics whatever the call says."""
    return nnx_classes.subclass(cls, f"Frozen{cls.__name__}", _frozen_call)


def _frozen_call(cls: Any) -> Callable[..., jax.Array]:
    def __call__(  # noqa: N807
        self: Any, x: jax.Array, use_running_average: bool | None = None, **kwargs: Any
    ) -> jax.Array:
        return cls.__call__(self, x, True, **kwargs)

    return __call__


def _is_frozen(layer: Any) -> bool:
    return nnx_classes.has_class_of(layer, _frozen_call)
