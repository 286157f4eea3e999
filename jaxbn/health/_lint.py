"""What is wrong with how a network is put together: `lint`, from a trace; nothing runs."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import jax

from jaxbn._folding.norms import Norm, norms
from jaxbn._inspection import layers
from jaxbn._inspection.hooks import hooked_nnx
from jaxbn._misuse import check_function
from jaxbn._text import distinct
from jaxbn.health._findings import ERROR, WARNING, Finding, worst_first

SCOPE = "jaxbn_layer_"  # named scope around the call of a Flax layer; a number follows


def lint(fn: Any, *args: Any, train: bool | None = None) -> list[Finding]:
    """What is wrong with how a network uses its batch norms, worst first.

    Use it on a network before it is trained, in train mode, and on what you serve, in eval mode.
    The network is traced and does not run; nothing changes. Any library may have written the norms.
    docs/health.md explains each finding.

    Args:
      fn: a function of arrays with its weights closed over, or an nnx model. It may return updated
        statistics and gradients too.
      *args: a batch, as arrays or as their shapes and dtypes (`jax.ShapeDtypeStruct`). Rows are on
        axis 0 of the first array. An nnx model may be among them; it is not changed.
      train: what fn is for: True for a training step, False for serving. None: modes are not
        judged.

    Returns:
      A list of `Finding`; empty if nothing is wrong. `layer` is the path as in `layers.find` for
      Flax's and this library's modules, the named scope or "norm 0", "norm 1", … for others.
      Norms inside `lax.scan` and `shard_map` are not seen.

    Raises:
      TypeError: fn is neither of the two.
      ValueError: there is no array, no batch norm, or fn does not take a longer batch.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbn
    >>> net = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=False)])
    >>> x = jnp.ones((8, 2))
    >>> variables = net.init(jax.random.key(0), x)
    >>> def fn(x):
    ...     return net.apply(variables, x, mutable=["batch_stats"])
    >>> (finding,) = jaxbn.health.lint(fn, x, train=True)
    >>> finding.layer, finding.kind, finding.figure
    ('layers_1', 'lost_bias', 3.0)
    """
    write = "health.lint(lambda x: net.apply(variables, x), x)"
    expected = "a function with its weights closed over, or an nnx model"
    check_function("lint", fn, write, expected)
    models = [v for v in (fn, *args) if layers.is_nnx(v)]
    data = [v for v in args if not layers.is_nnx(v)]
    if not jax.tree.leaves(data):
        raise ValueError(
            "lint: no arrays, expected a batch to trace fn with; write health.lint(fn, x)."
        )
    paths: list[str] = []
    split = _split(models)

    def traced(*data: Any) -> Any:
        copies, arrays = iter(_merged(split)), iter(data)
        call = next(copies) if layers.is_nnx(fn) else fn
        given = [next(copies) if layers.is_nnx(v) else next(arrays) for v in args]
        with _named_layers([call, *given], paths):
            return call(*given)

    found = norms(traced, [jax.tree.map(_shaped, v) for v in data])
    if found is None:
        raise ValueError(
            "lint: fn computes something else for a longer batch, so rows cannot be told from "
            "channels; expected a function that takes any number of rows, the first axis of its "
            "first array."
        )
    if not found:
        raise ValueError(
            "lint: fn has no batch norm, expected a network with at least one outside of lax.scan "
            "and shard_map; unroll the loop, or lint the function inside."
        )
    findings: dict[Any, Finding] = {}
    for layer, norm in zip(_names(found, paths), found, strict=True):
        for finding in _of_norm(layer, norm, train):
            findings.setdefault((layer, finding.kind), finding)
    return worst_first(list(findings.values()))


def _of_norm(layer: str, norm: Norm, train: bool | None) -> Iterator[Finding]:
    def found(kind: str, severity: str, figure: float, threshold: float, remedy: str) -> Finding:
        return Finding(layer, kind, severity, float(figure), float(threshold), (), remedy)

    if norm.train and train is False:
        remedy = "train=False, use_running_average=True (linen), or model.eval() (nnx)"
        yield found("train_in_inference", ERROR, 1, 0, remedy)
    if not norm.train and train is True:
        remedy = (
            "train=True, use_running_average=False (linen), or model.train() (nnx); unless the "
            "layer is frozen on purpose"
        )
        yield found("eval_in_training", WARNING, 0, 1, remedy)
    if norm.train and norm.values == 1:
        remedy = (
            "y is bias whatever x is: a larger batch, axis_name= to pool over devices, or "
            'jaxbn.swap(to="group")'
        )
        yield found("one_value", ERROR, 1, 2, remedy)
    if norm.dead:
        remedy = (
            "take the factor 0 away; where two parameters in a row start at 0 (scale_init=zeros "
            "and a gate), start one of them at 1, or neither learns"
        )
        yield found("multiplied_by_zero", WARNING, norm.features, 0, remedy)
    if norm.train and norm.keep is not None:
        remedy = (
            "dropout after the last norm; or after training jaxbn.recalibrate(apply, variables, "
            "batches) with dropout off"
        )
        yield found("dropout_before_norm", WARNING, 1 / norm.keep, 1, remedy)
    if norm.integers:
        remedy = "x.astype(jnp.float32) where the data comes in, before arithmetic"
        yield found("late_cast", WARNING, norm.integers, 0, remedy)
    if norm.bias:
        remedy = "use_bias=False before the norm: the mean takes the bias away"
        yield found("lost_bias", WARNING, norm.bias, 0, remedy)
    if norm.relu:
        yield found("relu_before_norm", WARNING, 0.5, 0, "the norm first, then relu")


def _names(found: list[Norm], paths: list[str]) -> list[str]:
    """A name for each norm. A Flax layer that is called twice has one name."""
    numbers = [re.findall(rf"{SCOPE}(\d+)", norm.path) for norm in found]
    others = (norm.path or f"norm {i}" for i, norm in enumerate(found) if not numbers[i])
    names = iter(distinct(others))
    return [paths[int(number[-1])] if number else next(names) for number in numbers]


@contextmanager
def _named_layers(models: list[Any], paths: list[str]) -> Iterator[None]:
    """A context in which each call of a Flax batch norm has a named scope: its path's number."""

    def scope(path: str) -> Any:
        if path not in paths:
            paths.append(path)
        return jax.named_scope(f"{SCOPE}{paths.index(path)}")

    def call_nnx(call: Any, run: Callable[[bool], jax.Array]) -> tuple[jax.Array, None]:
        with scope(call.path):
            return run(call.train), None

    def call_linen(layer_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        if not isinstance(layer, linen.BatchNorm) or context.method_name != "__call__":
            return layer_call(*args, **kwargs)
        with scope(layers.join("", *layer.path)):
            return layer_call(*args, **kwargs)

    linen: Any = sys.modules.get(
        "flax.linen"
    )  # if the program has not imported it, no layer is linen's
    with ExitStack() as stack:
        for model in models:
            if layers.is_nnx(model):
                stack.enter_context(hooked_nnx(model, call_nnx))
        if linen is not None:
            stack.enter_context(linen.intercept_methods(call_linen))
        yield


def _split(models: list[Any]) -> list[tuple[Any, Any]]:
    if not models:
        return []
    from flax import nnx

    return [nnx.split(model) for model in models]


def _merged(split: list[tuple[Any, Any]]) -> list[Any]:
    """Copies that may be updated where they are made, in a trace."""
    if not split:
        return []
    from flax import nnx

    return [nnx.merge(graphdef, state, copy=True) for graphdef, state in split]


def _shaped(v: Any) -> jax.ShapeDtypeStruct:
    if not isinstance(v, jax.ShapeDtypeStruct):
        v = jax.numpy.asarray(v)
    return jax.ShapeDtypeStruct(v.shape, v.dtype)
