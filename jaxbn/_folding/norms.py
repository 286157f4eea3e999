"""The batch norms in a traced program, whichever library wrote them, and what comes before them."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._folding.chains import AFFINE, CONTRACTIONS, LAYOUT
from jaxbn._folding.program import Op, Program, shape_of
from jaxbn._folding.training_mode import at_two_sizes, grown_inputs

MOMENTS = "batch_norm_moments"  # this library's operation that takes moments
RANDOM = ("random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform")
ROOTS = ("rsqrt", "sqrt")
INTEGER_ARITHMETIC = ("add", "sub", "mul", "div", "rem", "integer_pow", "pow", *CONTRACTIONS)
# What leaves no value of its own: a pool takes one of the values, a clamp the value or a bound.
PICKS = ("reduce_window_max", "reduce_max")
NO, FOR_NOW, FOR_GOOD = range(3)  # is a value all 0? As a parameter is at first, or always?


class Norm(NamedTuple):
    """One batch norm of a program."""

    path: str  # the named scope that wrote it
    train: bool  # whether it normalizes by the batch
    values: int  # per channel, behind the statistics of the batch
    features: int  # number of channels
    bias: int  # number of biases right before it, which the mean takes away; 0 for none
    relu: bool  # whether relu is right before it
    keep: float | None  # the share of values that a dropout before it keeps; None without
    integers: int  # operations on integers before a cast to what it normalizes
    dead: bool  # whether no result of the program will ever depend on it


def norms(fn: Callable[..., Any], args: Sequence[Any]) -> list[Norm] | None:
    """The batch norms of `fn(*args)`, in order; None where rows cannot be told from channels.

    A value that keeps its shape when the batch gets longer, but is computed from a value that grew,
    is a statistic of the batch. A norm in training subtracts such a statistic from a value that
    grew, and multiplies by another. A norm in eval multiplies by a root of what no row reaches. The
    norms inside of loops (`lax.scan`) and of `shard_map` are not seen.

    Args:
      fn: a function of arrays, with its weights closed over.
      args: a batch. Rows are on axis 0 of the first leaf, and of all leaves as long as that.

    >>> import jax.numpy as jnp, jaxbn
    >>> from jaxbn._folding.norms import norms
    >>> def fn(x):
    ...     x = x @ jnp.ones((3, 2)) + jnp.array([[1.0, 2.0]])
    ...     return jaxbn.batch_norm(x, None, None, train=True)[0]
    >>> (norm,) = norms(fn, [jnp.eye(3)])
    >>> norm.train, norm.values, norm.features, norm.bias
    (True, 3, 2, 2)
    """
    rows = next((leaf.shape[0] for leaf in jax.tree.leaves(args) if leaf.ndim), 1)
    times = 2 if rows == 1 else 1  # of one row, some libraries make another program
    traced = at_two_sizes(fn, args, times)
    return None if traced is None else list(_Reader(*traced, times).norms())


class _Reader:
    """One walk through a program. Values are numbers, as in `Op`."""

    def __init__(self, program: Program, longer: Program, times: int):
        self.program, self.times = program, times
        self.made = {i: op for op in program.ops for i in op.outputs}  # value → its operation
        self.grows = grown_inputs(program, longer)
        self.statistic: set[int] = set()
        self.rooted: set[int] = set()
        self.data = set(program.inputs)  # what depends on the arguments
        self.random: set[int] = set()  # what depends on random bits and not on the arguments
        self.keep: dict[int, float] = {}  # value → share that a dropout before it kept
        self.zero = {i: _zero(v) for i, v in program.consts.items()}
        self.depends: dict[int, frozenset[int]] = {}  # value → the norms that it depends on
        self.inside: dict[int, int] = {}  # value → the norm whose affine part made it
        self.found: list[dict[str, Any]] = []
        for op, long in zip(program.ops, longer.ops, strict=True):
            self._read(op, long)

    def norms(self) -> Iterator[Norm]:
        """What was found, but for what only subtracts a statistic."""
        live = self._live()
        for norm in self.found:
            if norm["scaled"]:
                yield self._norm(norm, live)

    # Forward: one operation after the other

    def _read(self, op: Op, long: Op) -> None:
        if self._any(self.data, op):
            self.data.update(op.outputs)
        elif op.name in RANDOM or self._any(self.random, op):
            self.random.update(op.outputs)
        from_rows = self._any(self.grows, op) or op.outputs[0] in self.random
        from_statistic = self._any(self.statistic, op)
        for i, a, b in zip(op.outputs, op.eqn.outvars, long.eqn.outvars, strict=True):
            grew = shape_of(a) != shape_of(b)
            if grew and from_rows:
                self.grows.add(i)
            elif i in self.data and (from_statistic or from_rows):
                self.statistic.add(i)
            if op.name == MOMENTS:  # also those of ghost batches, of which there are more then
                self.grows.discard(i)
                self.statistic.add(i)
            self.zero[i] = self._zero_of(op)
            self.depends[i] = frozenset().union(*(self.depends.get(j, ()) for j in op.inputs))
        if op.name in ROOTS or (op.name in (*AFFINE, *LAYOUT) and self._any(self.rooted, op)):
            self.rooted.update(i for i in op.outputs if i not in self.grows)
        kept = [self.keep[i] for i in op.inputs if i in self.keep]
        if (dropped := self._dropped(op)) is not None:
            kept.append(dropped)
        if kept:
            self.keep.update(dict.fromkeys(op.outputs, min(kept)))
        self._normalizes(op)

    def _any(self, values: set[int], op: Op) -> bool:
        return any(i in values for i in op.inputs)

    def _normalizes(self, op: Op) -> None:
        """Whether the operation begins a norm, or goes on with one."""
        if op.name == "select_n":  # what a mask leaves of a norm
            masked = [self.inside[i] for i in op.inputs[1:] if i in self.inside]
            self.inside |= dict.fromkeys(op.outputs, masked[0]) if masked else {}
            return
        rows = [i for i in op.inputs if i in self.grows]
        if len(rows) != 1 or op.name not in (*AFFINE, *LAYOUT) or op.outputs[0] not in self.grows:
            return
        (x,), others = rows, [i for i in op.inputs if i not in self.grows]
        norm = self.inside.get(x)
        if op.name in AFFINE and others:
            (by,) = others
            if norm is not None and norm in self.depends.get(by, ()):
                norm = None  # a statistic of what this norm gave: another norm begins
            train = by in self.statistic and self._size(op, by) > 1
            scales = op.name in ("mul", "div") and (train or by in self.rooted)
            before = None if norm is None else self.found[norm]
            other = before is None or before["train"] != train or (before["scaled"] and not train)
            if other and (scales or (train and op.name == "sub")):
                norm = len(self.found)
                self.found.append({"x": x, "by": by, "op": op, "train": train, "scaled": False})
                first = self.made.get(self._back(x))
                if not train and first is not None and first.name == "sub":
                    self.found[norm]["x"] = next(i for i in first.inputs if i in self.grows)
            if norm is not None:
                self.found[norm]["scaled"] |= scales
        if norm is not None:
            for i in op.outputs:
                self.inside[i] = norm
                self.depends[i] = self.depends[i] | {norm}
                self.keep.pop(i, None)  # the batch's variance is 1 again

    def _size(self, op: Op, value: int) -> int:
        return math.prod(self._varying(op, value).values())

    def _varying(self, op: Op, value: int) -> dict[int, int]:
        """Axis of the operand → size, for the axes on which its values vary."""
        shape = shape_of(op.eqn.invars[op.inputs.index(value)])
        axes = {axis: size for axis, size in enumerate(shape) if size > 1}
        made = self.made.get(value)
        while made is not None and made.name in ("convert_element_type", "copy", "neg"):
            made = self.made.get(made.inputs[0])
        if made is not None and made.name == "broadcast_in_dim":
            inner = shape_of(made.eqn.invars[0])
            pairs = zip(made.eqn.params["broadcast_dimensions"], inner, strict=True)
            axes = {axis: size for axis, size in pairs if size > 1}
        return axes

    def _zero_of(self, op: Op) -> int:
        zeros = [self.zero.get(i, NO) for i in op.inputs]
        if op.name in (*LAYOUT, "neg", "abs", "stop_gradient", "reduce_sum", *PICKS):
            return zeros[0]
        if op.name == "div":
            return zeros[0]
        if op.name in ("mul", *CONTRACTIONS):
            return FOR_GOOD if FOR_GOOD in zeros or min(zeros) > NO else max(zeros)
        return min(zeros) if op.name in ("add", "sub", "max", "add_any") else NO

    def _dropped(self, op: Op) -> float | None:
        """The share of values that this operation keeps, if it is a dropout."""
        if op.name == "select_n" and len(op.inputs) == 3 and op.inputs[0] in self.random:
            branches = op.inputs[1:]
            zeros = [i for i in branches if self.zero.get(i, NO) == FOR_GOOD]
            if len(zeros) == 1 and self._mask_of_values(op, op.inputs[0]):
                (kept,) = (i for i in branches if i not in zeros)
                return self._divided(self.made.get(kept))
        if op.name in ("mul", "div"):  # mask * x / keep
            made = [self.made.get(i) for i in op.inputs if i in self.grows]
            mask = [
                i
                for m in made
                if m is not None and m.name == "mul"
                for i in m.inputs
                if i in self.random
            ]
            if mask:
                return self._divided(op)
        return None

    def _mask_of_values(self, op: Op, mask: int) -> bool:
        """Whether a mask differs within a row; one that drops whole rows is no dropout here."""
        return any(axis > 0 for axis in self._varying(op, mask))

    def _divided(self, op: Op | None) -> float | None:
        """The number q below 1 that an operation divides by, or multiplies by 1 / q."""
        if op is None or op.name not in ("mul", "div"):
            return None
        values = [self.program.consts.get(i) for i in op.inputs]
        numbers = [float(np.asarray(v)) for v in values if v is not None and np.size(v) == 1]
        if len(numbers) != 1:
            return None
        q = numbers[0] if op.name == "div" else 1 / numbers[0] if numbers[0] else 1.0
        return q if 0 < q < 1 else None

    # Backward: what comes before a norm, and what becomes of it

    def _back(self, value: int) -> int:
        """The value before reshapes, transposes and casts between floats."""
        while (op := self.made.get(value)) is not None and op.name in LAYOUT:
            before = op.inputs[0]
            if not jnp.issubdtype(self._dtype(op), jnp.inexact):
                break
            value = before
        return value

    def _dtype(self, op: Op) -> Any:
        """Of the first operand."""
        aval: Any = op.eqn.invars[0].aval
        return aval.dtype

    def _norm(self, found: dict[str, Any], live: set[int]) -> Norm:
        op, x, by = found["op"], self._back(found["x"]), found["by"]
        axes = self._varying(op, by)
        features = math.prod(axes.values())
        total = math.prod(shape_of(op.eqn.outvars[0]))
        return Norm(
            path=op.path,
            train=found["train"],
            values=total // max(features, 1) // self.times,
            features=features,
            bias=self._bias(x, axes),
            relu=self._is_relu(x),
            keep=self.keep.get(x),
            integers=self._integers(x),
            dead=not set(op.outputs) & live,
        )

    def _bias(self, x: int, features: dict[int, int]) -> int:
        """The number of biases that a convolution or a dot has added to x, one a feature."""
        op = self.made.get(x)
        if op is None or op.name != "add":
            return 0
        rows = [i for i in op.inputs if i in self.grows]
        others = [i for i in op.inputs if i not in self.grows]
        if len(rows) != 1 or len(others) != 1 or others[0] in self.statistic:
            return 0
        made = self.made.get(self._back(rows[0]))
        varies = self._varying(op, others[0])
        # Of ghost batches each has a statistic for each feature.
        alone = varies and not Counter(varies.values()) - Counter(features.values())
        return math.prod(varies.values()) if alone and made and made.name in CONTRACTIONS else 0

    def _is_relu(self, x: int) -> bool:
        op = self.made.get(x)
        while op is not None and op.name in PICKS:
            op = self.made.get(self._back(op.inputs[0]))
        return op is not None and op.name == "max" and self._any(self._zeros, op)

    @property
    def _zeros(self) -> set[int]:
        return {i for i, zero in self.zero.items() if zero == FOR_GOOD}

    def _integers(self, x: int) -> int:
        """The operations on integers behind the cast to x; 0 where x is no cast of integers."""
        op = self.made.get(x)
        while op is not None and op.name in (*AFFINE, *LAYOUT):
            integer = jnp.issubdtype(self._dtype(op), jnp.integer)
            if op.name == "convert_element_type" and integer:
                return self._arithmetic(op.inputs[0])
            rows = [i for i in op.inputs if i in self.grows]
            op = self.made.get(rows[0]) if len(rows) == 1 else None
        return 0

    def _arithmetic(self, value: int) -> int:
        count, left, seen = 0, [value], set()
        while left:
            if (op := self.made.get(i := left.pop())) is None or i in seen:
                continue
            seen.add(i)
            if jnp.issubdtype(op.dtype, jnp.integer) and i in self.grows:
                count += op.name in INTEGER_ARITHMETIC
                left += op.inputs
        return count

    def _live(self) -> set[int]:
        """The values on which a result depends, or will once parameters have learned."""
        live = set(self.program.outputs)
        for op in reversed(self.program.ops):
            if op.eqn.effects or live & set(op.outputs):
                live |= {i for k, i in enumerate(op.inputs) if not self._is_lost(op, k)}
        return live

    def _is_lost(self, op: Op, k: int) -> bool:
        """Whether an operand is multiplied by 0 for good: by a 0, or by a parameter that is 0.

        The latter where the operand is 0 too: of two factors that are 0 neither has a gradient.
        """
        if op.name not in ("mul", *CONTRACTIONS):
            return False
        own, other = (self.zero.get(op.inputs[i], NO) for i in (k, 1 - k))
        return other == FOR_GOOD or min(own, other) > NO


def _zero(value: Any) -> int:
    """A number that is written in the program is 0 for good; an array that is 0 may be learned."""
    if isinstance(value, jax.core.Tracer) or not hasattr(value, "dtype"):
        return FOR_GOOD if isinstance(value, int | float) and value == 0 else NO
    if not jnp.issubdtype(value.dtype, jnp.inexact) or np.asarray(value).any():
        return NO
    return FOR_NOW if isinstance(value, jax.Array) or np.ndim(value) else FOR_GOOD
