"""Running statistics computed again over a data set, the weights as they are (precise BN)."""

import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxbn._extras import need
from jaxbn._inspection import layers
from jaxbn._inspection.observer import Observe, Record, observer
from jaxbn._inspection.selection import Where, select
from jaxbn._op import arguments, devices
from jaxbn._op.devices import Pool
from jaxbn._op.pooling import across, merge
from jaxbn._op.state import Moments, State
from jaxbn._text import listed


def recalibrate(
    apply: Callable[..., Any],
    model: Any,
    batches: Iterable[Any],
    *,
    where: Where = "*",
    variance: str = "pooled",
    unbiased: bool | None = None,
    axis_name: str | Sequence[str] | None = None,
    limit: int | None = None,
    progress: bool | None = None,
) -> Any:
    """The model with running statistics of a data set under the weights it has now::

        mean = Σ n_i mean_i / N        var = Σ n_i (var_i + |mean_i - mean|²) / N

    over batches i of n_i values, N in all. Each batch is normalized by its own moments on its
    way through the layers, as in training. The statistics of before play no part, and no
    parameter is touched. For weights that were averaged (SWA, EMA), for data of another domain
    (AdaBN). Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3 (precise BN).

    Args:
      apply: `apply(model, batch)`, in training or eval mode: these layers normalize by the batch
        in both, so that eval mode is training without dropout. Linen's must pass keywords on, as
        `functools.partial(net.apply, train=False)` does; that of a tree of `State` returns the
        new tree. The same function in a later call is not compiled again.
      model: linen variables, an nnx model, or a tree with a `State` for each layer.
      batches: any iterable; one batch is in memory at a time. Only the size of their first axes
        may differ, and each size is compiled once: two where the last batch is smaller. Within a
        jit, shard_map or pmap of your own an array [batches, rows, …] is scanned.
      where: the layers to recalibrate: a glob over the paths, several, or a predicate. Others
        keep their statistics and run as `apply` runs them.
      variance: "pooled"; or "mean" for Σ n_i var_i / N, which leaves out how far the batches'
        means lie apart.
      unbiased: var times n / (n - 1), n the values it is of (with "mean": of its batch). None:
        as each layer says; a `State` does not say, which is False.
      axis_name: mapped axis or axes to pool over at the end, where the layers themselves do not.
      limit: at most so many batches.
      progress: a bar; None for one where stderr is a terminal.

    Returns:
      New linen variables, or a new tree; the nnx model, updated. `count`, where it is kept, is
      the number of batches. Values that are not finite raise; in a trace, where nobody can be
      told, a layer leaves such a batch out.

    Raises:
      TypeError: apply does not take, or return, what is said above.
      ValueError: no layer, no batch, a batch of another shape or with moments that are not
        finite, or a layer that no value reaches. Nothing was changed then.

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
    if variance not in ("pooled", "mean"):
        raise ValueError(f'{call}: variance={variance!r}, expected "pooled" or "mean".')
    if limit is not None and limit < 1:
        raise ValueError(f"{call}: limit={limit}, expected at least 1 batch, or None for all.")
    chosen = select(call, model, where)
    pool = arguments.resolve(call, axis_name, None)
    observe, arrays = observer(call, apply, model, tuple(chosen))
    fold = functools.partial(_fold, variance == "pooled", unbiased)
    if isinstance(batches, jax.core.Tracer):
        batches = batches[:limit]
        total, count = _scanned(observe, fold, arrays, batches), len(batches)
    else:
        with _shown(batches, limit, progress) as shown:
            total, count = _looped(observe, fold, arrays, shown)
    if not count:
        raise ValueError(
            f"{call}: no batches, expected at least one. A generator that was used up gives none: "
            f"make it anew for each call."
        )
    if missed := [path for path in chosen if path not in total or _is_empty(total[path])]:
        raise ValueError(
            f"{call}: no value came through {listed(missed)} in {count} batches: apply does not "
            f"run them, or every cell was masked. Run them, or leave them out by where=."
        )
    new = {
        path: _state(layer.state, total[path], variance == "pooled", pool, count)
        for path, layer in chosen.items()
    }
    return layers.replace(model, new)


def reset(model: Any, where: Where = "*") -> Any:
    """The model with running statistics as they are at the start: mean 0, var 1, count 0.

    Args:
      model: linen variables, an nnx model, which is updated, or a tree with a `State` a layer.
      where: the layers to reset, as in `recalibrate`.

    Raises:
      ValueError: no such layer.

    >>> import jax.numpy as jnp, jaxbn
    >>> jaxbn.reset({"bn": jaxbn.State(jnp.ones(1), jnp.zeros(1), None)})
    {'bn': State(mean=Array([0.], dtype=float32), var=Array([1.], dtype=float32), count=None)}
    """

    def start(state: State) -> State:
        count = None if state.count is None else jnp.zeros_like(state.count)
        return State(jnp.zeros_like(state.mean), jnp.ones_like(state.var), count)

    chosen = select("reset", model, where)
    return layers.replace(model, {path: start(layer.state) for path, layer in chosen.items()})


Records = dict[str, Record]
Fold = Callable[[Records | None, Records], tuple[Records, dict[str, jax.Array]]]


def _looped(
    observe: Observe, fold: Fold, arrays: Any, batches: Iterable[Any]
) -> tuple[Records, int]:
    """The records of all batches, and how many those are."""
    total: Records | None = None
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
        _check_finite(before, count - 1)  # of the batch before: the devices work on this one
        before, count = finite, count + 1
    _check_finite(before, count - 1)
    return total or {}, count


def _scanned(observe: Observe, fold: Fold, arrays: Any, batches: jax.Array) -> Records:
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
    pooled: bool, unbiased: bool | None, total: Records | None, new: Records
) -> tuple[Records, dict[str, jax.Array]]:
    """Records of all batches so far, with those of one more; and whether that one is finite."""

    def learn(old: Record | None, new: Record) -> tuple[Record, jax.Array]:
        count, mean, var = new.moments
        flag = new.unbiased if unbiased is None else jnp.full_like(new.unbiased, unbiased)
        # [] or, of stacked layers, [layers], beside [C] or [layers, C].
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
            return Record(batch, flag), finite
        both = merge(old.moments, batch)
        if not pooled:
            share = batch.count / jnp.where(both.count > 0, both.count, 1)
            both = both._replace(var=old.moments.var + (batch.var - old.moments.var) * share)
        return Record(both, flag), finite

    olds = total or dict.fromkeys(new)
    out = {path: learn(olds[path], record) for path, record in new.items()}
    return {p: record for p, (record, _) in out.items()}, {p: ok for p, (_, ok) in out.items()}


def _bessel(n: jax.Array, unbiased: jax.Array) -> jax.Array:
    """N / (n - 1) where that is asked for and there is one."""
    return jnp.where(unbiased & (n > 1), n / jnp.where(n > 1, n - 1, 1), jnp.ones_like(n))


def _state(old: State, record: Record, pooled: bool, pool: Pool | None, batches: int) -> State:
    m = across(record.moments, pool)
    var = m.var * _bessel(m.count, record.unbiased) if pooled else m.var
    # A channel that a mask hides in every batch keeps what it had.
    mean, var = (
        jnp.where(m.count > 0, new, devices.spread(before.astype(new.dtype), new))
        for new, before in ((m.mean, old.mean), (var, old.var))
    )
    count = None if old.count is None else jnp.full_like(old.count, batches)
    return State(_placed(mean, old.mean), _placed(var, old.var), count)


def _placed(new: jax.Array, old: Any) -> Any:
    """New on the devices where old lies, free to move where old is."""
    if not (_known(new) and _known(old)):
        return new
    if isinstance(old, jax.Array) and old.committed:
        return jax.device_put(new, old.sharding)
    host = np.asarray(new)
    return jnp.asarray(host) if isinstance(old, jax.Array) else host


def _known(v: Any) -> bool:
    return not isinstance(v, jax.core.Tracer)


def _is_empty(record: Record) -> bool:
    return _known(record.moments.count) and not np.any(record.moments.count)


def _shown(batches: Iterable[Any], limit: int | None, progress: bool | None) -> Any:
    """A context of the batches, at most `limit`, with a bar as they are gone through."""
    some = itertools.islice(batches, limit)
    if not (sys.stderr.isatty() if progress is None else progress):
        return contextlib.nullcontext(some)
    track = need("recalibrate", "rich.progress").track
    sizes = [n for n in (getattr(batches, "__len__", lambda: None)(), limit) if n is not None]
    total = min(sizes) if sizes and hasattr(batches, "__len__") else limit
    console = need("recalibrate", "rich.console").Console(stderr=True)
    # In a file the bar stands once, full.
    return contextlib.closing(
        track(some, "Recalibrating", total, console=console, transient=console.is_terminal)
    )
