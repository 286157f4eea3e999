"""Rules for convolutions and matrix products, and for the padding before them."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxbn._folding.constants import floating
from jaxbn._folding.program import Op, shape_of
from jaxbn.export._nodes import node
from jaxbn.export._operators import Operators, Value, cast, dtype_of, ordered, plain


def convolution(run: Operators, op: Op) -> Value | None:
    """Conv; ConvTranspose where the input is dilated. The bias that follows is part of the node."""
    p, dtype = op.eqn.params, dtype_of(op, 0)
    lhs, rhs, out = p["dimension_numbers"]
    transposed = any(d != 1 for d in p["lhs_dilation"])
    if p["batch_group_count"] != 1 or not floating(dtype) or dtype_of(op, 1) != dtype:
        return None
    if op.inputs[0] not in run.values or (
        transposed and (any(s != 1 for s in p["window_strides"]) or op.inputs[1] not in run.known)
    ):
        return None
    x, w = run.whole(op.inputs[0], lhs), run.whole(op.inputs[1], rhs)
    spread = [d * (n - 1) for d, n in zip(p["rhs_dilation"], w.shape[2:], strict=True)]
    padding = p["padding"]
    if transposed:  # ConvTranspose counts padding from the places that a kernel reaches at all
        padding = [(s - a, s - b) for s, (a, b) in zip(spread, padding, strict=True)]
        parts = np.split(np.flip(w, tuple(range(2, w.ndim))), p["feature_group_count"])
        w = np.ascontiguousarray(np.concatenate([part.swapaxes(0, 1) for part in parts]))
    strides = p["lhs_dilation"] if transposed else p["window_strides"]
    windows = [s + 1 for s in spread]
    pads = pads_of(padding, () if transposed else x.shape[2:], windows, strides)
    if pads is None:
        return None
    shape, beyond = list(ordered(op.shape, out)), [(0, 0)] * 2
    if "pads" in pads:  # negative widths cut the input, and widen what is transposed
        beyond += [(min(a, 0), min(b, 0)) for a, b in padding]
        pads = {"pads": [max(n, 0) for n in pads["pads"]]}
    widened = transposed and any(map(any, beyond))
    if transposed:
        shape = [n + a + b for n, (a, b) in zip(shape, beyond, strict=True)]
    else:
        x = padded(x, beyond, np.zeros((), dtype))
    bias = None if widened or op.dtype != dtype else bias_after(run, op, out[1])
    y = node(
        "ConvTranspose" if transposed else "Conv",
        shape,
        dtype,
        *((x, w) if bias is None else (x, w, bias)),
        kernel_shape=list(w.shape[2:]),
        strides=list(strides),
        dilations=list(p["rhs_dilation"]),
        group=p["feature_group_count"],
        **pads,
    )
    if widened:
        y = padded(y, [(-a, -b) for a, b in beyond], np.zeros((), dtype))
    return Value(cast(y, op.dtype), tuple(out))


def pads_of(
    padding: Sequence[Any], sizes: Sequence[Any], windows: Sequence[int], strides: Sequence[int]
) -> dict[str, Any] | None:
    """Padding as attributes; of sizes known at run time only, if the padding is JAX's "SAME"."""
    if all(isinstance(n, int | np.integer) for pair in padding for n in pair):
        return {"pads": [int(a) for a, _ in padding] + [int(b) for _, b in padding]}
    for name, word in (("SAME", "SAME_UPPER"), ("SAME_LOWER", "SAME_LOWER")):
        same = jax.lax.padtype_to_pads(sizes, windows, strides, name)
        if len(same) == len(padding) and all(a == b for a, b in zip(same, padding, strict=True)):
            return {"auto_pad": word}
    return None


def bias_after(run: Operators, op: Op, axis: int) -> np.ndarray | None:
    """The constant per channel that is added next, if nothing else reads op's result."""
    (result,) = op.outputs
    after = run.reader(result)
    if after is None or (after.name, after.shape, after.dtype) != ("add", op.shape, op.dtype):
        return None
    constant = next((run.known[i] for i in after.inputs if i in run.known), None)
    if constant is None:
        return None
    numbers = constant.numbers(len(op.shape))
    if numbers.size not in (1, numbers.shape[axis]):
        return None
    run.absorbed[after.outputs[0]] = result
    return np.broadcast_to(numbers.reshape(-1), (op.shape[axis],)).astype(op.dtype)


def padded(x: Any, padding: Sequence[tuple[int, int]], value: np.ndarray) -> Any:
    """Pad x with a constant. Negative widths cut."""
    if not any(map(any, padding)):
        return x
    shape = [n + a + b for n, (a, b) in zip(x.shape, padding, strict=True)]
    pads = np.array([a for a, _ in padding] + [b for _, b in padding], np.int64)
    return node("Pad", shape, x.dtype, x, pads, value, mode="constant")


def pad(run: Operators, op: Op) -> Value | None:
    """Pad with one number."""
    x, fill = op.inputs
    config, number = op.eqn.params["padding_config"], run.uniform(fill)
    widths = [n for a, b, _ in config for n in (a, b)]
    if number is None or x not in run.values or any(inner for _, _, inner in config):
        return None
    if not all(isinstance(n, int | np.integer) for n in widths):
        return None
    value = run.values[x]
    padding = ordered([(int(a), int(b)) for a, b, _ in config], value.order)
    return Value(padded(value.array, padding, np.asarray(number, op.dtype)), value.order)


def dot(run: Operators, op: Op) -> Value | None:
    """A product with a constant matrix: Gemm with the bias that follows; MatMul from rank 3 on."""
    (left, right), batch = op.eqn.params["dimension_numbers"]
    x, kernel = op.inputs
    dtype, rank = dtype_of(op, 0), len(shape_of(op.eqn.invars[0]))
    if x not in run.values or kernel not in run.known or any(map(len, batch)) or rank < 2:
        return None
    if dtype_of(op, 1) != dtype or not floating(dtype) or tuple(left) != (rank - 1,):
        return None
    if len(shape_of(op.eqn.invars[1])) != 2:
        return None
    (axis,) = right
    array, w = run.array(x), run.whole(kernel, (axis, 1 - axis))
    if rank > 2:
        return plain(cast(node("MatMul", op.shape, dtype, array, w), op.dtype))
    bias = bias_after(run, op, 1) if op.dtype == dtype else None
    bias = np.zeros(w.shape[1], dtype) if bias is None else bias  # quantizers need one a column
    return plain(cast(node("Gemm", op.shape, dtype, array, w, bias), op.dtype))
