"""The inputs and results of an exported function: names, free sizes, examples."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxbn._text import first_line, printable


def flat_args(x: Any) -> tuple[tuple[Any, ...], list[Any], Any]:
    """The arguments that x stands for, their arrays, and the structure that holds the arrays."""
    args = x if isinstance(x, tuple) and not hasattr(x, "_fields") else (x,)
    return args, *jax.tree.flatten(args, is_leaf=_is_list)


def _is_list(v: Any) -> bool:
    return isinstance(v, list)


def shapes_of(call: str, leaves: Sequence[Any], sizes: str | Sequence[str] | None) -> list[Any]:
    """The inputs with symbols for the sizes that are free."""
    if sizes is None:
        batch = leaves[0].shape[0]
        specs = [", ".join(("B" if v.shape[0] == batch else "_", "...")) for v in leaves]
    else:
        specs = [sizes] if isinstance(sizes, str) else list(sizes)
    if len(specs) != len(leaves):
        raise ValueError(
            f"{call}: sizes are {len(specs)} but x has {len(leaves)} arrays, expected one string "
            f"for each; write sizes=({', '.join([repr('B, ...')] * len(leaves))})."
        )
    scope, shapes = jax.export.SymbolicScope(), []
    for spec, v in zip(specs, leaves, strict=True):
        fits, why = False, "they are others"
        try:
            shape = jax.export.symbolic_shape(spec, like=v.shape, scope=scope)
            fits = len(shape) == v.ndim and all(
                not isinstance(n, int) or n == m for n, m in zip(shape, v.shape, strict=True)
            )
        except Exception as error:
            why = first_line(error)
        if not fits:
            raise ValueError(
                f"{call}: sizes {spec!r} do not fit x of shape {v.shape}: {why}; expected its "
                f"sizes, with letters where they are free; write 'B, ...'."
            )
        shapes.append(jax.ShapeDtypeStruct(shape, v.dtype))
    return shapes


def untraceable(call: str, leaves: Sequence[Any], shapes: Sequence[Any], error: Any) -> ValueError:
    """The refusal of a function that fails while it is traced for any size."""
    return ValueError(
        f"{call}: fn cannot be traced with sizes {', '.join(map(str, shapes[0].shape))}: "
        f"{first_line(error)}; expected operations that work at any size; for this size alone, "
        f"write sizes={', '.join(map(str, leaves[0].shape))!r}."
    )


def names_of(call: str, what: str, given: Sequence[str] | None, tree: Any) -> list[str]:
    """A name for each leaf: as given, or the keys that lead to the leaf, or a number."""
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    word = what.removesuffix("s")
    if not paths:
        raise ValueError(f"{call}: fn returns no array, expected one array or several.")
    if given is None:
        keyed = (jax.tree_util.DictKey, jax.tree_util.GetAttrKey)
        names = [
            jax.tree_util.keystr(path, simple=True, separator=".")
            if any(isinstance(key, keyed) for key in path)
            else (word if len(paths) == 1 else f"{word}_{k}")
            for k, path in enumerate(paths)
        ]
    else:
        names = [given] if isinstance(given, str) else list(given)
    if len(names) != len(paths) or len({*names}) != len(names) or "" in names:
        example = ", ".join(repr(f"{word}_{k}") for k in range(len(paths)))
        raise ValueError(
            f"{call}: {what} are {names}, expected {len(paths)} different names, one for each "
            f"array; write {what}=({example},)."
        )
    return names


def by_name(names: Collection[str], arrays: Sequence[Any]) -> tuple[dict[str, np.ndarray], bool]:
    """The arguments of a call, in order or one dict, by name; and whether they are the inputs.

    Trees are taken apart. The name of an array has the keys that lead to it, as in `names_of`.
    """
    keyed = len(arrays) == 1 and isinstance(arrays[0], Mapping)
    # Key by key: JAX would sort the keys, and a dict of np.load is no tree to JAX.
    parts = [{key: v} for key, v in arrays[0].items()] if keyed else arrays
    found = [
        (jax.tree_util.keystr(path, simple=True, separator="."), leaf)
        for part in parts
        for path, leaf in jax.tree_util.tree_flatten_with_path(part, is_leaf=_is_list)[0]
    ]
    given = dict(found if keyed else zip(names, (leaf for _, leaf in found), strict=False))
    fits = given.keys() == {*names} and len(given) == len(found)
    return {name: np.asarray(array) for name, array in given.items()}, fits


def call_with(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """A call with such arguments, each array as its dtype and sizes.

    >>> import numpy as np
    >>> from jaxbn.export import _signature
    >>> _signature.call_with([{"a": np.ones((4, 3))}, "b"], {})
    "fn({'a': float64 [4, 3]}, str)"
    """

    class Kind(str):
        __repr__ = str.__str__

    def kind(v: Any) -> Kind:
        if not hasattr(v, "shape"):
            return Kind(type(v).__name__)
        return Kind(f"{v.dtype} [{', '.join(map(str, v.shape))}]")

    shown = jax.tree.map(kind, [*args, *kwargs.values()])
    names = [""] * len(args) + [f"{name}=" for name in kwargs]
    line = printable(f"fn({', '.join(map('{}{!r}'.format, names, shown))})")
    return line if len(line) <= 500 else f"{line[:499]}…"  # a batch as a list of lists is long


def examples_of(leaves: Sequence[Any], shapes: Sequence[Any]) -> Iterator[tuple[list[Any], Any]]:
    """Inputs to compare a file on: the example, one row of it, another size.

    Each comes with the rows of the example that it consists of, or None if it is larger than the
    example on another axis than the batch.
    """
    arrays, batch = [np.asarray(v) for v in leaves], shapes[0].shape[0]
    rows = len(arrays[0])
    yield arrays, np.arange(rows)
    free = [
        {k for k, n in enumerate(s.shape) if not isinstance(n, int) and n != batch} for s in shapes
    ]
    larger = any(free)
    counts = [1, 3 if rows == 2 else 2]
    if isinstance(batch, int):
        counts = [rows] if larger else []
    for count in counts:
        taken, times = np.arange(count) % rows, 2 if count == counts[-1] else 1
        example = []
        for v, s, axes in zip(arrays, shapes, free, strict=True):
            v = v[taken] if s.shape[0] == batch else v
            example.append(np.tile(v, [times if k in axes else 1 for k in range(v.ndim)]))
        yield example, None if larger and times > 1 else taken
