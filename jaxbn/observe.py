"""One batch through a model of any kind, normalized by its own moments: those, layer by layer."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbn import layers
from jaxbn.axes import wide
from jaxbn.calls import Call, batch_moments, hooked_apply, hooked_nnx
from jaxbn.moments import merge
from jaxbn.state import Moments, State


class Record(NamedTuple):
    """What one layer shows of a batch."""

    moments: Moments  # leaves [layers, …] where the layer was scanned
    unbiased: jax.Array  # [] bool: whether the layer's running var takes n / (n - 1)


Observe = Callable[[Any, Any], dict[str, Record]]


def observer(
    call: str, apply: Callable[..., Any], model: Any, paths: tuple[str, ...]
) -> tuple[Observe, Any]:
    """`observe(arrays, batch)` → path → `Record`, jitted, and the arrays of the model.

    The layers at these paths normalize by the batch, in whatever mode apply runs the model; the
    others run as it says. The model learns nothing. For one apply it is one function, compiled
    once.

    Args:
      call: whose errors these are.
      apply: `apply(model, batch)`; of a tree of `State` it returns the new tree.
      model: linen variables, an nnx model, or a tree with a `State` for each layer.
      paths: as in `layers.find`.

    Raises:
      TypeError: apply does not take what linen's apply takes, or returns no tree of states.

    >>> import jax.numpy as jnp, jaxbn
    >>> from jaxbn.observe import observer
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
        return _nnx(apply, paths, graphdef), state
    if any(map(_is_state, jax.tree.leaves(model, is_leaf=_is_state))):
        return _functional(call, apply, paths), model
    try:
        inspect.signature(apply).bind(model, None, mutable=[])
    except TypeError:
        raise TypeError(
            f"{call}: apply does not take (variables, batch, mutable=…), by which running "
            f"statistics are reached; write functools.partial(net.apply, train=False), or "
            f"lambda variables, batch, **kwargs: net.apply(variables, batch[0], **kwargs)."
        ) from None
    return _linen(apply, paths), model


# The last few are kept: a call an epoch compiles in the first one alone.
_kept = functools.lru_cache(maxsize=8)


@_kept
def _linen(apply: Callable[..., Any], paths: tuple[str, ...]) -> Observe:
    hooked = hooked_apply(apply, _hook(paths), _combine)
    return jax.jit(lambda variables, batch: hooked(variables, batch)[1])


@_kept
def _nnx(apply: Callable[..., Any], paths: tuple[str, ...], graphdef: Any) -> Observe:
    from flax import nnx

    hook = _hook(paths)

    def observe(state: Any, batch: Any) -> dict[str, Record]:
        model = nnx.merge(graphdef, state)  # a copy: what it learns here is thrown away
        with hooked_nnx(model, hook, _combine) as seen:
            apply(model, batch)
        return seen

    return jax.jit(observe)


@_kept
def _functional(call: str, apply: Callable[..., Any], paths: tuple[str, ...]) -> Observe:
    def observe(tree: Any, batch: Any) -> dict[str, Record]:
        nodes, treedef = jax.tree.flatten(tree, is_leaf=_is_state)
        # The paths of a tree that JAX has sorted as it sorted the nodes.
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
        return {path: Record(found[i], jnp.asarray(False)) for path, i in where.items()}

    return jax.jit(observe)


def _hook(paths: tuple[str, ...]) -> Callable[..., tuple[jax.Array, Any]]:
    def hook(call: Call, run: Callable[[bool], jax.Array]) -> tuple[jax.Array, Any]:
        if call.path not in paths:
            return run(call.train), None
        y, moments = batch_moments(call, lambda _: run(True))
        return y, Record(moments, jnp.asarray(getattr(call.layer, "unbiased", False)))

    return hook


def _combine(a: Record, b: Record) -> Record:
    return Record(merge(a.moments, b.moments), b.unbiased)


def _is_state(v: Any) -> bool:
    return isinstance(v, State)


def _nothing_yet(state: State) -> Moments:
    mean, var = (jnp.zeros(jnp.shape(v), wide(v.dtype)) for v in (state.mean, state.var))
    return Moments(jnp.zeros((), jnp.float32), mean, var)
