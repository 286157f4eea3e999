"""Everything that can be wrong with a call, refused before any work.

Every check here reads shapes, dtypes and Python numbers only, so a bad call is refused
before any work, under `jit` as in eager code.
"""

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxbn._op import axes as axes_
from jaxbn._op.axes import Axes, check_dtype, check_number, is_integer, promote, wide
from jaxbn._op.devices import Pool, sharded_as, split_over, varying_axes
from jaxbn._op.renorm import Renorm
from jaxbn._op.state import Moments, Params, State
from jaxbn._op.tables import Index, Rows, rows_of, taken


class Checked(NamedTuple):
    """The arguments of one call of `batch_norm`, found good, in the form that the op works with."""

    x: jax.Array
    params: Params  # each leaf an array or None; [C], or as `rows` reads them
    state: Any  # State in the types that both modes return; Moments; or None; of the domain of x
    table: Any  # of all domains, where x belongs to one; else as state
    domain: Index | None  # the domain that all of x belongs to
    domains: jax.Array | None  # [rows]: the domain of each row of x
    rows: Rows | None  # where rows of x have a domain, a scale or a bias of their own
    axes: Axes
    momentum: Any
    epsilon: Any  # a float, or traced
    mask: jax.Array | None  # booleans of x's rank: the cells that count, by mask and by weights
    weights: jax.Array | None  # of x's rank; 0 where the mask is False
    dtype: Any  # of y
    residual: jax.Array | None  # in dtype
    renorm: Renorm | None  # None in eval mode
    pool: Pool | None  # the devices whose statistics are one; None in eval mode
    batch_axis: int  # the axis that ghost batches divide, where there are any
    ghosts: int  # number of ghost batches; 0 where there are none


def check(
    call: str,
    x: Any,
    params: Any,
    state: Any,
    *,
    train: Any,
    axis: Any,
    momentum: Any,
    epsilon: Any,
    unbiased: Any,
    axis_name: Any,
    axis_index_groups: Any,
    virtual_batch_size: Any,
    mask: Any,
    dtype: Any,
    activation: Any,
    residual: Any,
    renorm: Any,
    weights: Any,
    domain: Any,
    labels: Any,
) -> Checked:
    """The arguments of `batch_norm`, or an error that says what to write."""
    x = array(call, "x", x)
    axes = axes_.resolve(call, x, axis)
    momentum, epsilon = check_numbers(call, momentum, epsilon)
    check_train(call, train)
    check_flag(call, "unbiased", unbiased, "Write unbiased=False.")
    params = Params(None, None) if params is None else check_kind(call, Params, params)
    gathers = isinstance(state, Moments)
    state = None if state is None else check_kind(call, Moments if gathers else State, state)
    domain = None if domain is None else check_domain(call, domain, state, x, axes)
    any_ = params.scale is not None or params.bias is not None
    labels = check_labels(call, labels, params, x, axes) if any_ and labels is not None else None
    check_features(call, params, state, x, axes, domain is not None, labels is not None)
    params, rows = by_row(params, domain, labels, x, axes)
    if isinstance(state, State):
        state = settle(call, state, momentum, x, axes, domain is not None)
    elif gathers:
        state = state if domain is None else state._replace(count=spread_count(state))
        state = Moments(*(by_features(v, x, axes) if v.ndim else v for v in state))
    table = state
    if domain is not None and not np.ndim(domain):
        state = jax.tree.map(lambda v: taken(v, domain), table)
    dtype = x.dtype if dtype is None else dtype
    dtype = check_dtype(call, "values of y", dtype, "leave dtype out for that of x")
    check_activation(call, activation)
    residual = None if residual is None else check_residual(call, residual, x)
    mean = state.mean if isinstance(state, State) else None
    check_y(call, dtype, x=x, residual=residual, mean=mean, **params._asdict())
    residual = None if residual is None else residual.astype(dtype)
    mask, weights = check_cells(call, mask, weights, x)
    limits = None if renorm is None else check_renorm(call, renorm, state, x)
    pool, batch_axis, ghosts = None, 0, 0
    if rows is not None and virtual_batch_size is not None:
        raise ValueError(
            f"{call}: virtual_batch_size={virtual_batch_size} where each row of x has a domain, a "
            f"scale or a bias of its own, expected one or the other; leave virtual_batch_size out."
        )
    if not train:
        check_eval(call, state)
    else:
        pool = resolve(call, axis_name, axis_index_groups)
        values = axes.count(x) * (pool.devices if pool else 1)
        if virtual_batch_size is not None and x.size:
            batch_axis, ghosts = check_ghosts(call, x, axes, virtual_batch_size)
            values = axes.count(x) // ghosts
        if pool is not None:
            check_one_domain(call, domain, pool)
        if mask is None:
            check_count(call, x, values, virtual_batch_size if ghosts else None)
    return Checked(
        x=x,
        params=params,
        state=state,
        table=table,
        domain=None if np.ndim(domain) else domain,
        domains=domain if np.ndim(domain) else None,
        rows=rows,
        axes=axes,
        momentum=momentum,
        epsilon=epsilon,
        mask=mask,
        weights=weights,
        dtype=dtype,
        residual=residual,
        renorm=Renorm(state.mean, state.var, *limits) if limits and train else None,
        pool=pool,
        batch_axis=batch_axis,
        ghosts=ghosts,
    )


