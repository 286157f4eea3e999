"""Flat names to nested dicts, and back."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

DEEPEST = 100  # levels of names; no model comes near, and what recurses ends at 1000


def nested(arrays: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """The dicts whose values stand at these keys.

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
    """What a node of a tree holds, by name: a dict's items, a list's, a named tuple's."""
    if isinstance(tree, Mapping):
        return {str(key): node for key, node in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_asdict"):
        return tree._asdict()
    if isinstance(tree, (list, tuple)):
        return {str(i): node for i, node in enumerate(tree)}
    return None


def split_at_dots(tree: Any, source: str) -> dict[str, Any]:
    """The tree as dicts alone, every array where its names say."""
    flat: dict[tuple[str, ...], Any] = {}
    for keys, v in _leaves(tree, (), source):
        if keys in flat and not (flat[keys] == {} == v):
            raise ValueError(f"read: {source} holds two arrays {'.'.join(keys)!r}.")
        flat[keys] = v
    arrays = {keys for keys, v in flat.items() if not isinstance(v, dict)}
    placed: dict[tuple[str, ...], Any] = {}
    # Empty dicts first: what others put into them stays.
    for keys in sorted(flat, key=lambda keys: keys in arrays):
        cut = next((n for n in range(1, len(keys)) if keys[:n] in arrays), len(keys))
        placed[(*keys[: cut - 1], ".".join(keys[cut - 1 :]))] = flat[keys]
    return nested(placed)


def _leaves(tree: Any, path: tuple[str, ...], source: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """What is no dict, or an empty one, and its names, split at dots."""
    if len(path) > DEEPEST:
        raise ValueError(f"read: {source} nests names more than {DEEPEST} deep.")
    nodes = children(tree)
    if path and not nodes:
        yield path, {} if nodes == {} else np.asarray(tree) if hasattr(tree, "dtype") else tree
        return
    for name, node in (nodes or {}).items():
        yield from _leaves(node, (*path, *name.split(".", DEEPEST + 1)), source)


def leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[Any, Any]]:
    """The names down to each array, and the array itself; None is left out."""
    for key, node in tree.items():
        if isinstance(node, Mapping):
            yield from leaves(node, (*path, str(key)))
        elif node is not None:
            yield (*path, str(key)), np.asarray(node)
