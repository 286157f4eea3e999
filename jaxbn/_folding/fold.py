"""`fold`: a trained network without norms. The kernels beside the norms absorb them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._folding.chains import CONTRACTIONS, transparent
from jaxbn._folding.constants import ARITHMETIC, floating, known
from jaxbn._folding.program import Program, evaluate, trace
from jaxbn._folding.rewrite import Rewrite, SiteOutcome
from jaxbn._folding.training_mode import batch_statistics
from jaxbn._misuse import check_function
from jaxbn._op.arguments.values import check_real
from jaxbn._op.axes import promote
from jaxbn._text import a_kind, aligned


class FoldSite(NamedTuple):
    """One row of the report: a convolution or dot with a constant kernel, or a norm that stays."""

    name: str  # "0 conv 3x3, 3 -> 8 ResNet/conv_init"
    folded: bool | None  # None if there is nothing to fold
    note: str  # what was folded, or why not
    absolute: float | None  # largest error of this site alone on the example; None if unchanged
    relative: float | None  # absolute over the largest value of the site's result


class FoldReport(NamedTuple):
    """What `fold` did: the sites in order, and the largest error of fn's results on the example.

    `print(report)` prints a table.

    >>> import jax.numpy as jnp, jaxbn
    >>> w, mean, scale = jnp.ones((3, 2)), jnp.array([[1.0, 0.0]]), jnp.array([[2.0, -4.0]])
    >>> _, report = jaxbn.fold(lambda x: (x @ w - mean) * scale, jnp.eye(3))
    >>> print(report)
    site            folded  what or why not  absolute  relative
    0 dense 3 -> 2  yes     sub, mul          0.0e+00   0.0e+00
    result                  1 site of 1       0.0e+00   0.0e+00
    """

    sites: tuple[FoldSite, ...]
    absolute: float
    relative: float
    tolerance: float

    @property
    def folded(self) -> tuple[FoldSite, ...]:
        """The sites that were folded."""
        return tuple(site for site in self.sites if site.folded)

    def __str__(self) -> str:
        def error(v: float | None) -> str:
            return "" if v is None else f"{v:.1e}"

        word = {True: "yes", False: "no", None: "-"}
        total = f"{len(self.folded)} site{'s' * (len(self.folded) != 1)} of {len(self.sites)}"
        rows = [("site", "folded", "what or why not", "absolute", "relative")]
        rows += [
            (s.name, word[s.folded], s.note, error(s.absolute), error(s.relative))
            for s in self.sites
        ]
        rows += [("result", "", total, error(self.absolute), error(self.relative))]
        return "\n".join(aligned(rows, right=2))


class Folded:
    """The function that `fold` returns: jitted, with the methods `trace` and `lower` of `jax.jit`.

    It pickles if fn pickles. Unpickling traces and folds fn again.

    >>> import jax.numpy as jnp
    >>> from jaxbn._folding.fold import Folded
    >>> w = jnp.eye(2)
    >>> print(Folded(lambda x: x @ w * 2, jnp.ones((1, 2)))(jnp.ones((3, 2)))[0])
    [2. 2.]
    """

    def __init__(self, fn: Callable[..., Any], *example_args: Any, merge_branches: bool = False):
        self.fn = fn
        self.merge_branches = merge_branches
        self.written: set[int] = set()  # results of norms that run as they are written
        self.shapes = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), example_args)
        self.program = trace(fn, example_args, transparent)
        self.kept: dict[Any, jax.Array] = {}
        self._jitted = jax.jit(self._run)

    def __reduce__(self) -> tuple[Any, ...]:
        state = {"written": self.written, "merge_branches": self.merge_branches}
        return Folded, (self.fn, *self.shapes), state

    def __call__(self, *args: Any) -> Any:
        """Equals `fn(*args)` up to rounding."""
        return self._jitted(*args)

    def trace(self, *args: Any) -> Any:
        """As of `jax.jit`."""
        return self._jitted.trace(*args)

    def lower(self, *args: Any) -> Any:
        """As of `jax.jit`."""
        return self._jitted.lower(*args)

    def _run(self, *args: Any) -> Any:
        again = trace(self.fn, args, transparent)
        # A constant may depend on the shape (a mean over the batch), but must not change with time.
        if not _same(again, self.program) and not _same(
            trace(self.fn, self.shapes, transparent), self.program
        ):
            raise ValueError(
                "fold: the weights that fn closes over have changed since it was folded; fold "
                "again: folded, report = jaxbn.fold(fn, x)."
            )
        return again.tree.unflatten(self.rewrite(again).run(jax.tree.leaves(args)))

    def rewrite(self, program: Program) -> Rewrite:
        """A run of a trace of fn."""
        return Rewrite(program, self.kept, self.written, self.merge_branches)


class FoldError(ValueError):
    """`fold` refuses fn: there is nothing to fold, or an error is above tolerance.

    Attributes:
      report: the `FoldReport`, with every site and its error.

    >>> import jax.numpy as jnp, jaxbn
    >>> try:
    ...     jaxbn.fold(lambda x: x @ jnp.ones((3, 2)), jnp.eye(3))
    ... except ValueError as error:
    ...     len(error.report.folded)
    0
    """

    report: FoldReport

    def __init__(self, message: str, report: FoldReport | None = None):  # None as it is unpickled
        super().__init__(message)
        if report is not None:
            self.report = report


def fold(
    fn: Callable[..., Any],
    *example_args: Any,
    tolerance: float | None = None,
    merge_branches: bool = False,
) -> tuple[Callable[..., Any], FoldReport]:
    """A function that equals `fn`, without its norms: kernels and biases absorb the norms.

    Use `fold` before a trained network is served, exported or quantized. In inference a norm is
    `x * a + b` per channel, so `(W x + c) * a + b = (W a) x + (c a + b)`: Jacob et al. 2018,
    section 3.2. `fn` is traced, so any library may have written it.

    `fold` absorbs the additions, subtractions, multiplications and divisions by per-channel
    constants that follow a convolution or a dot with a constant kernel. Reshapes, transposes and
    casts in between are allowed if they keep channels apart, and so are concatenations, splits, and
    sums and means over space without padding. An affine before a convolution or a dot is absorbed,
    also through a mean or a flatten, if the convolution does not pad with zeros. Kernels are
    computed in float64 and cast once. A value with a second reader stays as it is. A norm that
    stays becomes one multiplication and one addition, where that is exact enough on the example.

    Args:
      fn: an inference function of arrays, or of trees of arrays, that closes over its weights.
        fn is traced again for each new shape.
      example_args: a batch. fold traces fn with the batch and measures errors on it.
      tolerance: the largest error allowed, over the largest value, for each site and for fn's
        results. The default is 1e-5 in float32, 1e-12 in float64, and 4 units in the last place
        of bfloat16 or float16.
      merge_branches: make one convolution of a sum of convolutions of one value that differ in
        their windows alone, and of the value itself (RepVGG: 3x3, 1x1 and identity).

    Returns:
      `(folded, report)`. `folded` takes any batch size, works under `jit`, `vmap`, `grad` and
      `jax.export`, and pickles if fn does. `report` says what became of each site.

    Raises:
      TypeError: fn is not a function, an argument is not an array, or tolerance is no number.
      ValueError: fn is in training mode.
      FoldError: there is nothing to fold, or an error is above tolerance. FoldError is a
        ValueError. The message names the place, and the error has the report.

    >>> import jax, jax.numpy as jnp, jaxbn
    >>> params, state = jaxbn.init(2)
    >>> state = state._replace(mean=jnp.array([1.0, 2.0]))
    >>> w = jnp.ones((3, 2))
    >>> def fn(x):
    ...     return jaxbn.batch_norm(x @ w, params, state, train=False)[0]
    >>> folded, report = jaxbn.fold(fn, jnp.eye(3))
    >>> print([site.note for site in report.folded])
    ['sub, mul, add']
    >>> print(str(jax.make_jaxpr(folded)(jnp.eye(3))).count("sub"))
    0
    """
    _check_arguments(fn, example_args, tolerance)
    example_args = jax.tree.map(jnp.asarray, example_args)
    try:
        where = batch_statistics(fn, example_args)
        folded = Folded(fn, *example_args, merge_branches=merge_branches)
    except Exception as error:
        error.add_note(
            "fold: fn failed while it was traced; expected an inference function of the example "
            "arguments: a module in eval mode (use_running_average=True, model.eval()), with no "
            "variable written."
        )
        raise
    if where is not None:
        raise ValueError(
            f"fold: {where} normalizes by statistics of the batch, expected a function in "
            f"inference mode; write train=False (jaxbn.batch_norm), use_running_average=True "
            f"(linen), model.eval() (nnx), is_training=False (Haiku) or "
            f"eqx.nn.inference_mode(model) (Equinox)."
        )

    if tolerance is None:
        tolerance = _tolerance(folded.program)
    report = _measure(folded, example_args, tolerance)
    if not report.folded:
        _check_something(report, folded.program)
    _verify(report)
    return folded, report


def _same(one: Program, other: Program) -> bool:
    """Whether two traces hold the same constants."""

    def equal(a: Any, b: Any) -> bool:
        if a is b:
            return True
        one, other = known(a), known(b)
        if one is None or other is None:
            return one is other
        return (
            one.shape == other.shape
            and one.dtype == other.dtype
            and one.value.tobytes() == other.value.tobytes()
        )

    values = list(one.consts.values()), list(other.consts.values())
    return len(values[0]) == len(values[1]) and all(map(equal, *values))


# Errors on the example


def _measure(folded: Folded, args: Sequence[Any], tolerance: float) -> FoldReport:
    """The report: each site runs alone on its input in fn, then all sites run together.

    A norm that stays, and as one affine is not exact enough, stays as it is written.
    """
    outcomes: list[SiteOutcome] = []

    def differences(*args: Any) -> Any:
        program, leaves = trace(folded.fn, args, transparent), jax.tree.leaves(args)
        values, rewrite = evaluate(program, leaves), folded.rewrite(program)
        results = rewrite.run(leaves)
        outcomes[:] = [rewrite.outcomes[i] for i in sorted(rewrite.outcomes)]
        alone = [
            _largest_error(outcome.alone(values[outcome.reads]), _part(values, outcome))
            for outcome in outcomes
            if outcome.alone is not None
        ]
        pairs = ((y, values[i]) for y, i in zip(results, program.outputs, strict=True))
        return alone, [_largest_error(y, r) for y, r in pairs if jnp.issubdtype(r, jnp.inexact)]

    # Accelerators multiply float32 in fewer bits by default. The fold is not to blame for that.
    with jax.default_matmul_precision("highest"):
        alone, together = jax.device_get(jax.jit(differences)(*args))
    errors = iter(alone)
    sites, inexact = [], set()
    for i, outcome in enumerate(outcomes):
        error = (None, None) if outcome.alone is None else _worst([next(errors)])
        if not outcome.folded and error[1] is not None and error[1] > tolerance:
            inexact |= {*outcome.gives}
        sites.append(FoldSite(f"{i} {outcome.name}", outcome.folded, outcome.note, *error))
    if inexact:
        folded.written |= inexact
        return _measure(folded, args, tolerance)
    return FoldReport(tuple(sites), *_worst(together), tolerance)


def _part(values: dict[int, Any], outcome: SiteOutcome) -> Any:
    """What fn computes where the site's result stands."""
    parts = [values[i] for i in outcome.gives]
    if outcome.part is not None:
        return jax.lax.slice_in_dim(parts[0], *outcome.part, axis=outcome.axis)
    return jnp.concatenate(parts, outcome.axis) if len(parts) > 1 else parts[0]


