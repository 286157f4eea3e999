"""`standardize`: weight standardization, by the op: a kernel is normalized for each output."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._op import axes as axes_
from jaxbn._op.arguments.values import array, check_numbers
from jaxbn._op.batch_norm import batch_norm


def standardize(kernel: Any, axis: int | Sequence[int] = -1, *, epsilon: float = 1e-5) -> jax.Array:
    """Equals `(kernel - mean) / sqrt(var + epsilon)`, mean and var over all axes but `axis`.

    Use it for the kernels of convolutions that a GroupNorm follows: with both, a network trains on
    one or two images a device about as well as with batch norm on many. Standardize in the forward
    pass, at every call, so that the gradient flows through. `jaxbn.swap(…, to="group",
    standardize="*")` does so in a model as it is written. Qiao et al. 2019, "Micro-Batch Training
    with Batch-Channel Normalization and Weight Standardization".

    Args:
      kernel: any rank from 2 up, floating; Flax's layout `[..., in, out]` fits the default axis.
      axis: the axes of the outputs, each of which has a mean and a var of its own.
      epsilon: added to var.

    Returns:
      An array of the kernel's shape and dtype. Mean and var are taken in float32 or wider.

    Raises:
      TypeError: the kernel is not floating.
      ValueError: an output sums up one value only, which would become 0.

    >>> import jax.numpy as jnp, jaxbn
    >>> kernel = jnp.array([[1.0, 5.0], [3.0, 7.0]])  # [in, out]
    >>> print(jaxbn.standardize(kernel, epsilon=0.0))
    [[-1. -1.]
     [ 1.  1.]]
    """
    kernel = array("standardize", "kernel", kernel)
    if not jnp.issubdtype(kernel.dtype, jnp.inexact):
        raise TypeError(
            f"standardize: kernel has dtype {kernel.dtype}, expected a floating dtype; write "
            f"kernel.astype(jnp.float32)."
        )
    axes = axes_.resolve("standardize", kernel, axis)
    _, epsilon = check_numbers("standardize", None, epsilon)
    if math.prod(kernel.shape[a] for a in axes.reduced) == 1:
        raise ValueError(
            f"standardize: kernel with shape {kernel.shape} has one value for each output on axes "
            f"{axes.features}, which would become 0; expected at least 2; leave such a kernel as "
            f"it is, or pass the axis of the outputs as axis=."
        )
    return batch_norm(kernel, None, None, train=True, axis=axes.features, epsilon=epsilon)[0]
