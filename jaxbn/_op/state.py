"""`Params`, `State` and `Moments`, and how the moments of a batch enter the state."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._op.axes import check_dtype, check_number, is_integer, wide
from jaxbn._op.devices import varying_axes


class Params(NamedTuple):
    """Trainable affine; either may be None. Its gradients are (dscale, dbias)."""

    scale: jax.Array | None  # [C]; [classes, C], see `labels`; or [rows, 1, …, C] as x has rows
    bias: jax.Array | None  # likewise


class State(NamedTuple):
    """Running statistics, used when `train=False`."""

    mean: jax.Array  # [C]; [domains, C] of several domains
    var: jax.Array  # likewise
    # [] int32, [domains] of several domains: updates so far; None: uncounted
    count: jax.Array | None  # type: ignore[assignment]


class Moments(NamedTuple):
    """Count, mean and biased variance of a set of values, per channel; count 0 is the empty set."""

    count: jax.Array  # type: ignore[assignment]  # [], or [C] where a mask differs per feature
    mean: jax.Array  # [C]
    var: jax.Array  # [C], real also for complex x


def init(
    features: int | Sequence[int],
    dtype: Any = jnp.float32,
    *,
    domains: int | None = None,
    classes: int | None = None,
) -> tuple[Params, State]:
    """Fresh `Params` (scale 1, bias 0) and `State` (mean 0, var 1, count 0).

    Args:
      features: size of the feature axis, or sizes of the feature axes in x's order.
      dtype: of scale and bias. Statistics have this dtype too, or float32 where dtype is
        narrower; var is real also for a complex dtype.
      domains: the number of sets of statistics, for `domain=` of `batch_norm`: mean and var are
        `[domains, *features]`, count [domains]. None: one set, without that axis.
      classes: the number of scales and biases, for `labels=` of `batch_norm`: they are
        `[classes, *features]`. None: one of each, without that axis.

    Raises:
      TypeError: features, domains or classes are no integers, or dtype is not floating or complex.
      ValueError: a size is negative, or there are no domains or classes.

    >>> import jaxbn
    >>> params, state = jaxbn.init(64)
    >>> params.scale.shape, state.mean.shape, int(state.count)
    ((64,), (64,), 0)
    >>> params, state = jaxbn.init(64, domains=2)
    >>> params.scale.shape, state.mean.shape, state.count.shape
    ((64,), (2, 64), (2,))
    """
    shape = tuple(features) if isinstance(features, Sequence) else (features,)
    integers = not isinstance(features, str) and all(map(is_integer, shape))
    if not integers or any(size < 0 for size in shape):
        raise (ValueError if integers else TypeError)(
            f"init: features={features!r}, expected the size of the feature axis (or axes); "
            f"write jaxbn.init(x.shape[-1])."
        )
    what, otherwise = "parameters and statistics", "leave dtype out for float32"
    dtype = check_dtype("init", what, dtype, otherwise)
    before: dict[str, tuple[int, ...]] = {"domains": (), "classes": ()}
    for name, number in (("domains", domains), ("classes", classes)):
        if number is not None:
            before[name] = (check_number("init", name, number),)
    table = (*before["classes"], *shape)
    params = Params(jnp.ones(table, dtype), jnp.zeros(table, dtype))
    table = (*before["domains"], *shape)
    mean = jnp.zeros(table, wide(dtype))
    var = jnp.ones(table, jnp.finfo(mean.dtype).dtype)
    return params, State(mean, var, jnp.zeros(before["domains"], jnp.int32))


def blend(state: State, moments: Moments, momentum: Any, unbiased: bool) -> State:
    """Equals `momentum * state + (1 - momentum) * moments`, in the state's dtypes.

    `momentum=None` is the cumulative average: update k weighs the batch by 1/k. `unbiased`
    multiplies the batch's variance by n / (n - 1) first, with n the pooled count. A channel keeps
    its statistics, bit for bit, where its moments are not finite or it has no valid value. count
    goes up if any channel learned. With the cumulative average one count serves all channels, so
    a batch that is not finite in one channel counts for none.
    """
    n = moments.count
    var = moments.var * (n / jnp.where(n > 1, n - 1, n)) if unbiased else moments.var
    mean, var = moments.mean.astype(state.mean.dtype), var.astype(state.var.dtype)
    # var is a sum over x - mean, so var is not finite where mean is not. One exception: mean may
    # have more range than the state's dtype, and lose it in the cast.
    finite = jnp.isfinite(var)
    if jnp.finfo(mean.dtype).bits < jnp.finfo(moments.mean.dtype).bits:
        finite &= jnp.isfinite(mean)

    count = state.count
    if count is not None:
        flags = [jnp.any(finite & (n > 0))]
        if momentum is None:
            flags.append(jnp.any(~finite))
        if split := varying_axes(state.mean) - varying_axes(count):
            # These mapped axes split the features, but not the count, so all parts must agree.
            flags = list(lax.psum(jnp.stack(flags).astype(jnp.int32), tuple(split)) > 0)
        learns = flags[0]
        if momentum is None:
            finite = ~flags[1]
            learns &= finite
        count = count + (learns & (count < jnp.iinfo(count.dtype).max)).astype(count.dtype)
    learned = finite & (n > 0)  # [C]

    def step(old: jax.Array, batch: jax.Array) -> jax.Array:
        if state.count is None or momentum is not None:
            keep = momentum if isinstance(momentum, float) else momentum.astype(old.dtype)
            new = keep * old + (1 - keep) * batch
        else:
            # Added as a difference: (1 - 1/k) * old would round, and late updates would be lost.
            start = jnp.where(state.count > 0, old, 0)  # the first update drops init's values
            new = start + (batch - start) / (state.count.astype(old.dtype) + 1)
        return jnp.where(learned, new.astype(old.dtype), old)

    new = State(step(state.mean, mean), step(state.var, var), count)
    return jax.tree.map(lax.stop_gradient, new)
