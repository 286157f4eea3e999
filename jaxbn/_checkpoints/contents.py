"""What a checkpoint holds: linen's variables, an nnx state or PyTorch's arrays."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxbn._checkpoints.nesting import leaves
from jaxbn._extras import need
from jaxbn._inspection.layers import is_nnx
from jaxbn._text import short

COLLECTIONS = ("params", "batch_stats")


def part_of(tree: Mapping[str, Any], part: str | None = None) -> Mapping[str, Any]:
    """The model's part of a checkpoint: the one named, or where linen's collections stand.

    Args:
      tree: of `jaxbn._checkpoints.read.read`.
      part: names down to it, `ema/model`; None: the only place with `params` and `batch_stats`,
        or, where there is none, the whole tree.

    Raises:
      ValueError: there is no such part, or there are several and none was named.

    >>> from jaxbn._checkpoints import contents
    >>> tree = {"step": 3, "model": {"params": {}, "batch_stats": {}}}
    >>> contents.part_of(tree), contents.part_of(tree, "model/params")
    ({'params': {}, 'batch_stats': {}}, {})
    """
    if part is not None:
        node: Any = tree
        for key in part.split("/"):
            node = node.get(key) if isinstance(node, Mapping) else None
        if not isinstance(node, Mapping):
            raise ValueError(
                f"part_of: the checkpoint has no part {part!r}; at its top are {short(tree)}."
            )
        return node
    places = list(_places(tree, ""))
    if len(places) > 1:
        names = short(repr(path) for path, _ in places)
        raise ValueError(
            f"part_of: the checkpoint holds several models, {names}; name one: --part."
        )
    return places[0][1] if places else tree


def is_torch(tree: Mapping[str, Any]) -> bool:
    """Whether arrays have PyTorch's names.

    >>> from jaxbn._checkpoints import contents
    >>> contents.is_torch({"fc": {"kernel": 0}}), contents.is_torch({"fc": {"weight": 0}})
    (False, True)
    """
    return any(keys[-1] in ("weight", "running_mean") for keys, _ in leaves(tree))


def state_dict(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested names with dots between.

    >>> from jaxbn._checkpoints import contents
    >>> contents.state_dict({"fc": {"weight": 0}})
    {'fc.weight': array(0)}
    """
    return {".".join(keys): v for keys, v in leaves(tree)}


def variables(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree as linen's variables; an nnx state, which has no collections, as one.

    >>> import numpy as np
    >>> from jaxbn._checkpoints import contents
    >>> contents.variables({"bn": {"mean": {"value": np.zeros(1)}}})
    {'params': {'bn': {'mean': array([0.])}}}
    """
    if has_collections(tree):
        return {name: tree[name] for name in COLLECTIONS if name in tree}
    return {"params": {name: _unboxed(node) for name, node in tree.items() if node is not None}}


def has_collections(tree: Mapping[str, Any]) -> bool:
    """Whether params or batch_stats stand at its top, as in linen.

    >>> from jaxbn._checkpoints import contents
    >>> contents.has_collections({"bn": {}})
    False
    """
    return bool(set(COLLECTIONS) & set(tree))


def arrays(model: Any) -> Mapping[str, Any]:
    """Parameters and statistics of linen's variables or an nnx module, as nested dicts.

    >>> from jaxbn._checkpoints import contents
    >>> contents.arrays({"params": {}})
    {'params': {}}
    """
    if not is_nnx(model):
        return model
    nnx = need("arrays", "flax.nnx")
    return nnx.to_pure_dict(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))


def _unboxed(node: Any) -> Any:
    """The tree with the arrays themselves in place of the boxes of an nnx state."""
    if not isinstance(node, Mapping):
        return np.asarray(node)
    if set(node) == {"value"} and not isinstance(node["value"], Mapping):
        return _unboxed(node["value"])
    return {name: _unboxed(inner) for name, inner in node.items() if inner is not None}


def _places(tree: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not isinstance(tree, Mapping):
        return
    if set(COLLECTIONS) <= set(tree):
        yield path, tree
    for key, node in tree.items():
        yield from _places(node, f"{path}/{key}".lstrip("/"))
