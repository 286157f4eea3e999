"""What the batch norm layers of a training run see and learn.

A jitted step returns a `Record` for each layer, O(C) numbers, as an auxiliary result. On the host,
`metrics` turns each record into a few figures, which `jaxbn.writers` write.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import add
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey

from jaxbn._inspection import hooks
from jaxbn._inspection.layers import find, is_nnx, join, nnx_layers, plain
from jaxbn._inspection.sketch import mixed, quantiles
from jaxbn._misuse import check_by_path
from jaxbn._op.axes import wide
from jaxbn._op.pooling import merge
from jaxbn._op.state import Moments, Params, State
from jaxbn.health._distances import distance, seen_in, values_of
from jaxbn.health._findings import Limits
from jaxbn.health._shards import Shards, bounds, by_shard, spread

EPSILON = 1e-5  # Flax's


class Record(NamedTuple):
    """What one batch norm layer saw and learned in a step; arrays [C], or [layers, C] of a scan.

    >>> from jaxbn import watch
    >>> watch.Record._fields
    ('batch', 'state', 'params', 'grads', 'shards', 'kernel', 'quantiles')
    """

    batch: Moments  # of the layer's input, pooled over devices as the layer pools
    state: State
    params: Params
    grads: Params  # dscale and dbias; None for one that is not known
    shards: Shards | None = None  # of the layer's input, if the step is watched with `shards=`
    kernel: "Kernel | None" = None  # before the layer, if `records` gets `kernels=`
    quantiles: jax.Array | None = None  # of the layer's input, if watched with `histogram=`


class Kernel(NamedTuple):
    """How large the kernel before a layer is, or all of several kernels, and the gradient.

    >>> from jaxbn import watch
    >>> watch.Kernel._fields
    ('norm', 'grad_norm')
    """

    norm: jax.Array  # [], Euclidean
    grad_norm: jax.Array  # []


class Observed(NamedTuple):
    """What one layer saw in a step that is watched with options; without, `Moments` alone.

    >>> from jaxbn import watch
    >>> watch.Observed._fields
    ('batch', 'shards', 'quantiles')
    """

    batch: Moments
    shards: Shards | None = None  # with `shards=`; of the first call, if a layer is called twice
    quantiles: jax.Array | None = None  # with `histogram=`


@functools.cache  # nnx.jit compiles a step again for a new hook
def _hook(shards: int | tuple[str, ...] | None, histogram: bool) -> hooks.Hook:
    def observe(call: hooks.Call, run: Callable[[bool], jax.Array]) -> tuple[jax.Array, Observed]:
        y, batch = hooks.batch_moments(call, run)
        return y, Observed(
            batch,
            None if shards is None else by_shard(call, shards),
            quantiles(call) if histogram else None,
        )

    return observe


def _observing(call: str, shards: Any, histogram: bool) -> dict[str, Any]:
    """The keywords of `hooked_apply` and `hooked_nnx` for what is to be observed."""
    if shards is None and not histogram:
        return {}
    names = (shards,) if isinstance(shards, str) else shards
    named = isinstance(names, (tuple, list)) and all(isinstance(name, str) for name in names)
    numbered = isinstance(shards, int) and shards > 0
    if shards is not None and not (numbered or (named and shards)):
        raise ValueError(
            f"{call}: shards={shards!r}, expected the number of parts that the rows are split "
            f"into, or the names of mapped axes; write shards=jax.device_count(), or "
            f'shards="data" under shard_map and pmap.'
        )
    hook = _hook(tuple(names) if named else shards, bool(histogram))
    return {"hook": hook, "combine": _both_calls}


def _both_calls(a: Observed, b: Observed) -> Observed:
    """What a layer that is called twice saw.

    The shards stay those of the first call. A second call brings the same rows: as further rows
    they would make chance look smaller than it is.
    """
    quantiles = a.quantiles
    if quantiles is not None and b.quantiles is not None:
        quantiles = mixed([quantiles, b.quantiles], [a.batch.count, b.batch.count])
    return Observed(merge(a.batch, b.batch), a.shards, quantiles)


def linen(
    apply: Callable[..., Any],
    on: bool = True,
    *,
    shards: int | str | Sequence[str] | None = None,
    histogram: bool = False,
) -> Callable[..., tuple[Any, Any]]:
    """A linen model's `apply` that also returns the moments of each layer's input.

    Call it in the jitted training step, and give the moments to `records`. One step serves with
    `on=True` on some steps and `on=False` on others.

    Args:
      apply: `model.apply`, or a function that passes its keywords on to it.
      on: False calls apply itself, which compiles to the program without watching, and returns {}
        for the moments.
      shards: also record what each shard of the batch holds, for `jaxbn.health.shards` and the
        spread in `metrics`. Under jit, the number of consecutive, equal parts of the rows:
        `jax.device_count()`, or `jax.process_count()` to compare hosts. Under shard_map, pmap and
        vmap, the mapped axes of which each device has a part. Rows are on axis 0 of each layer's x.
        Of a layer that is called twice they are those of the first call: each row counts once.
      histogram: also record how the values of each layer's x are distributed: 64 values that are
        equally probable, from a sample of some 4096. The histogram is `x` in `channels`, and in
        TensorBoard.

    Returns:
      A function with apply's arguments that returns `(what apply returns, path → Moments)`; with
      shards or histogram, path → `Observed`.

    Raises:
      TypeError: apply is a model, its variables, or anything else that is not a function.
      ValueError: shards are neither a number above 0 nor axes; or when called with on=True, apply
        passed through no batch norm layer, or the rows do not divide into shards.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from jaxbn import watch
    >>> model = nn.BatchNorm(use_running_average=False)
    >>> variables = model.init(jax.random.key(0), jnp.ones((1, 2)))
    >>> (y, updates), seen = watch.linen(model.apply)(
    ...     variables, jnp.eye(2), mutable=["batch_stats"]
    ... )
    >>> seen[""].mean.tolist()
    [0.5, 0.5]
    """
    hooks.check_apply("watch.linen", apply, "watch.linen(model.apply), or watch.nnx(model) of nnx")
    if not on:
        return lambda *args, **kwargs: (apply(*args, **kwargs), {})
    hooked = hooks.hooked_apply(apply, **_observing("watch.linen", shards, histogram))

    def watched(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        out, seen = hooked(*args, **kwargs)
        if not seen:
            raise ValueError(
                "watch.linen: apply passed through no batch norm layer, expected flax.linen."
                "BatchNorm or jaxbn.linen.BatchNorm in the model; write watch.linen(model.apply, "
                "on=False) for a model without them."
            )
        return out, seen

    return watched


@contextmanager
def nnx(
    model: Any,
    on: bool = True,
    *,
    shards: int | str | Sequence[str] | None = None,
    histogram: bool = False,
) -> Iterator[dict[str, Any]]:
    """A context for calls of an nnx model that collects the moments of each layer's input.

    Open it in the jitted training step, around `nnx.value_and_grad`, and give the moments to
    `records`.

    Args:
      model: an nnx model, which is called as usual.
      on: False does nothing and leaves the dict empty.
      shards: as in `linen`.
      histogram: as in `linen`.

    Yields:
      A dict that is filled when the context ends: path → `Moments`; with shards or histogram,
      path → `Observed`.

    Raises:
      TypeError: model is not an nnx model.
      ValueError: with on=True, the model has no batch norm layer, or none was called; or shards
        are wrong as in `linen`.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from jaxbn import watch
    >>> model = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    >>> with watch.nnx(model) as seen:
    ...     y = model(jnp.array([[1.0, 3.0], [5.0, 3.0]]))
    >>> watch.records(seen, model)[""].batch.var.tolist()
    [4.0, 0.0]
    """
    if not is_nnx(model):
        raise TypeError(
            f"watch.nnx: called with {type(model).__name__}, expected an nnx model; write with "
            f"watch.nnx(model) as seen: y = model(x), or watch.linen(model.apply) of linen."
        )
    if not on:
        yield {}
        return
    if not list(nnx_layers(model)):
        raise ValueError(
            f"watch.nnx: {type(model).__name__} has no batch norm layer, expected flax.nnx."
            f"BatchNorm or jaxbn.nnx.BatchNorm in the model; write watch.nnx(model, on=False) for "
            f"a model without them."
        )
    with hooks.hooked_nnx(model, **_observing("watch.nnx", shards, histogram)) as seen:
        yield seen
    if not seen:
        raise ValueError(
            f"watch.nnx: no batch norm layer of {type(model).__name__} was called, expected a "
            f"call of the model; write with watch.nnx(model) as seen: y = model(x)."
        )


def kernels(model: Any, *args: Any, **kwargs: Any) -> dict[str, str | tuple[str, ...]]:
    """The kernel before each batch norm layer: path of the layer → path of the kernel.

    Use it once before the training loop, and give the result to `records`, for `kernel_grad_norm`
    and `effective_rate` in `metrics`. The model is traced and does not run.

    Args:
      model: linen's `model.apply`, or an nnx model.
      *args: of a call of the model: for linen, variables and a batch; for nnx, a batch.
      **kwargs: of the call, `mutable=["batch_stats"]` say.

    Returns:
      Path → path, for the layers whose x is the result of one convolution or dense layer, with or
      without a bias. A layer after an activation or a sum is left out. Of a layer in `nn.scan` or
      `nn.vmap` the kernel is the stack of all kernels, and so are the norms. A layer that is called
      several times, after different kernels, has a tuple of their paths, in the order of the calls;
      the norms are then those of all these kernels together.

    Raises:
      TypeError: model is neither of the two, or the arguments of the call are missing.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from jaxbn import watch
    >>> model = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=False)])
    >>> variables = model.init(jax.random.key(0), jnp.eye(2))
    >>> watch.kernels(model.apply, variables, jnp.eye(2), mutable=["batch_stats"])
    {'layers_1': 'layers_0/kernel'}
    """
    from jaxbn._folding.program import trace  # slow to import

    if is_nnx(model):
        from flax import nnx

        graphdef, tree = nnx.split(model)

        def inputs(tree: Any) -> dict[str, Any]:
            with hooks.hooked_nnx(copy := nnx.merge(graphdef, tree), _input, add) as seen:
                copy(*args, **kwargs)
            return dict(seen)
    else:
        hooks.check_apply("watch.kernels", model, "watch.kernels(model.apply, variables, x)")
        if not args:
            raise TypeError(
                "watch.kernels: called with apply alone, expected the arguments of a call of the "
                "model; write watch.kernels(model.apply, variables, x)."
            )
        (tree, *batch), hooked = args, hooks.hooked_apply(model, _input, add)

        def inputs(tree: Any) -> dict[str, Any]:
            return hooked(tree, *batch, **kwargs)[1]

    program = trace(inputs, [tree], lambda _: True, one_turn=True)
    paths = dict(zip(program.inputs, _leaves(tree), strict=True))
    made = {i: op for op in program.ops for i in op.outputs}
    inputs_of = jax.tree.unflatten(program.tree, program.outputs)
    before = {
        layer: tuple(dict.fromkeys(filter(None, (_kernel_of(x, made, paths) for x in of_calls))))
        for layer, of_calls in inputs_of.items()
    }
    return {layer: of if len(of) > 1 else of[0] for layer, of in before.items() if of}


def _input(call: hooks.Call, run: Callable[[bool], jax.Array]) -> tuple[jax.Array, Any]:
    return run(call.train), (call.x,)


def _kernel_of(x: int, made: Mapping[int, Any], paths: Mapping[int, str]) -> str | None:
    """The path of the kernel that x is the result of; None if x is something else."""
    from jaxbn._folding.chains import CONTRACTIONS, LAYOUT

    op = made.get(x)
    if op is None:
        return None
    if op.name in LAYOUT:
        return _kernel_of(op.inputs[0], made, paths)

    def leaf(i: int) -> str | None:
        while i in made and made[i].name in LAYOUT:
            i = made[i].inputs[0]
        return paths.get(i)

    if op.name == "add":  # of a bias; any other sum is not the result of one kernel
        terms = [i for i in op.inputs if leaf(i) is None]
        return _kernel_of(terms[0], made, paths) if len(terms) == 1 else None
    if op.name not in CONTRACTIONS:
        return None
    found = next(filter(None, map(leaf, op.inputs[::-1])), None)
    return found and found.removeprefix("params/")


def _leaves(tree: Any) -> dict[str, Any]:
    """Path → leaf, in JAX's order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(plain(tree))
    # The attribute of one of Flax's boxes is not part of the path.
    keys = ([k for k in path if not isinstance(k, GetAttrKey)] for path, _ in leaves)
    named = (join("", *(getattr(k, "key", getattr(k, "idx", k)) for k in path)) for path in keys)
    return dict(zip(named, (leaf for _, leaf in leaves), strict=True))


