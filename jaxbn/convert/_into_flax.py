"""Weights and statistics of PyTorch, Keras, Haiku and Equinox, into Flax; linen to nnx and back."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from jaxbn._inspection.layers import is_nnx, nnx_layers
from jaxbn._text import short
from jaxbn.convert import _sources
from jaxbn.convert._arrays import Tensor
from jaxbn.convert._matching import Rename, match, refuse, report_of
from jaxbn.convert._norm_arguments import torch_arguments
from jaxbn.convert._report import Report
from jaxbn.convert._state_dicts import Source, read
from jaxbn.convert._targets import Variables, flatten


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
    arguments = torch_arguments(call, momentum, eps)
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


def _between(
    call: str, source: Any, like: Any, rename: Rename | None, keep: Iterable[str]
) -> tuple[Any, Report]:
    tensors, target = flatten(call, source).tensors(), flatten(call, like)
    notes = ["momentum, epsilon and unbiased are arguments, not variables: write the same in both"]
    return into_flax(call, tensors, like, target, rename, keep, lambda _: None, notes)


def into_flax(
    call: str,
    tensors: Iterable[Tensor],
    like: Any,
    target: Variables,
    rename: Rename | None,
    keep: Iterable[str],
    arguments_of: Callable[[str], Mapping[str, Any] | None],  # of a layer of the source
    notes: Iterable[str],
) -> tuple[Any, Report]:
    """`like` with its variables replaced by the tensors, and the report."""
    found = match(tensors, target.slots, rename, keep)
    problems, notes = target.problems + found.problems, list(notes)
    kept = set(found.kept)
    for slot, leaf in zip(target.slots, target.leaves, strict=True):
        if slot.path in kept and isinstance(leaf, jax.ShapeDtypeStruct):
            problems.append(f"keep: {slot.path} is a shape; expected an array that can stay")
    source_of = {t: s for s, t in found.layers.items()}
    counted = {slot.layer for slot in target.slots if slot.role.leaf == "count"}
    modules = dict(nnx_layers(like)) if is_nnx(like) else {}
    batch_norm: dict[str, Mapping[str, Any]] = {}
    others: dict[str, list[str]] = {}  # arguments of `like` that differ from the source's → layers
    for layer in (slot.layer for slot in target.slots if slot.role.leaf == "mean"):
        if layer not in source_of or (arguments := arguments_of(source_of[layer])) is None:
            continue
        batch_norm[layer] = arguments
        if arguments["momentum"] is None and layer not in counted:
            problems.append(
                f"missing, in the target: a count in {layer!r}: BatchNorm(momentum=None)"
            )
        has: dict[str, Any] = {"momentum": None} if layer in counted else {}
        if layer in modules:  # Flax's own layer has no `unbiased`
            has = {name: getattr(modules[layer], name, False) for name in arguments}
        if has.get("epsilon", arguments["epsilon"]) != arguments["epsilon"]:
            problems.append(
                f"epsilon: {layer!r} has {has['epsilon']}, the source {arguments['epsilon']}"
            )
        if other := [f"{name}={v!r}" for name, v in has.items() if v != arguments[name]]:
            others.setdefault(", ".join(other), []).append(layer)
    notes += [f"like has {text} in {short(layers)}" for text, layers in others.items()]
    refuse(call, problems)
    return target.build(found.values), report_of(found, batch_norm, notes)
