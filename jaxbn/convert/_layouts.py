"""How other libraries name and lay out the arrays of a layer, and how Flax lays them out.

Flax keeps features last. The kernel of a dense layer is [in, out] (IO). The kernel of a convolution
is [spatial…, in, out] (HWIO). The kernel of a transposed convolution is [spatial…, in, out], in the
order in which it is applied; with `transpose_kernel` the kernel is [spatial…, out, in], and Flax
flips the kernel before applying it.
"""

import math

import numpy as np

from jaxbn.convert._arrays import Role

Form = tuple[str, np.ndarray]  # what was done, and the array in its new form

FLAX_NAMES = {"running_mean": "mean", "running_var": "var", "num_batches_tracked": "count"}
TORCH_NAMES = {flax: torch for torch, flax in FLAX_NAMES.items()}


def from_torch(leaf: str, v: np.ndarray, role: Role) -> Form | None:
    """The array `leaf` of a PyTorch layer in this role of a Flax layer; None if another."""
    if role.leaf != "kernel" or leaf != "weight" or v.ndim < 2:
        if leaf == "weight":
            fits = {(1, "scale"), (2, "embedding"), (1, "negative_slope")}
            if (v.ndim, role.leaf) not in fits:
                return None
        elif FLAX_NAMES.get(leaf, leaf) != role.leaf:
            return None
        if role.leaf == "negative_slope" and v.size == 1 and role.ndim == 0:
            return "1 → ()", v.reshape(())
        if role.outputs and v.ndim == 1:
            return "CHW → HWC", channels_last(v, role.outputs, 0)
        return "", v
    wide = with_rank(v, role.ndim if role.transpose_kernel is None else None)
    same = wide.ndim == v.ndim
    a, b = (_spatial(v) if same else "1" * (w.ndim - 2) for w in (v, wide))
    v = wide
    if v.ndim == 2:
        how = f"OI{a} → IO"
        if role.flattened:  # PyTorch flattened (C, H, W), Flax (H, W, C)
            how, v = f"{how}, inputs CHW → HWC", channels_last(v, role.flattened, 1)
        if role.outputs:
            how, v = f"{how}, outputs CHW → HWC", channels_last(v, role.outputs, 0)
        return how, v.T
    w = v.transpose(*range(2, v.ndim), 1, 0)
    if role.transpose_kernel is None:
        return f"OI{a} → {b}IO", w
    return (f"IO{a} → {a}OI", w) if role.transpose_kernel else (f"IO{a} → {a}IO, flipped", flip(w))


def to_torch(role: Role, w: np.ndarray) -> tuple[str, str, np.ndarray]:
    """The inverse of `from_torch`: the name in PyTorch, what was done, and the array."""
    if role.leaf == "negative_slope" and not w.ndim:
        return "weight", "() → 1", w.reshape(1)
    if role.leaf != "kernel" or w.ndim < 2:
        weights = ("scale", "embedding", "negative_slope")
        name = "weight" if role.leaf in weights else TORCH_NAMES.get(role.leaf, role.leaf)
        if role.outputs and w.ndim == 1:
            return name, "HWC → CHW", channels_first(w, role.outputs, 0)
        return name, "", w
    s = _spatial(w)
    if w.ndim == 2:
        how, v = "IO → OI", w.T
        if role.flattened:
            how, v = f"{how}, inputs HWC → CHW", channels_first(v, role.flattened, 1)
        if role.outputs:
            how, v = f"{how}, outputs HWC → CHW", channels_first(v, role.outputs, 0)
        return "weight", how, v
    unflipped = flip(w) if role.transpose_kernel is False else w
    v = unflipped.transpose(-1, -2, *range(w.ndim - 2))
    if role.transpose_kernel is None:
        return "weight", f"{s}IO → OI{s}", v
    return "weight", f"{s}OI → IO{s}" if role.transpose_kernel else f"{s}IO → IO{s}, flipped", v