def records(
    seen: Mapping[str, Moments | Observed],
    variables: Any,
    grads: Any = None,
    *,
    kernels: Mapping[str, str | tuple[str, ...]] | None = None,
) -> dict[str, Record]:
    """The `Record` of every layer that saw a batch: path → `Record`.

    Call it at the end of the jitted training step, and return the result beside the loss.

    Args:
      seen: path → `Moments` or `Observed`, from `linen` or `nnx`. With `jaxbn.batch_norm`, make
        the dict yourself from `jaxbn.moments(x)`.
      variables: linen's `{"params": …, "batch_stats": …}`, or the nnx model.
      grads: gradients of the loss, in the structure of the parameters; None leaves them out.
      kernels: path of a layer → path of the kernel before it, from `jaxbn.watch.kernels`, for the
        norms of the kernel and of its gradient; None leaves them out.

    Returns:
      Path → `Record`, for the paths in seen; {} if seen is empty.

    Raises:
      TypeError: seen is not a dict, path → `Moments`.
      ValueError: variables hold no running statistics for a layer in seen; or kernels came without
        grads, or name a kernel that the parameters do not have.

    >>> import jax.numpy as jnp, jaxbn
    >>> from jaxbn import watch
    >>> params, state = jaxbn.init(2)
    >>> seen = {"bn": jaxbn.moments(jnp.eye(2))}
    >>> variables = {"params": {"bn": params}, "batch_stats": {"bn": state}}
    >>> recorded = watch.records(seen, variables, grads={"bn": params})
    >>> recorded["bn"].grads.scale.tolist()
    [1.0, 1.0]
    """
    write = "watch.records(seen, variables, grads)"
    check_by_path("watch.records", seen, (Moments, Observed), write, "watch.linen")
    found = find(variables)
    if missing := sorted(set(seen) - set(found)):
        raise ValueError(
            f"watch.records: no running statistics in variables for the layers {missing} that saw "
            f"the batch; expected the variables of the model that was called; write "
            f'watch.records(seen, {{"params": params, "batch_stats": batch_stats}}, grads), or '
            f"the nnx model in place of the variables."
        )
    stats = variables
    if isinstance(variables, Mapping):
        stats = variables.get("batch_stats", variables)
    slopes = find({"params": {} if grads is None else grads, "batch_stats": stats})
    observed = {path: v if isinstance(v, Observed) else Observed(v) for path, v in seen.items()}
    norms = {} if not seen or kernels is None else _kernel_norms(kernels, variables, grads)
    return {
        path: Record(
            batch=of.batch,
            state=found[path].state,
            params=found[path].params,
            grads=slopes[path].params,
            shards=of.shards,
            kernel=norms.get(path),
            quantiles=of.quantiles,
        )
        for path, of in observed.items()
    }


