"""Running statistics computed again over a data set, with the weights unchanged (precise BN)."""

import contextlib
import functools
import itertools
import numbers
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxbn._extras import need
from jaxbn._inspection import layers
from jaxbn._inspection.observer import Observe, Observed, observer
from jaxbn._inspection.selection import Where, select
from jaxbn._inspection.stacking import feature_axes
from jaxbn._misuse import check_batches, is_unbound, misuse, takes
from jaxbn._op import devices
from jaxbn._op.arguments.pools import resolve
from jaxbn._op.arguments.values import check_flag
from jaxbn._op.axes import is_integer
from jaxbn._op.devices import Pool
from jaxbn._op.pooling import across, merge
from jaxbn._op.state import Moments, State
from jaxbn._text import listed

WRITE = (
    "recalibrate(functools.partial(net.apply, train=False), variables, batches), or of nnx "
    "recalibrate(lambda model, x: model(x), model, batches)"
)
EXPECTED = "apply(model, batch), the model and batches"


@takes(EXPECTED, WRITE)
def recalibrate(
    apply: Callable[..., Any],
    model: Any,
    batches: Iterable[Any],
    *,
    where: Where = "*",
    variance: str = "pooled",
    unbiased: bool | None = None,
    momentum: float = 0.0,
    axis_name: str | Sequence[str] | None = None,
    limit: int | None = None,
    progress: bool | None = None,
) -> Any:
    """The model with the running statistics of a data set, under the model's present weights::

        mean = Σ n_i mean_i / N        var = Σ n_i (var_i + |mean_i - mean|²) / N

    over batches i of n_i values, N values in all. Running statistics are an average over past
    weights. Use `recalibrate` when the present weights differ from those: after averaging weights
    (SWA, EMA), or for data of another domain (AdaBN). Every batch passes through the model once.
    Each layer normalizes the batch by the batch's own moments, as in training. The old statistics
    have no influence, unless `momentum` keeps some of them, and no parameter changes. Wu & Johnson
    2021, "Rethinking 'Batch' in BatchNorm", section 3 (precise BN).

    Args:
      apply: `apply(model, batch)`, in training or eval mode. The layers normalize by the batch in
        both modes, so eval mode is training without dropout. Linen's apply must pass keywords on,
        as `functools.partial(net.apply, train=False)` does. For a tree of `State`, apply returns
        the new tree. A later call with the same function compiles nothing.
      model: linen variables, an nnx model, or a tree with a `State` for each layer.
      batches: any iterable. One batch is in memory at a time. Only the first axes may differ in
        size, and each size is compiled once: two sizes if the last batch is smaller. Inside your
        own jit, shard_map or pmap, pass an array [batches, rows, …], which is scanned.
      where: the layers to recalibrate: a glob over the paths, several globs, or a predicate. Other
        layers keep their statistics and run as `apply` runs them.
      variance: "pooled" for the formula above, or "mean" for Σ n_i var_i / N, which ignores how
        far apart the batches' means are.
      unbiased: whether var is multiplied by n / (n - 1). With "pooled" n is the number of values
        in the data set, with "mean" the number in the batch. None: each layer's own setting; a
        plain `State` has none and counts as False.
      momentum: the fraction of the old statistics to keep: mean and var become
        `momentum * old + (1 - momentum) * new`. With 0 the old statistics have no influence, not
        even NaN. Use it for few images of another domain, as `N / (N + n)`: the old statistics
        weigh as much as N images beside these n (Schneider et al. 2020, "Improving robustness
        against common corruptions by covariate shift adaptation", section 2).
      axis_name: mapped axis or axes to pool over at the end, if the layers do not pool themselves.
      limit: use at most this many batches.
      progress: whether to show a bar; None shows a bar if stderr is a terminal.

    Returns:
      New linen variables, a new tree, or the nnx model itself, updated. mean and var are [C] in
      float32 or wider. `count`, if the layer keeps one, is the number of batches. Of a layer with
      domains, each domain has the statistics of its own rows; a domain without a row keeps its
      own, so one call may recalibrate one domain.

    Raises:
      TypeError: apply does not take or return what is said above, momentum or limit is no number,
        unbiased is no bool, or where is none of these three.
      ValueError: there is no layer or no batch, a batch has another shape, a batch has moments that
        are not finite, or no value reaches a layer. Nothing was changed then. Under jit nothing
        can be raised for moments that are not finite; a layer skips that batch.

    >>> import jax.numpy as jnp, jaxbn
    >>> _, state = jaxbn.init(1)
    >>> def apply(state, x):
    ...     return jaxbn.batch_norm(x, None, state, train=True)[1]
    >>> batches = [jnp.array([[0.0], [2.0]]), jnp.array([[4.0], [4.0]])]
    >>> state = jaxbn.recalibrate(apply, state, batches)
    >>> state.mean.tolist(), state.var.tolist(), int(state.count)
    ([2.5], [2.75], 2)
    """
    call = "recalibrate"
    if not callable(apply) or layers.is_nnx(apply) or is_unbound(apply):
        raise misuse(call, (apply, model, batches), EXPECTED, WRITE)
    if not isinstance(batches, jax.core.Tracer):
        check_batches(call, batches, f"{call}(apply, model, [x])")
    if not isinstance(variance, str) or variance not in ("pooled", "mean"):
        raise ValueError(f'{call}: variance={variance!r}, expected "pooled" or "mean".')
    number = isinstance(momentum, numbers.Real)
    if not number or not 0 <= momentum <= 1:
        raise (ValueError if number else TypeError)(
            f"{call}: momentum={momentum!r}, expected the fraction of the old statistics to keep, "
            f"a number in [0, 1]; write momentum=N / (N + n) for n images beside old statistics "
            f"that weigh as N images."
        )
    if limit is not None and not (is_integer(limit) and limit >= 1):
        raise (ValueError if is_integer(limit) else TypeError)(
            f"{call}: limit={limit!r}, expected at least 1 batch, or None for all."
        )
    if unbiased is not None:
        check_flag(call, "unbiased", unbiased, "None takes each layer's own setting.")
    chosen = select(call, model, where)
    pool = resolve(call, axis_name, None)
    observe, arrays = observer(call, apply, model, tuple(chosen))
    fold = functools.partial(_fold, variance == "pooled", unbiased)
    if isinstance(batches, jax.core.Tracer):
        batches = batches[:limit]
        total, count = _scanned(observe, fold, arrays, batches), len(batches)
    else:
        with _shown(batches, limit, progress) as shown:
            try:
                total, count = _looped(observe, fold, arrays, shown)
            except Exception as error:
                if hasattr(batches, "shape"):
                    error.add_note(
                        f"{call}: batches is one array of shape {batches.shape}, each row of which "
                        f"is taken as a batch; for one batch write {call}(apply, model, [x])."
                    )
                raise
    if not count:
        raise ValueError(
            f"{call}: no batches, expected at least one. A generator that was used up gives none; "
            f"make a new generator for each call."
        )
    if missed := [path for path in chosen if path not in total or _is_empty(total[path])]:
        raise ValueError(
            f"{call}: no value came through {listed(missed)} in {count} batches: apply does not "
            f"run these layers, or every cell was masked. Run them, or leave them out by where=."
        )
    new = {
        path: _state(layer.state, total[path], variance == "pooled", momentum, pool, count)
        for path, layer in chosen.items()
    }
    return layers.replace(model, new)