def _largest_error(y: jax.Array, reference: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Largest error and largest value. Equal infinities do not differ, nor do two NaNs."""
    wide = promote(y.dtype, jnp.float32)
    y, reference = y.astype(wide), reference.astype(wide)
    same = (y == reference) | (jnp.isnan(y) & jnp.isnan(reference))
    error = jnp.where(same, 0, jnp.abs(y - reference))
    size = jnp.where(jnp.isfinite(reference), jnp.abs(reference), 0)
    return jnp.max(error, initial=0), jnp.max(size, initial=0)


def _worst(errors: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The largest error, and the largest relative error. A NaN counts as infinite."""
    absolute = [float("inf") if np.isnan(error) else float(error) for error, _ in errors]
    relative = [
        error / float(largest) if largest else error and float("inf")
        for error, (_, largest) in zip(absolute, errors, strict=True)
    ]
    return max(absolute, default=0.0), max(relative, default=0.0)


def _tolerance(program: Program) -> float:
    """4 units in the last place of the narrowest dtype in the program; 1e-5 in float32."""
    names = {*CONTRACTIONS, *ARITHMETIC}
    dtypes = [op.dtype for op in program.ops if op.name in names and floating(op.dtype)]
    eps = max((float(jnp.finfo(dtype).eps) for dtype in dtypes), default=0.0)
    return {np.finfo("float64").eps: 1e-12, np.finfo("float32").eps: 1e-5}.get(eps, 4 * eps)


# What cannot be folded


def _check_arguments(fn: Any, args: Sequence[Any], tolerance: float | None) -> None:
    check_function("fold", fn, "jaxbn.fold(lambda x: model.apply(variables, x), x)")
    if not jax.tree.leaves(args):
        raise ValueError(
            "fold: no example arguments, expected a batch to trace fn with; write "
            "jaxbn.fold(fn, x)."
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(args):
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
            raise TypeError(
                f"fold: example_args{jax.tree_util.keystr(path)} is {a_kind(leaf)}, "
                f"expected an array; close over what is none: "
                f"jaxbn.fold(lambda x: fn(x, option), x)."
            )
    if tolerance is not None:
        above = "a relative error above 0"
        check_real("fold", "tolerance", tolerance, lambda v: v > 0, above, "1e-5")


def _check_something(report: FoldReport, program: Program) -> None:
    """Raises if fn has neither a norm that was folded nor a norm that had to stay."""
    found = {site.folded for site in report.sites}
    count = sum(op.name in CONTRACTIONS for op in program.ops)
    if count and found <= {False}:
        raise FoldError(
            f"fold: no convolution or dot of fn has a constant kernel (there are {count}), so "
            f"there is nothing to fold into; close over concrete weights and pass data alone: "
            f"jaxbn.fold(lambda x: model.apply(variables, x), x).",
            report,
        )
    if False not in found:
        raise FoldError(
            f"fold: fn has no norm to fold: of its {count} convolutions and dots, none is followed "
            f"by more than a bias; expected a network with batch norms, in inference mode.",
            report,
        )


def _verify(report: FoldReport) -> None:
    worst = max(report.folded, key=lambda site: site.relative or 0.0, default=None)
    if worst is None or max(worst.relative or 0.0, report.relative) <= report.tolerance:
        return
    raise FoldError(
        f"fold: folding changes fn's result by {report.relative:.1e} of its largest value, and "
        f"the result of site {worst.name!r} alone, more than any other, by {worst.relative:.1e}; "
        f"expected {report.tolerance:.1e} at most. A running mean far beyond its standard "
        f"deviation, or a var near 0, amplifies rounding: recalibrate the statistics, or accept "
        f"it by tolerance={max(worst.relative or 0.0, report.relative) * 2:.0e}.",
        report,
    )
