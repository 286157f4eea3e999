"""Running statistics that devices, or microbatches, hold apart: check them, bring them together."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn import collectives
from jaxbn.moments import across, wide
from jaxbn.state import Moments, State


def assert_replicated(state: Any) -> None:
    """Nothing, if every device holds the same bits of every array in `state`; else an error.

    Two kinds of copies are compared: those of an array that is replicated (over the whole mesh
    or over some of its axes), and the rows of an array [devices, ...] with one row a device, as
    `pmap` and `shard_map(out_specs=P("devices"))` return it. In a program of several processes
    each calls it, and the copies of all processes are compared.

    Args:
      state: a `State`, Flax's `batch_stats`, an nnx state, or any tree of arrays.

    Raises:
      AssertionError: some copies differ; it names the leaf, the devices and by how much.

    >>> import jaxbn
    >>> _, state = jaxbn.init(3)
    >>> jaxbn.assert_replicated(state)
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if not isinstance(leaf, jax.Array):
            continue
        name = jax.tree_util.keystr(path)
        copies: dict[Any, tuple[Any, np.ndarray]] = {}
        for shard in leaf.addressable_shards:
            key = None if _one_row_a_device(leaf) else str(shard.index)
            value = np.asarray(shard.data)
            device, first = copies.setdefault(key, (shard.device, value))
            if first.tobytes() != value.tobytes():
                raise AssertionError(
                    f"assert_replicated: {name} differs between devices {device.id} and "
                    f"{shard.device.id}, by {np.abs(first - value).max():.3g} at most; each "
                    f"device trained with statistics of its own. Pool them with axis_name= in "
                    f"training, or once with jaxbn.sync_state(state, axis_name)."
                )
        if jax.process_count() > 1 and (leaf.is_fully_replicated or _one_row_a_device(leaf)):
            _compare_processes(name, next(iter(copies.values()))[1])


def _one_row_a_device(leaf: jax.Array) -> bool:
    """Whether leaf is [devices, ...] with a row on each."""
    rows = leaf.sharding.shard_shape(leaf.shape)[0] if leaf.ndim > 1 else 0
    devices = len(leaf.sharding.device_set)
    return devices > 1 and rows == 1 and leaf.shape[0] == devices


def _compare_processes(name: str, value: np.ndarray) -> None:
    from jax.experimental import multihost_utils  # slow to import, and for many hosts alone

    digest = np.asarray([zlib.crc32(value.tobytes())], np.uint32)
    digests = np.asarray(multihost_utils.process_allgather(digest)).reshape(-1)
    if (digests != digests[0]).any():
        other = int(np.argmax(digests != digests[0]))
        raise AssertionError(
            f"assert_replicated: {name} differs between processes 0 and {other}; pool statistics "
            f"with axis_name= in training, or once with jaxbn.sync_state(state, axis_name)."
        )