def reset(model: Any, where: Where = "*") -> Any:
    """The model with the running statistics of a new model: mean 0, var 1, count 0.

    Use it before training continues on other data, so that the old statistics have no influence.

    Args:
      model: linen variables, an nnx model, or a tree with a `State` for each layer.
      where: the layers to reset, as in `recalibrate`.

    Returns:
      New linen variables, a new tree, or the nnx model itself, updated.

    Raises:
      ValueError: the model has no such layer.

    >>> import jax.numpy as jnp, jaxbn
    >>> jaxbn.reset({"bn": jaxbn.State(jnp.ones(1), jnp.zeros(1), None)})
    {'bn': State(mean=Array([0.], dtype=float32), var=Array([1.], dtype=float32), count=None)}
    """

    def start(state: State) -> State:
        count = None if state.count is None else jnp.zeros_like(state.count)
        return State(jnp.zeros_like(state.mean), jnp.ones_like(state.var), count)

    chosen = select("reset", model, where)
    return layers.replace(model, {path: start(layer.state) for path, layer in chosen.items()})


Observations = dict[str, Observed]
Fold = Callable[[Observations | None, Observations], tuple[Observations, dict[str, jax.Array]]]


def _looped(
    observe: Observe, fold: Fold, arrays: Any, batches: Iterable[Any]
) -> tuple[Observations, int]:
    """What the layers saw in all batches, and the number of batches."""
    total: Observations | None = None
    count, first, before = 0, None, dict[str, jax.Array]()
    for batch in batches:
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batch)]
        first = shapes if first is None else first
        if [s[1:] for s in shapes] != [s[1:] for s in first]:
            raise ValueError(
                f"recalibrate: batch {count} has shapes {shapes}, but batch 0 has {first}; only "
                f"the size of the first axis may differ. Resize, or pad and mask."
            )
        total, finite = fold(total, observe(arrays, batch))
        # Reading a flag waits for it. The flags of the batch before are read while the devices
        # work on this batch.
        _check_finite(before, count - 1)
        before, count = finite, count + 1
    _check_finite(before, count - 1)
    return total or {}, count


def _scanned(observe: Observe, fold: Fold, arrays: Any, batches: jax.Array) -> Observations:
    """What the layers saw in all batches of an array [batches, rows, …], inside a trace."""
    if not len(batches):
        return {}
    first, _ = fold(None, observe(arrays, batches[0]))
    return lax.scan(lambda total, x: fold(total, observe(arrays, x)), first, batches[1:])[0]


