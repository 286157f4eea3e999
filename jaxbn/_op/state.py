"""What batch norm is made of: `Params`, `State`, `Moments`, and how moments enter the state."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._op.arguments import check_dtype
from jaxbn._op.axes import Axes, is_integer, promote, wide
from jaxbn._op.devices import sharded_as, varying_axes


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
      dtype: of scale and bias. Statistics have it too where it is float32 or wider, and are
        float32 where it is narrower; var is real where it is complex.

    Raises:
      TypeError: features are no integers, or dtype is not floating or complex.
      ValueError: a size is negative.

    >>> import jaxbn
    >>> params, state = jaxbn.init(64)
    >>> params.scale.shape, state.mean.shape, int(state.count)
    ((64,), (64,), 0)
    """
    shape = tuple(features) if isinstance(features, Sequence) else (features,)
    integers = not isinstance(features, str) and all(map(is_integer, shape))
    if not integers or any(size < 0 for size in shape):
        raise (ValueError if integers else TypeError)(
            f"init: features={features!r}, expected the size of the feature axis (or axes); "
            f"write jaxbn.init(x.shape[-1])."
        )
    dtype = jnp.dtype(dtype)
    check_dtype("init", "parameters and statistics", dtype, "leave dtype out for float32")
    params = Params(jnp.ones(shape, dtype), jnp.zeros(shape, dtype))
    mean = jnp.zeros(shape, wide(dtype))
    var = jnp.ones(shape, jnp.finfo(mean.dtype).dtype)
    return params, State(mean, var, jnp.zeros((), jnp.int32))


def check_kind(call: str, kind: Any, value: Any) -> Any:
    """`value` as `Params` or `State`, from one or from any tuple of as many leaves."""
    if isinstance(value, tuple) and len(value) == len(kind._fields):
        return kind(*value)
    name, was = kind.__name__.lower(), type(value).__name__
    remedy = "write params, state = jaxbn.init(features)."
    if isinstance(value, Params | State | Moments):
        remedy = f"the order is {call}(x, params, state)."
    elif isinstance(value, Mapping):
        keys = sorted(map(str, value))
        was = f"{was} of {keys[:4]}" + ", …" * (len(keys) > 4)
        collection, line = {
            "params": ("params", 'jaxbn.Params({0}.get("scale"), {0}.get("bias"))'),
            "state": ("batch_stats", 'jaxbn.State({0}["mean"], {0}["var"], {0}.get("count"))'),
        }[name]
        remedy = f"write {line.format(name)}."
        if not set(kind._fields) & set(keys):
            remedy = (
                f"linen holds each layer's under its name, so write "
                f'v = variables["{collection}"]["BatchNorm_0"] and {line.format("v")}.'
            )
    raise TypeError(
        f"{call}: {name} is {was}, expected jaxbn.{kind.__name__}({', '.join(kind._fields)}) or "
        f"None; {remedy}"
    )


def settle(call: str, state: State, x: jax.Array, axes: Axes) -> State:
    """The state in the types that both modes return, or an error that names the call.

    Strong types; mean and var in float32 or wider, since a narrow running average stops far from
    the truth: its steps are rounded away. The mean of complex x is complex; a count is int32.
    Where shardings are types, mean and var are sharded as the features of x are.
    """
    leaves = {"mean": jnp.asarray(state.mean), "var": jnp.asarray(state.var)}
    for name, v in leaves.items():
        if not jnp.issubdtype(v.dtype, jnp.inexact):
            raise TypeError(
                f"{call}: state.{name} has dtype {v.dtype}, in which no average can move; write "
                f"state._replace({name}=state.{name}.astype(jnp.float32))."
            )
    mean, var = (sharded_as(v.astype(wide(v.dtype)), x, axes.features) for v in leaves.values())
    kind = promote(mean.dtype, x.dtype) if jnp.iscomplexobj(x) else mean.dtype
    return State(mean.astype(kind), var, None if state.count is None else _int32(state.count))


def _int32(count: Any) -> jax.Array:
    """Equals count, rounded down; the largest int32 for what is larger."""
    count, top = jnp.asarray(count), jnp.iinfo(jnp.int32).max
    if jnp.issubdtype(count.dtype, jnp.integer) and jnp.iinfo(count.dtype).max > top:
        count = jnp.minimum(count, top)
    return count.astype(jnp.int32)


def blend(state: State, moments: Moments, momentum: Any, unbiased: bool) -> State:
    """Equals `momentum * state + (1 - momentum) * moments`, in the state's dtypes.

    `momentum=None` is the cumulative average: update k weighs the batch by 1/k. `unbiased`
    multiplies the batch's variance by n / (n - 1) first, n the pooled count. A channel whose
    moments are not finite, or of no value, keeps its statistics, bit for bit; count goes up where
    any channel learned. One count serves all channels, so for the cumulative average a batch that
    is not finite in one channel counts for none.
    """
    n = moments.count
    var = moments.var * (n / jnp.where(n > 1, n - 1, n)) if unbiased else moments.var
    mean, var = moments.mean.astype(state.mean.dtype), var.astype(state.var.dtype)
    # Of var alone, which is a sum over x - mean, so where mean is not finite var is not. Unless
    # mean has more range than the state, and was finite until the cast.
    finite = jnp.isfinite(var)
    if jnp.finfo(mean.dtype).bits < jnp.finfo(moments.mean.dtype).bits:
        finite &= jnp.isfinite(mean)

    count = state.count
    if count is not None:
        flags = [jnp.any(finite & (n > 0))]
        if momentum is None:
            flags.append(jnp.any(~finite))
        if split := varying_axes(state.mean) - varying_axes(count):
            # Features are split over these mapped axes and the count is not: all parts must agree.
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
            # By what is to be added: a weight near 1 would be rounded, and its share lost.
            start = jnp.where(state.count > 0, old, 0)  # of what init left, nothing
            new = start + (batch - start) / (state.count.astype(old.dtype) + 1)
        return jnp.where(learned, new.astype(old.dtype), old)

    new = State(step(state.mean, mean), step(state.var, var), count)
    return jax.tree.map(lax.stop_gradient, new)
