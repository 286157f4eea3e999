"""Flax's variables, linen's or nnx's, as slots; and new variables of the same kind."""

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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
    flattened: Mapping[str, tuple[int, ...]] | None = None,
) -> Variables:
    """The slots of linen's `params` and `batch_stats`, of an nnx module, or of an nnx state.

    Other collections and types of variables (caches, random keys) have no slots and stay.

    Args:
      call: the public call, for errors.
      tree: arrays or shapes (`jax.eval_shape`, `nnx.eval_shape`).
      transposed: layer → `transpose_kernel`, of transposed convolutions. nnx modules have it.
      flattened: layer → (H, W, C), of dense layers after a flattened image.
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
            f"{call}: a {type(tree).__name__}{keys} came for Flax's variables; expected linen's, "
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
    flattened: Mapping[str, tuple[int, ...]],
) -> Variables:
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    slots, leaves = [], [leaf for _, leaf in paths]
    for keys, leaf in paths:
        # Attributes are no part of a name: they are boxes around an array (`.value`).
        parts = [str(k.key) for k in keys if isinstance(k, jax.tree_util.DictKey)]
        layer, name = "/".join(parts[depth:-1]), parts[-1]
        role = Role(name)
        if name == "kernel":
            role = Role(name, transposed.get(layer), flattened.get(layer))
        slots.append(Slot("/".join(parts), layer, role, tuple(leaf.shape), leaf.dtype))

    def new(values: Mapping[str, np.ndarray]) -> Any:
        given = [_placed(values[s.path], v) if s.path in values else v for s, v in both]
        return build(jax.tree_util.tree_unflatten(structure, given))

    both = list(zip(slots, leaves, strict=True))
    kernels = {slot.layer: slot.shape for slot in slots if slot.role.leaf == "kernel"}
    problems = [
        f"transposed: {k!r} is no convolution of Flax's" for k in transposed if k not in kernels
    ]
    for layer, size in flattened.items():
        if len(shape := kernels.get(layer, ())) != 2 or int(np.prod(size)) != shape[0]:
            problems.append(
                f"flattened: {layer!r} with {size} is no dense layer of that many inputs"
            )
    return Variables(slots, leaves, new, problems)


def _placed(value: np.ndarray, like: Any) -> jax.Array:
    """The value on the devices where `like` is."""
    sharding = getattr(like, "sharding", None)
    if sharding is None or (isinstance(like, jax.Array) and not like.committed):
        return jnp.asarray(value)
    return jax.device_put(value, sharding)