def _kernel_norms(
    kernels: Mapping[str, str | tuple[str, ...]], variables: Any, grads: Any
) -> dict[str, Kernel]:
    """Path of a layer → the norms of the kernels before the layer, and of their gradients."""
    before = {layer: (of,) if isinstance(of, str) else of for layer, of in kernels.items()}
    weights = variables.get("params", {}) if isinstance(variables, Mapping) else variables
    weights, slopes = _leaves(weights), _leaves(grads)
    if missing := sorted(
        {k for of in before.values() for k in of} - (weights.keys() & slopes.keys())
    ):
        raise ValueError(
            f"watch.records: variables or grads have no {missing}, expected the parameters of the "
            f"model that watch.kernels was called for, and their gradients; write "
            f"watch.records(seen, variables, grads, kernels=kernels)."
        )

    def norm(arrays: Mapping[str, jax.Array], of: tuple[str, ...]) -> jax.Array:
        squares = (jnp.abs(arrays[k].astype(wide(arrays[k].dtype))) ** 2 for k in of)
        return jnp.sqrt(sum(square.sum() for square in squares))

    return {layer: Kernel(norm(weights, of), norm(slopes, of)) for layer, of in before.items()}


Channels = dict[str, np.ndarray]


def channels(record: Record) -> Channels:
    """The arrays of a record as flat NumPy arrays of float64 or complex128, by name.

    `jaxbn.writers` get them for histograms. Use it for figures of your own.

    Args:
      record: with arrays [C], or [layers, C] of a scanned layer.

    Returns:
      Name → [C] or [layers · C], without the arrays that are None. Of a layer with domains, batch
      and running statistics are those of the domains in this batch. `x` has [64], values of the
      layer's input that are equally probable, if the step was watched with `histogram=True`.

    >>> import jax.numpy as jnp, jaxbn
    >>> from jaxbn import watch
    >>> params, state = jaxbn.init(2)
    >>> record = watch.Record(jaxbn.moments(jnp.eye(2)), state, params, jaxbn.Params(None, None))
    >>> list(watch.channels(record))
    ['batch_mean', 'batch_var', 'running_mean', 'running_var', 'scale', 'bias']
    """
    arrays = {
        "batch_mean": record.batch.mean,
        "batch_var": record.batch.var,
        "running_mean": record.state.mean,
        "running_var": record.state.var,
        "scale": record.params.scale,
        "bias": record.params.bias,
        "dscale": record.grads.scale,
        "dbias": record.grads.bias,
        "x": record.quantiles,
    }
    flat = {
        name: np.asarray(v, complex if np.iscomplexobj(v) else float).reshape(-1)
        for name, v in arrays.items()
        if v is not None
    }
    seen = seen_in(record.batch).reshape(-1)
    if np.shape(record.batch.count) == np.shape(record.batch.mean) and seen.any():
        flat |= {name: flat[name][seen] for name in _BOTH if name in flat}
    return flat


