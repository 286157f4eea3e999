"""The batch norm layers that `where=` selects."""

from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase
from typing import Any

from jaxbn._inspection.layers import Layer, find
from jaxbn._text import listed

Where = str | Sequence[str] | Callable[[str], bool]


def selects(where: Where, path: str) -> bool:
    """Whether `where` (a glob, several globs, or a predicate) selects the layer at `path`.

    `*` matches any text, slashes included: "stage1/*" selects everything inside stage1.

    >>> from jaxbn._inspection import selection
    >>> [selection.selects("*/bn", p) for p in ("a/bn", "a/b/bn", "bn")]
    [True, True, False]
    """
    if callable(where):
        return bool(where(path))
    globs = [where] if isinstance(where, str) else where
    return any(fnmatchcase(path, glob) for glob in globs)


def check_where(call: str, name: str, where: Any) -> None:
    """Refuses what is no glob, no globs and no predicate, and globs that can be read once only."""
    globs = isinstance(where, Collection) and all(isinstance(glob, str) for glob in where)
    if not (callable(where) or globs):
        raise TypeError(
            f"{call}: {name}={where!r}, expected a glob over the paths, several globs in a list, "
            f'or a function of the path; write {name}="*" for all.'
        )


def select(call: str, tree: Any, where: Where) -> dict[str, Layer]:
    """The layers of the tree (as in `layers.find`) that `where` selects, at least one.

    Raises:
      TypeError: `where` is no glob, no globs and no predicate.
      ValueError: the tree has no batch norm layer, or `where` selects none.

    >>> import jaxbn
    >>> from jaxbn._inspection import selection
    >>> tree = {"a": jaxbn.init(2)[1], "b": jaxbn.init(2)[1]}
    >>> list(selection.select("freeze", tree, "a*"))
    ['a']
    """
    check_where(call, "where", where)
    found = find(tree)
    if not found:
        raise ValueError(
            f"{call}: no batch norm layer in this {type(tree).__name__}; expected variables with "
            f'"batch_stats", an nnx model that holds a BatchNorm, or a tree of jaxbn.State.'
        )
    chosen = {path: layer for path, layer in found.items() if selects(where, path)}
    if not chosen:
        raise ValueError(
            f"{call}: where={where!r} selects none of the batch norm layers {listed(found)}; "
            f'expected a glob such as "{next(iter(found))}", several of them, or a function of the '
            f"path."
        )
    return chosen
