"""Do the shards of a batch hold rows of one kind? An analysis of variance, layer by layer."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._inspection.hooks import Call
from jaxbn._misuse import misuse
from jaxbn._op import devices
from jaxbn._op.arguments.pools import resolve
from jaxbn._op.devices import Pool
from jaxbn._op.state import Moments
from jaxbn.health._distances import in_double
from jaxbn.health._findings import WARNING, Finding, Limits, check_limits, worst_first
from jaxbn.health._rows import over_rows, rows_of_call

ROUNDING = 1e-6  # of float32 means, some eps: a channel whose rows differ by less is a constant


class Shards(NamedTuple):
    """What came to one layer on each shard of a batch: moments over rows, [C, shards].

    A shard is the part of the batch that one device, or one host, has loaded.

    >>> from jaxbn import health
    >>> health.Shards._fields
    ('mean', 'sd')
    """

    mean: Moments  # of the rows' means
    sd: Moments  # of the rows' sds, about the mean of all shards


def by_shard(call: Call, shards: int | str | Sequence[str]) -> Shards:
    """The `Shards` of a layer's x, within a trace.

    Args:
      call: the call of the layer.
      shards: how many consecutive, equal parts the rows of x are; or the mapped axes of which each
        device has a part.

    Returns:
      `Shards`, with all leaves [C, shards], equal on all devices of the mapped axes.

    Raises:
      ValueError: the rows do not divide, or an axis is not bound.

    >>> import jaxbn, jax.numpy as jnp
    >>> from jaxbn import calls
    >>> from jaxbn.health import _shards
    >>> x = jnp.array([[1.0], [3.0], [5.0], [7.0]])
    >>> _shards.by_shard(calls.Call(jaxbn.linen.BatchNorm(), x, None, True), 2).mean.mean.tolist()
    [[2.0, 6.0]]
    """
    rows = rows_of_call("watch", call)
    number, pool = (
        (shards, None) if isinstance(shards, int) else (1, resolve("watch", shards, None))
    )
    *features, n = rows.mean.shape
    if n % number:
        raise ValueError(
            f"watch: shards={number} and x of a batch norm layer has {n} rows, expected a number "
            f"that divides the rows; write shards=jax.device_count(), or the name of the mapped "
            f"axis under shard_map and pmap."
        )

    def split(v: jax.Array) -> jax.Array:
        # Where shardings are types, JAX can split a sharded axis into some numbers of parts only.
        whole = devices.sharded_as(v, v, [None] * v.ndim)
        return whole.reshape(*features, number, n // number)

    valid = rows.count.reshape(*(1,) * (rows.mean.ndim - rows.count.ndim), *rows.count.shape) > 0
    weight = split(jnp.broadcast_to(valid, rows.mean.shape).astype(rows.var.dtype))
    mean, var = split(rows.mean.real), split(rows.var)
    of_means = over_rows(weight, mean)
    count = devices.total(of_means.count.sum(-1), pool)
    center = devices.total((of_means.count * of_means.mean).sum(-1), pool)
    center = (center / jnp.where(count > 0, count, 1))[..., None, None]
    of_sds = over_rows(weight, jnp.sqrt(var + (mean - center) ** 2))
    leaves, kind = jax.tree.flatten(Shards(of_means, of_sds))
    return jax.tree.unflatten(kind, list(_of_all(jnp.stack(leaves), pool)))


def _of_all(v: jax.Array, pool: Pool | None) -> jax.Array:
    """[..., shards] of all devices in the pool: theirs, one after the other on the last axis."""
    if pool is None:
        return v
    for name in pool.mapped:
        v = _on_last(devices.parts(v, name, None))
    return _on_last(devices.gather(v, pool)) if pool.axis_name else v


def _on_last(v: jax.Array) -> jax.Array:
    """[devices, ..., shards] → [..., devices · shards]."""
    return jnp.moveaxis(v, 0, -2).reshape(*v.shape[1:-1], -1)


def apart(of_rows: Moments) -> np.ndarray:
    """The squared distance of each shard from the middle, [C, shards], over what chance gives.

    Over a channel's shards the squares have mean 1 by chance, times (1 - 1 / shards). NaN for a
    channel that cannot be judged: it is constant, or there are no two rows in any shard.
    """
    count, mean, var = (in_double(v).reshape(-1, v.shape[-1]) for v in of_rows)
    rows, shards = count.sum(1, keepdims=True), (count > 0).sum(1, keepdims=True)
    with np.errstate(all="ignore"):
        middle = (count * mean).sum(1, keepdims=True) / rows
        squares = count * (mean - middle) ** 2
        within = (count * var).sum(1, keepdims=True) / (rows - shards)
        constant = squares.sum(1, keepdims=True) + within <= rows * (ROUNDING * middle) ** 2
        return np.where((rows > shards) & (shards > 1) & ~constant, squares / within, np.nan)


def ratios(of_rows: Moments) -> np.ndarray:
    """F of each channel, [C]: variance between shards over variance within, NaN if not judged."""
    shards = (in_double(of_rows.count).reshape(-1, of_rows.count.shape[-1]) > 0).sum(1)
    return apart(of_rows).sum(1) / np.maximum(shards - 1, 1)


def spread(of_rows: Moments) -> float:
    """RMS distance of the shards' values over what chance gives, over all channels.

    >>> import numpy as np, jaxbn
    >>> from jaxbn.health import _shards
    >>> four_rows_a_shard = jaxbn.Moments(
    ...     np.array([[4.0, 4.0]]), np.array([[0.0, 1.0]]), np.array([[1.0, 1.0]])
    ... )
    >>> round(_shards.spread(four_rows_a_shard) ** 2, 3)  # 2 between, 8 / 6 within
    1.5
    """
    of = ratios(of_rows)
    judged = of[~np.isnan(of)]
    return float(np.sqrt(judged.mean())) if judged.size else np.nan


def bounds(shards: Shards, chance: float) -> tuple[float, float]:
    """What the spread of a layer is below, and above, with this chance without skew, each.

    The larger of two spreads, of means and of sds, is held against the upper bound, so each has
    half of the chance. NaN if nothing can be judged.

    >>> import numpy as np, jaxbn
    >>> from jaxbn.health import _shards
    >>> rows = jaxbn.Moments(np.full((1, 8), 16.0), np.zeros((1, 8)), np.ones((1, 8)))
    >>> [round(v, 2) for v in _shards.bounds(_shards.Shards(rows, rows), 1e-5)]
    [0.15, 2.45]
    """
    from scipy.special import fdtri  # type: ignore[import-untyped]  # jax depends on scipy

    count = in_double(shards.mean.count)
    count = count.reshape(-1, count.shape[-1])
    of = (count > 0).sum(1).min(), count.sum(1).min()
    if not 1 < of[0] < of[1]:
        return np.nan, np.nan
    chances = chance, 1 - chance / 2
    low, high = (float(np.sqrt(fdtri(of[0] - 1, of[1] - of[0], p))) for p in chances)
    return low, high


def shards(records: Mapping[str, Any], *, limits: Limits = Limits()) -> list[Finding]:  # noqa: B008
    """Whether the shards of a batch hold rows of one kind; findings, worst first.

    Use it in training on many devices or hosts, whose loader gives each its part of the data. A
    loader that sorts by class, that starts every host from one seed, or that forgets to normalize
    on one host, ends in no error. The test is an analysis of variance by layer, of the rows' means
    and of the rows' sds::

        figure = sqrt(mean over channels of rows * variance between shards / variance within)

    The variance between the rows of a shard, over their number, is the variance that is expected
    between shards, however the pixels of a row are correlated. So each ratio is 1 by chance. For
    Gaussian rows it has the F distribution with (shards - 1, rows - shards) degrees of freedom.
    The mean of such ratios exceeds a high quantile no more often than one of them does, however
    channels depend on one another (Roosta-Khorasani & Székely 2015, for a known variance within
    shards). docs/health.md has measured rates.

    Args:
      records: path → `jaxbn.watch.Record`, of a step that was watched with `shards=`.
      limits: `limits.shards` is the chance that a layer of sound shards is found skewed at one
        look, and the chance that all layers are found repeated.

    Returns:
      A list of `Finding`. `skewed_shards`: the shards of a layer lie farther apart than chance
      puts them. `repeated_shards`: at every layer they lie closer together, as copies do.

    Raises:
      TypeError: records is no dict.
      ValueError: a record has no shards.

    >>> import jax, jax.numpy as jnp, jaxbn
    >>> from jaxbn import health, watch
    >>> model = jaxbn.linen.BatchNorm(use_running_average=False)
    >>> x = jax.random.normal(jax.random.key(0), (64, 8))
    >>> variables = model.init(jax.random.key(1), x)
    >>> def found(x):
    ...     look = watch.linen(model.apply, shards=4)
    ...     seen = look(variables, x, mutable=["batch_stats"])[1]
    ...     return [finding.kind for finding in health.shards(watch.records(seen, variables))]
    >>> found(x), found(x[jnp.argsort(x[:, 0])]), found(jnp.tile(x[:16], (4, 1)))
    ([], ['skewed_shards'], ['repeated_shards'])
    """
    if not isinstance(records, Mapping):
        raise misuse(
            "health.shards", [records], "the records of a step", "health.shards(watch.records(...))"
        )
    check_limits("health.shards", limits)
    if missing := sorted(path for path, r in records.items() if getattr(r, "shards", None) is None):
        raise ValueError(
            f"health.shards: the records of {missing} have no shards, expected those of a step "
            f"that was watched with shards=; write watch.linen(model.apply, shards="
            f"jax.device_count()), or watch.nnx(model, shards=jax.device_count())."
        )
    skewed, repeated = [], []
    for path, record in records.items():
        of: Shards = jax.device_get(record.shards)
        judged = [(figure, v) for v in of if not np.isnan(figure := spread(v))]
        if not judged:
            continue
        figure, worst = max(judged, key=lambda pair: pair[0])
        low, high = bounds(of, limits.shards)
        if figure > high:
            far = tuple(map(int, np.nonzero(ratios(worst) > high**2)[0]))
            shard = int(np.nansum(apart(worst), 0).argmax())
            remedy = (
                f"shuffle before the data is split, and prepare all shards alike: shard {shard} "
                f"lies farthest off"
            )
            skewed.append(Finding(path, "skewed_shards", WARNING, figure, high, far, remedy))
        repeated.append(Finding(path, "repeated_shards", WARNING, figure, low, (), REPEATED))
    if not all(finding.figure < finding.threshold for finding in repeated):
        repeated = []
    return worst_first(skewed + repeated)


REPEATED = (
    "give each shard rows of its own, by jax.process_index() or jax.lax.axis_index in the seed or "
    "in the range of rows: these shards hold copies"
)
