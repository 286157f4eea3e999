"""Does a served function answer each row by that row alone, in the same way each time?"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._folding.training_mode import batch_statistics
from jaxbn._misuse import check_function, takes
from jaxbn._op.arguments.values import check_tolerance
from jaxbn._text import first_line
from jaxbn.health._distances import relative_error
from jaxbn.health._findings import ERROR, Finding, worst_first

EVAL = "run the norms in eval mode: train=False, use_running_average=True, model.eval()"
# What rounding may do: a batch of another size is multiplied in another order.
TOLERANCES = {"float64": 1e-10, "float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}


WRITE = "health.serving(lambda x: net.apply(variables, x), x)"


@takes("an inference function and a batch", WRITE)
def serving(fn: Callable[[Any], Any], x: Any, *, tolerance: float | None = None) -> list[Finding]:
    """What is wrong with a function that serves batches of rows, worst first.

    Use it before a model is served. A server puts the requests of several users into one batch, so
    the result of a row must not depend on the other rows, on its place, on the size of the batch or
    on the time. The checks, each with the kind of its finding:

    - mode: no norm normalizes by the batch (`train_in_inference`);
    - numbers: no result is NaN (`not_finite`);
    - determinism: two runs on x agree bit for bit (`not_deterministic`);
    - batch independence: a row's result stays while other rows change (`batch_dependent`);
    - order of rows: rolled rows give rolled results (`row_order`);
    - batch of one: a row alone gives the result that it has in x (`batch_of_one`).

    Args:
      fn: an inference function of x, jitted or not. A file will do:
        `export.load_stablehlo(path)`, `export.session(path)`. The mode of a function that JAX
        cannot trace is judged by its results alone.
      x: a batch, an array or a tree of arrays, rows on axis 0. Of at least 2 rows that differ.
      tolerance: the largest error allowed, over the largest value of the result. The default
        follows the result's dtype: 1e-4 in float32, 1e-10 in float64, 4e-3 in float16, 3e-2 in
        bfloat16, 0 for integers, whose error is the share of values that differ.

    Returns:
      A list of `Finding`; empty if nothing is wrong. `layer` is the place of a norm in training
      mode, or the result: `result`, `result['logits']`.

    Raises:
      TypeError: fn is no function of x, or tolerance is no number.
      ValueError: x has no rows to compare, or fn returns no result, or one without a row for each
        row of x.

    >>> import jax.numpy as jnp, jaxbn
    >>> def centred(x):
    ...     return x - x.mean()
    >>> x = jnp.arange(8.0).reshape(4, 2)
    >>> [finding.kind for finding in jaxbn.health.serving(centred, x)]
    ['batch_dependent', 'batch_of_one']
    """
    check_function("serving", fn, WRITE)
    check_tolerance("serving", tolerance)
    n = _rows(x)
    if where := _training_mode(fn, x):
        return [Finding(where, "train_in_inference", ERROR, 1.0, 0.0, (), EVAL)]
    result = _Results(fn(x), n, tolerance)
    stateful = "give fn no random key and no state that a call changes: dropout off, model.eval()"
    findings = result.changes(fn(x), slice(None), "not_deterministic", stateful, exact=True)
    if any(finding.figure > result.limit_of(finding.layer) for finding in findings):
        return findings  # runs that differ so much hide all else
    findings += result.nans()
    rows, half = np.arange(n), n // 2
    dependent = f"take no statistic or maximum over rows; {EVAL}"
    # The first half beside copies of the first row, then the second beside copies of the last.
    for part, mixed in (
        (slice(0, half), np.where(rows < half, rows, 0)),
        (slice(half, n), np.where(rows < half, n - 1, rows)),
    ):
        y = _taken(fn(_taken(x, mixed)), part)
        findings += result.changes(y, part, "batch_dependent", dependent)
    rolled = np.roll(rows, 1)
    y = fn(_taken(x, rolled))
    findings += result.changes(y, rolled, "row_order", "treat all rows alike, wherever they stand")
    alone = "keep the axis of rows (no squeeze), and take no statistic over rows"
    try:
        y = fn(_taken(x, rows[:1]))
    except Exception as error:
        remedy = f"fn fails on one row ({first_line(error)}): {alone}"
        findings.append(Finding("result", "batch_of_one", ERROR, np.inf, 0.0, (), remedy))
    else:
        findings += result.changes(y, rows[:1], "batch_of_one", alone)
    return worst_first(_once(findings))


class _Results:
    """The results on x, one row for each row of x, and other results compared with them."""

    def __init__(self, y: Any, n: int, tolerance: float | None):
        self.n, self.tolerance = n, tolerance
        self.leaves = _named(y)
        if not self.leaves:
            raise ValueError(
                f"serving: fn returns no array, expected a row for each of the {n} rows of x; "
                f"return the results."
            )
        for name, v in self.leaves.items():
            if v.shape[:1] != (n,):
                raise ValueError(
                    f"serving: {name} has shape {v.shape}, expected a row for each of the {n} rows "
                    f"of x; return results with rows on axis 0 alone."
                )

    def limit_of(self, name: str) -> float:
        """The tolerance of one result."""
        if self.tolerance is not None:
            return self.tolerance
        return default_tolerance(self.leaves[name].dtype)

    def nans(self) -> list[Finding]:
        """A finding for each result that holds NaN. An infinity may be a mask."""
        numbers = {name: int((v != v).sum()) for name, v in self.leaves.items()}
        remedy = (
            "jaxbn.health.check(variables): look for statistics and weights that are not finite"
        )
        return [
            Finding(name, "not_finite", ERROR, float(n), 0.0, (), remedy)
            for name, n in numbers.items()
            if n
        ]

    def changes(
        self, y: Any, rows: Any, kind: str, remedy: str, *, exact: bool = False
    ) -> list[Finding]:
        """A finding for each result in y that is not the result of these rows of x."""
        new, findings = _named(y), []
        for name, v in self.leaves.items():
            figure = relative_error(new[name], v[rows], of=v) if name in new else np.inf
            limit = 0.0 if exact else self.limit_of(name)
            if figure > limit:
                findings.append(Finding(name, kind, ERROR, float(figure), limit, (), remedy))
        return findings


def default_tolerance(dtype: Any) -> float:
    """The error that rounding alone may make in results of a dtype; 0 for integers.

    >>> from jaxbn.health import _serving
    >>> _serving.default_tolerance("float32"), _serving.default_tolerance("int32")
    (0.0001, 0.0)
    """
    dtype = np.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return 0.0
    return TOLERANCES.get(jnp.finfo(dtype).dtype.name, 3e-2)


def _rows(x: Any) -> int:
    """The number of rows of x. Raises unless all leaves have as many, and two rows differ."""
    leaves = jax.tree.leaves(x)
    sizes = {np.shape(leaf)[0] if np.ndim(leaf) else 0 for leaf in leaves}
    n = min(sizes, default=0)
    if len(sizes) != 1 or n < 2 or all(np.all(np.asarray(v) == v[:1]) for v in leaves):
        shapes = ", ".join(str(np.shape(leaf)) for leaf in leaves) or "no array"
        raise ValueError(
            f"serving: x is {shapes}, expected arrays with as many rows on axis 0, at least 2, "
            f"that differ; pass a batch of real inputs."
        )
    return n


def _training_mode(fn: Callable[[Any], Any], x: Any) -> str | None:
    try:
        return batch_statistics(fn, (x,))
    except Exception:  # a function that cannot be traced, such as an ONNX session
        return None


def _taken(tree: Any, rows: Any) -> Any:
    return jax.tree.map(lambda v: v[rows], tree)


def _named(y: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(y)
    return {f"result{jax.tree_util.keystr(path)}": np.asarray(v) for path, v in leaves}


def _once(findings: list[Finding]) -> list[Finding]:
    """One finding of a kind for each result: that with the largest figure."""
    worst: dict[tuple[str, str], Finding] = {}
    for finding in sorted(findings, key=lambda f: f.figure):
        worst[finding.layer, finding.kind] = finding
    return list(worst.values())
