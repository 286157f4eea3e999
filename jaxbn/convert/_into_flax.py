"""Weights and statistics of PyTorch, Keras, Haiku and Equinox, into Flax; linen to nnx and back."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np

from jaxbn._inspection.layers import is_nnx, nnx_layers
from jaxbn.convert import _layouts, _sources
from jaxbn.convert._matching import Rename, match, refuse, renamed
from jaxbn.convert._report import Report, Role, Slot, Tensor
from jaxbn.convert._state_dicts import Source, read
from jaxbn.convert._targets import Variables, flatten
from jaxbn.convert._transfer import into_flax, report_of


def norm_arguments(momentum: float | None = 0.1, eps: float = 1e-5) -> dict[str, Any]:
    """The arguments of `jaxbn.linen.BatchNorm` and `jaxbn.nnx.BatchNorm` that equal PyTorch's.

    PyTorch's momentum is the weight of the new value, here it is that of the old; PyTorch's running
    variance takes n / (n - 1).

    Args:
      momentum: PyTorch's; None is the cumulative average in both.
      eps: PyTorch's.

    Raises:
      ValueError: momentum is not in [0, 1], or eps is negative.

    >>> from jaxbn import convert
    >>> convert.norm_arguments()
    {'momentum': 0.9, 'epsilon': 1e-05, 'unbiased': True}
    """
    return _arguments("norm_arguments", momentum, eps)


def from_torch(
    source: Source,
    like: Any,
    *,
    rename: Rename | None = None,
    keep: Iterable[str] = (),
    transposed: Mapping[str, bool] | None = None,
    flattened: Mapping[str, tuple[int, ...]] | None = None,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
) -> tuple[Any, Report]:
    """Equals `like` with the weights and statistics of a PyTorch model.

    Args:
      source: `model.state_dict()` or a mapping of names to arrays, or the path of a `.safetensors`
        file or of a PyTorch file (`.pt`, `.pth`, `.bin`), which is read with weights_only=True.
      like: linen's variables, an nnx module or its state; shapes alone will do.
      rename: PyTorch layer, or a beginning of its name → name of the layer in like; None drops it.
      keep: layers of like that stay as they are: a new head.
      transposed: layer of like → its `transpose_kernel`, for every transposed convolution of
        linen; nnx modules tell their own.
      flattened: layer of like → (H, W, C), for a dense layer after a flattened image: its inputs
        come in PyTorch's order, (C, H, W), and shapes cannot tell.
      momentum: PyTorch's, of its batch norm layers; it is not in a state_dict.
      eps: PyTorch's; nor is this.

    Returns:
      `(new, report)`: new is of like's kind and shares no memory with the source; like stays.
      `num_batches_tracked` becomes `count` where like counts updates, else it is dropped.

    Raises:
      ValueError: keys are unknown, missing or misshapen, all of which are listed; an nnx batch norm
        of like has another epsilon; a cumulative average (momentum=None) meets a like without
        count; the file is none, cut off, or would run code.
      TypeError: source or like is of another kind.

    >>> import numpy as np
    >>> from jaxbn import convert
    >>> like = {"params": {"fc": {"kernel": np.zeros((3, 2))}}}
    >>> new, report = convert.from_torch({"fc.weight": np.arange(6.0).reshape(2, 3)}, like)
    >>> new["params"]["fc"]["kernel"].tolist()
    [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    """
    call = "from_torch"
    arguments = _arguments(call, momentum, eps)
    tensors = _sources.torch(read(call, source))
    target = flatten(call, like, transposed, flattened)
    notes = [
        f"momentum: {momentum} of PyTorch (weight of the new) is {arguments['momentum']} here "
        f"(weight of the old)"
        if momentum is not None
        else "momentum: None in both, the cumulative average of all updates"
    ]
    return into_flax(call, tensors, like, target, rename, keep, lambda _: arguments, notes)


def from_keras(
    model: Any,
    like: Any,
    *,
    rename: Rename | None = None,
    keep: Iterable[str] = (),
    transposed: Mapping[str, bool] | None = None,
) -> tuple[Any, Report]:
    """Equals `like` with the weights and statistics of a Keras 3 model, whatever its backend.

    Momentum, epsilon and the kinds of convolutions are read from its layers. A layer's name is its
    path (`block/conv`); a separable convolution is two, `…/depthwise` and `…/pointwise`.

    Args:
      model: `keras.Model` or layer, built.
      like: linen's variables, an nnx module or its state.
      rename: layer there, or a beginning of its path → layer of like; None drops it.
      keep: layers of like that stay as they are.
      transposed: as in `from_torch`.

    Raises:
      ValueError: as in `from_torch`.

    >>> from jaxbn import convert
    >>> new, report = convert.from_keras(keras_model, like)  # doctest: +SKIP
    """
    call = "from_keras"
    tensors, norms = _sources.keras(model)
    if not tensors:
        raise ValueError(
            f"{call}: a {type(model).__name__} without weights came; expected a Keras model that "
            f"is built; call it once, or give it a keras.Input."
        )
    target = flatten(call, like, transposed)
    return into_flax(call, tensors, like, target, rename, keep, norms.get, [])


def from_haiku(
    params: Mapping[str, Mapping[str, Any]],
    state: Mapping[str, Mapping[str, Any]],
    like: Any,
    *,
    decay_rate: float,
    eps: float = 1e-5,
    rename: Rename | None = None,
    keep: Iterable[str] = (),
    transposed: Mapping[str, bool] | None = None,
) -> tuple[Any, Report]:
    """Equals `like` with the weights and statistics of a Haiku model.

    The running statistics are Haiku's debiased averages, those of its inference. Training goes on
    without debiasing, which after t updates weighs the past by at most decay_rate**t more. Where
    nothing was ever updated (counter 0), they are 0 and 1.

    Args:
      params: as `hk.transform_with_state` gives them; `~` in a name is left out.
      state: likewise.
      like: linen's variables, an nnx module or its state.
      decay_rate: that of `hk.BatchNorm`; it is not in its state.
      eps: that of `hk.BatchNorm`.
      rename: layer there, or a beginning of its path → layer of like; None drops it.
      keep: layers of like that stay as they are.
      transposed: as in `from_torch`.

    Raises:
      ValueError: as in `from_torch`.

    >>> import numpy as np
    >>> from jaxbn import convert
    >>> like = {"params": {"Dense_0": {"kernel": np.zeros((3, 2))}}}
    >>> params = {"linear": {"w": np.ones((3, 2))}}
    >>> new, report = convert.from_haiku(params, {}, like, decay_rate=0.99)
    >>> report.moves[0].source, report.moves[0].target
    ('linear/w', 'params/Dense_0/kernel')
    """
    call = "from_haiku"
    tensors, updates = _sources.haiku(params, state)
    arguments = {"momentum": decay_rate, "epsilon": eps, "unbiased": False}
    notes = [f"{layer}: debiased averages of {count} updates" for layer, count in updates.items()]
    target = flatten(call, like, transposed)
    return into_flax(call, tensors, like, target, rename, keep, lambda _: arguments, notes)


def from_equinox(
    model: Any,
    state: Any,
    like: Any,
    *,
    rename: Rename | None = None,
    keep: Iterable[str] = (),
    transposed: Mapping[str, bool] | None = None,
    flattened: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[Any, Report]:
    """Equals `like` with the weights and statistics of an Equinox model.

    The running statistics are those of Equinox's inference: in mode "ema" the averages, in mode
    "batch" the debiased ones. Where nothing was ever updated, they are 0 and 1.

    Args:
      model: as `eqx.nn.make_with_state` gives it.
      state: likewise.
      like: linen's variables, an nnx module or its state.
      rename: layer there, or a beginning of its path → layer of like; None drops it.
      keep: layers of like that stay as they are.
      transposed: as in `from_torch`.
      flattened: as in `from_torch`; Equinox flattens (C, H, W) too.

    Raises:
      ValueError: as in `from_torch`.

    >>> from jaxbn import convert
    >>> new, report = convert.from_equinox(model, state, like)  # doctest: +SKIP
    """
    call = "from_equinox"
    tensors, norms = _sources.equinox(model, state)
    target = flatten(call, like, transposed, flattened)
    return into_flax(call, tensors, like, target, rename, keep, norms.get, [])


def linen_to_nnx(
    variables: Any, like: Any, *, rename: Rename | None = None, keep: Iterable[str] = ()
) -> tuple[Any, Report]:
    """Equals `like`, an nnx module or its state, with the values of linen's variables.

    Raises:
      ValueError, TypeError: as in `from_torch`.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> from jaxbn import convert
    >>> variables = nn.Dense(2).init(jax.random.key(0), jnp.ones((1, 3)))
    >>> model, report = convert.linen_to_nnx(variables, nnx.Linear(3, 2, rngs=nnx.Rngs(1)))
    >>> bool((model.kernel[...] == variables["params"]["kernel"]).all())
    True
    """
    return _between("linen_to_nnx", variables, like, rename, keep)


def nnx_to_linen(
    model: Any, like: Any, *, rename: Rename | None = None, keep: Iterable[str] = ()
) -> tuple[Any, Report]:
    """Equals `like`, linen's variables, with the values of an nnx module or its state.

    Raises:
      ValueError, TypeError: as in `from_torch`.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> from jaxbn import convert
    >>> like = jax.eval_shape(nn.Dense(2).init, jax.random.key(0), jnp.ones((1, 3)))
    >>> variables, report = convert.nnx_to_linen(nnx.Linear(3, 2, rngs=nnx.Rngs(1)), like)
    >>> variables["params"]["kernel"].shape
    (3, 2)
    """
    return _between("nnx_to_linen", model, like, rename, keep)


def to_torch(
    variables: Any,
    like: Source | None = None,
    *,
    rename: Rename | None = None,
    transposed: Mapping[str, bool] | None = None,
    flattened: Mapping[str, tuple[int, ...]] | None = None,
    momentum: float | None = 0.99,
    epsilon: float = 1e-5,
) -> tuple[dict[str, np.ndarray], Report]:
    """The state_dict, as NumPy arrays, of a PyTorch model with the values of Flax's variables.

    Load it with `model.load_state_dict({k: torch.from_numpy(v) for k, v in new.items()})`, or write
    it with `safetensors.numpy.save_file(new, path)`.

    Args:
      variables: linen's variables, an nnx module or its state.
      like: the state_dict, or the file, whose names and shapes are wanted; None names layers by
        `rename`, or as in Flax with dots.
      rename: Flax layer, or a beginning of its path → PyTorch layer.
      transposed: as in `from_torch`, by Flax's layers.
      flattened: likewise.
      momentum: that of linen's batch norm layers; nnx modules tell theirs. The report has
        PyTorch's.
      epsilon: likewise.

    Returns:
      `(new, report)`. `num_batches_tracked` is `count`, or where Flax counts no updates that of
      like, or 0.

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
    given = _named(call, source, rename) if like is None else read(call, like)
    slots = []
    for key, v in given.items():
        layer, _, leaf = key.rpartition(".")
        slots.append(Slot(key, layer, Role(leaf), v.shape, v.dtype))
    found = match(tensors, slots, rename, ())
    refuse(call, source.problems + found.problems)
    new = {key: np.array(found.values.get(key, v)) for key, v in given.items()}

    modules = dict(nnx_layers(variables)) if is_nnx(variables) else {}
    batch_norm = {}
    for slot in source.slots:
        if slot.role.leaf == "mean" and slot.layer in found.layers:
            norm = modules.get(slot.layer)
            kept, eps = (norm.momentum, norm.epsilon) if norm else (momentum, epsilon)
            batch_norm[found.layers[slot.layer]] = {"momentum": _other(kept), "eps": eps}
    return new, report_of(found, batch_norm, [])


COUNT = "num_batches_tracked"


def _arguments(call: str, momentum: float | None, eps: float) -> dict[str, Any]:
    if momentum is not None and not 0 <= momentum <= 1:
        raise ValueError(
            f"{call}: momentum={momentum!r}, expected PyTorch's, in [0, 1], or None for "
            f"the cumulative average; write momentum=0.1."
        )
    if not eps >= 0:
        raise ValueError(f"{call}: eps={eps!r}, expected at least 0; write eps=1e-5.")
    return {"momentum": _other(momentum), "epsilon": eps, "unbiased": True}


def _other(momentum: float | None) -> float | None:
    """Weight of the new value ↔ of the old; 1 - 0.9 is 0.09999999999999998 in floating point."""
    return None if momentum is None else round(1 - momentum, 12)


def _named(call: str, source: Variables, rename: Rename | None) -> dict[str, np.ndarray]:
    """The state_dict whose layers are called by rename, or as in Flax."""
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
    return form if role.leaf == name else None


def _between(
    call: str, source: Any, like: Any, rename: Rename | None, keep: Iterable[str]
) -> tuple[Any, Report]:
    tensors, target = flatten(call, source).tensors(), flatten(call, like)
    notes = ["momentum, epsilon and unbiased are arguments, not variables: write the same in both"]
    return into_flax(call, tensors, like, target, rename, keep, lambda _: None, notes)