class OneValueError(ValueError):
    """Training statistics over one value per channel; its words are for whoever goes on."""

    what: str
    remedy: str


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
    except (TypeError, ValueError) as error:
        cause = error
    own = isinstance(v, jax.Array) or type(v) is np.ndarray
    was = f"has dtype {v.dtype}" if own else f"is {'None' if v is None else type(v).__name__}"
    raise TypeError(
        f"{call}: {what} {was}, expected an array of numbers, of JAX or NumPy; write "
        f"jnp.asarray(numbers)."
    ) from cause


def check_domain(call: str, domain: Any, state: Any, x: jax.Array, axes: Axes) -> Index:
    """A domain for all of x, or one for each row, among those of the state."""
    features = tuple(x.shape[a] for a in axes.features)
    size = features[0] if len(features) == 1 else features
    if state is None:
        raise ValueError(
            f"{call}: domain= with state=None, but domains are sets of running statistics; start "
            f"from params, state = jaxbn.init({size}, domains=2)."
        )
    shape = np.shape(state.mean)
    if shape == features:
        raise ValueError(
            f"{call}: domain= with state.mean of shape {shape}, which is one set of statistics; "
            f"write jaxbn.init({size}, domains=2) for two, or leave domain out."
        )
    return check_index(call, "domain", domain, shape[0] if shape else 0, x, axes)


def check_labels(call: str, labels: Any, params: Params, x: jax.Array, axes: Axes) -> Index:
    """A label for all of x, or one for each row, among the scales and biases of params."""
    features = tuple(x.shape[a] for a in axes.features)
    tables = [np.shape(leaf) for leaf in params if leaf is not None]
    numbers = {shape[0] for shape in tables if len(shape) == 1 + len(features)}
    if len(numbers) != 1:
        size = features[0] if len(features) == 1 else features
        raise ValueError(
            f"{call}: labels= with scale and bias of shape {tables}, expected a table "
            f"{('classes', *features)}, with a row for each label; write "
            f"jaxbn.init({size}, classes=10), or leave labels out."
        )
    return check_index(call, "labels", labels, numbers.pop(), x, axes)


def check_index(call: str, name: str, index: Any, number: int, x: jax.Array, axes: Axes) -> Index:
    """An index into a table of `number` rows: an int for all of x, a traced one, or one a row."""
    if not is_integer(index):
        index = array(call, name, index)
    dtype = getattr(index, "dtype", np.dtype(int))
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(
            f"{call}: {name} has dtype {dtype}, expected an integer, or integers, one for each row "
            f"of x; write jnp.asarray({name}, jnp.int32)."
        )
    rows = tuple(x.shape[a] for a in axes.reduced[:1])
    if np.shape(index) not in ((), rows):
        expected = f"() or {rows}, one for each row" if rows else "()"
        raise ValueError(
            f"{call}: {name} has shape {np.shape(index)} but x has shape {x.shape}; expected "
            f"{expected}; write {name}=0, or jnp.full({rows[0] if rows else 1}, 0)."
        )
    if seen := _first(index, lambda v: (v < 0) | (v >= number)):
        holds, what = (" holds ", "domains") if name == "domain" else (" hold ", "classes")
        more = f"for the last, or {what}={seen[0] + 1} where they are made"
        raise ValueError(
            f"{call}: {name}{holds if np.shape(index) else '='}{seen[0]}, expected 0 to "
            f"{number - 1}, one of {number} {what}; write {name}={number - 1} "
            f"{more if seen[0] > 0 else 'for the last'}."
        )
    if is_integer(index):
        return int(index)
    index = index.astype(int)  # as `jnp.arange` is, with which it is compared
    return sharded_as(index, x, axes.reduced[:1]) if index.ndim else index


