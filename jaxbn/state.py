"""What batch norm is made of: `Params`, `State`, `Moments`, and how moments enter the state."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn.axes import promote
from jaxbn.collectives import varying_axes


class Params(NamedTuple):
    """Trainable affine; either may be None. Its gradients are (dscale, dbias)."""

    scale: jax.Array | None  # [C]
    bias: jax.Array | None  # [C]


class State(NamedTuple):
    """Running statistics, used when `train=False`."""

    mean: jax.Array  # [C]
    var: jax.Array  # [C]
    count: jax.Array | None  # type: ignore[assignment]  # [] int32: updates so far; None: uncounted


class Moments(NamedTuple):
    """Count, mean and biased variance of a set of values, per channel; count 0 is the empty set."""

    count: jax.Array  # type: ignore[assignment]  # [], or [C] where a mask differs per feature
    mean: jax.Array  # [C]
    var: jax.Array  # [C], real also for complex x


def init(features: int | Sequence[int], dtype: Any = jnp.float32) -> tuple[Params, State]:
    """Fresh `Params` (scale 1, bias 0) and `State` (mean 0, var 1, count 0).

    Args:
      features: size of the feature axis, or sizes of the feature axes in x's order.
      dtype: of scale, bias and mean; var is real where it is complex.

    Raises:
      ValueError: a size is negative.

    >>> import jaxbn
    >>> params, state = jaxbn.init(64)
    >>> params.scale.shape, state.mean.shape, int(state.count)
    ((64,), (64,), 0)
    """
    shape = tuple(features) if isinstance(features, Sequence) else (features,)
    if any(size < 0 for size in shape):
        raise ValueError(
            f"init: features={features!r}, expected the size of the feature axis (or axes); "
            f"write jaxbn.init(x.shape[-1])."
        )
    params = Params(jnp.ones(shape, dtype), jnp.zeros(shape, dtype))
    mean = jnp.zeros(shape, dtype)
    var = jnp.ones(shape, jnp.finfo(dtype).dtype)
    return params, State(mean, var, jnp.zeros((), jnp.int32))


def settle(state: State, x: jax.Array) -> State:
    """The state in the types that both modes return: strong ones, a complex mean for complex x."""
    mean, var = jnp.asarray(state.mean), jnp.asarray(state.var)
    kind = promote(mean.dtype, x.dtype) if jnp.iscomplexobj(x) else mean.dtype
    count = None if state.count is None else jnp.asarray(state.count)
    if count is not None:
        count = count.astype(count.dtype)
    return State(mean.astype(kind), var.astype(var.dtype), count)


def blend(state: State, moments: Moments, momentum: float | None, unbiased: bool) -> State:
    """Equals `momentum * state + (1 - momentum) * moments`, in float32 or wider.

    `momentum=None` is the cumulative average: update k weighs the batch by 1/k. `unbiased`
    multiplies the batch's variance by n / (n - 1) first, n the pooled count. Moments that
    are not finite anywhere leave the state as it was, bit for bit; so do those of no value.
    """
    # Of var alone, which is a sum over x - mean, so where mean is not finite var is not: to ask
    # both is one more kernel to start.
    finite = jnp.all(jnp.isfinite(moments.var))
    some = jnp.any(moments.count > 0)
    if state.count is not None and (split := varying_axes(state.mean) - varying_axes(state.count)):
        # Features are split over these mapped axes and the count is not: all parts must agree.
        flags = jnp.stack([~finite, some]).astype(jnp.int32)
        flags = lax.psum(flags, tuple(split))
        finite, some = flags[0] == 0, flags[1] > 0
    learned = finite & (moments.count > 0)  # [] or [C]
    n = moments.count
    var = moments.var * (n / jnp.where(n > 1, n - 1, n)) if unbiased else moments.var

    def step(old: jax.Array, batch: jax.Array) -> jax.Array:
        wide = promote(old.dtype, batch.dtype)
        keep: Any = momentum
        if state.count is not None and momentum is None:
            keep = (state.count / (state.count + 1)).astype(wide)
        new = (keep * old.astype(wide) + (1 - keep) * batch.astype(wide)).astype(old.dtype)
        return jnp.where(learned, new, old)

    count = state.count
    if count is not None:
        count = count + (finite & some).astype(count.dtype)
    new = State(step(state.mean, moments.mean), step(state.var, var), count)
    return jax.tree.map(lax.stop_gradient, new)
