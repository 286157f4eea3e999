"""The norm layers in a tree of arrays."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxbn._checkpoints.nesting import children
from jaxbn._inspection.layers import Layer
from jaxbn._op.state import Params, State
from jaxbn._text import distinct

# PyTorch's names of what a layer holds, beside ours.
NAMES = {
    "mean": "running_mean",
    "var": "running_var",
    "scale": "weight",
    "bias": "bias",
    "count": "num_batches_tracked",
}
# Trees beside a model that hold its scales and biases a second time, and norms without statistics.
COPIES = re.compile(r"opt|opt_.*|optimizer.*|(.*_)?ema(_.*)?|mu|nu|trace|grads?", re.IGNORECASE)
NO_BATCH = re.compile(r".*(layer|group|rms|instance)_?norm.*|(ln|gn)(_|\d|$).*", re.IGNORECASE)


def find(tree: Any) -> dict[str, Layer]:
    """Path → what the batch norm layer there holds, wherever in a checkpoint's tree it stands.

    Layers are what holds `mean` and `var`, or PyTorch's `running_mean` and `running_var`; linen's
    scale and bias are looked up in `params` beside `batch_stats`. So are scale and bias alone, with
    a state of None, unless they have the name of another norm or are an optimizer's. Of layers
    with one path the later ones have a number behind it.

    Raises:
      ValueError: statistics are half Flax's and half PyTorch's.

    >>> import numpy as np
    >>> from jaxbn._checkpoints import norm_layers
    >>> stats, params = {"mean": np.zeros(2), "var": np.ones(2)}, {"scale": np.ones(2)}
    >>> tree = {"model": {"batch_stats": {"bn": stats}, "params": {"bn": params}}}
    >>> found = norm_layers.find(tree)
    >>> list(found), found["model/bn"].params.scale.tolist()
    (['model/bn'], [1.0, 1.0])
    """
    names, layers, used = [], [], set()
    for path, node in _nodes(tree, ()):
        if (fields := _fields(path, node)) is None:
            continue
        place = tuple("params" if key == "batch_stats" else key for key in path)
        used |= {path, place}
        held = {**(_at(tree, place) or {}), **node}
        values = {name: _array(held.get(other)) for name, other in fields.items()}
        names.append("/".join(key for key in path if key != "batch_stats"))
        state = State(*(values[field] for field in State._fields))
        layers.append(Layer(Params(values["scale"], values["bias"]), state))
    nothing: Any = State(None, None, None)  # type: ignore[arg-type]
    for path, node in _nodes(tree, ()):
        params = Params(_array(node.get("scale")), _array(node.get("bias")))
        if (
            path not in used
            and _shape(params.scale) is not None
            and _shape(params.scale) == _shape(params.bias)
            and not any(map(COPIES.fullmatch, path))
            and not (path and NO_BATCH.fullmatch(path[-1]))
        ):
            names.append("/".join(key for key in path if key != "params"))
            layers.append(Layer(params, nothing))
    return dict(zip(distinct(names), layers, strict=True))


def _nodes(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Every dict of the tree and where it stands, the outer before the inner."""
    if (node := children(tree)) is not None:
        yield path, node
        for key, inner in node.items():
            yield from _nodes(inner, (*path, key))


def _at(tree: Any, path: tuple[str, ...]) -> dict[str, Any] | None:
    for key in path:
        tree = (children(tree) or {}).get(key)
    return children(tree)


def _fields(path: tuple[str, ...], node: Mapping[str, Any]) -> Mapping[str, str] | None:
    """Whose names the statistics have that a node holds: our field → its name there."""
    for fields in ({field: field for field in NAMES}, NAMES):
        if None not in [_shape(_array(node.get(fields[name]))) for name in ("mean", "var")]:
            return fields
    for mean, var in (("mean", "running_var"), ("running_mean", "var")):
        if None not in [_shape(_array(node.get(name))) for name in (mean, var)]:
            raise ValueError(
                f"find: layer {'/'.join(path)!r} holds {mean} beside {var}, expected "
                f"mean and var, or PyTorch's running_mean and running_var."
            )
    return None


def _array(value: Any) -> Any:
    """The array itself, or the one in an nnx variable's box."""
    if isinstance(value, Mapping) and set(value) == {"value"}:
        value = value["value"]
    return value if isinstance(value, (np.ndarray, jax.Array)) else None


def _shape(array: Any) -> Any:
    return None if array is None else array.shape
