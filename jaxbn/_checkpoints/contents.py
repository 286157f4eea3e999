"""The model in a checkpoint: linen's variables, an nnx state or PyTorch's arrays."""

import os
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxbn._checkpoints.nesting import children, leaves, nodes
from jaxbn._checkpoints.read import read
from jaxbn._extras import need
from jaxbn._inspection.layers import is_nnx
from jaxbn._text import short

COLLECTIONS = ("params", "batch_stats")


class Contents(NamedTuple):
    """A model's arrays, and whose names the arrays have."""

    kind: Literal["linen", "nnx", "torch"]
    tree: Mapping[str, Any]

    def state_dict(self) -> dict[str, np.ndarray]:
        """The arrays by one name each, with dots in it, as PyTorch has them.

        >>> from jaxbn._checkpoints.contents import Contents
        >>> Contents("torch", {"fc": {"weight": 0}}).state_dict()
        {'fc.weight': array(0)}
        """
        return {".".join(keys): np.asarray(v) for keys, v in leaves(self.tree)}

    def variables(self) -> dict[str, Any]:
        """The arrays as linen's variables. What has no collections becomes `params`.

        >>> import numpy as np
        >>> from jaxbn._checkpoints.contents import Contents
        >>> Contents("nnx", {"bn": {"mean": {"value": np.zeros(1)}}}).variables()
        {'params': {'bn': {'mean': array([0.])}}}
        """
        if self.kind == "linen":
            return {name: self.tree[name] for name in COLLECTIONS if name in self.tree}
        tree = self.tree.items()
        return {"params": {name: _unboxed(node) for name, node in tree if node is not None}}


def read_model(path: str | os.PathLike[str], part: str | None = None) -> Contents:
    """The model in a checkpoint: the arrays, and their kind, which is decided here alone.

    A tree with linen's collections at its top is linen's. Without them the names decide: `weight`
    and `running_mean` are PyTorch's, all others are those of an nnx state.

    Args:
      path: as in `jaxbn._checkpoints.read.read`.
      part: as in `part_of`.

    Raises:
      ValueError, OSError, ModuleNotFoundError: as in `read` and `part_of`.

    >>> import tempfile, numpy as np
    >>> from jaxbn._checkpoints import contents, write
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write.save(f"{folder}/net.msgpack", {"fc": {"weight": np.zeros((2, 3))}})
    ...     contents.read_model(f"{folder}/net.msgpack").kind
    'torch'
    """
    tree = part_of(read(path), part)
    if set(COLLECTIONS) & set(tree):
        return Contents("linen", tree)
    torch = any(keys[-1] in ("weight", "running_mean") for keys, _ in leaves(tree))
    return Contents("torch" if torch else "nnx", tree)


def part_of(tree: Mapping[str, Any], part: str | None = None) -> Mapping[str, Any]:
    """The model's part of a checkpoint: the part that is named, or else linen's collections.

    Args:
      tree: what `jaxbn._checkpoints.read.read` returns.
      part: the names down to the part, `ema/model`. None: the only place with `params` and
        `batch_stats`, or the whole tree where there is no such place.

    Raises:
      ValueError: there is no such part, or there are several models and none was named.

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
    places = [
        (path, node)
        for path, node in nodes(tree)
        if isinstance(node, Mapping) and set(COLLECTIONS) <= set(node)
    ]
    if len(places) > 1:
        names = short(repr("/".join(path)) for path, _ in places)
        raise ValueError(
            f"part_of: the checkpoint holds several models, {names}; name one: --part."
        )
    return places[0][1] if places else tree


def arrays(model: Any) -> Mapping[str, Any]:
    """The parameters and statistics of linen's variables or of an nnx module, as nested dicts.

    >>> from jaxbn._checkpoints import contents
    >>> contents.arrays({"params": {}})
    {'params': {}}
    """
    if not is_nnx(model):
        return model
    nnx = need("arrays", "flax.nnx")
    return nnx.to_pure_dict(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))


def _unboxed(node: Any) -> Any:
    """The tree without the boxes, dicts of one `value`, that an nnx state has around its arrays."""
    if (inner := children(node)) is None:
        return np.asarray(node)
    if set(inner) == {"value"} and children(inner["value"]) is None:
        return _unboxed(inner["value"])
    return {name: _unboxed(child) for name, child in inner.items() if child is not None}
