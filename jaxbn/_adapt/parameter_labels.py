"""Labels and masks that tell optax which parameters belong to norms."""

from typing import Any

import jax

from jaxbn._inspection.layers import join
from jaxbn._inspection.selection import Where, check_where, selects
from jaxbn._text import listed


def labels(params: Any, frozen: Where = ()) -> Any:
    """The tree with a label in place of each parameter: "scale", "bias", "frozen" or "rest".

    Use it to give the scales and biases of norms an optimizer of their own, or none. A layer counts
    as a norm, of any kind, if all it holds are a scale, a bias, or both. Kernels, and biases beside
    kernels, are "rest". The result is the `param_labels` of `optax.multi_transform`; so is the
    function itself::

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
      params: linen's params, `nnx.state(model, nnx.Param)` or what optax makes of it, or a tree
        with `Params`. The leaves are arrays of any shape and dtype.
      frozen: norms whose scale and bias are "frozen" instead: a glob over the paths, several
        globs, or a predicate.

    Returns:
      A tree of the same structure with strings as leaves.

    Raises:
      ValueError: the tree has no norm, or `frozen` selects none.

    >>> import jax.numpy as jnp, jaxbn
    >>> v = jnp.ones(2)
    >>> params = {"dense": {"kernel": v, "bias": v}, "bn": {"scale": v, "bias": v}}
    >>> print(jaxbn.labels(params))
    {'bn': {'bias': 'bias', 'scale': 'scale'}, 'dense': {'bias': 'rest', 'kernel': 'rest'}}
    """
    check_where("labels", "frozen", frozen)
    parameters, treedef = _parameters(params)
    norms = _norms(parameters)
    if not norms:
        raise ValueError(
            f"labels: no norm among {len(parameters)} parameters; expected linen's params, "
            f"nnx.state(model, nnx.Param) or a tree of jaxbn.Params, with a layer that holds a "
            f"scale, or a bias and nothing else."
        )
    still = {path for path in norms if selects(frozen, path)}
    if frozen != () and not still:
        raise ValueError(
            f"labels: frozen={frozen!r} selects none of the norms {listed(sorted(norms))}; "
            f'expected a glob such as "{min(norms)}", several of them, or a function of the path.'
        )

    def label(keys: tuple[str, ...]) -> str:
        path = join("", *keys[:-1])
        if path not in norms:
            return "rest"
        return "frozen" if path in still else keys[-1]

    return jax.tree.unflatten(treedef, map(label, parameters))


def decay_mask(params: Any) -> Any:
    """The tree with False in place of each scale and bias of a norm, and True elsewhere.

    Use it as the mask of weight decay: `optax.adamw(lr, mask=jaxbn.decay_mask)`,
    `optax.add_decayed_weights(5e-4, jaxbn.decay_mask)`. Decay of a kernel before a norm changes
    nothing that the norm does not undo. Decay of the norm's own scale and bias shrinks the result.

    Args:
      params: as in `labels`. A tree without a norm is all True, because optax may pass a part of
        the parameters that has none.

    Returns:
      A tree of the same structure with booleans as leaves.

    >>> import jax.numpy as jnp, jaxbn
    >>> v = jnp.ones(2)
    >>> print(jaxbn.decay_mask({"dense": {"kernel": v}, "bn": {"scale": v}}))
    {'bn': {'scale': False}, 'dense': {'kernel': True}}
    """
    parameters, treedef = _parameters(params)
    norms = _norms(parameters)
    return jax.tree.unflatten(treedef, [join("", *keys[:-1]) not in norms for keys in parameters])


def _parameters(params: Any) -> tuple[list[tuple[str, ...]], Any]:
    """The keys from the root to each parameter, in JAX's order, and the tree's structure."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    return [tuple(name for key in path if (name := _key_name(key))) for path, _ in leaves], treedef


def _norms(parameters: list[tuple[str, ...]]) -> set[str]:
    """The paths of the layers that hold a scale, a bias, or both, and nothing else."""
    held: dict[str, set[str]] = {}
    for keys in parameters:
        held.setdefault(join("", *keys[:-1]), set()).add(keys[-1] if keys else "")
    return {path for path, inside in held.items() if inside <= {"scale", "bias"}}


def _key_name(key: Any) -> str | None:
    """A key of JAX's as `layers.find` writes it; None for the step into an nnx variable."""
    if isinstance(key, jax.tree_util.GetAttrKey):
        return None if key.name == "value" else key.name
    return str(getattr(key, "key", getattr(key, "idx", key)))
