"""Params and state: their kind, their shapes, and the types that both modes return."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._op.arguments.values import _is_number, array
from jaxbn._op.axes import Axes, promote, wide
from jaxbn._op.devices import by_features
from jaxbn._op.state import Moments, Params, State


def check_kind(call: str, kind: Any, value: Any) -> Any:
    """`value` as a `kind` of arrays, from one or from any tuple of as many leaves."""
    name, was = kind.__name__.lower(), type(value).__name__
    if isinstance(value, tuple) and len(value) == len(kind._fields):
        optional = () if kind is Moments else ("scale", "bias", "count")
        leaves = dict(zip(kind._fields, value, strict=True))
        for field, v in leaves.items():
            if v is not None or field not in optional:
                leaves[field] = array(call, f"{name}.{field}", v)
        return kind(**leaves)
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


def check_features(
    call: str,
    params: Any,
    state: Any,
    x: jax.Array,
    axes: Axes,
    domain: bool = False,
    labels: bool = False,
) -> None:
    """Params, and mean and var of the state, must have exactly the shape of the feature axes.

    With a domain, the state has an axis of domains before these, and with labels, params may have
    one of classes. Scale and bias may also have the rank of x, and a row for each of x's.
    """
    expected = tuple(x.shape[a] for a in axes.features)
    groups = {
        "params": {f"params.{name}": getattr(params, name) for name in ("scale", "bias")},
        "state": {f"state.{name}": getattr(state, name, None) for name in ("mean", "var")},
    }
    shapes = {
        group: {what: np.shape(leaf) for what, leaf in leaves.items() if leaf is not None}
        for group, leaves in groups.items()
    }
    every = {**shapes["params"], **shapes["state"]}
    rows = tuple(
        n if a in (*axes.features, *axes.reduced[:1]) else 1 for a, n in enumerate(x.shape)
    )

    def fits(what: str, shape: tuple[int, ...]) -> bool:
        of_state = what in shapes["state"]
        table = (domain if of_state else labels) and shape[1:] == expected
        return table or shape == expected or (not of_state and shape == rows)

    wrong = {what: shape for what, shape in every.items() if not fits(what, shape)}
    if not wrong:
        return
    what, shape = next(iter(wrong.items()))
    own, other = ("params", "state") if what in shapes["params"] else ("state", "params")
    features = expected[0] if len(expected) == 1 else expected
    like = ""
    if own == "params" and shape == (*rows[:1], *expected) != rows:
        remedy = f"write {what}.reshape({rows}) for one in each row of x."
    elif len(shape) > 1 and shape[1:] == expected:
        name, which = ("domain", "sets of statistics") if own == "state" else ("labels", "of them")
        remedy = f"write {name}=, which of the {shape[0]} {which} x takes, or one for each row."
    # All of its own leaves are of another size, and none of those beside it.
    elif shapes[other] and wrong.keys() == shapes[own].keys():
        like = f", as {other} {'has' if other == 'state' else 'have'}"
        fresh = "[0] for fresh ones" if own == "params" else "[1] for a fresh one"
        remedy = f"pass this layer's {own} and not another's, or jaxbn.init({features}){fresh}."
    elif len(expected) == 1 and {*every.values()} == {shape} & {(n,) for n in x.shape[1:]}:
        axis = x.shape.index(shape[0], 1)
        order = "channels first: " if axis == 1 else ""
        remedy = f"write axis={axis} ({order}x has {shape[0]} there), or jaxbn.init({features})."
    else:
        remedy = f"write jaxbn.init({features}), or pass the feature axis as axis=."
    raise ValueError(
        f"{call}: {what} has shape {shape}, but x with shape {x.shape} has features {expected} on "
        f"axes {axes.features}{like}; {remedy}"
    )


def check_eval(call: str, state: Any) -> None:
    """Eval normalizes by the running statistics of a State."""
    if state is None:
        raise ValueError(
            f"{call}: state=None with train=False, but eval normalizes by the running "
            f"statistics; pass the State that training returned, or write train=True."
        )
    if isinstance(state, Moments):
        raise ValueError(
            f"{call}: state is a Moments with train=False, but moments are gathered, as "
            f"jaxbn.recalibrate does, of batches in training; write train=True, or pass a "
            f"State."
        )


def check_renorm(
    call: str, renorm: Any, state: Any, x: jax.Array
) -> tuple[jax.Array, jax.Array] | None:
    """r_max and d_max as arrays; None where moments are gathered, which no state is to draw to."""
    pair = renorm if isinstance(renorm, tuple | list) else ()
    least = zip(pair, (1.0, 0.0), strict=False)
    if len(pair) != 2 or not all(_is_number(v, w.__le__) for v, w in least):
        raise (ValueError if pair else TypeError)(
            f"{call}: renorm={renorm!r}, expected (r_max, d_max), numbers of at least 1 and 0, or "
            f"traced ones; write renorm=(3.0, 5.0), or renorm=(1.0, 0.0) for plain batch norm."
        )
    if jnp.iscomplexobj(x):
        raise TypeError(
            f"{call}: renorm={renorm!r} with x of dtype {x.dtype}, but d is clipped, and complex "
            f"numbers have no order; leave renorm out."
        )
    if state is None:
        raise ValueError(
            f"{call}: renorm={renorm!r} with state=None, but y is drawn to the running statistics; "
            f"start from params, state = jaxbn.init(features)."
        )
    if isinstance(state, Moments):
        return None
    r_max, d_max = (jnp.asarray(limit, state.var.dtype) for limit in pair)
    return r_max, d_max


def settle(
    call: str, state: State, momentum: Any, x: jax.Array, axes: Axes, domains: bool = False
) -> State:
    """The state in the types that both modes return, or an error that names the call.

    Strong types; mean and var in float32 or wider, since a narrow running average stops far from
    the truth: its steps are rounded away. The mean of complex x is complex; a count is int32.
    Where shardings are types, mean and var are sharded as the features of x are.
    """
    if state.count is None and momentum is None:
        raise ValueError(
            f"{call}: state.count=None with momentum=None, but the cumulative average weighs "
            f"by the updates so far; start from jaxbn.init(features), or write momentum=0.99."
        )
    number = np.shape(state.mean)[:1] if domains else ()
    if state.count is not None and state.count.shape != number:
        of_each, more = (" of each domain", f", domains={number[0]}") if domains else ("", "")
        raise ValueError(
            f"{call}: state.count has shape {state.count.shape}, expected {number}, the "
            f"updates{of_each}; write state._replace(count=jnp.zeros({number}, jnp.int32)), "
            f"or start from jaxbn.init(features{more})."
        )
    for name in ("var", "count"):
        if jnp.iscomplexobj(v := getattr(state, name)):
            raise TypeError(
                f"{call}: state.{name} has dtype {v.dtype}, expected real numbers; write "
                f"state._replace({name}=state.{name}.real)."
            )
    for name in ("mean", "var"):
        v = getattr(state, name)
        if not jnp.issubdtype(v.dtype, jnp.inexact):
            raise TypeError(
                f"{call}: state.{name} has dtype {v.dtype}, in which no average can move; write "
                f"state._replace({name}=state.{name}.astype(jnp.float32))."
            )
    mean, var = (by_features(v.astype(wide(v.dtype)), x, axes.features) for v in state[:2])
    kind = promote(mean.dtype, x.dtype) if jnp.iscomplexobj(x) else mean.dtype
    return State(mean.astype(kind), var, None if state.count is None else _int32(state.count))


def spread_count(m: Moments) -> jax.Array:
    """The count of moments of several domains, for each channel."""
    count = jnp.asarray(m.count)
    return jnp.broadcast_to(jnp.expand_dims(count, range(count.ndim, m.mean.ndim)), m.mean.shape)


def _int32(count: Any) -> jax.Array:
    """Equals count, rounded down; the largest int32 for what is larger."""
    count, top = jnp.asarray(count), jnp.iinfo(jnp.int32).max
    if jnp.issubdtype(count.dtype, jnp.integer) and jnp.iinfo(count.dtype).max > top:
        count = jnp.minimum(count, top)
    return count.astype(jnp.int32)