def _check_finite(finite: dict[str, jax.Array], batch: int) -> None:
    bad = [path for path, flag in finite.items() if _known(flag) and not flag]
    if bad:
        raise ValueError(
            f"recalibrate: batch {batch} has moments that are not finite in {listed(bad)}; nothing "
            f"was changed. Leave that batch out, or mask its NaN cells."
        )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fold(
    pooled: bool, unbiased: bool | None, total: Observations | None, new: Observations
) -> tuple[Observations, dict[str, jax.Array]]:
    """The total with one more batch, and path → whether that batch's moments are finite."""

    def learn(old: Observed | None, new: Observed) -> tuple[Observed, jax.Array]:
        count, mean, var = new.moments
        flag = new.unbiased if unbiased is None else jnp.full_like(new.unbiased, unbiased)
        # count and flag are [], or [layers] if the layer was scanned; mean is [C] or [layers, C].
        count, flag = (
            devices.spread(v.reshape(v.shape + (1,) * (mean.ndim - v.ndim)), mean)
            for v in (count, flag)
        )
        finite = jnp.all(jnp.isfinite(mean) & jnp.isfinite(var))
        if not pooled:
            var = var * _bessel(count, flag)
        batch = Moments(count.astype(var.dtype), mean, var)
        batch = Moments(*(jnp.where(finite, v, jnp.zeros_like(v)) for v in batch))
        if old is None:
            return Observed(batch, flag), finite
        both = merge(old.moments, batch)
        if not pooled:
            share = batch.count / jnp.where(both.count > 0, both.count, 1)
            both = both._replace(var=old.moments.var + (batch.var - old.moments.var) * share)
        return Observed(both, flag), finite

    olds = total or dict.fromkeys(new)
    out = {path: learn(olds[path], observed) for path, observed in new.items()}
    return {p: observed for p, (observed, _) in out.items()}, {p: ok for p, (_, ok) in out.items()}


def _bessel(n: jax.Array, unbiased: jax.Array) -> jax.Array:
    """Equals n / (n - 1) where `unbiased` is True and n > 1, else 1."""
    return jnp.where(unbiased & (n > 1), n / jnp.where(n > 1, n - 1, 1), jnp.ones_like(n))


def _state(
    old: State,
    observed: Observed,
    pooled: bool,
    momentum: float,
    pool: Pool | None,
    batches: int,
) -> State:
    m = across(observed.moments, pool)
    var = m.var * _bessel(m.count, observed.unbiased) if pooled else m.var

    def step(before: jax.Array, new: jax.Array) -> jax.Array:
        before = devices.spread(before.astype(new.dtype), new)
        if momentum:  # NaN stays NaN when it is multiplied by 0
            new = momentum * before + (1 - momentum) * new
        # A channel that a mask hides in every batch keeps its old statistics.
        return jnp.where(m.count > 0, new, before)

    mean, var = step(old.mean, m.mean), step(old.var, var)
    count = old.count
    if count is not None:
        before, count = jnp.asarray(count), jnp.full_like(count, batches)
        if before.ndim:  # of layers and domains; a domain without a row keeps its own
            seen = jnp.any(m.count > 0, tuple(feature_axes(before.shape, m.count.shape)))
            count = jnp.where(seen, count, before)
    return State(_placed_as(mean, old.mean), _placed_as(var, old.var), count)


def _placed_as(new: jax.Array, old: Any) -> Any:
    """`new` on the devices of `old`; not committed to a device if `old` is not."""
    if not (_known(new) and _known(old)):
        return new
    if isinstance(old, jax.Array) and old.committed:
        return jax.device_put(new, old.sharding)
    host = np.asarray(new)
    return jnp.asarray(host) if isinstance(old, jax.Array) else host


def _known(v: Any) -> bool:
    return not isinstance(v, jax.core.Tracer)


def _is_empty(observed: Observed) -> bool:
    return _known(observed.moments.count) and not np.any(observed.moments.count)


def _shown(batches: Iterable[Any], limit: int | None, progress: bool | None) -> Any:
    """A context that gives at most `limit` batches, and shows a bar while they are read."""
    some = itertools.islice(batches, limit)
    if not (sys.stderr.isatty() if progress is None else progress):
        return contextlib.nullcontext(some)
    track = need("recalibrate", "rich.progress").track
    sizes = [n for n in (getattr(batches, "__len__", lambda: None)(), limit) if n is not None]
    total = min(sizes) if sizes and hasattr(batches, "__len__") else limit
    console = need("recalibrate", "rich.console").Console(stderr=True)
    # On a terminal the bar vanishes at the end. In a file only the full bar is written.
    return contextlib.closing(
        track(some, "Recalibrating", total, console=console, transient=console.is_terminal)
    )
