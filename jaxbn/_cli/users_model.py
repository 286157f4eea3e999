"""The arrays of a checkpoint in a model that the user's own code describes."""

import importlib
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxbn import convert
from jaxbn._extras import need
from jaxbn._inspection.layers import is_nnx
from jaxbn._text import first_line, printable, short
from jaxbn.convert._report import Report

COLLECTIONS = ("params", "batch_stats")


class Network(NamedTuple):
    """What `jaxbn.recalibrate` takes: a model, how it is run, and data."""

    apply: Callable[..., Any]  # apply(model, batch), in eval mode
    model: Any  # linen's variables or an nnx module; shapes will do
    batches: Iterable[Any]


def network(name: str) -> Network:
    """What the function `module:function` returns: its module is imported, and so runs.

    Raises:
      ValueError: there is no such function, it fails, or it returns something else.

    >>> from jaxbn._cli import users_model
    >>> users_model.network("resnet")
    Traceback (most recent call last):
        ...
    ValueError: network: 'resnet' names no function, expected module:function
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"network: {name!r} names no function, expected module:function")
    try:
        made = getattr(importlib.import_module(module), function)()
    except (Exception, SystemExit) as error:  # `sys.exit()` of a script that runs when imported
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f"network: {name} fails: {_called(error)} ({printable(frame.filename)}, line "
            f"{frame.lineno}); expected a function of an importable module, called as {function}()."
        ) from error
    if not isinstance(made, tuple) or len(made) != 3 or not callable(made[0]):
        raise ValueError(
            f"network: {name} returns a {type(made).__name__}, expected a tuple (apply, model, "
            f"batches) with apply(model, batch), as jaxbn.recalibrate takes them."
        )
    return Network(*made)


def part_of(tree: Mapping[str, Any], part: str | None = None) -> Mapping[str, Any]:
    """The model's part of a checkpoint: the one named, or where linen's collections stand.

    Args:
      tree: of `jaxbn._checkpoints.read.read`.
      part: names down to it, `ema/model`; None: the only place with `params` and `batch_stats`,
        or, where there is none, the whole tree.

    Raises:
      ValueError: there is no such part, or there are several and none was named.

    >>> from jaxbn._cli import users_model
    >>> tree = {"step": 3, "model": {"params": {}, "batch_stats": {}}}
    >>> users_model.part_of(tree), users_model.part_of(tree, "model/params")
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


def load(
    tree: Mapping[str, Any],
    like: Any,
    *,
    rename: Mapping[str, str | None] | None = None,
    keep: Iterable[str] = (),
    epsilon: float = 1e-5,
) -> tuple[Any, Report]:
    """Equals `like` with the arrays of a checkpoint, every one in its place, by `jaxbn.convert`.

    Args:
      tree: linen's variables, an nnx state, or a PyTorch state_dict, as `checkpoints.read` gives
        them.
      like: linen's variables, an nnx module or its state; shapes will do.
      rename: layer of the checkpoint, or a beginning of its path → layer of like; None drops it.
      keep: layers of like that stay as they are.
      epsilon: that of a PyTorch model, whose file does not say.

    Raises:
      ValueError: something does not fit; all that does not is listed.

    >>> import numpy as np
    >>> from jaxbn._cli import users_model
    >>> like = {"params": {"fc": {"kernel": np.zeros((3, 2))}}}
    >>> new, _ = users_model.load({"fc": {"weight": np.ones((2, 3))}}, like)
    >>> new["params"]["fc"]["kernel"].shape
    (3, 2)
    """
    options: dict[str, Any] = {"rename": rename, "keep": keep}
    if is_torch(tree):
        return convert.from_torch(state_dict(tree), like, eps=epsilon, **options)
    call = convert.nnx_to_linen if isinstance(like, Mapping) else convert.linen_to_nnx
    return call(variables(tree), like, **options)


def is_torch(tree: Mapping[str, Any]) -> bool:
    """Whether arrays have PyTorch's names.

    >>> from jaxbn._cli import users_model
    >>> users_model.is_torch({"fc": {"kernel": 0}}), users_model.is_torch({"fc": {"weight": 0}})
    (False, True)
    """
    return any(keys[-1] in ("weight", "running_mean") for keys, _ in _leaves(tree))


def state_dict(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested names with dots between.

    >>> from jaxbn._cli import users_model
    >>> users_model.state_dict({"fc": {"weight": 0}})
    {'fc.weight': array(0)}
    """
    return {".".join(keys): v for keys, v in _leaves(tree)}


def variables(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree as linen's variables; an nnx state, which has no collections, as one.

    >>> import numpy as np
    >>> from jaxbn._cli import users_model
    >>> users_model.variables({"bn": {"mean": {"value": np.zeros(1)}}})
    {'params': {'bn': {'mean': array([0.])}}}
    """
    if has_collections(tree):
        return {name: tree[name] for name in COLLECTIONS if name in tree}
    return {"params": {name: _unboxed(node) for name, node in tree.items() if node is not None}}


def has_collections(tree: Mapping[str, Any]) -> bool:
    """Whether params or batch_stats stand at its top, as in linen.

    >>> from jaxbn._cli import users_model
    >>> users_model.has_collections({"bn": {}})
    False
    """
    return bool(set(COLLECTIONS) & set(tree))


def arrays(model: Any) -> Mapping[str, Any]:
    """Parameters and statistics of linen's variables or an nnx module, as nested dicts.

    >>> from jaxbn._cli import users_model
    >>> users_model.arrays({"params": {}})
    {'params': {}}
    """
    if not is_nnx(model):
        return model
    nnx = need("arrays", "flax.nnx")
    return nnx.to_pure_dict(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))


def _called(error: BaseException) -> str:
    """The kind of an error and what it says, on one line."""
    kind, line = type(error).__name__, first_line(error)
    return line if line.startswith(kind) else f"{kind}: {line}"


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


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[Any, Any]]:
    for key, node in tree.items():
        if isinstance(node, Mapping):
            yield from _leaves(node, (*path, str(key)))
        elif node is not None:
            yield (*path, str(key)), np.asarray(node)