def sync_state(
    state: Any,
    axis_name: str | Sequence[str],
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Any:
    """Equals the running statistics of all devices' data, from those of each device's own.

        mean = Σ w mean_i        var = Σ w (var_i + |mean_i - mean|²)

    with w a device's share of all updates counted, or the same for all where none are (Flax
    counts none). The mean of the variances alone, without the spread of the means, would be too
    small. Call it under shard_map, pmap or vmap, once before evaluating or saving.

    Args:
      state: a `State`, or any tree of mappings that hold "mean" and "var" (Flax's batch_stats,
        `nnx.to_pure_dict` of an nnx state); everything else in it returns as it came.
      axis_name: mapped axis or axes to pool over.
      axis_index_groups: pool within subgroups of that axis.

    Returns:
      The same tree, equal on all devices; `count` becomes the mean number of updates.

    Raises:
      ValueError: the axis is not bound, or the groups are no partition of it.

    >>> import jax, jax.numpy as jnp, jaxbn
    >>> local = jaxbn.State(jnp.array([[0.0], [2.0]]), jnp.ones((2, 1)), jnp.array([5, 5]))
    >>> pooled = jax.vmap(lambda s: jaxbn.sync_state(s, "devices"), axis_name="devices")(local)
    >>> pooled.mean[0].tolist(), pooled.var[0].tolist(), pooled.count[0].tolist()
    ([1.0], [2.0], 5)
    """
    pool = collectives.resolve("sync_state", axis_name, axis_index_groups)
    assert pool is not None

    def sync(mean: jax.Array, var: jax.Array, count: jax.Array | None) -> Layer:
        # A weight that vanishes beside one update, and is the same for all where there is none.
        weight = jnp.maximum(jnp.float32(0 if count is None else count), 1e-9)
        own = Moments(weight, mean.astype(wide(mean.dtype)), var.astype(wide(var.dtype)))
        pooled = across(own, pool)
        if count is not None:
            count = collectives.total(count, pool) // pool.devices
        return pooled.mean.astype(mean.dtype), pooled.var.astype(var.dtype), count

    return _by_layer(sync, state)


def merge_updates(states: Any, momentum: float | None = 0.99) -> Any:
    """Equals one update by the pooled moments of k microbatches, from k updates side by side.

        mean = Σ mean_i / k      var = Σ var_i / k + Σ |mean_i - mean|² / (k (1 - momentum))

    where state i is the *same* start, updated by microbatch i alone. The last term is the
    spread of the microbatches' means, which the update has scaled by (1 - momentum)². So
    gradient accumulation by `lax.scan` can train on k microbatches and leave the running
    statistics that one large batch would have left, up to rounding.

    Args:
      states: leaves stacked [k, ...], as `lax.scan` stacks them: a `State`, or any tree of
        mappings that hold "mean" and "var". Microbatches of one size.
      momentum: the one they were updated with; None for the cumulative average.

    Raises:
      ValueError: momentum is 1, with which no update leaves a trace, or out of range.

    >>> import jax, jax.numpy as jnp, jaxbn
    >>> x, (_, start) = jnp.array([[[0.0], [2.0]], [[4.0], [6.0]]]), jaxbn.init(1)
    >>> def one(x):
    ...     return jaxbn.batch_norm(x, None, start, train=True, momentum=0.5)[1]
    >>> merged, whole = jaxbn.merge_updates(jax.vmap(one)(x), 0.5), one(x.reshape(4, 1))
    >>> merged.mean.tolist(), merged.var.tolist(), whole.var.tolist()
    ([1.5], [3.0], [3.0])
    """
    if momentum is not None and not 0 <= momentum < 1:
        raise ValueError(
            f"merge_updates: momentum={momentum!r}, expected the momentum in [0, 1) of the "
            f"updates that are merged, or None for the cumulative average; write momentum=0.99."
        )

    def merge(mean: jax.Array, var: jax.Array, count: jax.Array | None) -> Layer:
        if momentum is None and count is None:
            raise ValueError(
                "merge_updates: momentum=None, but the states hold no count of updates; expected "
                "those of the cumulative average, or the momentum of the updates: momentum=0.99."
            )
        share = 1 / count[0].astype(jnp.float32) if momentum is None else 1 - momentum  # type: ignore[index]
        means, middle = mean.astype(wide(mean.dtype)), mean.astype(wide(mean.dtype)).mean(0)
        spread = jnp.square(jnp.abs(means - middle[None])).mean(0) / share
        pooled = var.astype(wide(var.dtype)).mean(0) + spread
        last = None if count is None else count[0]
        return middle.astype(mean.dtype), pooled.astype(var.dtype), last

    return _by_layer(merge, states)


Layer = tuple[jax.Array, jax.Array, jax.Array | None]  # mean, var, and count where it is kept


def _by_layer(f: Callable[..., Layer], tree: Any) -> Any:
    """The tree with `f(mean, var, count or None)` in place of every layer's statistics."""
    if isinstance(tree, State):
        return State(*f(*map(jnp.asarray, tree)))  # type: ignore[arg-type]
    if not isinstance(tree, Mapping):
        return tree
    kind: Any = type(tree)
    if not {"mean", "var"} <= set(tree):
        return kind({key: _by_layer(f, value) for key, value in tree.items()})
    count = jnp.asarray(tree["count"]) if "count" in tree else None
    mean, var, count = f(jnp.asarray(tree["mean"]), jnp.asarray(tree["var"]), count)
    new = {"mean": mean, "var": var, "count": count}
    return kind({key: new.get(key, value) for key, value in tree.items()})
