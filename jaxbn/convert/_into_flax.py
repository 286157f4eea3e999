"""From PyTorch, Keras, Haiku and Equinox into Flax; between linen and nnx."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxbn._inspection.layers import is_nnx, nnx_layers
from jaxbn._text import a_kind, short
from jaxbn.convert import _sources
from jaxbn.convert._arrays import Rename, Request, Slot, Tensor
from jaxbn.convert._matching import match_arrays, refuse, report_of
from jaxbn.convert._norm_arguments import torch_arguments
from jaxbn.convert._report import Report
from jaxbn.convert._state_dicts import Source, read_state_dict
from jaxbn.convert._targets import flatten


def from_torch(
    source: Source,
    like: Any,
    *,
    rename: Rename | None = None,
    keep: Iterable[str] = (),
    transposed: Mapping[str, bool] | None = None,
    flattened: Mapping[str, Any] | None = None,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
) -> tuple[Any, Report]:
    """Equals `like` with the weights and statistics of a PyTorch model.

    Args:
      source: `model.state_dict()`, a mapping of names to arrays, or the path of a file:
        `.safetensors`, or PyTorch's `.pt`, `.pth`, `.bin`, `.ckpt`, `.pth.tar`, which are read with
        weights_only=True; or a folder of such files with an index (`….index.json`), or with one.
      like: linen's variables, an nnx module or its state. Shapes are enough (`jax.eval_shape`).
      rename: PyTorch layer, or a beginning of its name → name of the layer in like; None drops it.
      keep: layers of like that stay as they are: a new head.
      transposed: layer of like → its `transpose_kernel`, for every transposed convolution of a
        linen model. An nnx module has the setting itself.
      flattened: layer of like → (H, W, C), for a dense layer that follows a flattened image, and
        for a norm between the two. PyTorch flattens (C, H, W), Flax (H, W, C), and the shapes are
        the same. For a dense layer whose outputs become an image: layer → (None, (H, W, C)), and
        layer → ((H, W, C), (H, W, C)) for both.
      momentum: the momentum of the PyTorch model's batch norm layers; a state_dict has none.
      eps: the eps of these layers; a state_dict has none.

    Returns:
      `(new, report)`. `new` is of the kind of `like` and shares no memory with the source; `like`
      is unchanged. `num_batches_tracked` becomes `count` if like counts updates; otherwise the
      array is dropped.

    Raises:
      ValueError: arrays are unknown, missing or misshapen (the message lists all of them); an nnx
        batch norm of like has another epsilon; momentum=None, and like has no count; the file is
        not of this kind, is cut off, or would run code.
      TypeError: source or like is of another type.

    >>> import numpy as np
    >>> from jaxbn import convert
    >>> like = {"params": {"fc": {"kernel": np.zeros((3, 2))}}}
    >>> new, report = convert.from_torch({"fc.weight": np.arange(6.0).reshape(2, 3)}, like)
    >>> new["params"]["fc"]["kernel"].tolist()
    [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    """
    request = Request("from_torch", like, rename, keep, transposed, flattened or {})
    arguments = torch_arguments(request.call, momentum, eps)
    tensors = _sources.torch(read_state_dict(request.call, source))
    notes = [
        f"momentum: {momentum} of PyTorch (weight of the new) is {arguments['momentum']} here "
        f"(weight of the old)"
        if momentum is not None
        else "momentum: None in both, the cumulative average of all updates"
    ]
    return _into_flax(request, tensors, lambda _: arguments, notes)


def from_keras(
    model: Any,
    like: Any,
    *,
    rename: Rename | None = None,
    keep: Iterable[str] = (),
    transposed: Mapping[str, bool] | None = None,
) -> tuple[Any, Report]:
    """Equals `like` with the weights and statistics of a Keras 3 model, whatever its backend.

    Momentum, epsilon and the kinds of convolutions are read from the Keras layers. The name of a
    layer is its path (`block/conv`). A separable convolution counts as two layers, `…/depthwise`
    and `…/pointwise`.

    Args:
      model: a built `keras.Model` or layer.
      like: linen's variables, an nnx module or its state.
      rename: Keras layer, or a beginning of its path → layer of like; None drops it.
      keep: layers of like that stay as they are.
      transposed: as in `from_torch`.

    Raises:
      ValueError: as in `from_torch`.

    >>> from jaxbn import convert
    >>> new, report = convert.from_keras(keras_model, like)  # doctest: +SKIP
    """
    tensors, norms = _sources.keras(model)
    if not tensors:
        raise ValueError(
            f"from_keras: {a_kind(model)} without weights came; expected a Keras model "
            f"that is built; call it once, or give it a keras.Input."
        )
    return _into_flax(Request("from_keras", like, rename, keep, transposed), tensors, norms.get)


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

    The running statistics are Haiku's debiased averages, which Haiku uses in inference. If no
    update was made (counter 0), mean is 0 and var is 1. Further training in Flax does not debias:
    after t updates in Haiku the past weighs at most decay_rate**t more than it would there.

    Args:
      params: the parameters of `hk.transform_with_state`; `~` in a name is left out.
      state: the state of `hk.transform_with_state`.
      like: linen's variables, an nnx module or its state.
      decay_rate: the decay_rate of the model's `hk.BatchNorm`; the state has none.
      eps: the eps of the model's `hk.BatchNorm`.
      rename: Haiku layer, or a beginning of its path → layer of like; None drops it.
      keep: layers of like that stay as they are.
      transposed: as in `from_torch`.

    Raises:
      TypeError: params or state is no dict of dicts, or `like` is nothing of Flax's.
      ValueError: as in `from_torch`.

    >>> import numpy as np
    >>> from jaxbn import convert
    >>> like = {"params": {"Dense_0": {"kernel": np.zeros((3, 2))}}}
    >>> params = {"linear": {"w": np.ones((3, 2))}}
    >>> new, report = convert.from_haiku(params, {}, like, decay_rate=0.99)
    >>> report.moves[0].source, report.moves[0].target
    ('linear/w', 'params/Dense_0/kernel')
    """
    for name, tree in (("params", params), ("state", state)):
        if not isinstance(tree, Mapping) or not all(isinstance(v, Mapping) for v in tree.values()):
            what = "a dict of others than dicts" if isinstance(tree, Mapping) else a_kind(tree)
            raise TypeError(
                f"from_haiku: {name} is {what}, expected a dict for each module, as "
                f"hk.transform_with_state gives; write params, state = net.init(rng, x)."
            )
    tensors, updates = _sources.haiku(params, state)
    if not tensors:
        raise ValueError(
            "from_haiku: params and state hold nothing, expected those of hk.transform_with_state; "
            "write params, state = net.init(rng, x)."
        )
    arguments = {"momentum": decay_rate, "epsilon": eps, "unbiased": False}
    notes = [
        f"{layer}: debiased averages of {count} update{'s' * (count != 1)}"
        for layer, count in updates.items()
    ]
    request = Request("from_haiku", like, rename, keep, transposed)
    return _into_flax(request, tensors, lambda _: arguments, notes)


def from_equinox(
    model: Any,
    state: Any,
    like: Any,
    *,
    rename: Rename | None = None,
    keep: Iterable[str] = (),
    transposed: Mapping[str, bool] | None = None,
    flattened: Mapping[str, Any] | None = None,
) -> tuple[Any, Report]:
    """Equals `like` with the weights and statistics of an Equinox model.

    The running statistics are those that Equinox uses in inference: the averages in mode "ema",
    the debiased averages in mode "batch". If no update was made, mean is 0 and var is 1.

    Args:
      model: the model of `eqx.nn.make_with_state`.
      state: the state of `eqx.nn.make_with_state`.
      like: linen's variables, an nnx module or its state.
      rename: Equinox layer, or a beginning of its path → layer of like; None drops it.
      keep: layers of like that stay as they are.
      transposed: as in `from_torch`.
      flattened: as in `from_torch`; Equinox flattens (C, H, W), as PyTorch does.

    Raises:
      TypeError: a batch norm's statistics are not in state, or `like` is nothing of Flax's.
      ValueError: as in `from_torch`.

    >>> from jaxbn import convert
    >>> new, report = convert.from_equinox(model, state, like)  # doctest: +SKIP
    """
    tensors, norms = _sources.equinox(model, state)
    if not tensors:
        raise ValueError(
            f"from_equinox: {a_kind(model)} without arrays came; expected an Equinox model; write "
            f"model, state = eqx.nn.make_with_state(Net)(key)."
        )
    request = Request("from_equinox", like, rename, keep, transposed, flattened or {})
    return _into_flax(request, tensors, norms.get)


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
    return _between(variables, Request("linen_to_nnx", like, rename, keep))


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
    return _between(model, Request("nnx_to_linen", like, rename, keep))


def _between(source: Any, request: Request) -> tuple[Any, Report]:
    """From Flax to Flax: every array keeps its layout, and a norm its arguments."""
    tensors = flatten(request.call, source).tensors()
    notes = ["momentum, epsilon and unbiased are arguments, not variables: write the same in both"]
    return _into_flax(request, tensors, lambda _: None, notes)


def _into_flax(
    request: Request,
    tensors: Iterable[Tensor],
    arguments_of: Callable[[str], Mapping[str, Any] | None],
    notes: Iterable[str] = (),
) -> tuple[Any, Report]:
    """`request.like` with its variables replaced by the tensors, and the report.

    `arguments_of` gives momentum, epsilon and unbiased of a norm layer of the source.
    """
    like = request.like
    target = flatten(request.call, like, request.transposed, request.flattened)
    found = match_arrays(tensors, target.slots, request.rename, request.keep)
    problems, notes = target.problems + found.problems, list(notes)
    kept = set(found.kept)
    for slot, leaf in zip(target.slots, target.leaves, strict=True):
        if slot.path in kept and isinstance(leaf, jax.ShapeDtypeStruct):
            problems.append(f"keep: {slot.path} is a shape; expected an array that can stay")
    source_of = {t: s for s, t in found.layers.items()}
    counted = {slot.layer for slot in target.slots if slot.role.leaf == "count"}
    modules = dict(nnx_layers(like)) if is_nnx(like) else {}
    batch_norm: dict[str, Mapping[str, Any]] = {}
    others: dict[str, list[str]] = {}  # arguments of like that differ → layers
    for layer in (slot.layer for slot in target.slots if slot.role.leaf == "mean"):
        if layer not in source_of or (arguments := arguments_of(source_of[layer])) is None:
            continue
        batch_norm[layer] = arguments
        if arguments["momentum"] is None and layer not in counted:
            problems.append(
                f"missing, in the target: a count in {layer!r}: BatchNorm(momentum=None)"
            )
        has: dict[str, Any] = {"momentum": None} if layer in counted else {}
        if layer in modules:  # Flax's own layer has no attribute `unbiased`
            has = {name: getattr(modules[layer], name, False) for name in arguments}
        if has.get("epsilon", arguments["epsilon"]) != arguments["epsilon"]:
            problems.append(
                f"epsilon: {layer!r} has {has['epsilon']}, the source {arguments['epsilon']}"
            )
        if other := [f"{name}={v!r}" for name, v in has.items() if v != arguments[name]]:
            others.setdefault(", ".join(other), []).append(layer)
    notes += [f"like has {text} in {short(layers)}" for text, layers in others.items()]
    notes += _not_finite(found.values)
    if request.flattened is not None:
        notes += _perhaps_flattened(target.slots, request.flattened)
    refuse(request.call, problems)
    return target.build(found.values), report_of(found, batch_norm, notes)


def _not_finite(values: Mapping[str, np.ndarray]) -> list[str]:
    """A note on the layers whose statistics hold NaN or infinity."""
    layers = dict.fromkeys(
        path.rpartition("/")[0].removeprefix("batch_stats/")
        for path, v in values.items()
        if path.rpartition("/")[2] in ("mean", "var") and not np.isfinite(v).all()
    )
    if not layers:
        return []
    return [f"statistics that are not finite, as in the source: {short(layers)}"]


def _perhaps_flattened(slots: Sequence[Slot], flattened: Mapping[str, Any]) -> list[str]:
    """Notes on dense layers whose inputs or outputs may be a square image of a convolution.

    The source lists such an image in the order (C, H, W), Flax in the order (H, W, C). The shapes
    are the same, so nothing but the model's code can tell.
    """
    kernels = {slot.layer: slot.shape for slot in slots if slot.role.leaf == "kernel"}
    norms = {slot.shape[0] for slot in slots if slot.role.leaf in ("scale", "mean") and slot.shape}
    convs = [shape for shape in kernels.values() if len(shape) > 2]
    notes = []
    for layer, shape in kernels.items():
        if len(shape) != 2 or layer in flattened:
            continue
        for axis, word, before, place in (
            (0, "inputs", -1, "{}"),
            (1, "outputs", -2, "(None, {})"),
        ):
            n = shape[axis]
            beside = {other[before] for other in kernels.values()} | norms
            side, c = max(
                ((_side(n, conv[before]), conv[before]) for conv in convs), default=(0, 0)
            )
            if n in beside or side < 2:
                continue
            size = place.format((side, side, c))
            notes.append(
                f"{layer}: {n} {word} may be an image of {side}x{side}x{c}; if so, the order is "
                f"wrong without flattened={{{layer!r}: {size}}}"
            )
    return notes


def _side(n: int, channels: int) -> int:
    """The side of a square image with so many channels and n values; 0 if there is none."""
    side = math.isqrt(n // channels)
    return side if side * side * channels == n else 0
