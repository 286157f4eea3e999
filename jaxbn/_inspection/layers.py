"""The batch norm layers of a model or a checkpoint: their paths, and what they hold."""

import functools
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbn._op.axes import wide
from jaxbn._op.state import Params, State


class Layer(NamedTuple):
    """What one batch norm layer holds. A scanned layer holds arrays [layers, C] in place of [C].

    >>> import jaxbn
    >>> from jaxbn import layers
    >>> layers.Layer(*jaxbn.init(3)).state.mean.shape
    (3,)
    """

    params: Params  # scale and bias; None for the one that the layer does not have
    state: State  # mean and var; count is None if updates are not counted


def find(tree: Any) -> dict[str, Layer]:
    """The batch norm layers of a model: path → `Layer`, in the tree's order.

    Use it to see which layers a model has and what their paths are. All of jaxbn names a layer by
    the path that this function gives: the keys from the root to the layer, with slashes between.

    Args:
      tree: one of: linen's variables (`params` and `batch_stats`, or the batch_stats alone); an
        nnx module or its state; a tree of dicts and lists that holds `State`s and `Params`, or
        mappings with arrays "mean" and "var"; a result of `find`. The leaves may be arrays,
        `ShapeDtypeStruct`s or, in `params`, gradients. They may stand in Flax's boxes
        (`nn.with_partitioning`).

    Returns:
      Path → `Layer`, whose arrays are [C], or [layers, C] where the layer was scanned. No arrays
      are copied. The dict is empty for a tree without batch norm.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from jaxbn import layers
    >>> model = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True)])
    >>> found = layers.find(model.init(jax.random.key(0), jnp.ones((1, 2))))
    >>> [(path, layer.state.var.shape) for path, layer in found.items()]
    [('layers_1', (3,))]
    """
    if isinstance(tree, Mapping) and tree and all(isinstance(v, Layer) for v in tree.values()):
        return dict(tree)
    tree = plain(tree)
    stats = plain(tree.get("batch_stats", tree)) if isinstance(tree, Mapping) else tree
    weights = plain(tree.get("params", {})) if stats is not tree else stats
    return {
        path: Layer(_params_of(_at(weights, path)), state_of(node)) for path, node in _nodes(stats)
    }