def check_one_domain(call: str, domain: Index | None, pool: Pool) -> None:
    """Refuses devices that pool their statistics and are seen to have different domains."""
    if not isinstance(domain, jax.Array) or domain.ndim:
        return
    if apart := sorted(varying_axes(domain) & set(pool.axis_name)):
        raise ValueError(
            f"{call}: domain differs over mapped axis {apart[0]!r}, over which the statistics are "
            f"pooled; write domain=jnp.full(len(x), domain), one for each row."
        )


def by_row(
    params: Params, domain: Index | None, labels: Index | None, x: jax.Array, axes: Axes
) -> tuple[Params, Rows | None]:
    """Scale and bias that x takes, [C]; or as `Rows` has them, where rows of x differ.

    Where shardings are types, they are sharded as x is.
    """
    features = tuple(x.shape[a] for a in axes.features)

    def is_table(leaf: jax.Array) -> bool:
        return labels is not None and leaf.shape[1:] == features

    def is_of_rows(leaf: jax.Array) -> bool:
        return not is_table(leaf) and leaf.shape != features

    def placed(leaf: jax.Array | None) -> jax.Array | None:
        if leaf is None:
            return None
        like = range(x.ndim)
        return sharded_as(leaf, x, like) if is_of_rows(leaf) else by_features(leaf, x, axes)

    params = Params(*map(placed, params))
    each = any(np.ndim(index) for index in (domain, labels) if index is not None)
    each |= any(is_of_rows(leaf) for leaf in params if leaf is not None)
    rows = rows_of(axes) if each else None

    def read(leaf: jax.Array | None) -> jax.Array | None:
        if leaf is None:
            return None
        if rows is not None and is_of_rows(leaf):
            return jnp.squeeze(leaf, rows.axes.reduced)
        index = labels if is_table(leaf) else None
        if isinstance(index, jax.Array) and index.ndim:
            assert rows is not None
            return rows.read(leaf, index)
        leaf = leaf if index is None else taken(leaf, index)
        return leaf if rows is None else rows.read(leaf, None)

    return Params(*map(read, params)), rows


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


class Tables(NamedTuple):
    """Sizes of the axis before the features in a Flax layer's variables; () where there is none."""

    statistics: tuple[int, ...]
    affine: tuple[int, ...]


def check_tables(call: str, domains: Any, affine_per_domain: bool, classes: Any) -> Tables:
    """The tables that a layer's constructor asks for."""
    statistics, affine = (
        () if number is None else (check_number(call, name, number),)
        for name, number in (("domains", domains), ("classes", classes))
    )
    if affine_per_domain and affine:
        raise ValueError(
            f"{call}: affine_per_domain=True with classes={classes}, but scale and bias are by "
            f"domain or by label; leave one of them out."
        )
    if affine_per_domain and not statistics:
        raise ValueError(
            f"{call}: affine_per_domain=True without domains; write domains=2, or classes=2 for a "
            f"scale and a bias by labels."
        )
    return Tables(statistics, statistics if affine_per_domain else affine)


def check_choices(call: str, domains: Any, classes: Any, domain: Any, labels: Any) -> None:
    """A layer's call chooses from the tables that the layer has, and from these alone."""
    for name, given, table, number in (
        ("domain", domain, "domains", domains),
        ("labels", labels, "classes", classes),
    ):
        if given is None and number is not None:
            raise ValueError(
                f"{call}: the layer has {table}={number} and its call no {name}; write "
                f"bn(x, {name}=0), or one for each row of x."
            )
        if given is not None and number is None:
            raise ValueError(
                f"{call}: {name}= in the call of a layer without {table}; write {table}=2 in the "
                f"constructor, or leave {name} out."
            )


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