def metrics(records: Mapping[str, Record]) -> dict[str, dict[str, float]]:
    """The figures of each layer: path → name → figure, for the names in `METRICS`.

    Use it to log a training run with a logger of your own. The figures are computed on the host in
    float64. Where a variance divides, 1e-5 (Flax's default epsilon) is added, so that a constant
    channel gives a large figure and not NaN. The symmetric KL divergence is that of
    `jaxbn.health.distance`, in nats. A scanned layer has one figure for all its [layers, C].

    Args:
      records: path → `Record`, from `records`.

    Returns:
      Path → name → float. Figures whose arrays a record does not have are left out; values that
      are NaN or infinite stay in.

    Raises:
      TypeError: records is not a dict, path → `Record`.

    >>> import jax.numpy as jnp, jaxbn
    >>> from jaxbn import watch
    >>> params, state = jaxbn.init(2)
    >>> seen = {"bn": jaxbn.moments(2.0 + 4 * jnp.eye(2))}
    >>> variables = {"params": {"bn": params}, "batch_stats": {"bn": state}}
    >>> figures = watch.metrics(watch.records(seen, variables))["bn"]
    >>> figures["batch_var_min"], round(figures["mean_over_sd_max"], 3)
    (4.0, 2.0)
    """
    check_by_path("watch.metrics", records, (Record,), "watch.metrics(records)", "watch.records")
    with np.errstate(all="ignore"):  # figures show overflows and NaNs
        return {path: _figures(record) for path, record in jax.device_get(dict(records)).items()}


