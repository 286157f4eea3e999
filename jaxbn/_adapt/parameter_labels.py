"""Labels and masks that tell optax which parameters are batch norm's."""

from typing import Any

import jax

from jaxbn._inspection.layers import join
from jaxbn._inspection.selection import Where, match
from jaxbn._text import listed


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
        path = join("", *place[:-1])
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
    return jax.tree.unflatten(treedef, [join("", *place[:-1]) not in norms for place in places])


def _places(params: Any) -> tuple[list[tuple[str, ...]], Any]:
    """The path of each parameter, in the tree's order, and how the tree is put together."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    return [tuple(name for key in path if (name := _name(key))) for path, _ in leaves], treedef


def _norms(places: list[tuple[str, ...]]) -> set[str]:
    """Paths of the layers that hold a scale, or a bias and nothing else."""
    held: dict[str, set[str]] = {}
    for place in places:
        held.setdefault(join("", *place[:-1]), set()).add(*place[-1:] or [""])
    return {path for path, names in held.items() if names <= {"scale", "bias"}}


def _name(key: Any) -> str | None:
    """A step of a tree path as `layers.find` writes it; None for that into an nnx variable."""
    if isinstance(key, jax.tree_util.GetAttrKey):  # a pure nnx state has no variables
        return None if key.name == "value" else key.name
    return str(getattr(key, "key", getattr(key, "idx", key)))
