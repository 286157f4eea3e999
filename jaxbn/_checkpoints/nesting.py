"""Flat names and nested dicts: from one to the other, and a walk through either."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

DEEPEST = 100  # levels of names; no model comes near, and Python's recursion ends at 1000


def nested(arrays: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Nested dicts of values that are given by their keys.

    >>> from jaxbn._checkpoints import nesting
    >>> nesting.nested({("bn", "mean"): 0, ("bn", "var"): 1})
    {'bn': {'mean': 0, 'var': 1}}
    """
    tree: dict[str, Any] = {}
    for (*folders, last), v in arrays.items():
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = v
    return tree


def children(tree: Any) -> dict[str, Any] | None:
    """The children of a node by name (dict, list, tuple, named tuple); None for a leaf.

    >>> from jaxbn._checkpoints import nesting
    >>> nesting.children([5, 6]), nesting.children(5)
    ({'0': 5, '1': 6}, None)
    """
    if isinstance(tree, Mapping):
        return {str(key): node for key, node in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_asdict"):
        return tree._asdict()
    if isinstance(tree, (list, tuple)):
        return {str(i): node for i, node in enumerate(tree)}
    return None


def nodes(tree: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every node of a tree with the names down to it, each before its children.

    >>> from jaxbn._checkpoints import nesting
    >>> [keys for keys, _ in nesting.nodes({"bn": {"mean": 0}})]
    [(), ('bn',), ('bn', 'mean')]
    """
    waiting: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    while waiting:
        path, node = waiting.pop()
        yield path, node
        inner = [((*path, key), child) for key, child in (children(node) or {}).items()]
        waiting += reversed(inner)


def leaves(tree: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The nodes that hold a value: no dict or list, and not None.

    >>> from jaxbn._checkpoints import nesting
    >>> list(nesting.leaves({"bn": {"mean": 0, "var": None}, "head": {}}))
    [(('bn', 'mean'), 0)]
    """
    return (
        (path, node) for path, node in nodes(tree) if node is not None and children(node) is None
    )


def split_at_dots(tree: Any, source: str) -> dict[str, Any]:
    """The tree as nested dicts, with names split at their dots.

    A name that continues the name of an array keeps the dot after that name: a dict cannot stand
    where an array stands.

    Raises:
      ValueError: two arrays get one name, or names nest more than DEEPEST deep.

    >>> from jaxbn._checkpoints import nesting
    >>> nesting.split_at_dots({"fc.bias": 0, "fc.weight": 1, "fc.weight.absmax": 2}, "net")
    {'fc': {'bias': 0, 'weight': 1, 'weight.absmax': 2}}
    """
    flat: dict[tuple[str, ...], Any] = {}
    for path, node in nodes(tree):
        keys = tuple(part for name in path for part in name.split(".", DEEPEST + 1))
        if len(keys) > DEEPEST:
            raise ValueError(f"read: {source} nests names more than {DEEPEST} deep.")
        if not path or children(node):
            continue
        v = {} if children(node) == {} else np.asarray(node) if hasattr(node, "dtype") else node
        if keys in flat and not (flat[keys] == {} == v):
            raise ValueError(f"read: {source} holds two arrays {'.'.join(keys)!r}.")
        flat[keys] = v
    arrays = {keys for keys, v in flat.items() if not isinstance(v, dict)}
    placed: dict[tuple[str, ...], Any] = {}
    # Empty dicts go first: a later name may put something into one, and must not be overwritten.
    for keys in sorted(flat, key=lambda keys: keys in arrays):
        cut = next((n for n in range(1, len(keys)) if keys[:n] in arrays), len(keys))
        placed[(*keys[: cut - 1], ".".join(keys[cut - 1 :]))] = flat[keys]
    return nested(placed)
