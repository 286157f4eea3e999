"""Runs a program with its affines folded into the convolutions and dots beside them."""

import math
from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxbn._folding.chains import (
    AFFINE,
    CASTS,
    LAYOUT,
    SUMS,
    Chain,
    holds_contraction,
    into,
    merged,
    norm_inside,
    site_of,
    start,
    window_of,
)
from jaxbn._folding.constants import Known, compute, known
from jaxbn._folding.program import CUSTOM, Op, Program, bodies, run, shape_of


class SiteOutcome(NamedTuple):
    """What became of one site, and a function that runs a folded site alone."""

    name: str
    folded: bool | None  # None if there is nothing to fold
    note: str
    reads: int  # the value that the site computes from
    gives: tuple[int, ...]  # the value that the site computes, or its parts along `axis`
    alone: Callable[[Any], Any] | None  # the site as it is now; None if it is as it was
    axis: int = 0
    part: tuple[int, int] | None = None  # start and stop of the site's result in `gives`


class Joined(NamedTuple):
    """Chains concatenated, and affines of the whole that are not run yet."""

    op: Op
    parts: tuple[Chain, ...]  # each with its share of the affines
    ops: tuple[Op, ...] = ()


class Rewrite:
    """One run of a program with its affines folded. `outcomes` records what became of each site."""

    def __init__(
        self,
        program: Program,
        kept: dict[Any, jax.Array],
        written: Container[int] = (),  # results of norms that run as they are written
        merge_branches: bool = False,
    ):
        self.program = program
        self.kept = kept
        self.written = written
        self.merge_branches = merge_branches
        self.outcomes: dict[int, SiteOutcome] = {}  # by the number of the site's first result
        self.origin = dict.fromkeys(program.inputs, "the input")
        self.readers: dict[int, list[str]] = {i: ["the caller"] for i in program.outputs}
        for op in program.ops:
            for i in op.inputs:
                self.readers.setdefault(i, []).append(_name(op))

    def run(self, leaves: Sequence[Any]) -> list[Any]:
        """Runs the program on `leaves` and returns its results."""
        self.values: dict[int, Any] = dict(zip(self.program.inputs, leaves, strict=True))
        for i, value in self.program.consts.items():
            constant = known(value)
            self.values[i] = value if constant is None else constant
        for op in self.program.ops:  # the constants first: `_split` looks ahead
            operands = [self.values.get(i) for i in op.inputs]
            constants = [v for v in operands if isinstance(v, Known)]
            if len(constants) == len(operands):
                self.values |= zip(op.outputs, compute(op, constants) or (), strict=False)
        for op in self.program.ops:
            if op.outputs and self.values.keys() >= {*op.outputs}:
                continue  # a constant, or an affine after a split
            operands = [self.values[i] for i in op.inputs]
            results: Sequence[Any] | None = None
            for attempt in (
                self._split,
                self._contraction,
                self._branches,
                self._joined,
                self._affine,
                self._plain,
            ):
                if results is None:
                    results = attempt(op, operands)
            assert results is not None
            self.values |= zip(op.outputs, results, strict=True)
            for i in op.outputs:
                self.origin.setdefault(i, _name(op))
                if len(self.readers.get(i, ())) > 1:
                    self.array(i)
        return [self.array(i) for i in self.program.outputs]

    def array(self, i: int, why: str = "") -> Any:
        """Value i as an array. A chain ends here, because of its reader, or because of `why`."""
        value = self.values[i]
        if isinstance(value, Known):
            if value.source is not None:
                return value.source
            array = self._keep(i, value.value.astype(value.dtype))
            if array.shape == value.shape:
                return array
            return lax.broadcast_in_dim(array, value.shape, range(array.ndim))
        if isinstance(value, Chain):
            value = self.values[i] = self._finish(i, value, why)
        if isinstance(value, Joined):
            value = self.values[i] = self._finish_joined(i, value)
        return value

    def _keep(self, key: Any, value: np.ndarray) -> jax.Array:
        """The numbers as an array. All shapes that the program runs on share one array."""
        old = self.kept.get(key)
        if old is None or old.dtype != value.dtype or np.asarray(old).tobytes() != value.tobytes():
            with jax.ensure_compile_time_eval():
                self.kept[key] = old = jnp.asarray(value)
        return old

    def _plain(self, op: Op, operands: Sequence[Any]) -> list[Any]:
        if holds_contraction(op.eqn):
            note = f"inside {op.name}, which is not looked into; unroll it"
            self._row("convolutions or dots", op, False, note)
        elif op.name in CUSTOM:
            n = norm_inside(op.eqn, [isinstance(v, Known) for v in operands])
            if n > 1:
                note = (
                    f"inside {op.name.removesuffix('_call')} {_name(op)}, whose derivative folding "
                    f"would lose; write the norm outside of it"
                )
                self._row(f"norm of {n} channels", op, False, note)
        return run(op, *(self.array(i) for i in op.inputs))

    def _contraction(self, op: Op, operands: list[Any]) -> list[Chain] | None:
        site = site_of(op, operands)
        if site is None:
            return None
        i = op.inputs[1 - site.slot]
        value = self.values[i]
        if isinstance(value, Chain) and value.site is None and not value.trivial:
            inside = into(site, value)
            if not isinstance(inside, str):
                return [start(inside[0], value.base, inside[1])]
            self.array(i, f"{_name(op)} {inside}")
        self.array(i)
        return [start(site, i)]

    def _branches(self, op: Op, operands: list[Any]) -> list[Chain] | None:
        """The sum of two convolutions of one value, or of one and an affine, as one convolution."""
        if not self.merge_branches or op.name != "add":
            return None
        chains = []
        for i, v in zip(op.inputs, operands, strict=True):
            ones = np.ones((1,) * len(op.shape))
            chains.append(v if isinstance(v, Chain) else Chain(i, None, ones, 0 * ones, None))
        chain = merged(chains[0], chains[1], op)
        return None if chain is None else [chain]

    def _joined(self, op: Op, operands: list[Any]) -> list[Joined] | None:
        """Convolutions that are concatenated, or an affine of such, a share for each of them."""
        if op.name == "concatenate":
            joins = all(isinstance(v, Chain) and v.site is not None for v in operands)
            return [Joined(op, tuple(operands))] if joins else None
        joined = [v for v in operands if isinstance(v, Joined)]
        others = [v for v in operands if not isinstance(v, Joined)]
        if len(joined) != 1 or op.name not in (*AFFINE, *CASTS):
            return None
        if not all(isinstance(v, Known) for v in others):
            return None
        (whole,) = joined
        shares = (
            _shares(others[0], whole.op, len(op.shape)) if others else [None] * len(whole.parts)
        )
        position = operands.index(whole)
        if shares is None or shape_of(op.eqn.invars[position]) != op.shape:
            return None
        parts = [v.then(op, position, k) for v, k in zip(whole.parts, shares, strict=True)]
        if any(v is None for v in parts):
            return None
        return [whole._replace(parts=tuple(v for v in parts if v), ops=(*whole.ops, op))]

    def _split(self, op: Op, operands: list[Any]) -> list[Any] | None:
        """A convolution that is split: its kernel absorbs the affines that follow each part."""
        whole = operands[0] if op.name == "split" else None
        if not isinstance(whole, Chain) or whole.site is None or whole.channel is None:
            return None
        axis, sizes = op.eqn.params["axis"], op.eqn.params["sizes"]
        if whole.channel.shape[axis] != sum(sizes):
            return None
        parts = [
            self._followed(i, shape_of(v), op.dtype, axis)
            for i, v in zip(op.outputs, op.eqn.outvars, strict=True)
        ]

        def on_whole(numbers: Sequence[np.ndarray]) -> np.ndarray:
            rest = [1] * len(op.shape)
            shapes = [(*rest[:axis], n, *rest[axis + 1 :]) for n in sizes]
            return np.concatenate(list(map(np.broadcast_to, numbers, shapes)), axis)

        scale = on_whole([part.scale for part in parts])
        chain = whole._replace(
            scale=whole.scale * scale,
            offset=whole.offset * scale + on_whole([part.offset for part in parts]),
            ops=(*whole.ops, *(o for part in parts for o in part.ops)),
        )
        if chain.trivial or not any(part.arithmetic for part in parts):
            return None
        alone = self._emit(op.inputs[0], chain)
        ends = [p.ops[-1].outputs[0] if p.ops else p.base for p in parts]
        site = whole.site
        self._row(str(site), site.op, True, _what(chain), chain.base, ends, alone, axis)
        results = run(op, alone(self.array(chain.base)))
        for part, y in zip(parts, results, strict=True):
            self.values |= {i: y for o in part.ops for i in o.outputs}
        return results

    def _followed(self, i: int, shape: tuple[Any, ...], dtype: Any, axis: int) -> Chain:
        """The affines that vary along an axis alone and follow a part, which nobody else reads."""
        ones = np.ones((1,) * len(shape))
        chain = longest = Chain(i, None, ones, 0 * ones, None)
        while len(self.readers.get(i, ())) == 1:
            op = next((o for o in self.program.ops if i in o.inputs), None)
            if op is None or op.name not in (*AFFINE, *CASTS):
                break
            constants = [v for k in op.inputs if isinstance(v := self.values.get(k), Known)]
            if len(constants) != len(op.inputs) - 1 or op.shape != shape:
                break
            constant = constants[0] if constants else None
            longer = chain.then(op, op.inputs.index(i), constant)
            if longer is None:
                break
            varies = np.broadcast_shapes(longer.scale.shape, longer.offset.shape)
            if any(n > 1 for k, n in enumerate(varies) if k != axis):
                break
            chain, i = longer, op.outputs[0]
            if op.dtype == dtype:
                longest = chain
        return longest

    def _finish_joined(self, end: int, whole: Joined) -> Any:
        """The result of a concatenation: its affines in the kernels, or as they were written."""
        op, ops = whole.op, whole.ops
        if not ops or any(part.trivial for part in whole.parts):
            y = run(op, *(self.array(i) for i in op.inputs))[0]
            return self._as_written(op.outputs[0], y, ops)
        axis, start, results = op.eqn.params["dimension"], 0, []
        for i, v, part in zip(op.inputs, op.eqn.invars, whole.parts, strict=True):
            assert part.site is not None
            alone, stop = self._emit(i, part), start + shape_of(v)[axis]
            what, site = _what(part), part.site
            at = (axis, (start, stop))
            self._row(str(site), site.op, True, what, part.base, [end], alone, *at)
            results.append(alone(self.array(part.base)))
            start = stop
        return run(op, *results)[0]

    def _as_written(self, previous: int, y: Any, ops: Sequence[Op]) -> Any:
        """Equals y, which is value `previous`, after the operations."""
        for op in ops:
            y = run(op, *(y if i == previous else self.array(i) for i in op.inputs))[0]
            previous = op.outputs[0]
        return y

    def _affine(self, op: Op, operands: list[Any]) -> list[Chain] | None:
        unknown = [p for p, v in enumerate(operands) if not isinstance(v, Known)]
        if len(unknown) != 1:
            return None
        p = unknown[0]
        i, chain = op.inputs[p], operands[p]
        if op.name in AFFINE and shape_of(op.eqn.invars[p]) != op.shape:
            return None
        if not isinstance(chain, Chain):
            if op.name not in AFFINE or op.name == "neg":
                return None
            ones = np.ones((1,) * len(op.shape))
            chain = Chain(i, None, ones, 0 * ones, None)
        longer = chain.then(op, p, operands[1 - p] if len(operands) == 2 else None)
        return None if longer is None else [longer]

    def _finish(self, end: int, chain: Chain, why: str) -> Any:
        """The result of a chain: folded, or computed as it was written."""
        readers = " and ".join(self.readers[end])
        site, ops = chain.site, chain.ops
        if site is None:
            if not chain.trivial:
                note = f"after {self.origin[chain.base]}, before {why or readers}"
                what, row = f"norm of {chain.width} channels", (chain.base, [end])
                if len(chain.arithmetic) > 2 and end not in self.written:
                    alone = self._one_affine(end, chain)
                    note = f"{note}; now one multiplication and one addition"
                    self._row(what, ops[-1], False, note, *row, alone)
                    return alone(self.array(chain.base))
                self._row(what, ops[-1], False, note)
        elif chain.trivial:
            note = "a bias alone follows" if chain.arithmetic else f"read by {readers}"
            self._row(str(site), site.op, None, note)
            self.origin[end] = f"{site}, which is read by {readers}"
            ops = (site.op, *ops)
        else:
            alone = self._emit(end, chain)
            self._row(str(site), site.op, True, _what(chain), chain.base, [end], alone)
            return alone(self.array(chain.base))
        return self._as_written(chain.base, self.array(chain.base), ops)

    def _row(
        self,
        what: str,
        op: Op,
        folded: bool | None,
        note: str,
        reads: int = 0,
        gives: Sequence[int] = (),
        alone: Callable[[Any], Any] | None = None,
        axis: int = 0,
        part: tuple[int, int] | None = None,
    ) -> None:
        name = f"{what} {op.path}".rstrip()
        outcome = SiteOutcome(name, folded, note, reads, tuple(gives), alone, axis, part)
        self.outcomes[op.outputs[0]] = outcome

    def _one_affine(self, end: int, chain: Chain) -> Callable[[Any], Any]:
        """The norm as `x * scale + offset`, as a function of the norm's input."""
        wide = max((o.dtype for o in chain.ops), key=lambda d: jnp.finfo(d).bits)
        scale = self._keep((end, "scale"), chain.scale.astype(wide))
        offset = self._keep((end, "offset"), chain.offset.astype(wide))

        def one_affine(x: Any) -> Any:
            y = _moved(lax.convert_element_type(x, wide), chain.ops, chain.means)
            with jax.named_scope(chain.ops[-1].path), jax.numpy_rank_promotion("allow"):
                y = jnp.add(jnp.multiply(y, scale), offset)
            return lax.convert_element_type(y, chain.ops[-1].dtype)

        return one_affine

    def _emit(self, end: int, chain: Chain) -> Callable[[Any], Any]:
        """The site with its chain in kernel and bias, as a function of the site's input."""
        site = chain.site
        assert site is not None
        op, key = site.op, end
        scale, bias = chain.by_channel(chain.scale), chain.by_channel(chain.offset / chain.gain)
        kernel = site.scaled(scale)
        wide = max((o.dtype for o in (op, *chain.ops)), key=lambda d: jnp.finfo(d).bits)
        last = chain.ops[-1].dtype if chain.ops else op.dtype
        reads: Any = op.eqn.invars[1 - site.slot].aval
        kernel_array = self._keep((key, "kernel"), kernel.astype(site.dtype))
        bias_array = self._keep((key, "bias"), site.of_result(bias).astype(wide))

        def emit(x: Any) -> Any:
            if any(o.name in SUMS for o in site.before):
                x = lax.convert_element_type(x, wide)
            x = _moved(x, site.before, site.means)
            x = lax.convert_element_type(x, reads.dtype)
            (y,) = run(op, *((x, kernel_array) if site.slot else (kernel_array, x)))
            if bias.any():
                y = lax.add(lax.convert_element_type(y, wide), bias_array)
            if chain.gain != 1 or chain.means:
                y = lax.convert_element_type(y, wide)
            y = _moved(y, chain.ops, chain.means)
            return lax.convert_element_type(y, last)

        return emit


