"""Chains of per-channel affines, and the convolutions and dots that can absorb a chain."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxbn._folding.constants import Known, expanded, floating, relayout
from jaxbn._folding.program import Op, bodies, shape_of

if TYPE_CHECKING:
    from jax.extend.core import JaxprEqn

CONTRACTIONS = ("conv_general_dilated", "dot_general")
AFFINE = ("add", "sub", "mul", "div", "neg")
LAYOUT = ("convert_element_type", "copy", "transpose", "squeeze", "broadcast_in_dim", "reshape")
CASTS = ("convert_element_type", "copy")
SUMS = ("reduce_sum", "reduce_window_sum")


def transparent(eqn: "JaxprEqn") -> bool:
    """Whether a call with a derivative of its own must be opened, because it holds what we fold.

    A `relu` stays closed: the derivative of `relu` at 0 differs from that of `max`.
    """
    names = {inner.primitive.name for body, _ in bodies(eqn) for inner in body.eqns}
    return holds_contraction(eqn) or names <= {*AFFINE, *LAYOUT}


def holds_contraction(eqn: "JaxprEqn") -> bool:
    """Whether the equation contains a convolution or a dot, at any depth."""
    return any(
        inner.primitive.name in CONTRACTIONS or holds_contraction(inner)
        for body, _ in bodies(eqn)
        for inner in body.eqns
    )


class Site(NamedTuple):
    """A convolution or dot with a constant kernel."""

    op: Op
    slot: int  # which operand of op is the kernel
    kernel: np.ndarray  # float64
    dtype: Any  # of the kernel in the program
    axes: tuple[int, ...]  # axes of the kernel that become channels of the result
    out: tuple[int, ...]  # the axes of the result where those channels stand
    before: tuple[Op, ...] = ()  # an affine of the input that the kernel has absorbed
    means: frozenset[int] = frozenset()  # as in `Chain`, of the operations in `before`
    branches: int = 1  # convolutions and values that the kernel is the sum of

    @property
    def channels(self) -> tuple[int, ...]:
        """The number of channels on each axis of `axes`."""
        return tuple(self.kernel.shape[a] for a in self.axes)

    def scaled(self, scale: np.ndarray) -> np.ndarray:
        """The kernel times scale [channels]."""
        return self.kernel * spread(scale, self.axes, self.kernel.ndim)

    def of_result(self, v: np.ndarray) -> np.ndarray:
        """`v` [channels] with axes of size 1 added, to broadcast against the result."""
        return spread(v, self.out, len(self.op.shape))

    def __str__(self) -> str:
        params, shape = self.op.eqn.params, self.kernel.shape
        if self.op.name == "dot_general":
            contracted = params["dimension_numbers"][0][self.slot]
            features = math.prod(shape[a] for a in contracted)
            return f"dense {features} -> {math.prod(self.channels)}"
        out, into, *space = params["dimension_numbers"].rhs_spec
        groups = params["feature_group_count"]
        window = "x".join(str(shape[a]) for a in space)
        text = f"conv {window}, {shape[into] * groups} -> {shape[out]}"
        return text + (f", {groups} groups" if groups > 1 else "")


def site_of(op: Op, operands: list[Any]) -> Site | None:
    """`op` as a site; None for another operation, or if the kernel is not constant."""
    slots = [slot for slot, v in enumerate(operands) if isinstance(v, Known)]
    if op.name not in CONTRACTIONS or len(slots) != 1 or not floating(op.dtype):
        return None
    slot, kernel = slots[0], operands[slots[0]]
    if not floating(kernel.dtype):
        return None
    ndim = len(kernel.shape)
    numbers = np.broadcast_to(kernel.numbers(ndim), kernel.shape)
    dims = op.eqn.params["dimension_numbers"]
    if op.name == "conv_general_dilated":
        if slot == 0:
            return None
        return Site(op, slot, numbers, kernel.dtype, dims.rhs_spec[:1], dims.out_spec[1:2])
    contracted, batch = dims[0][slot], tuple(dims[1][slot])
    free = tuple(a for a in range(ndim) if a not in (*contracted, *batch))
    # The result has the batch axes, then those of the left operand, then those of the right.
    first = len(batch) if slot == 0 else len(op.shape) - len(free)
    out = (*range(len(batch)), *range(first, first + len(free)))
    return Site(op, slot, numbers, kernel.dtype, (*batch, *free), out)


def spread(v: np.ndarray, axes: Iterable[int], ndim: int) -> np.ndarray:
    """`v` with `ndim` axes: the axes of v become `axes`, and all others have size 1."""
    axes = tuple(axes)
    shape = [1] * ndim
    for size, axis in zip(v.shape, axes, strict=True):
        shape[axis] = size
    return v.transpose(np.argsort(axes)).reshape(shape)


class Chain(NamedTuple):
    """Affine and layout operations on one value, not run yet: `base * scale + offset`.

    scale and offset are float64. They have the rank of the result, and size 1 on axes on which
    they do not vary. With a site, the chain equals `site(base) * scale + offset`. Sums and means
    over axes on which neither varies are run on the base, before the affine.
    """

    base: int
    site: Site | None
    scale: np.ndarray
    offset: np.ndarray
    channel: np.ndarray | None  # with a site: the position of each channel in the result
    ops: tuple[Op, ...] = ()
    gain: float = 1.0  # how much larger an offset before the sums is after them
    means: frozenset[int] = frozenset()  # results of divisions that make a mean of a sum
    width: int = 1  # the channels of the affine, before a reshape repeats its numbers

    def then(self, op: Op, position: int, operand: Known | None) -> "Chain | None":
        """The chain with one more operation; None if the operation is not a per-channel affine."""
        if not floating(op.dtype):
            return None
        if op.name in LAYOUT and operand is None:
            return self._moved(op)
        if op.name in SUMS:
            return self._summed(op)
        if op.name not in AFFINE:
            return None
        if op.name == "neg":
            return self._replace(scale=-self.scale, offset=-self.offset, ops=(*self.ops, op))
        if operand is None or (op.name == "div" and position == 1):
            return None
        k = operand.numbers(len(op.shape))
        if op.name == "div" and k.size == 1 and k.item() == self._just_summed():
            means, n = self.means | {op.outputs[0]}, k.item()
            offset, gain = self.offset / n, self.gain / n
            return self._replace(offset=offset, gain=gain, means=means, ops=(*self.ops, op))
        if not self._by_channel(k):
            return None
        scale, offset = self.scale, self.offset
        with np.errstate(all="ignore"):
            if op.name == "mul":
                scale, offset = scale * k, offset * k
            elif op.name == "div":
                scale, offset = scale / k, offset / k
            elif op.name == "add":
                offset = offset + k
            else:
                sign = 1 if position == 0 else -1
                scale, offset = sign * scale, sign * (offset - k)
        width = max(self.width, k.size)
        return self._replace(scale=scale, offset=offset, ops=(*self.ops, op), width=width)

    def _summed(self, op: Op) -> "Chain | None":
        """The chain after a sum over axes on which nothing varies, without padding."""
        window = window_of(op)
        parts = [v for v in (self.scale, self.offset, self.channel) if v is not None]
        if window is None or any(
            n > 1 and v.shape[a] > 1 for v in parts for a, n in window.items()
        ):
            return None
        n, axes = math.prod(window.values()), tuple(window) if op.name == "reduce_sum" else ()
        channel = None if self.channel is None else self.channel.squeeze(axes)
        return self._replace(
            scale=self.scale.squeeze(axes),
            offset=self.offset.squeeze(axes) * n,
            channel=channel,
            ops=(*self.ops, op),
            gain=self.gain * n,
        )

    def _just_summed(self) -> int | None:
        """The number of values behind each sum, if the chain ends in a sum and casts."""
        last = next((op for op in reversed(self.ops) if op.name not in CASTS), None)
        window = window_of(last) if last is not None and last.name in SUMS else None
        return None if window is None else math.prod(window.values())

    def _by_channel(self, k: np.ndarray) -> bool:
        if self.channel is None:
            both = np.broadcast_shapes(self.scale.shape, self.offset.shape, k.shape)
            return sum(size > 1 for size in both) <= 1
        return all(n in (1, c) for n, c in zip(k.shape, self.channel.shape, strict=True))

    def _moved(self, op: Op) -> "Chain | None":
        if op.name == "broadcast_in_dim":
            kept = op.eqn.params["broadcast_dimensions"]
            added = [size for axis, size in enumerate(op.shape) if axis not in kept]
            if tuple(op.shape[a] for a in kept) != shape_of(op.eqn.invars[0]) or set(added) - {1}:
                return None
        scale, offset = self.scale, self.offset
        if op.name == "reshape" and self.site is None:  # a flatten: the numbers are repeated
            old = shape_of(op.eqn.invars[0])
            scale, offset = (expanded(v, old, op.shape) for v in (scale, offset))
        moved = [None if v is None else relayout(op, v) for v in (scale, offset, self.channel)]
        if moved[0] is None or moved[1] is None or (moved[2] is None) != (self.channel is None):
            return None
        return self._replace(scale=moved[0], offset=moved[1], channel=moved[2], ops=(*self.ops, op))

    @property
    def arithmetic(self) -> tuple[Op, ...]:
        """The operations without reshapes, transposes, casts, sums and means."""
        return tuple(op for op in self.ops if op.name in AFFINE and op.outputs[0] not in self.means)

    @property
    def trivial(self) -> bool:
        """Nothing to fold: at most a bias after a site, or one factor for all channels."""
        if self.site is None:
            return self.scale.size == 1
        names = [op.name for op in self.arithmetic]
        return not self.site.before and (names in ([], ["add"]))

    def by_channel(self, v: np.ndarray) -> np.ndarray:
        """v, which has the rank of the result, as an array [channels of the site]."""
        assert self.site is not None
        assert self.channel is not None
        flat = np.empty(self.channel.size)
        flat[self.channel.ravel()] = np.broadcast_to(v, self.channel.shape).ravel()
        return flat.reshape(self.site.channels)


def start(site: Site, base: int, offset: np.ndarray | None = None) -> Chain:
    """The chain that begins at a site. `offset` remains of a chain that the kernel absorbed."""
    ndim = len(site.op.shape)
    channel = np.arange(math.prod(site.channels)).reshape(site.channels)
    channel = spread(channel, site.out, ndim)
    first = np.zeros(channel.shape) if offset is None else spread(offset, site.out, ndim)
    return Chain(base, site, np.ones(channel.shape), first, channel)


def into(site: Site, chain: Chain) -> tuple[Site, np.ndarray] | str:
    """The site after its kernel absorbed an affine of its input, and the offset [channels] left.

    A convolution sums W (a x + b) over a window. The factor a goes into W, and b becomes Σ W b, if
    no window contains zeros of padding. If the kernel cannot absorb the affine, the reason is
    returned as text.
    """
    params, kernel, ndim = site.op.eqn.params, site.kernel, site.kernel.ndim
    if site.op.name == "conv_general_dilated":
        dims, groups = params["dimension_numbers"], params["feature_group_count"]
        pairs = {dims.lhs_spec[1]: dims.rhs_spec[1]}
        padded = any(p > 0 for pad in params["padding"] for p in pad)
        padded |= any(d > 1 for d in params["lhs_dilation"])
        if padded and chain.offset.any():
            return "pads with zeros, which the offset does not reach"
    else:
        groups = 1
        contracted, batch = params["dimension_numbers"]
        other = 1 - site.slot
        pairs = dict(zip(contracted[other], contracted[site.slot], strict=True))
        pairs |= dict(zip(batch[other], batch[site.slot], strict=True))

    def on_kernel(v: np.ndarray) -> np.ndarray | None:
        if any(size > 1 and axis not in pairs for axis, size in enumerate(v.shape)):
            return None
        if groups == 1 or v.size == 1:
            rest = [axis for axis in range(v.ndim) if axis not in pairs]
            inner = v.transpose(*pairs, *rest).reshape([v.shape[axis] for axis in pairs])
            return spread(inner, pairs.values(), ndim)
        # Each group of output channels reads its own group of input channels.
        out, inner = dims.rhs_spec[:2]
        each = np.repeat(v.reshape(groups, -1), kernel.shape[out] // groups, axis=0)
        return spread(each, (out, inner), ndim)

    scale, offset = on_kernel(chain.scale), on_kernel(chain.offset)
    if scale is None or offset is None:
        return "sums over other axes"
    summed = tuple(a for a in range(ndim) if a not in site.axes)
    left = (kernel * offset).sum(summed)
    order = np.argsort(np.argsort(site.axes))
    site = site._replace(kernel=kernel * scale, before=chain.ops, means=chain.means)
    return site, left.transpose(order)


def window_of(op: Op) -> dict[int, int] | None:
    """Axis → the number of values that a sum adds up there; None with padding or unknown sizes."""
    params, shape = op.eqn.params, shape_of(op.eqn.invars[0])
    if op.name == "reduce_sum":
        window = {axis: shape[axis] for axis in params["axes"]}
    else:
        if any(p for pad in params["padding"] for p in pad) or set(params["base_dilation"]) > {1}:
            return None
        window = dict(enumerate(params["window_dimensions"]))
    return window if all(isinstance(n, int) for n in window.values()) else None


def norm_inside(eqn: "JaxprEqn", known: Sequence[bool]) -> int:
    """The channels of an affine by constants inside a call, at any depth; 0 if there is none."""
    found = 0
    for body, _ in bodies(eqn):
        constants = {*body.constvars, *(v for v, k in zip(body.invars, known, strict=False) if k)}
        for inner in body.eqns:
            given = [hasattr(v, "val") or v in constants for v in inner.invars]
            if all(given):
                constants |= set(inner.outvars)
            elif inner.primitive.name in ("sub", "mul", "div"):
                sizes = [
                    math.prod(shape_of(v)) for v, k in zip(inner.invars, given, strict=True) if k
                ]
                found = max([found, *(n for n in sizes if isinstance(n, int))])
            else:
                found = max(found, norm_inside(inner, given))
    return found


def merged(a: Chain, b: Chain, op: Op) -> Chain | None:
    """The sum of two chains on one base as one convolution; None if it is not one.

    Both are convolutions that differ in their windows alone, or one is an affine of the base, which
    is a convolution by 1x1 (Ding et al. 2021, RepVGG).
    """
    if a.site is None or (b.site is not None and a.site.kernel.size < b.site.kernel.size):
        a, b = b, a
    site = a.site
    if site is None or a.base != b.base or site.op.name != "conv_general_dilated":
        return None
    same_place = all(o.name in (*AFFINE, *CASTS) for o in (*a.ops, *b.ops))
    if not same_place or site.before or (b.site is not None and b.site.before):
        return None
    dims, params = site.op.eqn.params["dimension_numbers"], site.op.eqn.params
    space = dims.rhs_spec[2:]
    window = [site.kernel.shape[axis] for axis in space]
    if b.site is None:
        kernel = _identity(site)
        other = {**params, "padding": ((0, 0),) * len(space)}
        if kernel is None or set(params["window_strides"]) != {1}:
            return None
    else:
        kernel, other = b.site.kernel, b.site.op.eqn.params
        if b.site.op.name != site.op.name:
            return None
    alone = ("padding", "precision", "preferred_element_type")
    if any(params[name] != other[name] for name in params if name not in alone):
        return None
    if {*params["rhs_dilation"], *params["lhs_dilation"]} != {1}:
        return None
    pads = [(0, 0)] * kernel.ndim
    for axis, size, one, two in zip(
        space, window, params["padding"], other["padding"], strict=True
    ):
        before, after = one[0] - two[0], one[1] - two[1]
        if before < 0 or after < 0 or kernel.shape[axis] + before + after != size:
            return None
        pads[axis] = (before, after)
    assert a.channel is not None
    branches = site.branches + (1 if b.site is None else b.site.branches)
    other_kernel = site._replace(kernel=np.pad(kernel, pads))
    kernel = site.scaled(a.by_channel(a.scale)) + other_kernel.scaled(a.by_channel(b.scale))
    offset = np.broadcast_to(a.offset + b.offset, a.channel.shape)
    return a._replace(
        site=site._replace(kernel=kernel, branches=branches),
        scale=np.ones_like(offset),
        offset=offset,
        ops=(*b.ops, *a.ops, op),
        width=max(a.width, b.width, 2),
    )


def _identity(site: Site) -> np.ndarray | None:
    """The kernel by 1x1 that changes nothing; None if the site has other channels out than in."""
    dims, params = site.op.eqn.params["dimension_numbers"], site.op.eqn.params
    groups = params["feature_group_count"]
    out, into_ = dims.rhs_spec[:2]
    n, m = site.kernel.shape[out], site.kernel.shape[into_]
    if n != m * groups or params["batch_group_count"] != 1:
        return None
    shape = [1] * site.kernel.ndim
    shape[out], shape[into_] = n, m
    kernel = np.zeros(shape)
    index: list[Any] = [0] * site.kernel.ndim
    index[out], index[into_] = np.arange(n), np.arange(n) % m
    kernel[tuple(index)] = 1
    return kernel
