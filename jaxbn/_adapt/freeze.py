"""Frozen batch norm: running statistics that training uses and does not change."""

import functools
from collections.abc import Callable, Mapping, Set
from typing import Any

import jax
import numpy as np

from jaxbn._inspection import layers, nnx_classes
from jaxbn._inspection.hooks import Call, check_apply, hooked_apply
from jaxbn._inspection.selection import Where, select
from jaxbn._misuse import misuse
from jaxbn._op.arguments.values import check_flag
from jaxbn._op.state import State
from jaxbn._text import listed


def freeze(
    model: Any, variables: Any = None, where: Where = "*", *, allow_untrained: bool = False
) -> Any:
    """The model with some batch norm layers in eval mode, whatever mode the model is called in.

    Use it to fine-tune a trained network on few rows or small batches, whose statistics would be
    noise. A frozen layer equals `x * a + b` per channel: no statistics of the batch enter it, and
    its running statistics do not change. The optimizer still changes scale and bias; `labels` tells
    how to keep those too.

    Args:
      model: linen's `net.apply`, or an nnx model, which is changed in place.
      variables: linen's variables, from which the layers are read. The frozen apply may be called
        with others.
      where: the layers to freeze: a glob over the paths (`"stage1/*"`), several globs, or a
        predicate.
      allow_untrained: accept layers whose statistics no batch has updated.

    Returns:
      For linen, a function to call in place of `net.apply`, which pickles if `net.apply` pickles.
      For nnx, the model; `unfreeze` undoes the change.

    Raises:
      TypeError: linen's apply came without variables or an nnx model with some, the model is a
        linen module or variables, where is none of these three, or allow_untrained is no bool.
      ValueError: there is no such layer, or no batch has updated a layer's statistics (count 0, or
        mean 0 and var 1). Frozen, such a layer would not normalize at all.

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
            f"apply and its variables; write freeze(net.apply, variables)."
        )
    if nnx_model and variables is not None:
        expected = "an nnx model alone, or linen's apply and its variables"
        write = "freeze(model, where=...) or freeze(net.apply, variables)"
        raise misuse("freeze", (model, variables), expected, write)
    if not nnx_model:
        check_apply("freeze", model, "freeze(net.apply, variables)")
    check_flag("freeze", "allow_untrained", allow_untrained, "Write allow_untrained=True.")
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
    """The nnx model with its frozen layers as they were before `freeze`.

    Use it to train the whole network after a frozen phase. For linen, call `net.apply` again, which
    `freeze` did not change.

    Args:
      model: an nnx model, which is changed in place.
      where: the layers, as in `freeze`. Layers that are not frozen stay as they are.

    Returns:
      The model.

    Raises:
      TypeError: the model is not an nnx model.
      ValueError: there is no such layer.

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
            f"unfreeze: {type(model).__name__} is no nnx model; for linen call net.apply, which "
            f"freeze(net.apply, variables) did not change."
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
            f"freeze cannot see whether they were ever updated; freeze outside of jit and "
            f"eval_shape, or write allow_untrained=True."
        )
    if fresh := [path for path, layer in chosen.items() if _never_updated(layer.state)]:
        raise ValueError(
            f"freeze: the statistics of {listed(fresh)} were never updated (mean 0 and var 1, or "
            f"count 0), so the frozen layers would not normalize at all. Restore a checkpoint with "
            f"its statistics, train, or call jaxbn.recalibrate first; or write "
            f"allow_untrained=True."
        )


def _is_traced(state: State) -> bool:
    return any(isinstance(v, (jax.core.Tracer, jax.ShapeDtypeStruct)) for v in state)


def _never_updated(state: State) -> bool:
    """Whether the statistics of a layer, or of one of scanned layers [layers, C], are initial."""
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
    """The nnx layer's class, but a call is in eval mode whatever the caller asks for."""
    return nnx_classes.subclass(cls, f"Frozen{cls.__name__}", _frozen_call)


def _frozen_call(cls: Any) -> Callable[..., jax.Array]:
    def __call__(  # noqa: N807
        self: Any, x: jax.Array, use_running_average: bool | None = None, **kwargs: Any
    ) -> jax.Array:
        return cls.__call__(self, x, True, **kwargs)

    return __call__


def _is_frozen(layer: Any) -> bool:
    return nnx_classes.has_class_of(layer, _frozen_call)