def check_y(call: str, dtype: Any, **arrays: jax.Array | None) -> None:
    """Refuses complex numbers where y is real, and so would lose their imaginary part."""
    groups = {"scale": "params.", "bias": "params.", "mean": "state."}
    for name, v in arrays.items():
        if v is not None and jnp.iscomplexobj(v) and not jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(
                f"{call}: {groups.get(name, '')}{name} has dtype {v.dtype} but y has dtype "
                f"{dtype}; write dtype={v.dtype.name!r} for a complex y."
            )


def check_residual(call: str, residual: Any, x: jax.Array) -> jax.Array:
    """`residual` as an array of x's shape, or an error with the line to write.

    Where shardings are types, its axes are sharded as those of x are.
    """
    residual = array(call, "residual", residual)
    if residual.shape != x.shape:
        raise ValueError(
            f"{call}: residual has shape {residual.shape} but x has shape {x.shape}; expected the "
            f"same. Project the shortcut as x is, or write "
            f"residual=jnp.broadcast_to(residual, x.shape) for one that repeats."
        )
    return sharded_as(residual, x, range(x.ndim))


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


def check_cells(
    call: str, mask: Any, weights: Any, x: jax.Array
) -> tuple[jax.Array | None, jax.Array | None]:
    """The cells that count, and how much: mask and weights multiply. None for what is not given."""
    mask = None if mask is None else check_mask(call, mask, x)
    if weights is None:
        return mask, None
    weights = check_weights(call, weights, x)
    weights = weights if mask is None else jnp.where(mask, weights, 0)
    return weights > 0, weights


def check_mask(call: str, mask: Any, x: jax.Array) -> jax.Array:
    """`mask` as booleans with x's rank; broadcastable to x, or an error with the line to write.

    Where shardings are types, its axes are sharded as those of x are.
    """
    given, mask = mask, array(call, "mask", mask)
    if mask.dtype != bool:
        if seen := _first(given, lambda v: (v != 0) & (v != 1)):
            raise ValueError(
                f"{call}: mask holds {seen[0]}, expected True and False, or 1 and 0: a cell takes "
                f"part in the statistics or it does not; write mask > 0, or weights=mask for a "
                f"share."
            )
        mask = mask != 0
    return _of_xs_rank(call, "mask has", mask, x)


def check_weights(call: str, weights: Any, x: jax.Array) -> jax.Array:
    """`weights` in float32 or wider with x's rank; broadcastable to x, finite, not negative.

    Where shardings are types, their axes are sharded as those of x are.
    """
    given, weights = weights, array(call, "weights", weights)
    if jnp.iscomplexobj(weights):
        raise TypeError(
            f"{call}: weights have dtype {weights.dtype}, expected real numbers of at least 0; "
            f"write weights=jnp.abs(weights)."
        )
    if seen := _first(given, lambda v: ~((v >= 0) & (v < np.inf))):
        raise ValueError(
            f"{call}: weights hold {seen[0]}, expected finite numbers of at least 0, the share "
            f"that a cell has in the statistics; write weights=jnp.clip(weights, 0, 1), or mask= "
            f"for cells that take no part."
        )
    kind = promote(weights.dtype, jnp.finfo(wide(x.dtype)).dtype)
    return _of_xs_rank(call, "weights have", weights.astype(kind), x)


def _of_xs_rank(call: str, what_has: str, v: jax.Array, x: jax.Array) -> jax.Array:
    """Equals v with ones before its axes up to the rank of x, sharded as x is; v must fit x."""
    tail = x.shape[x.ndim - v.ndim :] if v.ndim <= x.ndim else None
    if tail is None or any(m not in (1, n) for m, n in zip(v.shape, tail, strict=True)):
        what, _ = what_has.split()
        name, verb = ("A mask", "broadcasts") if what == "mask" else ("Weights", "broadcast")
        remedy = f"{name} {verb} as in NumPy, from the last axis backwards."
        if v.shape == x.shape[: v.ndim]:
            nones = ", ".join(["None"] * (x.ndim - v.ndim))
            remedy = f"{name} over the leading axes: {what}[..., {nones}]."
        raise ValueError(
            f"{call}: {what_has} shape {v.shape} but x has shape {x.shape}; expected a shape "
            f"that broadcasts to x. {remedy}"
        )
    v = jnp.expand_dims(v, tuple(range(x.ndim - v.ndim)))
    return sharded_as(v, x, range(x.ndim))


