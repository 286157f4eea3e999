"""One argument by itself: an array, a number, a flag, a function."""

import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def array(call: str, what: str, v: Any) -> jax.Array:
    """Returns `v` as a JAX array of numbers, or raises where no batch norm can compute with `v`."""
    library = type(v).__module__.partition(".")[0]
    if library in ("torch", "tensorflow"):
        raise TypeError(
            f"{call}: {what} is a tensor of {library}, expected an array of JAX or NumPy; write "
            f"jnp.asarray({what}.numpy())."
        )
    if type(v).__name__ == "JetTracer":
        raise NotImplementedError(
            f"{call}: {what} is traced by jax.experimental.jet, which has no rule for lax.cond, "
            f"jax.checkpoint and jax.custom_jvp; nest jax.jvp for higher orders, write "
            f"jax.jvp(lambda x: jax.jvp(f, (x,), (v,))[1], (x,), (v,))."
        )
    cause = None
    try:
        found = jnp.asarray(v)
        if jnp.issubdtype(found.dtype, jnp.number) or found.dtype == bool:
            return found
    except (TypeError, ValueError, OverflowError) as error:
        cause = error
    own = isinstance(v, jax.Array) or type(v) is np.ndarray
    was = f"has dtype {v.dtype}" if own else f"is {'None' if v is None else type(v).__name__}"
    raise TypeError(
        f"{call}: {what} {was}, expected an array of numbers, of JAX or NumPy; write "
        f"jnp.asarray(numbers)."
    ) from cause


def check_y(call: str, dtype: Any, **arrays: jax.Array | None) -> None:
    """Refuses complex numbers where y is real, and so would lose their imaginary part."""
    groups = {"scale": "params.", "bias": "params.", "mean": "state."}
    for name, v in arrays.items():
        if v is not None and jnp.iscomplexobj(v) and not jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(
                f"{call}: {groups.get(name, '')}{name} has dtype {v.dtype} but y has dtype "
                f"{dtype}; write dtype={v.dtype.name!r} for a complex y."
            )


def check_numbers(call: str, momentum: Any, epsilon: Any) -> tuple[Any, Any]:
    """Momentum in [0, 1] or None, and epsilon, finite and not negative: floats, or traced."""
    if momentum is not None:
        kept = (
            "a number in [0, 1], the fraction of the old value that is kept (PyTorch's momentum m "
            "is 1 - m here), or None for the cumulative average"
        )
        check_real(call, "momentum", momentum, lambda v: 0 <= v <= 1, kept, "0.99")
    added = "a finite number of at least 0, added to the variance"
    check_real(call, "epsilon", epsilon, lambda v: 0 <= v < math.inf, added, "1e-5")
    return _settled(momentum), _settled(epsilon)


def check_real(
    call: str, name: str, v: Any, good: Callable[[float], bool], expected: str, write: str
) -> None:
    """Raises unless v is one real number and good, or traced.

    Args:
      call: the public call.
      name: of the argument.
      v: what was given.
      good: whether a number will do.
      expected: what was expected.
      write: a number that will do, as it is written.

    >>> from jaxbn._op.arguments import values
    >>> values.check_real("fold", "tolerance", -1, lambda v: v > 0, "an error above 0", "1e-5")
    Traceback (most recent call last):
        ...
    ValueError: fold: tolerance=-1, expected an error above 0; write tolerance=1e-5.
    """
    if not _is_number(v, good):
        raise _wrong(v)(f"{call}: {name}={v!r}, expected {expected}; write {name}={write}.")


def check_tolerance(call: str, tolerance: Any) -> None:
    """Raises unless this is None, or a relative error of at least 0.

    >>> from jaxbn._op.arguments import values
    >>> values.check_tolerance("serving", None)
    """
    if tolerance is not None:
        least = "a relative error of at least 0"
        check_real(call, "tolerance", tolerance, lambda v: v >= 0, least, "1e-3")


def _settled(v: Any) -> Any:
    return v if v is None or isinstance(v, jax.core.Tracer) else float(v)


def _is_number(v: Any, good: Callable[[float], bool]) -> bool:
    """Whether v is one real number and good, or traced and may be."""
    return _wrong(v) is ValueError and (isinstance(v, jax.core.Tracer) or good(float(v)))


def _wrong(v: Any) -> type[Exception]:
    """What to raise for v where a real number was expected: ValueError for another number."""
    real = isinstance(v, numbers.Real)
    if isinstance(v, np.generic | np.ndarray | jax.Array):
        real = v.shape == () and any(jnp.issubdtype(v.dtype, k) for k in (np.floating, np.integer))
    return ValueError if real else TypeError


def first(v: Any, wrong: Callable[[np.ndarray], np.ndarray]) -> list[Any]:
    """The first value of v that is wrong, where the values can be seen from here."""
    if isinstance(v, jax.core.Tracer) or not getattr(v, "is_fully_addressable", True):
        return []
    values = np.asarray(v)
    return values[wrong(values)][:1].tolist()


def check_flag(call: str, name: str, flag: Any, remedy: str) -> None:
    """Refuses a flag that is not a bool, or is traced."""
    if not isinstance(flag, bool | np.bool_):
        raise TypeError(
            f"{call}: {name}={flag!r}, expected True or False, known when tracing. {remedy}"
        )


def check_train(call: str, train: Any) -> None:
    """Refuses a `train` that is not a bool, or is traced."""
    remedy = (
        "Both return the same types, so a traced flag can choose: jax.lax.cond(flag, train_step, "
        "eval_step, x)."
    )
    check_flag(call, "train", train, remedy)


def check_update_stats(call: str, update_stats: Any) -> None:
    """Refuses an `update_stats` that is not a bool, or is traced."""
    remedy = (
        "A traced flag can choose afterwards: jax.tree.map(lambda old, new: jnp.where(flag, new, "
        "old), old_stats, new_stats)."
    )
    check_flag(call, "update_stats", update_stats, remedy)


def check_activation(call: str, activation: Any) -> None:
    """An activation is None or a function of y."""
    if activation is not None and not callable(activation):
        raise TypeError(
            f"{call}: activation={activation!r}, expected None or a function of y; write "
            f"activation=jax.nn.relu."
        )
    if isinstance(activation, type):
        name = activation.__name__
        raise TypeError(
            f"{call}: activation={name}, a class, expected None or a function of y; write "
            f"activation={name}() where such a layer is a function."
        )


def check_activated(call: str, activation: Any, y: Any) -> Any:
    """What an activation returned: an array, or an error with the line to write."""
    if not isinstance(y, jax.Array | np.ndarray):
        was = "None" if y is None else type(y).__name__
        raise TypeError(
            f"{call}: activation={activation!r} returned {was}, expected an array; write "
            f"activation=jax.nn.relu, or a function that returns one."
        )
    return y
