"""What a step records of each layer: the batch, its statistics, parameters and gradients."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbn._inspection.layers import find
from jaxbn._misuse import check_by_path
from jaxbn._op.axes import wide
from jaxbn._op.state import Moments, Params, State
from jaxbn.health._shards import Shards
from jaxbn.watch._kernels import leaves
from jaxbn.watch._observe import Observed


class Kernel(NamedTuple):
    """How large the kernel before a layer is, or all of several kernels, and the gradient.

    >>> from jaxbn import watch
    >>> watch.Kernel._fields
    ('norm', 'grad_norm')
    """

    norm: jax.Array  # [], Euclidean
    grad_norm: jax.Array  # []


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
    kernel: Kernel | None = None  # before the layer, if `records` gets `kernels=`
    quantiles: jax.Array | None = None  # of the layer's input, if watched with `histogram=`


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
      grads: gradients of the loss, in the structure of the parameters, or of linen's variables;
        None leaves them out.
      kernels: path of a layer → path of the kernel before it, from `jaxbn.watch.kernels`, for the
        norms of the kernel and of its gradient; None leaves them out.

    Returns:
      Path → `Record`, for the paths in seen; {} if seen is empty.

    Raises:
      TypeError: seen is not a dict, path → `Moments`; or kernels are not a dict of paths.
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
    if kernels is not None:
        given = "watch.records(seen, variables, grads, kernels=kernels)"
        check_by_path("watch.records", kernels, (str, tuple, list), given, "watch.kernels")
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
    grads = _of_params(grads, variables)
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


def _of_params(grads: Any, variables: Any) -> Any:
    """The gradients of the parameters, if these are the gradients of linen's variables."""
    both = isinstance(grads, Mapping) and isinstance(variables, Mapping)
    if both and "params" in grads and "params" not in variables.get("params", ()):
        return grads["params"]
    return grads


def _kernel_norms(
    kernels: Mapping[str, str | tuple[str, ...]], variables: Any, grads: Any
) -> dict[str, Kernel]:
    """Path of a layer → the norms of the kernels before the layer, and of their gradients."""
    before = {layer: (of,) if isinstance(of, str) else of for layer, of in kernels.items()}
    weights = variables.get("params", {}) if isinstance(variables, Mapping) else variables
    weights, slopes = leaves(weights), leaves(grads)
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
