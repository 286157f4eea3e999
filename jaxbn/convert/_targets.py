"""Flax's variables, linen's or nnx's, as slots; and new variables of the same kind."""

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._text import a_kind
from jaxbn.convert._arrays import Role, Slot, Tensor


class Variables(NamedTuple):
    """Parameters and running statistics of a Flax model, one slot an array."""

    slots: list[Slot]
    leaves: list[Any]  # arrays or shapes, one for each slot
    build: Callable[
        [Mapping[str, np.ndarray]], Any
    ]  # path → value gives a new model; all else stays
    problems: list[str]

    def tensors(self) -> list[Tensor]:
        """The variables as a source: each array fits a slot of its own role, unchanged."""

        def form(slot: Slot, array: np.ndarray) -> Callable[[Role], tuple[str, np.ndarray] | None]:
            return lambda role: ("", array) if role.leaf == slot.role.leaf else None

        arrays = list(map(np.asarray, self.leaves))
        both = zip(self.slots, arrays, strict=True)
        return [Tensor(slot.path, slot.layer, form(slot, v), v) for slot, v in both]


def flatten(
    call: str,
    tree: Any,
    transposed: Mapping[str, bool] | None = None,
    flattened: Mapping[str, Any] | None = None,
) -> Variables:
    """The slots of linen's `params` and `batch_stats`, of an nnx module, or of an nnx state.

    Other collections and types of variables (caches, random keys) have no slots and stay.

    Args:
      call: the public call, for errors.
      tree: arrays or shapes (`jax.eval_shape`, `nnx.eval_shape`).
      transposed: layer → `transpose_kernel`, of transposed convolutions. nnx modules have it.
      flattened: layer → (H, W, C), of dense layers after a flattened image and of norms between
        the two; layer → (inputs, outputs), two such sizes or None, of any dense layer.
    """
    transposed, flattened = dict(transposed or {}), dict(flattened or {})
    nnx = sys.modules.get("flax.nnx")  # if nnx was never imported, tree is none of its objects
    if nnx is not None and isinstance(tree, nnx.Module):
        graph, mine, rest = nnx.split(tree, (nnx.Param, nnx.BatchStat), ...)
        for path, module in nnx.iter_modules(tree):
            if isinstance(module, nnx.ConvTranspose):
                transposed.setdefault("/".join(map(str, path)), module.transpose_kernel)
        return _slots(mine, lambda new: nnx.merge(graph, new, rest), 0, transposed, flattened)
    if nnx is not None and isinstance(tree, nnx.State):
        mine, rest = nnx.split_state(tree, (nnx.Param, nnx.BatchStat), ...)
        return _slots(mine, lambda new: nnx.merge_state(new, rest), 0, transposed, flattened)
    if not isinstance(tree, Mapping) or not {"params", "batch_stats"} & set(tree):
        keys = f" of {sorted(map(str, tree))}" if isinstance(tree, Mapping) else ""
        raise TypeError(
            f"{call}: {a_kind(tree)}{keys} came for Flax's variables; expected linen's, "
            f"with 'params' and 'batch_stats', or an nnx module or its state; write "
            f"model.init(key, x), or jax.eval_shape(model.init, key, x)."
        )
    mine = {name: tree[name] for name in ("params", "batch_stats") if name in tree}
    kind: Any = type(tree)  # a dict, or Flax's FrozenDict
    return _slots(mine, lambda new: kind({**tree, **new}), 1, transposed, flattened)


def _slots(
    tree: Any,
    build: Callable[[Any], Any],
    depth: int,  # parts of a path before the layer's name: 1 in linen, the collection
    transposed: Mapping[str, bool],
    flattened: Mapping[str, Any],
) -> Variables:
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    slots, leaves = [], [leaf for _, leaf in paths]
    # Attributes are no part of a name: they are boxes around an array (`.value`).
    names = [
        [str(k.key) for k in keys if isinstance(k, jax.tree_util.DictKey)] for keys, _ in paths
    ]
    layers = ["/".join(parts[depth:-1]) for parts in names]
    shapes = {
        (layer, parts[-1]): tuple(leaf.shape)
        for layer, parts, leaf in zip(layers, names, leaves, strict=True)
    }
    sizes, problems = _sizes(flattened, shapes)
    for layer, parts, leaf in zip(layers, names, leaves, strict=True):
        inputs, outputs = sizes.get(layer, (None, None))
        role = Role(parts[-1], outputs=outputs, ndim=len(leaf.shape))
        if role.leaf == "kernel":
            role = role._replace(transpose_kernel=transposed.get(layer), flattened=inputs)
        slots.append(Slot("/".join(parts), layer, role, tuple(leaf.shape), leaf.dtype))

    def new(values: Mapping[str, np.ndarray]) -> Any:
        given = [_placed(values[s.path], v) if s.path in values else v for s, v in both]
        return build(jax.tree_util.tree_unflatten(structure, given))

    both = list(zip(slots, leaves, strict=True))
    problems[:0] = [
        f"transposed: {layer!r} is no convolution of Flax's"
        for layer in transposed
        if (layer, "kernel") not in shapes
    ]
    return Variables(slots, leaves, new, problems)


def _sizes(
    flattened: Mapping[str, Any], shapes: Mapping[tuple[str, str], tuple[int, ...]]
) -> tuple[dict[str, tuple[Any, Any]], list[str]]:
    """Layer → (H, W, C) of inputs and of outputs, None where an axis is no image; and problems."""
    sizes: dict[str, tuple[Any, Any]] = {}
    problems = []
    for layer, size in flattened.items():
        norm = next((shapes[layer, k] for k in ("scale", "mean") if (layer, k) in shapes), None)
        one = all(isinstance(n, (int, np.integer)) for n in size)
        inputs, outputs = (size, None) if one else size
        if norm is not None:  # it has the same features on both sides
            inputs, outputs = None, inputs or outputs
            wrong = [("norm", size, "features")] * (norm != (math.prod(outputs or ()),))
        else:
            shape = shapes.get((layer, "kernel"), ())
            wrong = [
                ("dense layer", part, word)
                for axis, (part, word) in enumerate(((inputs, "inputs"), (outputs, "outputs")))
                if part and (len(shape) != 2 or math.prod(part) != shape[axis])
            ]
        problems += [
            f"flattened: {layer!r} with {part} is no {kind} of that many {word}"
            for kind, part, word in wrong
        ]
        if not wrong:
            sizes[layer] = inputs, outputs
    return sizes, problems


def _placed(value: np.ndarray, like: Any) -> jax.Array:
    """The value on the devices where `like` is."""
    sharding = getattr(like, "sharding", None)
    if sharding is None or (isinstance(like, jax.Array) and not like.committed):
        return jnp.asarray(value)
    return jax.device_put(value, sharding)
