"""One batch goes through a model of any kind; the moments that each layer sees come out."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbn._inspection import layers
from jaxbn._inspection.hooks import Call, Hook, batch_moments, hooked_apply, hooked_nnx
from jaxbn._op.axes import wide
from jaxbn._op.state import Moments, State


class Observed(NamedTuple):
    """What one layer saw of a batch."""

    moments: Moments  # stacked as the layer's statistics are, if the layer was scanned
    unbiased: jax.Array  # [] bool: whether the layer multiplies its running var by n / (n - 1)


Observe = Callable[[Any, Any], dict[str, Observed]]


def observer(
    call: str, apply: Callable[..., Any], model: Any, paths: tuple[str, ...]
) -> tuple[Observe, Any]:
    """A jitted `observe(arrays, batch)` that returns path → `Observed`, and the model's arrays.

    The layers at these paths normalize by the batch, whatever the mode in which apply runs the
    model. Other layers run in the mode that apply says. The model's statistics do not change.
    The same arguments give the same function, so a second call compiles nothing.

    Args:
      call: the public call, for errors.
      apply: `apply(model, batch)`. For a tree of `State`, apply returns the new tree.
      model: linen variables, an nnx model, or a tree with a `State` for each layer.
      paths: the layers to observe, as `layers.find` names them.

    Raises:
      TypeError: apply does not take what linen's apply takes, or returns no tree of states.

    >>> import jax.numpy as jnp, jaxbn
    >>> from jaxbn._inspection.observer import observer
    >>> _, state = jaxbn.init(1)
    >>> def apply(state, x):
    ...     return jaxbn.batch_norm(x, None, state, train=True)[1]
    >>> observe, state = observer("doc", apply, state, ("",))  # "": the whole tree is one layer
    >>> observe(state, jnp.array([[1.0], [3.0]]))[""].moments.mean.tolist()
    [2.0]
    """
    if layers.is_nnx(model):
        from flax import nnx

        graphdef, state = nnx.split(model)
        return _observe_nnx(apply, paths, graphdef), state
    if any(map(_is_state, jax.tree.leaves(model, is_leaf=_is_state))):
        return _observe_functional(call, apply, paths), model
    try:
        inspect.signature(apply).bind(model, None, mutable=[])
    except TypeError:
        raise TypeError(
            f"{call}: apply does not take (variables, batch, mutable=…), expected a function that "
            f"passes mutable= on to linen; write functools.partial(net.apply, train=False), or "
            f"lambda variables, batch, **kwargs: net.apply(variables, batch[0], **kwargs)."
        ) from None
    return _observe_linen(apply, paths), model


# A program that recalibrates every epoch compiles in the first epoch only. The cache is small,
# because each entry keeps a model's function, and with it perhaps its weights, alive.
_kept = functools.lru_cache(maxsize=8)


@_kept
def _observe_linen(apply: Callable[..., Any], paths: tuple[str, ...]) -> Observe:
    hook, unbiased = _hook(paths)
    hooked = hooked_apply(apply, hook)
    return jax.jit(lambda variables, batch: _observed(hooked(variables, batch)[1], unbiased))


@_kept
def _observe_nnx(apply: Callable[..., Any], paths: tuple[str, ...], graphdef: Any) -> Observe:
    from flax import nnx

    hook, unbiased = _hook(paths)

    def observe(state: Any, batch: Any) -> dict[str, Observed]:
        model = nnx.merge(graphdef, state)  # a copy, whose updates are dropped
        with hooked_nnx(model, hook) as seen:
            apply(model, batch)
        return _observed(seen, unbiased)

    return jax.jit(observe)


@_kept
def _observe_functional(call: str, apply: Callable[..., Any], paths: tuple[str, ...]) -> Observe:
    def observe(tree: Any, batch: Any) -> dict[str, Observed]:
        nodes, treedef = jax.tree.flatten(tree, is_leaf=_is_state)
        # `find` keeps a tree's order, and JAX sorts keys. The tree is put together again from the
        # sorted nodes, so that paths and nodes come in one order.
        names = iter(layers.find(jax.tree.unflatten(treedef, nodes)))
        places = [i for i, node in enumerate(nodes) if _is_state(node)]
        where = {path: i for path, i in zip(names, places, strict=True) if path in paths}
        for i in where.values():
            nodes[i] = _nothing_yet(nodes[i])
        out = apply(jax.tree.unflatten(treedef, nodes), batch)
        found: Any
        same: Any
        found, same = jax.tree.flatten(out, is_leaf=lambda v: isinstance(v, (State, Moments)))
        if same != treedef or not all(isinstance(found[i], Moments) for i in where.values()):
            raise TypeError(
                f"{call}: apply(states, batch) returned {same}, expected the tree of states as "
                f"training returns it, {treedef}; write "
                f"lambda states, batch: forward(params, states, batch, train=True)[1]."
            )
        return {path: Observed(found[i], jnp.asarray(False)) for path, i in where.items()}

    return jax.jit(observe)


def _hook(paths: tuple[str, ...]) -> tuple[Hook, dict[str, bool]]:
    """The hook, and path → whether the layer is `unbiased`, known once the model was traced."""
    unbiased: dict[str, bool] = {}

    def hook(call: Call, run: Callable[..., jax.Array]) -> tuple[jax.Array, Any]:
        if call.path not in paths:
            return run(call.train), None
        # By the batch alone: renormalization would draw y to the old statistics.
        drawn = call.renorm is not None or getattr(call.layer, "renorm", None) is not None
        plain = {"renorm": (1.0, 0.0)} if drawn else {}
        if not call.update_stats:  # the layer learns nothing from this call, and so do we
            return run(True, **plain), None
        unbiased[call.path] = getattr(call.layer, "unbiased", False)
        return batch_moments(call, lambda _: run(True, **plain))

    return hook, unbiased


def _observed(seen: dict[str, Moments], unbiased: dict[str, bool]) -> dict[str, Observed]:
    return {path: Observed(of_x, jnp.asarray(unbiased[path])) for path, of_x in seen.items()}


def _is_state(v: Any) -> bool:
    return isinstance(v, State)


def _nothing_yet(state: State) -> Moments:
    """The moments of no values, which `batch_norm` merges the batch's moments into."""
    mean, var = (jnp.zeros(jnp.shape(v), wide(v.dtype)) for v in (state.mean, state.var))
    return Moments(jnp.zeros((), jnp.float32), mean, var)
