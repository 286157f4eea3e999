"""The batch norm layers in a tree of arrays, recognized by names alone."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxbn._checkpoints.nesting import children, nodes
from jaxbn._inspection.layers import Layer
from jaxbn._op.state import Params, State
from jaxbn._text import distinct

# Our name of each array of a norm layer → PyTorch's.
NAMES = {
    "mean": "running_mean",
    "var": "running_var",
    "scale": "weight",
    "bias": "bias",
    "count": "num_batches_tracked",
}
# Parts of a checkpoint that hold a model's scales and biases a second time.
COPIES = re.compile(r"opt|opt_.*|optimizer.*|(.*_)?ema(_.*)?|mu|nu|trace|grads?", re.IGNORECASE)
# Norm layers that have no running statistics.
NO_BATCH = re.compile(r".*(layer|group|rms|instance)_?norm.*|(ln|gn)(_|\d|$).*", re.IGNORECASE)


def norms_in(tree: Any) -> dict[str, Layer]:
    """Path → the batch norm layer there, for every norm layer anywhere in a checkpoint's tree.

    A node that holds `mean` and `var`, or PyTorch's `running_mean` and `running_var`, is a norm
    layer. linen keeps scale and bias in `params`, beside `batch_stats`, so they are looked up
    there. A node with scale and bias alone is a norm layer too, with a state of None, unless its
    name is that of another norm or of an optimizer's copy. Where several layers have one path, the
    later ones get a number.

    Raises:
      ValueError: one statistic of a layer has Flax's name and the other PyTorch's.

    >>> import numpy as np
    >>> from jaxbn._checkpoints import norm_layers
    >>> stats, params = {"mean": np.zeros(2), "var": np.ones(2)}, {"scale": np.ones(2)}
    >>> tree = {"model": {"batch_stats": {"bn": stats}, "params": {"bn": params}}}
    >>> found = norm_layers.norms_in(tree)
    >>> list(found), found["model/bn"].params.scale.tolist()
    (['model/bn'], [1.0, 1.0])
    """
    names, layers, used = [], [], set()
    dicts = {path: inner for path, node in nodes(tree) if (inner := children(node)) is not None}
    for path, node in dicts.items():
        if (fields := _fields(path, node)) is None:
            continue
        place = tuple("params" if key == "batch_stats" else key for key in path)
        used |= {path, place}
        held = {**dicts.get(place, {}), **node}
        values = {name: _array(held.get(other)) for name, other in fields.items()}
        names.append("/".join(key for key in path if key != "batch_stats"))
        state = State(*(values[field] for field in State._fields))
        layers.append(Layer(Params(values["scale"], values["bias"]), state))
    nothing: Any = State(None, None, None)  # type: ignore[arg-type]
    for path, node in dicts.items():
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


def _fields(path: tuple[str, ...], node: Mapping[str, Any]) -> Mapping[str, str] | None:
    """Our name → the name in this node, if the node holds statistics; None if it holds none."""
    for fields in ({field: field for field in NAMES}, NAMES):
        if None not in [_shape(_array(node.get(fields[name]))) for name in ("mean", "var")]:
            return fields
    for mean, var in (("mean", "running_var"), ("running_mean", "var")):
        if None not in [_shape(_array(node.get(name))) for name in (mean, var)]:
            raise ValueError(
                f"norms_in: layer {'/'.join(path)!r} holds {mean} beside {var}, expected "
                f"mean and var, or PyTorch's running_mean and running_var."
            )
    return None


def _array(value: Any) -> Any:
    """The array, also out of the box that an nnx state has around an array; None for all else."""
    if isinstance(value, Mapping) and set(value) == {"value"}:
        value = value["value"]
    return value if isinstance(value, (np.ndarray, jax.Array)) else None


def _shape(array: Any) -> Any:
    return None if array is None else array.shape
