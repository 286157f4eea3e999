"""What `jax.checkpoint` keeps of a network with batch norms: convolutions and statistics."""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from jaxbn.state import Moments

# The name that `jax.checkpoint_policies` know the statistics by.
MOMENTS = "batch_norm_moments"

_named = jax.checkpoint_policies.save_only_these_names(MOMENTS)


def named(m: Moments) -> Moments:
    """The moments, as a policy is to see them: pooled, with no collective left to repeat."""
    return Moments(*(checkpoint_name(leaf, MOMENTS) for leaf in m))


def checkpoint_policy(prim: Any, *avals: Any, **params: Any) -> bool:
    """Equals True for the outputs of convolutions and dots, and for batch statistics.

    For `jax.checkpoint(block, policy=jaxbn.checkpoint_policy)`, and `policy=` of
    `flax.linen.remat` and `flax.nnx.remat`. All else of the block (normalize, activation,
    residual sum) is computed again in its backward pass, from the convolution's output and O(C)
    numbers; statistics and their collectives are not. Wrap each block of a network and not the
    network: what is computed again lives as long as the backward pass of what is wrapped.

    To keep more or less, combine it: the statistics have the checkpoint name
    "batch_norm_moments", `jax.checkpoint_policies.save_only_these_names` alone keeps no
    convolution. Chen et al. 2016 (arXiv:1604.06174) drop the same layers' outputs.

    Args:
      prim: the primitive of one equation; JAX calls a policy for each.
      *avals: shapes and dtypes of its inputs.
      **params: its parameters.

    >>> import jax, jax.numpy as jnp, jaxbn
    >>> params, _ = jaxbn.init(3)
    >>> def block(w, x):
    ...     y, _ = jaxbn.batch_norm(x @ w, params, None, train=True)
    ...     return jax.nn.relu(y)
    >>> block = jax.checkpoint(block, policy=jaxbn.checkpoint_policy)
    >>> _, vjp = jax.vjp(block, jnp.ones((2, 3)), jnp.eye(4, 2))  # keeps x, w, x @ w, …
    >>> sum(leaf.shape == (4, 3) for leaf in jax.tree.leaves(vjp))  # … and neither y nor relu(y)
    1
    """
    dots = jax.checkpoint_policies.dots_saveable(prim, *avals, **params)
    return dots or _named(prim, *avals, **params)