def _figures(record: Record) -> dict[str, float]:
    arrays: dict[str, Any] = {**channels(record)}
    arrays["count"] = np.asarray(values_of(record.batch))
    if record.shards is not None:
        arrays["shards"] = record.shards
    if record.kernel is not None:
        arrays["kernel"] = record.kernel
    return {
        name: float(metric.of(*(arrays[need] for need in metric.needs)))
        for name, metric in METRICS.items()
        if arrays.keys() >= set(metric.needs)
    }


class Metric(NamedTuple):
    """How one figure is computed from the arrays of a record.

    >>> from jaxbn import watch
    >>> watch.METRICS["scale_abs_min"].help
    'Smallest |scale|.'
    """

    help: str
    needs: tuple[
        str, ...
    ]  # the names of the arrays, as in `channels`; or "count", "shards", "kernel"
    of: Callable[..., Any]  # of these arrays


def _mean_over_sd(mean: np.ndarray, var: np.ndarray) -> np.ndarray:
    return np.abs(mean) / np.sqrt(var + EPSILON)


def _symmetric_kl(mean: Any, var: Any, running_mean: Any, running_var: Any) -> np.ndarray:
    running, batch = State(running_mean, running_var, None), Moments(mean.size, mean, var)
    return distance(running, batch, EPSILON).divergence