def replace(tree: Any, states: Mapping[str, State]) -> Any:
    """The tree with other running statistics in the layers at these paths.

    Use it to put statistics that you computed yourself into a model. `jaxbn.recalibrate` and
    `jaxbn.reset` end with it.

    Args:
      tree: as in `find`.
      states: path → `State` with arrays of the shapes that the layer holds. `count` is used only
        where the layer stores a count.

    Returns:
      A new tree of the same structure. An nnx module is updated in place, as Flax's own training
      updates it, and returned. Each array keeps its dtype, but mean and var narrower than float32
      become float32.

    Raises:
      KeyError: the tree has no layer at one of the paths.

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
        if holds_statistics(node):
            return with_state(node, states[path]) if path in states else node
        if isinstance(node, Mapping):
            return _like(node, {key: walk(v, join(path, key)) for key, v in node.items()})
        if isinstance(node, (list, tuple)):
            parts = [walk(v, join(path, i)) for i, v in enumerate(node)]
            return type(node)(*parts) if hasattr(node, "_fields") else type(node)(parts)
        return node

    if isinstance(tree, Mapping) and "batch_stats" in tree:
        return _like(tree, {**tree, "batch_stats": walk(tree["batch_stats"], "")})
    return walk(tree, "")


def join(path: str, *keys: Any) -> str:
    """The path of what stands below `path` at these keys; the path of the root is "".

    >>> from jaxbn import layers
    >>> layers.join("", "stage1", 0), layers.join("stage1/0", "bn")
    ('stage1/0', 'stage1/0/bn')
    """
    return "/".join(map(str, (path, *keys) if path else keys))


def holds_statistics(node: Any) -> bool:
    """Whether a node of a tree is the statistics of one layer.

    Such a node is a `State`, or a mapping in which "mean" and "var" are arrays. If "mean" and "var"
    are mappings themselves, they are modules with these names, as the heads of a VAE often are.

    >>> import jax.numpy as jnp
    >>> from jaxbn import layers
    >>> stats = {"mean": jnp.zeros(2), "var": jnp.ones(2)}
    >>> layers.holds_statistics(stats), layers.holds_statistics({"mean": stats, "var": stats})
    (True, False)
    """
    if isinstance(node, State):
        return True
    if not isinstance(node, Mapping) or not {"mean", "var"} <= set(node):
        return False
    return jax.tree_util.all_leaves([unboxed(node["mean"]), unboxed(node["var"])])


def state_of(node: Any) -> State:
    """The `State` in a node that `holds_statistics`, without boxes.

    >>> from jaxbn import layers
    >>> layers.state_of({"mean": 0.0, "var": 1.0})
    State(mean=0.0, var=1.0, count=None)
    """
    return State(*map(unboxed, node if isinstance(node, State) else map(node.get, State._fields)))


def with_state(node: Any, state: State) -> Any:
    """The node, which `holds_statistics`, with the arrays of `state` in place of its own.

    Arrays enter the boxes and take the dtypes as `replace` says.

    >>> import jax.numpy as jnp, jaxbn
    >>> from jaxbn import layers
    >>> node = {"mean": jnp.zeros(1), "var": jnp.ones(1)}
    >>> layers.with_state(node, jaxbn.State(jnp.ones(1), jnp.ones(1), None))["mean"].tolist()
    [1.0]
    """
    old = node._asdict() if isinstance(node, State) else node
    new = {
        # A box is a pytree around one array, so the new array comes into a box of the same kind.
        name: jax.tree.map(functools.partial(_cast, value), old[name])
        for name, value in state._asdict().items()
        if old.get(name) is not None and value is not None
    }
    return node._replace(**new) if isinstance(node, State) else _like(node, {**old, **new})


def unboxed(value: Any) -> Any:
    """The array in one of Flax's boxes (`nn.Partitioned`, an nnx variable); any other value as is.

    >>> import flax.linen as nn
    >>> from jaxbn import layers
    >>> layers.unboxed(nn.Partitioned(1.0, names=("model",)))
    1.0
    """
    # If the program has not imported Flax, the value is not a box. Importing Flax takes long.
    meta, nnx = sys.modules.get("flax.core.meta"), sys.modules.get("flax.nnx")
    if meta is not None and isinstance(value, meta.AxisMetadata):
        (value,) = jax.tree.leaves(value)  # the method `unbox` would also constrain its sharding
    elif nnx is not None and isinstance(value, nnx.Variable):
        value = value.get_value()
    return value


def is_nnx(tree: Any) -> bool:
    """Whether the tree is an nnx module. The question does not import Flax.

    >>> from flax import nnx
    >>> from jaxbn import layers
    >>> layers.is_nnx(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    True
    """
    nnx = sys.modules.get("flax.nnx")  # if the program has not imported it, no module is nnx's
    return nnx is not None and isinstance(tree, nnx.Module)


def nnx_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """The path and the module of every batch norm layer of an nnx model.

    >>> from flax import nnx
    >>> from jaxbn import layers
    >>> model = nnx.Sequential(nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
    >>> [path for path, _ in layers.nnx_layers(model)]
    ['layers/0']
    """
    from flax import nnx

    for path, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            yield join("", *path), module


def plain(tree: Any) -> Any:
    """The arrays of an nnx module or state as a tree of dicts; any other tree as it is.

    >>> from jaxbn import layers
    >>> layers.plain({"scale": 1.0})
    {'scale': 1.0}
    """
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return tree
    if isinstance(tree, nnx.Module):
        tree = nnx.state(tree)
    return nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree


def _nodes(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The path and the node of the statistics of every layer.

    JAX's own walk is not used, because JAX sorts the keys of dicts.
    """
    if holds_statistics(tree):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, node in tree.items():
            yield from _nodes(node, join(path, key))
    elif isinstance(tree, (list, tuple)):
        for i, node in enumerate(tree):
            yield from _nodes(node, join(path, i))


def _at(tree: Any, path: str) -> Any:
    """The node at a path; None if there is none."""
    for key in path.split("/") if path else ():
        if isinstance(tree, (list, tuple)):
            tree = dict(enumerate(tree)).get(int(key))
        elif isinstance(tree, Mapping):
            tree = tree.get(key, tree.get(int(key)) if key.isdigit() else None)
        else:
            return None
    return tree


def _params_of(node: Any) -> Params:
    if isinstance(node, Params):
        return Params(*map(unboxed, node))
    held = node if isinstance(node, Mapping) else {}
    return Params(*(unboxed(held.get(name)) for name in Params._fields))


def _cast(value: Any, old: Any) -> Any:
    """The value in the dtype of the array that it replaces; statistics in float32 or wider."""
    dtype = jnp.result_type(old)
    return value.astype(wide(dtype) if jnp.issubdtype(dtype, jnp.inexact) else dtype)


def _like(tree: Any, items: dict[str, Any]) -> Any:
    """The items as a mapping of the tree's own type: a dict, or Flax's FrozenDict."""
    return type(tree)(items)
