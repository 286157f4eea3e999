"""Two models compared: statistics by distance, weights, results; and what is beyond its bound."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxbn import health
from jaxbn._checkpoints.contents import Contents
from jaxbn._checkpoints.nesting import leaves
from jaxbn._checkpoints.norm_layers import NAMES, norms_in
from jaxbn._inspection.layers import Layer
from jaxbn._text import aligned, printable
from jaxbn.health._distances import relative_error

COUNTS = ("count", NAMES["count"])
LONGEST = 40  # layers in a table
STATISTICS = ("mean", "var", NAMES["mean"], NAMES["var"])


class Beyond(NamedTuple):
    """A figure beyond its bound, or what has no figure."""

    what: str
    figure: float | None = None
    bound: float | None = None

    def __str__(self) -> str:
        if self.figure is None or self.bound is None:
            return self.what
        return f"{self.what}: {self.figure:.1e}, bound {self.bound:.1e}"


class LayerRow(NamedTuple):
    """One layer of two models. None for what the layer does not have in both."""

    layer: str
    divergence: float | None  # symmetric KL divergence of the statistics, of the worst channel
    shift: float | None  # of the mean, in sd of b, of the worst channel
    ratio: float | None  # of the variances, above 1, of the worst channel
    weights: float | None  # largest error of an array over the largest value of the array


class Outputs(NamedTuple):
    """One result of two functions on the same inputs."""

    result: str
    rows: int
    error: float  # over the largest value
    agreement: float | None  # share of equal maxima along the last axis; None without such an axis


def parts(source: Contents) -> tuple[dict[str, Layer], dict[str, np.ndarray]]:
    """The norm layers of a model, and the weights by name: all arrays that are no statistics.

    >>> import numpy as np
    >>> from jaxbn._checkpoints.contents import Contents
    >>> from jaxbn._cli import comparison
    >>> norm = {"running_mean": np.zeros(2), "running_var": np.ones(2), "weight": np.ones(2)}
    >>> norms, weights = comparison.parts(Contents("torch", {"bn": norm}))
    >>> list(norms), list(weights)
    (['bn'], ['bn/weight'])
    """
    tree: Any = source.tree if source.kind == "torch" else source.variables()
    norms = norms_in(tree["params"] if source.kind == "nnx" else tree)
    weights = {}
    for keys, v in leaves(tree):
        if source.kind != "torch":
            collection, *keys = keys  # type: ignore[assignment]
            if collection == "batch_stats":
                continue
        array = np.asarray(v)
        layer, leaf = "/".join(keys[:-1]), keys[-1]
        if array.dtype.kind in "OSUM" or leaf in COUNTS or (layer in norms and leaf in STATISTICS):
            continue
        weights["/".join(keys)] = array
    return norms, weights


def layer_rows(
    a: tuple[Mapping[str, Layer], Mapping[str, np.ndarray]],
    b: tuple[Mapping[str, Layer], Mapping[str, np.ndarray]],
    *,
    divergence: float,
    weights: float,
    epsilon: float = 1e-5,
) -> tuple[list[LayerRow], list[Beyond]]:
    """A row for each layer of two models, those that differ most first, and what is beyond a bound.

    Args:
      a: as `parts` returns it.
      b: as `parts` returns it, the reference.
      divergence: the bound of the statistics of every channel.
      weights: the bound of the relative error of every array.
      epsilon: of the norm layers.

    >>> import numpy as np
    >>> from jaxbn._cli import comparison
    >>> a, b = ({}, {"fc/kernel": np.ones(2)}), ({}, {"fc/kernel": np.full(2, 2.0)})
    >>> rows, beyond = comparison.layer_rows(a, b, divergence=0.0, weights=0.1)
    >>> rows[0].weights, str(beyond[0])
    (0.5, 'weights of fc/kernel: 5.0e-01, bound 1.0e-01')
    """
    beyond = [
        Beyond(f"{kind} {name} is in {side} alone")
        for kind, one, other in (("layer", a[0], b[0]), ("array", a[1], b[1]))
        for side, here, there in (("A", one, other), ("B", other, one))
        for name in here
        if name not in there
    ]
    errors: dict[str, float] = {}
    for name in (name for name in a[1] if name in b[1]):
        layer, error = name.rpartition("/")[0], _error(a[1][name], b[1][name])
        errors[layer] = max(errors.get(layer, 0.0), error)
        beyond += [Beyond(f"weights of {name}", error, weights)] * (error > weights)
    rows = []
    for layer in {**errors, **{name: None for name in a[0] if name in b[0]}}:
        apart: tuple[Any, Any, Any] = (None, None, None)
        if layer in a[0] and layer in b[0]:
            apart = _apart(a[0][layer].state, b[0][layer].state, epsilon)
            if apart[0] is not None and not apart[0] <= divergence:
                beyond.append(Beyond(f"statistics of {layer}", apart[0], divergence))
        rows.append(LayerRow(layer, *apart, errors.get(layer)))
    rows.sort(key=lambda row: (-(row.divergence or 0.0), -(row.weights or 0.0), row.layer))
    return rows, beyond


def _error(a: np.ndarray, b: np.ndarray) -> float:
    """The error over the largest value of either: an array of zeros has no scale of its own."""
    return relative_error(a, b, of=np.stack([a, b])) if a.shape == b.shape else math.inf


def _apart(a: Any, b: Any, epsilon: float) -> tuple[Any, Any, Any]:
    """Divergence, shift and ratio of the worst channel; infinite where they cannot be compared."""
    if a.mean is None and b.mean is None:
        return None, None, None
    if a.mean is None or b.mean is None or np.shape(a.mean) != np.shape(b.mean):
        return math.inf, math.inf, math.inf
    found = health.distance(a, b, epsilon)
    with np.errstate(all="ignore"):
        ratios = np.exp(np.abs(found.log_ratio))
    worst = [np.abs(v).max(initial=0) for v in (found.divergence, found.shift, ratios)]
    return tuple(math.inf if np.isnan(v) else float(v) for v in worst)  # type: ignore[return-value]


def results(
    y: Any, reference: Any, *, bound: float, agree: float | None = None, what: str = "result"
) -> tuple[list[Outputs], list[Beyond]]:
    """The results of two functions on the same inputs, and what is beyond a bound.

    Args:
      y: a tree of arrays. Results are compared in the order of `jax.tree.leaves`.
      reference: a tree of arrays.
      bound: of the error over the largest value of the reference.
      agree: the smallest share of equal top-1 answers.
      what: the name of a result.

    Raises:
      ValueError: the reference holds no number, so that nothing could differ.

    >>> import numpy as np
    >>> from jaxbn._cli import comparison
    >>> y, reference = np.array([[1.0, 2.0]]), np.array([[1.0, 0.0]])
    >>> comparison.results(y, reference, bound=3.0, agree=0.5)[1]
    [Beyond(what='result: top-1 agreement', figure=0.0, bound=0.5)]
    """
    found, beyond = [], []
    ours, theirs = jax.tree.leaves(y), jax.tree_util.tree_leaves_with_path(reference)
    if not any(np.size(v) for _, v in theirs):
        raise ValueError(
            f"results: {what} holds no number to compare; expected inputs of at least one row, and "
            f"a model that returns its results"
        )
    if len(ours) != len(theirs):
        beyond.append(Beyond(f"{what}: {len(ours)} arrays, expected {len(theirs)}"))
    for one, (path, other) in zip(ours, theirs, strict=False):
        name, v, w = f"{what}{jax.tree_util.keystr(path)}", np.asarray(one), np.asarray(other)
        error = relative_error(v, w)
        share = None
        if v.shape == w.shape and v.ndim > 1 and v.shape[-1] > 1 and v.size:
            share = float((v.argmax(-1) == w.argmax(-1)).mean())
        found.append(Outputs(name, len(w) if w.ndim else 0, error, share))
        beyond += [Beyond(f"{name}: error", error, bound)] * (error > bound)
        if nans := int((w != w).sum()):
            beyond.append(Beyond(f"{name}: {nans} values of the reference are NaN"))
        if agree is not None and share is not None and share < agree:
            beyond.append(Beyond(f"{name}: top-1 agreement", share, agree))
    return found, beyond


def show(
    title: str, rows: Sequence[LayerRow], outputs: Sequence[Outputs], beyond: Sequence[Beyond]
) -> None:
    """Prints a table of the layers, a line for each result, and what is beyond its bound.

    >>> from jaxbn._cli import comparison
    >>> comparison.show("a and b", [], [comparison.Outputs("result", 8, 1e-7, 1.0)], [])
    a and b: passed
    result, 8 rows: error 1.0e-07 of the largest value, top-1 agreement 100 %
    """
    print(f"{printable(title)}: {verdict(beyond)}")
    if rows:
        head = ("layer", "divergence", "mean shift / sd", "var ratio", "weights")
        cells = [(row.layer or ".", *map(_figure, row[1:])) for row in rows[:LONGEST]]
        print("\n".join(aligned([head, *cells], right=4)))
        if len(rows) > LONGEST:
            print(f"and {len(rows) - LONGEST} layers more, which differ less; --json has them all")
    for name, n, error, share in outputs:
        top = "" if share is None else f", top-1 agreement {100 * share:.4g} %"
        plural = "" if n == 1 else "s"
        print(printable(f"{name}, {n} row{plural}: error {error:.1e} of the largest value{top}"))
    for line in beyond:
        print(printable(f"beyond: {line}"))


def verdict(beyond: Sequence[Any]) -> str:
    """The number of findings in words.

    >>> from jaxbn._cli import comparison
    >>> comparison.verdict([]), comparison.verdict([1])
    ('passed', '1 finding')
    """
    n = len(beyond)
    return f"{n} finding{'s' * (n != 1)}" if n else "passed"


def as_json(beyond: Sequence[Any], **content: Any) -> str:
    """One JSON object: the content, `passed` and `findings`. NaN and infinity are null.

    >>> from jaxbn._cli import comparison
    >>> print(comparison.as_json([], a="net"))
    {
     "a": "net",
     "passed": true,
     "findings": []
    }
    """
    whole = {**content, "passed": not beyond, "findings": list(beyond)}
    return json.dumps(_plain(whole), indent=1, allow_nan=False)


def _plain(v: Any) -> Any:
    if isinstance(v, tuple) and hasattr(v, "_asdict"):
        v = v._asdict()
    if isinstance(v, Mapping):
        return {key: _plain(inner) for key, inner in v.items()}
    if isinstance(v, Iterable) and not isinstance(v, str):
        return [_plain(inner) for inner in v]
    return None if isinstance(v, float) and not math.isfinite(v) else v


def _figure(v: float | None) -> str:
    return "-" if v is None else f"{v:.1e}"
