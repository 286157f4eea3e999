"""Transposed convolutions, in the forms that LiteRT's converter makes no mistake with."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._folding.program import Op, Program, run


def results_of(program: Program, leaves: Sequence[Any]) -> list[Any]:
    """The results of a program, with its transposed convolutions in such a form."""
    values = program.consts | dict(zip(program.inputs, leaves, strict=True))
    for op in program.ops:
        step = _convolution if _is_transposed(op) else run
        values |= zip(op.outputs, step(op, *(values[i] for i in op.inputs)), strict=True)
    return [values[i] for i in program.outputs]


def _is_transposed(op: Op) -> bool:
    """Whether an operation is a convolution of x with zeros between the values of x."""
    return op.name == "conv_general_dilated" and any(d != 1 for d in op.eqn.params["lhs_dilation"])


def _convolution(op: Op, x: Any, w: Any) -> list[Any]:
    """A transposed convolution, each group by itself."""
    axes = op.eqn.params["dimension_numbers"]
    groups = op.eqn.params["feature_group_count"]
    dtype = jnp.float32 if op.dtype == jnp.float16 else op.dtype  # TFLite has none in float16
    with jax.named_scope(op.path):
        x, w = x.astype(dtype), w.astype(dtype)
        parts = jnp.split(x, groups, axes.lhs_spec[1]), jnp.split(w, groups, axes.rhs_spec[0])
        y = [_of_one_group(op, *part) for part in zip(*parts, strict=True)]
        return [jnp.concatenate(y, axes.out_spec[1]).astype(op.dtype)]


def _of_one_group(op: Op, x: Any, w: Any) -> Any:
    """A transposed convolution of one group, by what the converter translates rightly.

    The converter knows two paddings: all places that the kernel reaches, or those without the same
    number on both sides, so that x grows by its strides. Other results are cut from the first. A
    dilated kernel is a kernel with zeros inside. TFLite transposes in one and two dimensions; in
    three, the zeros are put into x.
    """
    p = op.eqn.params
    lhs, rhs, out = p["dimension_numbers"]
    strides, ones = p["lhs_dilation"], (1,) * len(p["lhs_dilation"])

    def convolved(x: Any, **changed: Any) -> Any:
        same = {"feature_group_count": 1, "rhs_dilation": ones, "preferred_element_type": x.dtype}
        return op.eqn.primitive.bind(x, w, **{**p, **same, **changed})

    w = _spread(w, rhs[2:], p["rhs_dilation"])
    if len(ones) > 2:
        return convolved(_spread(x, lhs[2:], strides), lhs_dilation=ones)
    windows = [w.shape[axis] for axis in rhs[2:]]
    cuts = [(n - 1 - a, n - 1 - b) for n, (a, b) in zip(windows, p["padding"], strict=True)]
    sizes = zip(cuts, windows, strides, strict=True)
    if p["window_strides"] == ones and all(a == b and a + b == n - s for (a, b), n, s in sizes):
        return convolved(x)
    y = convolved(x, window_strides=ones, padding=tuple((n - 1, n - 1) for n in windows))
    edges, steps = [(0, 0, 0)] * y.ndim, [1] * y.ndim
    for axis, (a, b), step in zip(out[2:], cuts, p["window_strides"], strict=True):
        edges[axis], steps[axis] = (-a, -b, 0), step
    y = lax.pad(y, jnp.zeros((), y.dtype), edges)
    return lax.slice(y, [0] * y.ndim, y.shape, steps)


def _spread(x: Any, axes: Sequence[int], steps: Sequence[int]) -> Any:
    """The array with zeros between its values along some axes."""
    inside = dict(zip(axes, steps, strict=True))
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, inside.get(k, 1) - 1) for k in range(x.ndim)])
