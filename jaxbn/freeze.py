"""Frozen batch norm: statistics that stay, and labels for parameters that optax treats apart."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxbn import layers
from jaxbn.calls import Call, hooked_apply
from jaxbn.selection import Where, listed, match, select
from jaxbn.state import State


def freeze(
    model: Any, variables: Any = None, where: Where = "*", *, allow_untrained: bool = False
) -> Any:
    """The model with layers that normalize by their running statistics, in training too.

    Those layers are then `x * a + b` per channel with a and b constant but for scale and bias:
    no statistics of a batch, no update, whatever mode the model is called in. Scale and bias
    are the optimizer's: see `labels` for how they stay as well.

    Args:
      model: linen's `net.apply`, or an nnx model, which is changed.
      variables: linen's variables, to look at; what `apply` is called with later may differ.
      where: the layers to freeze: a glob over the paths (`"stage1/*"`), several, or a predicate.
      allow_untrained: do not refuse layers whose statistics no batch has ever updated.

    Returns:
      A function to use wherever `net.apply` was; or the nnx model. `unfreeze` undoes the latter.

    Raises:
      TypeError: linen's apply without variables.
      ValueError: no such layer; or some were never updated (count 0 or, where updates are not
        counted, mean 0 and var 1), which would freeze the network at an arbitrary function.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbn
    >>> net = nn.BatchNorm(use_running_average=False)
    >>> variables = net.init(jax.random.key(0), jnp.ones((2, 1)))
    >>> stats = {"mean": jnp.array([1.0]), "var": jnp.array([4.0])}
    >>> apply = jaxbn.freeze(net.apply, variables | {"batch_stats": stats})
    >>> y = apply(variables | {"batch_stats": stats}, jnp.array([[3.0], [5.0]]))
    >>> y.round(3).tolist()
    [[1.0], [2.0]]
    """
    nnx_model = layers.is_nnx(model)
    if not nnx_model and variables is None:
        raise TypeError(
            f"freeze: {type(model).__name__} without variables, expected an nnx model, or linen's "
            f"apply and the variables whose statistics freeze: freeze(net.apply, variables)."
        )
    chosen = select("freeze", model if nnx_model else variables, where)
    if not allow_untrained:
        _check_updated(chosen)
    if nnx_model:
        for path, layer in layers.nnx_layers(model):
            if path in chosen and not _is_frozen(layer):
                cls: Any = type(layer)
                object.__setattr__(layer, "__class__", _frozen_class(cls))
        return model

    def by_running_statistics(
        call: Call, run: Callable[[bool], jax.Array]
    ) -> tuple[jax.Array, None]:
        return run(call.train and call.path not in chosen), None

    hooked = hooked_apply(model, by_running_statistics)

    @functools.wraps(model)
    def apply(*args: Any, **kwargs: Any) -> Any:
        return hooked(*args, **kwargs)[0]

    return apply


def unfreeze(model: Any, where: Where = "*") -> Any:
    """The nnx model with layers that `freeze` froze as they were before.

    Raises:
      TypeError: it is no nnx model; a linen net's own `apply` was never frozen.
      ValueError: no such layer.

    >>> from flax import nnx
    >>> import jaxbn
    >>> model = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    >>> type(jaxbn.freeze(model, allow_untrained=True)).__name__
    'FrozenBatchNorm'
    >>> type(jaxbn.unfreeze(model)).__name__
    'BatchNorm'
    """
    if not layers.is_nnx(model):
        raise TypeError(
            f"unfreeze: {type(model).__name__} is no nnx model; of linen call net.apply again, "
            f"which freeze(net.apply, variables) left as it was."
        )
    chosen = select("unfreeze", model, where)
    for path, layer in layers.nnx_layers(model):
        if path in chosen and _is_frozen(layer):
            object.__setattr__(layer, "__class__", type(layer).__base__)
    return model


def labels(params: Any, frozen: Where = ()) -> Any:
    """The tree with a label for each parameter: "scale", "bias", "frozen" or "rest".

    "scale" and "bias" are those of norms, of any kind: a layer is one that holds a scale, or a
    bias and nothing else. Kernels and the biases beside them are "rest". For
    `optax.multi_transform`, as `param_labels` or as a function of the parameters::

        tx = optax.multi_transform(
            {
                "scale": optax.sgd(lr),
                "bias": optax.sgd(lr),
                "frozen": optax.set_to_zero(),
                "rest": optax.adamw(lr),
            },
            functools.partial(jaxbn.labels, frozen="stem/*"),
        )

    Args:
      params: linen's params, `nnx.state(model, nnx.Param)` or what optax has of it, or a tree
        with `Params`.
      frozen: norms whose scale and bias are "frozen" instead: a glob over the paths, several, or
        a predicate.

    Raises:
      ValueError: no norm in the tree, or none that `frozen` means.

    >>> import jax.numpy as jnp, jaxbn
    >>> v = jnp.ones(2)
    >>> params = {"dense": {"kernel": v, "bias": v}, "bn": {"scale": v, "bias": v}}
    >>> print(jaxbn.labels(params))
    {'bn': {'bias': 'bias', 'scale': 'scale'}, 'dense': {'bias': 'rest', 'kernel': 'rest'}}
    """
    places, treedef = _places(params)
    norms = _norms(places)
    if not norms:
        raise ValueError(
            f"labels: no norm among {len(places)} parameters; expected linen's params, "
            f"nnx.state(model, nnx.Param) or a tree of jaxbn.Params, with a layer that holds a "
            f"scale, or a bias and nothing else."
        )
    still = {path for path in norms if match(frozen, path)}
    if frozen != () and not still:
        raise ValueError(
            f"labels: frozen={frozen!r} means none of the norms {listed(sorted(norms))}; "
            f'expected a glob such as "{min(norms)}", several of them, or a function of the path.'
        )

    def label(place: tuple[str, ...]) -> str:
        path = "/".join(place[:-1])
        if path not in norms:
            return "rest"
        return "frozen" if path in still else place[-1]

    return jax.tree.unflatten(treedef, map(label, places))


def decay_mask(params: Any) -> Any:
    """The tree with True for what weight decay is for: all but the scales and biases of norms.

    A norm undoes what decay does to the kernel before it; nothing undoes what it does to them.
    For `optax.adamw(lr, mask=jaxbn.decay_mask)`, `optax.add_decayed_weights(5e-4, decay_mask)`.

    Args:
      params: as in `labels`; without a norm all is True, as optax shows it the rest of a tree.

    >>> import jax.numpy as jnp, jaxbn
    >>> v = jnp.ones(2)
    >>> print(jaxbn.decay_mask({"dense": {"kernel": v}, "bn": {"scale": v}}))
    {'bn': {'scale': False}, 'dense': {'kernel': True}}
    """
    places, treedef = _places(params)
    norms = _norms(places)
    return jax.tree.unflatten(treedef, ["/".join(place[:-1]) not in norms for place in places])


def _places(params: Any) -> tuple[list[tuple[str, ...]], Any]:
    """The path of each parameter, in the tree's order, and how the tree is put together."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    return [tuple(name for key in path if (name := _name(key))) for path, _ in leaves], treedef


