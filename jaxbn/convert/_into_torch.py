"""Flax's weights and statistics as a PyTorch state dict."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxbn._inspection.layers import is_nnx, nnx_layers
from jaxbn._text import short
from jaxbn.convert import _layouts
from jaxbn.convert._arrays import Rename, Role, Slot, Tensor
from jaxbn.convert._matching import match_arrays, refuse, renamed, report_of
from jaxbn.convert._norm_arguments import one_minus
from jaxbn.convert._report import Report
from jaxbn.convert._state_dicts import Source, read_state_dict
from jaxbn.convert._targets import Variables, flatten

COUNT = "num_batches_tracked"


def to_torch(
    variables: Any,
    like: Source | None = None,
    *,
    rename: Rename | None = None,
    keep: Iterable[str] = (),
    transposed: Mapping[str, bool] | None = None,
    flattened: Mapping[str, Any] | None = None,
    momentum: float | None = 0.99,
    epsilon: float = 1e-5,
) -> tuple[dict[str, np.ndarray], Report]:
    """A PyTorch state_dict, of NumPy arrays, with the values of Flax's variables.

    Load it with `model.load_state_dict({k: torch.from_numpy(v) for k, v in new.items()})`, or write
    it with `safetensors.numpy.save_file(new, path)`.

    Args:
      variables: linen's variables, an nnx module or its state.
      like: a state_dict, or a file of one, with the names and shapes of the PyTorch model. None:
        layers are named by `rename`, or as in Flax with dots.
      rename: Flax layer, or a beginning of its path → PyTorch layer.
      keep: layers of like that stay as they are.
      transposed: Flax layer → its `transpose_kernel`, as in `from_torch`.
      flattened: Flax layer → (H, W, C), as in `from_torch`.
      momentum: the momentum of linen's batch norm layers. nnx modules have theirs. The report says
        what PyTorch calls momentum.
      epsilon: the epsilon of linen's batch norm layers.

    Returns:
      `(new, report)`. `num_batches_tracked` is Flax's `count`. If Flax counts no updates, it is
      that of `like`, or 0. bfloat16 becomes float32, since `torch.from_numpy` takes no bfloat16.

    Raises:
      ValueError, TypeError: as in `from_torch`.

    >>> import numpy as np
    >>> from jaxbn import convert
    >>> variables = {"params": {"fc": {"kernel": np.zeros((3, 2)), "bias": np.zeros(2)}}}
    >>> new, report = convert.to_torch(variables)
    >>> {name: v.shape for name, v in new.items()}
    {'fc.bias': (2,), 'fc.weight': (2, 3)}
    """
    call = "to_torch"
    source = flatten(call, variables, transposed, flattened)
    tensors = []
    for slot, v in zip(source.slots, map(np.asarray, source.leaves), strict=True):
        name, how, value = _layouts.to_torch(slot.role, v)
        tensors.append(Tensor(slot.path, slot.layer, partial(_if_called, name, (how, value)), v))
    given = _named(call, source, rename) if like is None else read_state_dict(call, like)
    slots = []
    for key, v in given.items():
        layer, _, leaf = key.rpartition(".")
        slots.append(Slot(key, layer, Role(leaf, ndim=v.ndim), v.shape, v.dtype))
    found = match_arrays(tensors, slots, rename, keep)
    norms = {slot.layer for slot in source.slots if slot.role.leaf == "mean"}
    tables = [
        f"{slot.path} is {slot.shape}, and PyTorch's norms have one axis: of several domains (or "
        f"classes, or layers of a scan), take one, as jax.tree.map(lambda v: v[0], batch_stats) "
        f"does where axis 0 is theirs"
        for slot in source.slots
        if slot.layer in norms and len(slot.shape) > 1
    ]
    refuse(call, tables)
    refuse(call, source.problems + found.problems)
    new = {key: np.array(found.values.get(key, v)) for key, v in given.items()}
    halves = [key for key, v in new.items() if v.dtype == jnp.bfloat16]
    new |= {key: new[key].astype(np.float32) for key in halves}
    notes = [f"bfloat16 → float32, which torch.from_numpy takes: {short(halves)}"] * bool(halves)

    modules = dict(nnx_layers(variables)) if is_nnx(variables) else {}
    batch_norm = {}
    for slot in source.slots:
        if slot.role.leaf == "mean" and slot.layer in found.layers:
            norm = modules.get(slot.layer)
            kept, eps = (norm.momentum, norm.epsilon) if norm else (momentum, epsilon)
            batch_norm[found.layers[slot.layer]] = {"momentum": one_minus(kept), "eps": eps}
    return new, report_of(found, batch_norm, notes)


def _named(call: str, source: Variables, rename: Rename | None) -> dict[str, np.ndarray]:
    """The state_dict without a `like`: layers are called as `rename` says, or as in Flax."""
    names = {slot.layer: slot.layer for slot in source.slots}
    if rename is not None:
        names, _ = renamed(names, rename)
    counted = {slot.layer for slot in source.slots if slot.role.leaf == "count"}
    new: dict[str, np.ndarray] = {}
    twice = []
    for slot, v in zip(source.slots, map(np.asarray, source.leaves), strict=True):
        if slot.layer not in names:
            continue
        layer = names[slot.layer].replace("/", ".")
        name, _, value = _layouts.to_torch(slot.role, v)
        key = f"{layer}.{name}".lstrip(".")
        twice += [f"two arrays of the source become {key}"] * (key in new)
        new[key] = value.astype(np.int64) if name == COUNT else value
        if name == "running_var" and slot.layer not in counted:
            new[f"{layer}.{COUNT}".lstrip(".")] = np.zeros((), np.int64)
    refuse(call, twice)
    return new


def _if_called(name: str, form: _layouts.Form, role: Role) -> _layouts.Form | None:
    """The form if the role has the name; a 1x1 convolution and a dense kernel are the same."""
    if role.leaf != name:
        return None
    how, v = form
    new = _layouts.with_rank(v, role.ndim if name == "weight" else None)
    return how if new.ndim == v.ndim else f"{how}, axes of size 1", new
