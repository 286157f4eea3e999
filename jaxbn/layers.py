"""The batch norm layers of a model or a checkpoint: where they stand and what they hold."""

import functools
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbn.axes import wide
from jaxbn.state import Params, State


class Layer(NamedTuple):
    """What one batch norm layer holds; leaves may be stacked [layers, C] where it was scanned."""

    params: Params  # scale and bias; either None where the layer has none
    state: State  # mean, var; count None where updates are not counted


def find(tree: Any) -> dict[str, Layer]:
    """Path → what the layer there holds, in the tree's order.

    Args:
      tree: linen's variables (`params` and `batch_stats`, or batch_stats alone), an nnx module or
        its state, or a tree of dicts with `Params` and `State` or mappings that hold "mean" and
        "var" in it; or what was found. Shapes in place of arrays do as well, and gradients under
        `params`.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from jaxbn import layers
    >>> model = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True)])
    >>> found = layers.find(model.init(jax.random.key(0), jnp.ones((1, 2))))
    >>> [(path, layer.state.var.shape) for path, layer in found.items()]
    [('layers_1', (3,))]
    """
    if isinstance(tree, Mapping) and tree and all(isinstance(v, Layer) for v in tree.values()):
        return dict(tree)
    tree = _plain(tree)
    stats = _plain(tree.get("batch_stats", tree)) if isinstance(tree, Mapping) else tree
    weights = _plain(tree.get("params", {})) if stats is not tree else stats
    return {path: _layer(node, _at(weights, path)) for path, node in _nodes(stats)}


def replace(tree: Any, states: Mapping[str, State]) -> Any:
    """The tree with the running statistics of the layers at these paths in place of their own.

    A tree of arrays returns as a new one; an nnx module is updated, as Flax's own training
    updates it, and returned. Leaves keep their dtype, but mean and var narrower than float32
    become float32; `count` enters where it is stored.

    Raises:
      KeyError: no layer is at a path.

    >>> import jax.numpy as jnp, jaxbn
    >>> from jaxbn import layers
    >>> stats = {"bn": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}
    >>> new = layers.replace(stats, {"bn": jaxbn.State(jnp.ones(2), jnp.ones(2), None)})
    >>> new["bn"]["mean"].tolist()
    [1.0, 1.0]
    """
    if missing := sorted(set(states) - set(find(tree))):
        raise KeyError(f"replace: no batch norm layer at {missing}; there are {sorted(find(tree))}")
    if is_nnx(tree):
        from flax import nnx

        modules = dict(nnx_layers(tree))
        for path, state in states.items():
            for name, value in state._asdict().items():
                box = getattr(modules[path], name, None)
                if isinstance(box, nnx.Variable):
                    box.set_value(_cast(value, box.get_value()))
        return tree

    def walk(node: Any, path: str) -> Any:
        if isinstance(node, State) or (isinstance(node, Mapping) and _holds_statistics(node)):
            return _renewed(node, states[path]) if path in states else node
        if isinstance(node, Mapping):
            return _like(node, {k: walk(v, f"{path}/{k}".lstrip("/")) for k, v in node.items()})
        if isinstance(node, (list, tuple)):
            parts = [walk(v, f"{path}/{i}".lstrip("/")) for i, v in enumerate(node)]
            return type(node)(*parts) if hasattr(node, "_fields") else type(node)(parts)
        return node

    if isinstance(tree, Mapping) and "batch_stats" in tree:
        return _like(tree, {**tree, "batch_stats": walk(tree["batch_stats"], "")})
    return walk(tree, "")


def is_nnx(tree: Any) -> bool:
    """Whether it is an nnx module; flax is not imported for the question."""
    nnx = sys.modules.get("flax.nnx")  # no module of nnx is at hand where it was never imported
    return nnx is not None and isinstance(tree, nnx.Module)


def nnx_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Path and module of every batch norm layer of an nnx model."""
    from flax import nnx

    for path, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            yield "/".join(map(str, path)), module


def _plain(tree: Any) -> Any:
    """The tree of arrays of an nnx module or state; any other as it is."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return tree
    if isinstance(tree, nnx.Module):
        tree = nnx.state(tree)
    return nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree


def _holds_statistics(node: Mapping[str, Any]) -> bool:
    return {"mean", "var"} <= set(node) and not isinstance(node["mean"], Mapping)


def _nodes(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, State) or (isinstance(tree, Mapping) and _holds_statistics(tree)):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, node in tree.items():
            yield from _nodes(node, f"{path}/{key}".lstrip("/"))
    elif isinstance(tree, (list, tuple)):
        for i, node in enumerate(tree):
            yield from _nodes(node, f"{path}/{i}".lstrip("/"))


def _at(tree: Any, path: str) -> Any:
    for key in path.split("/") if path else ():
        if isinstance(tree, (list, tuple)):
            tree = dict(enumerate(tree)).get(int(key))
        elif isinstance(tree, Mapping):
            tree = tree.get(key, tree.get(int(key)) if key.isdigit() else None)
        else:
            return None
    return tree


def _layer(stats: Any, weights: Any) -> Layer:
    state = stats if isinstance(stats, State) else State(*map(stats.get, State._fields))
    if isinstance(weights, Params):
        return Layer(weights, state)
    has = isinstance(weights, Mapping)
    return Layer(Params(*(weights.get(k) if has else None for k in Params._fields)), state)


def _renewed(node: Any, state: State) -> Any:
    old = node._asdict() if isinstance(node, State) else node
    new = {
        name: jax.tree.map(functools.partial(_cast, value), old[name])
        for name, value in state._asdict().items()
        if old.get(name) is not None and value is not None
    }
    return node._replace(**new) if isinstance(node, State) else _like(node, {**old, **new})


def _cast(value: Any, leaf: Any) -> Any:
    """The value in the leaf's dtype; statistics in float32 or wider."""
    inexact = jnp.issubdtype(leaf.dtype, jnp.inexact)
    return value.astype(wide(leaf.dtype) if inexact else leaf.dtype)


def _like(tree: Any, items: dict[str, Any]) -> Any:
    """The mapping in tree's own kind: a dict, or Flax's FrozenDict."""
    return type(tree)(items)