def _norms(places: list[tuple[str, ...]]) -> set[str]:
    """Paths of the layers that hold a scale, or a bias and nothing else."""
    held: dict[str, set[str]] = {}
    for place in places:
        held.setdefault("/".join(place[:-1]), set()).add(*place[-1:] or [""])
    return {path for path, names in held.items() if names <= {"scale", "bias"}}


def _check_updated(chosen: Mapping[str, layers.Layer]) -> None:
    traced = [path for path, layer in chosen.items() if _is_traced(layer.state)]
    if traced:
        raise ValueError(
            f"freeze: the statistics of {listed(traced)} have no values while they are traced, so "
            f"nobody knows whether they were ever updated; freeze outside of jit and eval_shape, "
            f"or write allow_untrained=True."
        )
    if fresh := [path for path, layer in chosen.items() if _never_updated(layer.state)]:
        raise ValueError(
            f"freeze: the statistics of {listed(fresh)} were never updated (mean 0 and var 1, or "
            f"count 0), so the layers would be frozen at no normalization at all. Restore a "
            f"checkpoint with its statistics, train, or jaxbn.recalibrate first; or write "
            f"allow_untrained=True."
        )


def _is_traced(state: State) -> bool:
    return any(isinstance(v, (jax.core.Tracer, jax.ShapeDtypeStruct)) for v in state)


def _never_updated(state: State) -> bool:
    """Of any of the layers, where they are stacked [layers, C]."""
    if state.count is not None and np.any(np.asarray(state.count) == 0):
        return True
    mean, var = np.asarray(state.mean), np.asarray(state.var)
    return bool(np.any(np.all((mean == 0) & (var == 1), axis=-1)))


@functools.lru_cache(maxsize=64)
def _frozen_class(cls: Any) -> Any:
    """The nnx layer's class, called by its running statistics whatever the call says."""

    def __call__(  # noqa: N807
        self: Any, x: jax.Array, use_running_average: bool | None = None, **kwargs: Any
    ) -> jax.Array:
        return cls.__call__(self, x, True, **kwargs)

    body = {"__call__": __call__, "__module__": cls.__module__, "jaxbn_frozen": True}
    return type(f"Frozen{cls.__name__}", (cls,), body)


def _is_frozen(layer: Any) -> bool:
    return getattr(type(layer), "jaxbn_frozen", False)


def _name(key: Any) -> str | None:
    """A step of a tree path as `layers.find` writes it; None for that into an nnx variable."""
    if isinstance(key, jax.tree_util.GetAttrKey):  # a pure nnx state has no variables
        return None if key.name == "value" else key.name
    return str(getattr(key, "key", getattr(key, "idx", key)))
