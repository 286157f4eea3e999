"""How other libraries name and lay out the arrays of a layer, and how Flax lays them out.

Flax keeps features last. The kernel of a dense layer is [in, out] (IO). The kernel of a convolution
is [spatial…, in, out] (HWIO). The kernel of a transposed convolution is [spatial…, in, out], in the
order in which it is applied; with `transpose_kernel` the kernel is [spatial…, out, in], and Flax
flips the kernel before applying it.
"""

import numpy as np

from jaxbn.convert._arrays import Role

Form = tuple[str, np.ndarray]  # what was done, and the array in its new form

FLAX_NAMES = {"running_mean": "mean", "running_var": "var", "num_batches_tracked": "count"}
TORCH_NAMES = {flax: torch for torch, flax in FLAX_NAMES.items()}


def from_torch(leaf: str, v: np.ndarray, role: Role) -> Form | None:
    """The array `leaf` of a PyTorch layer in this role of a Flax layer; None if another."""
    if leaf != "weight":
        return ("", v) if FLAX_NAMES.get(leaf, leaf) == role.leaf else None
    if role.leaf != "kernel" or v.ndim < 2:
        return ("", v) if (v.ndim, role.leaf) in {(1, "scale"), (2, "embedding")} else None
    s = _spatial(v)
    if role.flattened and v.ndim == 2:
        *size, c = role.flattened  # PyTorch flattened (C, H, W), Flax (H, W, C)
        w = np.moveaxis(v.reshape(-1, c, *size), (0, 1), (-1, -2)).reshape(-1, v.shape[0])
        return "OI → IO, inputs CHW → HWC", w
    w = v.transpose(*range(2, v.ndim), 1, 0)
    if role.transpose_kernel is None:
        return f"OI{s} → {s}IO", w
    return (f"IO{s} → {s}OI", w) if role.transpose_kernel else (f"IO{s} → {s}IO, flipped", flip(w))


def to_torch(role: Role, w: np.ndarray) -> tuple[str, str, np.ndarray]:
    """The inverse of `from_torch`: the name in PyTorch, what was done, and the array."""
    if role.leaf in ("scale", "embedding"):
        return "weight", "", w
    if role.leaf != "kernel" or w.ndim < 2:
        return TORCH_NAMES.get(role.leaf, role.leaf), "", w
    s = _spatial(w)
    if role.flattened and w.ndim == 2:
        v = np.moveaxis(w.reshape(*role.flattened, -1), (-1, -2), (0, 1)).reshape(w.shape[1], -1)
        return "weight", "IO → OI, inputs HWC → CHW", v
    unflipped = flip(w) if role.transpose_kernel is False else w
    v = unflipped.transpose(-1, -2, *range(w.ndim - 2))
    if role.transpose_kernel is None:
        return "weight", f"{s}IO → OI{s}", v
    return "weight", f"{s}OI → IO{s}" if role.transpose_kernel else f"{s}IO → IO{s}, flipped", v


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