def channels_last(v: np.ndarray, size: tuple[int, ...], axis: int) -> np.ndarray:
    """`v`, whose axis lists an image (C, H, W), with the axis listing it as (H, W, C).

    An axis of another length stays; whoever compares shapes reports it.

    >>> import numpy as np
    >>> from jaxbn.convert import _layouts
    >>> _layouts.channels_last(np.arange(6), (1, 3, 2), 0).tolist()
    [0, 3, 1, 4, 2, 5]
    """
    *space, c = size
    if v.shape[axis] != math.prod(size):
        return v
    parts = v.reshape(*v.shape[:axis], c, *space, *v.shape[axis + 1 :])
    return np.moveaxis(parts, axis, axis + len(space)).reshape(v.shape)


def channels_first(v: np.ndarray, size: tuple[int, ...], axis: int) -> np.ndarray:
    """The inverse of `channels_last`."""
    parts = v.reshape(*v.shape[:axis], *size, *v.shape[axis + 1 :])
    return np.moveaxis(parts, axis + len(size) - 1, axis).reshape(v.shape)


def with_rank(v: np.ndarray, ndim: int | None) -> np.ndarray:
    """`v` [O, I, …] with axes of size 1 added or left out behind, if that gives `ndim` axes.

    A convolution by 1x1 and a dense layer compute the same.

    >>> import numpy as np
    >>> from jaxbn.convert import _layouts
    >>> _layouts.with_rank(np.ones((3, 2)), 4).shape
    (3, 2, 1, 1)
    """
    if ndim is None or ndim < 2 or v.ndim < 2 or set(v.shape[ndim:]) - {1}:
        return v
    return v.reshape(*v.shape[:ndim], *(1,) * (ndim - v.ndim))


def from_haiku(leaf: str, v: np.ndarray, role: Role) -> Form | None:
    """The array `leaf` of a Haiku module in this role. Haiku's per-channel arrays are [1, …, C]."""
    names = {"w": "kernel", "b": "bias", "offset": "bias", "embeddings": "embedding"}
    if names.get(leaf, leaf) != role.leaf:
        return None
    if (
        leaf != "w"
        and role.leaf != "embedding"
        and v.size == max(v.shape, default=1)
        and v.ndim > 1
    ):
        return "", v.reshape(-1)
    if leaf == "w" and role.transpose_kernel is not None:  # [spatial…, out, in], not flipped
        s = _spatial(v)
        if role.transpose_kernel:
            return f"{s}OI, flipped", np.flip(v, tuple(range(v.ndim - 2)))
        return f"{s}OI → {s}IO", v.swapaxes(-1, -2)
    return "", v


def from_keras(kind: str, leaf: str, v: np.ndarray, role: Role) -> Form | None:
    """The variable `leaf` of a Keras layer of class `kind` in this role."""
    names = {"gamma": "scale", "beta": "bias", "embeddings": "embedding"}
    names |= {"moving_mean": "mean", "moving_variance": "var"}
    names |= {"depthwise_kernel": "kernel", "pointwise_kernel": "kernel"}
    transposed = "Transpose" in kind and leaf == "kernel"
    if names.get(leaf, leaf) != role.leaf or transposed != (role.transpose_kernel is not None):
        return None
    s = _spatial(v)
    if transposed:  # [spatial…, out, in]; Keras flips the kernel before applying it
        return ("", v) if role.transpose_kernel else (f"{s}OI → {s}IO, flipped", flip(v))
    if leaf == "depthwise_kernel" or (kind.startswith("Depthwise") and leaf == "kernel"):
        # [spatial…, C, multiplier]: output c * multiplier + m reads input c.
        return f"{s}IM → {s}1(IM)", v.reshape(*v.shape[:-2], 1, -1)
    return "", v


def flip(w: np.ndarray) -> np.ndarray:
    """`w` with spatial axes reversed and the two feature axes exchanged."""
    return np.flip(w, tuple(range(w.ndim - 2))).swapaxes(-1, -2)


def _spatial(kernel: np.ndarray) -> str:
    return "DHW"[5 - kernel.ndim :] if 2 < kernel.ndim < 6 else ""
