"""Another batch norm layer stands in for a layer of a linen model, while the model's apply runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jaxbn._inspection.layers import join
from jaxbn._op.batch_norm import finish

STANDS_IN = "jaxbn_stands_in"  # attribute of a layer that stands in for another

Change = Callable[[str, Any], Any]  # (path, layer) → the layer that stands in, or the layer itself

_changes: ContextVar[tuple[Change, ...]] = ContextVar(
    "jaxbn_changes", default=()
)  # innermost first


@contextmanager
def changed(change: Change) -> Iterator[None]:
    """A context in which the batch norm layers of linen models are those that `change` returns.

    A call of a layer becomes a call of its stand-in, in the scope of the layer. Every interceptor
    sees the call of the stand-in, so hooks see the settings that are in force, wherever they stand:
    around the change or inside of it.

    Args:
      change: `change(path, layer)`. Of several changes, the innermost comes first.
    """
    import flax.linen as nn

    def intercept(layer_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        if not _is_call(layer, context.method_name):
            return layer_call(*args, **kwargs)
        other = _stand_in(layer)
        if other is layer:
            return layer_call(*args, **kwargs)
        if hasattr(other, "unbiased"):  # a layer of this library
            return other(*args, **kwargs)
        # Flax's own layer takes neither.
        residual = kwargs.pop("residual", None)
        return finish(other(*args, **kwargs), getattr(other, "activation", None), residual)

    token = _changes.set((change, *_changes.get()))
    try:
        with nn.intercept_methods(intercept):
            yield
    finally:
        _changes.reset(token)


def is_replaced(layer: Any) -> bool:
    """Whether another layer stands in for this layer of a linen model."""
    return bool(_changes.get()) and not hasattr(layer, STANDS_IN) and _stand_in(layer) is not layer


def _is_call(layer: Any, method: str) -> bool:
    import flax.linen as nn

    its_call = isinstance(layer, nn.BatchNorm) and method == "__call__"
    return its_call and not layer.is_initializing() and not hasattr(layer, STANDS_IN)


def _stand_in(layer: Any) -> Any:
    other, path = layer, join("", *layer.path)
    for change in _changes.get():
        other = change(path, other)
    if other is not layer:
        object.__setattr__(other, STANDS_IN, True)
    return other