def _shares(constant: Known, op: Op, ndim: int) -> list[Known] | None:
    """The numbers that a constant has for each operand of a concatenation."""
    axis, numbers = op.eqn.params["dimension"], constant.numbers(ndim)
    sizes = [shape_of(v)[axis] for v in op.eqn.invars]
    if not all(isinstance(n, int) for n in sizes):
        return None
    parts = [numbers] * len(sizes)
    if numbers.shape[axis] > 1:
        parts = np.split(numbers, np.cumsum(sizes)[:-1], axis)
    return [Known(part, part.shape, constant.dtype) for part in parts]


def _moved(x: Any, ops: Sequence[Op], means: Container[int]) -> Any:
    """Equals x after the operations that move or sum its values, without affines and casts."""
    n = 1
    for op in ops:
        if op.name in SUMS:
            n = math.prod((window_of(op) or {}).values())
        if op.outputs[0] in means:
            x = lax.div(x, jnp.asarray(n, x.dtype))
        elif op.name in SUMS or (op.name in LAYOUT and op.name not in CASTS):
            (x,) = run(op, x)
    return x


def _name(op: Op) -> str:
    """The operation's name for people; for a call with its own derivative, its function's."""
    if op.name in CUSTOM:
        return next(bodies(op.eqn))[0].debug_info.func_name
    return {"conv_general_dilated": "conv", "dot_general": "dot"}.get(op.name, op.name)


def _what(chain: Chain) -> str:
    """The operations that the kernel absorbed, and the scopes that wrote the operations."""
    assert chain.site is not None
    n = chain.site.branches
    texts = [f"{n} branches"] * (n > 1)
    for all_ops, where in ((chain.site.before, " before"), (chain.arithmetic, "")):
        ops = [o for o in all_ops if o.name in AFFINE and o.outputs[0] not in chain.site.means]
        if ops:
            paths = dict.fromkeys(op.path for op in ops if op.path != chain.site.op.path)
            names = ", ".join(op.name for op in ops)
            texts.append(" of ".join(filter(None, (names + where, ", ".join(filter(None, paths))))))
    return "; ".join(texts)