_BATCH = ("batch_mean", "batch_var")
_BOTH = (*_BATCH, "running_mean", "running_var")

METRICS = {
    "batch_count": Metric("Values per channel behind the batch's moments.", ("count",), np.min),
    "mean_over_sd_max": Metric(
        "Largest |mean| / sd of the batch over channels.",
        _BATCH,
        lambda *v: _mean_over_sd(*v).max(),
    ),
    "batch_var_min": Metric("Smallest variance of the batch.", ("batch_var",), np.min),
    "batch_var_max": Metric("Largest variance of the batch.", ("batch_var",), np.max),
    "running_var_min": Metric("Smallest running variance.", ("running_var",), np.min),
    "running_var_max": Metric("Largest running variance.", ("running_var",), np.max),
    "symmetric_kl_max": Metric(
        "Largest symmetric KL divergence of running statistics and batch, nats.",
        _BOTH,
        lambda *v: _symmetric_kl(*v).max(),
    ),
    "symmetric_kl_mean": Metric(
        "Mean symmetric KL divergence of running statistics and batch, nats.",
        _BOTH,
        lambda *v: _symmetric_kl(*v).mean(),
    ),
    "scale_abs_min": Metric("Smallest |scale|.", ("scale",), lambda v: np.abs(v).min()),
    "scale_abs_max": Metric("Largest |scale|.", ("scale",), lambda v: np.abs(v).max()),
    "bias_abs_max": Metric("Largest |bias|.", ("bias",), lambda v: np.abs(v).max()),
    "dscale_norm": Metric("Euclidean norm of the gradient of scale.", ("dscale",), np.linalg.norm),
    "dbias_norm": Metric("Euclidean norm of the gradient of bias.", ("dbias",), np.linalg.norm),
    "nonfinite": Metric(
        "Moments and running statistics that are NaN or infinite.",
        _BOTH,
        lambda *v: sum(np.count_nonzero(~np.isfinite(part)) for part in v),
    ),
    "shard_mean_spread": Metric(
        "RMS distance of the shards' means over what chance gives.",
        ("shards",),
        lambda shards: spread(shards.mean),
    ),
    "shard_sd_spread": Metric(
        "RMS distance of the shards' sds over what chance gives.",
        ("shards",),
        lambda shards: spread(shards.sd),
    ),
    "shard_spread_limit": Metric(
        "Spread above which shards are skewed.",
        ("shards",),
        lambda shards: bounds(shards, Limits().shards)[1],
    ),
    "kernel_grad_norm": Metric(
        "Euclidean norm of the gradient of the kernel before the layer.",
        ("kernel",),
        lambda kernel: kernel.grad_norm,
    ),
    "effective_rate": Metric(
        "Norm of the gradient of the kernel before the layer over the norm of the kernel.",
        ("kernel",),
        lambda kernel: kernel.grad_norm / kernel.norm,
    ),
}