def _first(v: Any, wrong: Callable[[np.ndarray], np.ndarray]) -> list[Any]:
    """The first value of v that is wrong, where the values can be seen from here."""
    if isinstance(v, jax.core.Tracer) or not getattr(v, "is_fully_addressable", True):
        return []
    values = np.asarray(v)
    return values[wrong(values)][:1].tolist()


def check_numbers(call: str, momentum: Any, epsilon: Any) -> tuple[Any, Any]:
    """Momentum in [0, 1] or None, and epsilon, finite and not negative: floats, or traced."""
    if momentum is not None and not _is_number(momentum, lambda v: 0 <= v <= 1):
        raise _wrong(momentum)(
            f"{call}: momentum={momentum!r}, expected a number in [0, 1], the fraction of the old "
            f"value that is kept (PyTorch's momentum m is 1 - m here), or None for the cumulative "
            f"average; write momentum=0.99."
        )
    if not _is_number(epsilon, lambda v: 0 <= v < math.inf):
        raise _wrong(epsilon)(
            f"{call}: epsilon={epsilon!r}, expected a finite number of at least 0, added to the "
            f"variance; write epsilon=1e-5."
        )
    return _settled(momentum), _settled(epsilon)


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


def check_ghosts(call: str, x: jax.Array, axes: Axes, virtual_batch_size: int) -> tuple[int, int]:
    """The axis of x that ghost batches divide and their number, or an error with fitting sizes."""
    if not axes.reduced:
        raise ValueError(
            f"{call}: virtual_batch_size={virtual_batch_size} but x with shape {x.shape} has no "
            f"batch axis beside its feature axes {axes.features}; leave virtual_batch_size out."
        )
    batch_axis = axes.reduced[0]
    rows = x.shape[batch_axis]
    if not is_integer(virtual_batch_size):
        raise TypeError(
            f"{call}: virtual_batch_size={virtual_batch_size!r}, expected how many rows a group "
            f"has, an integer that divides the {rows} on axis {batch_axis} of x; write "
            f"virtual_batch_size={rows}."
        )
    if virtual_batch_size < 1 or rows % virtual_batch_size != 0:
        remedy = f"export x with {virtual_batch_size}*{rows} rows"  # where their number is a name
        if is_integer(rows):
            remedy = f"write one of {[d for d in range(1, rows + 1) if rows % d == 0]}"
        raise ValueError(
            f"{call}: virtual_batch_size={virtual_batch_size} does not divide the {rows} rows on "
            f"axis {batch_axis} of x with shape {x.shape}; {remedy}."
        )
    if (shards := split_over(x, batch_axis)) > 1 and (rows // shards) % virtual_batch_size != 0:
        within = rows // shards
        raise ValueError(
            f"{call}: virtual_batch_size={virtual_batch_size}, but the type of x has axis "
            f"{batch_axis} of its shape {x.shape} on {shards} devices, {within} rows on each; "
            f"expected groups of rows on one device; write one of "
            f"{[d for d in range(1, within + 1) if within % d == 0]}."
        )
    return batch_axis, rows // virtual_batch_size


def check_count(call: str, x: jax.Array, count: int, virtual_batch_size: int | None) -> None:
    """Refuse training statistics over exactly one value per channel: y would be bias alone."""
    if count == 1 and x.size:
        where, remedy = "over all devices", "Use a larger batch, pool devices with axis_name="
        if virtual_batch_size is not None:
            where = f"in each group of virtual_batch_size={virtual_batch_size}"
            remedy = "Use a larger virtual_batch_size"
        what = f"x with shape {x.shape} has one value per channel {where}"
        error = OneValueError(
            f"{call}: {what}, and its variance is 0, so y would be bias whatever x is; expected at "
            f"least 2 in training. {remedy}, or normalize by the running statistics with "
            f"train=False."
        )
        error.what, error.remedy = what, remedy
        raise error


def resolve(
    call: str,
    axis_name: str | Sequence[str] | None,
    axis_index_groups: Sequence[Sequence[int]] | None,
    without: str = "write axis_name=None",
) -> Pool | None:
    """The pool that these two keywords ask for; None for this device alone.

    `without` is what to do where statistics are global.

    Raises:
      ValueError: the axis is not bound, or the groups are no partition of it into equal parts.
      NotImplementedError: JAX has no collectives over the axis.
    """
    if axis_name is None:
        if axis_index_groups is not None:
            raise ValueError(
                f"{call}: axis_index_groups={axis_index_groups!r} without axis_name; groups are "
                f"indices along a mapped axis, write axis_name= too, or virtual_batch_size= "
                f"for groups of rows under jit."
            )
        return None
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    if not isinstance(names, Sequence) or len({*names}) != len(names):
        raise (ValueError if isinstance(names, Sequence) else TypeError)(
            f"{call}: axis_name={axis_name!r}, expected the name of a mapped axis, or several, "
            f"each once; write axis_name='batch'."
        )
    names = tuple(names)
    mesh = jax.sharding.get_abstract_mesh()
    try:
        size = lax.axis_size(names)
    except NameError:
        remedy = (
            f"Call it under shard_map, pmap or vmap with that axis name; under plain jit "
            f"statistics are global already, {without}."
        )
        apart = {*mesh.axis_names} - {*mesh.manual_axes}
        if mesh.manual_axes and (whole := [name for name in names if name in apart]):
            rest: Any = [name for name in names if name not in apart]
            rest = rest[0] if len(rest) == 1 else tuple(rest)
            remedy = (
                f"This shard_map does not map axis {whole[0]!r} of the mesh, over which statistics "
                f"are global already, {f'write axis_name={rest!r}' if rest else without}."
            )
        raise ValueError(
            f"{call}: axis_name={axis_name!r} is not bound here; bound axes: {_bound()}. {remedy}"
        ) from None
    of_devices = tuple(name for name in names if name in mesh.manual_axes)
    mapped = tuple(name for name in names if name not in mesh.manual_axes)
    # Where types are checked, the index along an axis of devices has a type that differs over it.
    if mapped and mesh.manual_axes and varying_axes(lax.axis_index(mesh.manual_axes[0])):
        raise NotImplementedError(
            f"{call}: axis_name={axis_name!r}, but JAX has no collectives over axis {mapped[0]!r} "
            f"of a vmap where a shard_map checks types; write check_vma=False in the shard_map."
        )
    if axis_index_groups is None:
        return Pool(of_devices, mapped, None, size)
    try:
        groups = tuple(tuple(group) for group in axis_index_groups)
    except TypeError:
        groups = ()
    members = [i for group in groups for i in group]
    integers = all(map(is_integer, members))
    if not integers or sorted(members) != [*range(size)] or len({*map(len, groups)}) != 1:
        raise ValueError(
            f"{call}: axis_index_groups={axis_index_groups!r} must name each index of axis "
            f"{axis_name!r} with size {size} once, in groups of one size; for pairs write "
            f"{[[i, i + 1] for i in range(0, size - size % 2, 2)]}."
        )
    if not isinstance(axis_name, str):
        raise ValueError(
            f"{call}: axis_index_groups with axis_name={axis_name!r}: groups index one axis; "
            f"write one name, or pool over one axis of a mesh that has more."
        )
    return Pool(of_devices, mapped, groups, len(groups[0]))


def _bound() -> list[str]:
    """Names of the mapped axes in scope."""
    from jax._src import core  # JAX has no public list of bound axes; only an error reads it

    names = map(str, core.get_axis_env().axis_sizes)
    return [name for name in names if not name.startswith("_internal")]  # of a pmap without one


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
    mean, var = (by_features(v.astype(wide(v.dtype)), x, axes) for v in state[:2])
    kind = promote(mean.dtype, x.dtype) if jnp.iscomplexobj(x) else mean.dtype
    return State(mean.astype(kind), var, None if state.count is None else _int32(state.count))


def by_features(v: jax.Array, x: jax.Array, axes: Axes) -> jax.Array:
    """Equals v [C], or a table of such rows, sharded by type as the features of x are."""
    before = v.ndim - len(axes.features)
    return sharded_as(v, x, (*[None] * before, *axes.features))


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
