"""What `jax.checkpoint` keeps of a network with batch norms: convolutions and batch statistics."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxbn._op.state import Moments

# The checkpoint name of the statistics, which policies refer to.
MOMENTS = "batch_norm_moments"

only_moments = jax.checkpoint_policies.save_only_these_names(MOMENTS)


def named(m: Moments) -> Moments:
    """Names the pooled moments for checkpoint policies. No collective is left to repeat."""
    return Moments(*map(_named, m))


def _named(v: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(v):  # JAX cannot keep a complex number by its name
        return lax.complex(_named(v.real), _named(v.imag))
    return checkpoint_name(v, MOMENTS)


def checkpoint_policy(prim: Any, *avals: Any, **params: Any) -> bool:
    """Equals True for the outputs of convolutions and dots, and for batch statistics.

    Use the policy to train with less memory, as `policy=` of `jax.checkpoint`, `flax.linen.remat`
    and `flax.nnx.remat`: `jax.checkpoint(block, policy=jaxbn.checkpoint_policy)`. The backward pass
    of the block computes normalization, activation and residual sum again, from the convolution's
    output and O(C) numbers. Statistics and their collectives are kept, not repeated. Wrap each
    block, not the whole network: recomputed arrays live until the wrapped function's backward pass
    ends. Chen et al. 2016 (arXiv:1604.06174) drop the same outputs.

    The statistics have the checkpoint name "batch_norm_moments" and combine with other policies.
    `jax.checkpoint_policies.save_only_these_names("batch_norm_moments")` keeps no convolution. Use
    that one on a TPU: XLA computes norms and activations again there by itself, so that
    `checkpoint_policy` saves no memory.

    Args:
      prim: the primitive of one equation. JAX calls the policy for each equation.
      *avals: shapes and dtypes of the equation's inputs.
      **params: parameters of the equation.

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
    return dots or only_moments(prim, *avals, **params)
