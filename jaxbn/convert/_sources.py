"""The arrays of PyTorch, Keras, Haiku and Equinox models, each with its form in Flax.

Each source also returns, by layer, the arguments that make a Flax batch norm continue as the
source's batch norm: momentum, epsilon, unbiased.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxbn._inspection.layers import join
from jaxbn._text import a_kind
from jaxbn.convert import _layouts
from jaxbn.convert._arrays import Tensor

Norms = dict[str, dict[str, Any]]  # layer → momentum, epsilon, unbiased


def torch(arrays: Mapping[str, np.ndarray]) -> list[Tensor]:
    """The arrays of a state_dict."""
    tensors = []
    for key, v in arrays.items():
        layer, _, leaf = key.rpartition(".")
        tensors.append(Tensor(key, layer, partial(_layouts.from_torch, leaf, v), v))
    return tensors


def keras(model: Any) -> tuple[list[Tensor], Norms]:
    """The arrays of a Keras layer and the layers inside. A separable convolution is two layers."""
    tensors: list[Tensor] = []
    norms: Norms = {}
    for path, layer, variables in _keras_layers(model):
        kind = type(layer).__name__
        if hasattr(layer, "moving_variance"):
            arguments = {"momentum": layer.momentum, "epsilon": layer.epsilon, "unbiased": False}
            norms[path] = arguments
        for variable in variables:
            part = ""
            if kind.startswith("Separable"):
                part = "/depthwise" if variable.name == "depthwise_kernel" else "/pointwise"
            v = np.asarray(variable)
            form = partial(_layouts.from_keras, kind, variable.name, v)
            tensors.append(Tensor(join(path, variable.name), path + part, form, v))
    return tensors, norms


def _keras_layers(model: Any) -> Iterator[tuple[str, Any, list[Any]]]:
    """Path, layer, and the layer's own variables. A shared layer comes once."""
    seen: set[int] = set()

    def walk(layer: Any, path: str) -> Iterator[tuple[str, Any, list[Any]]]:
        for inner in getattr(layer, "_layers", ()):
            yield from walk(inner, join(path, inner.name))
        own = [v for v in getattr(layer, "weights", ()) if id(v) not in seen]
        seen.update(map(id, own))
        if own:
            yield path, layer, own

    return walk(model, "")


def haiku(
    params: Mapping[str, Mapping[str, Any]], state: Mapping[str, Mapping[str, Any]]
) -> tuple[list[Tensor], dict[str, int]]:
    """The arrays of params and state, and each norm's number of updates. Averages are debiased."""
    tensors: list[Tensor] = []
    updates: dict[str, int] = {}

    def add(key: str, layer: str, leaf: str, v: np.ndarray) -> None:
        tensors.append(Tensor(key, layer, partial(_layouts.from_haiku, leaf, v), v))

    for module, values in [*params.items(), *state.items()]:
        arrays = {name: np.asarray(value) for name, value in values.items()}
        path = "/".join(part for part in module.split("/") if part != "~")
        layer, _, last = path.rpartition("/")
        if last not in ("mean_ema", "var_ema"):
            for leaf, v in arrays.items():
                add(f"{module}/{leaf}", path, leaf, v)
            continue
        leaf, count, average = last.removesuffix("_ema"), arrays["counter"], arrays["average"]
        if not count:
            average = np.full_like(average, leaf == "var")  # mean 0, var 1 before any update
        add(f"{module}/average", layer, leaf, average)
        if leaf == "mean":
            add(f"{module}/counter", layer, "count", count)
            updates[layer] = int(count)
    return tensors, updates


def equinox(model: Any, state: Any) -> tuple[list[Tensor], Norms]:
    """The arrays of an Equinox model, in PyTorch's names and layouts."""
    import equinox as eqx

    arrays: dict[str, np.ndarray] = {}
    norms: Norms = {}
    special = (eqx.nn.BatchNorm, eqx.nn.ConvTranspose)
    nodes = jax.tree_util.tree_leaves_with_path(model, is_leaf=lambda v: isinstance(v, special))
    for keys, node in nodes:
        path = jax.tree_util.keystr(keys, simple=True, separator=".")
        own = {path: node}
        if isinstance(node, special):
            own = {f"{path}.{name}".lstrip("."): getattr(node, name) for name in ("weight", "bias")}
        if isinstance(node, eqx.nn.BatchNorm):
            norms[path] = {"momentum": node.momentum, "epsilon": node.eps, "unbiased": False}
            if not isinstance(state, eqx.nn.State):
                raise TypeError(
                    f"from_equinox: state is {a_kind(state)}, expected the eqx.nn.State that holds "
                    f"the statistics of {path!r}; write model, state = "
                    f"eqx.nn.make_with_state(Net)(key)."
                )
            for name, value in _equinox_statistics(node, state).items():
                own[f"{path}.{name}".lstrip(".")] = value
        for name, value in own.items():
            if not eqx.is_array_like(value) or not hasattr(value, "shape"):
                continue
            v = np.asarray(value)
            if name.endswith("bias") and v.ndim > 1:
                v = v.reshape(-1)  # a convolution's bias is [C, 1, 1]
            if isinstance(node, eqx.nn.ConvTranspose) and name.endswith("weight"):
                # Equinox: [out, in, spatial…]. PyTorch: [in, out, spatial…], flipped.
                v = np.flip(v.swapaxes(0, 1), tuple(range(2, v.ndim)))
            arrays[name] = v
    return torch(arrays), norms


def _equinox_statistics(layer: Any, state: Any) -> dict[str, np.ndarray]:
    """The statistics that the layer uses in inference; mean 0 and var 1 before any update."""
    new = {}
    if layer.mode == "ema":
        mean, var = state.get(layer.ema_state_index)
        fresh = bool(state.get(layer.ema_first_time_index))
    else:
        count = new["num_batches_tracked"] = np.asarray(state.get(layer.batch_counter))
        fresh = not count
        debias = 1 if fresh else 1 - layer.momentum ** int(count)
        mean, var = (v / debias for v in state.get(layer.batch_state_index))
    mean, var = np.asarray(mean), np.asarray(var)
    if fresh:
        mean, var = np.zeros_like(mean), np.ones_like(var)
    return {"running_mean": mean, "running_var": var, **new}
