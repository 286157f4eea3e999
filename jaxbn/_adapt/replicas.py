"""Running statistics of several devices or microbatches: compare them, and make them one."""

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._inspection.layers import holds_statistics, state_of, with_state
from jaxbn._inspection.stacking import feature_axes
from jaxbn._op import devices as devices_
from jaxbn._op.arguments.pools import resolve
from jaxbn._op.arguments.values import check_real
from jaxbn._op.axes import wide
from jaxbn._op.pooling import across
from jaxbn._op.state import Moments, State


def assert_replicated(state: Any) -> None:
    """Raises an error unless every device holds the same bits of every array in `state`.

    Use it after training on several devices, before you save or evaluate. If devices trained with
    statistics of their own, a checkpoint holds the statistics of one device only.

    Two kinds of copies are compared: the copies of an array that is replicated over the mesh or
    over some of its axes, and the rows of an array [devices, ...] with one row on each device, as
    `pmap` and `shard_map(out_specs=P("devices"))` return it. In a program of several processes all
    processes must call `assert_replicated`, which compares the copies of all of them.

    Args:
      state: a `State`, Flax's `batch_stats`, an nnx state, or any tree of arrays of any shape and
        dtype.

    Raises:
      AssertionError: copies differ. The message names the leaf, the devices and the difference.

    >>> import jaxbn
    >>> _, state = jaxbn.init(3)
    >>> jaxbn.assert_replicated(state)
    """
    arrays = [
        (jax.tree_util.keystr(path) or "the array", leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if isinstance(leaf, jax.Array)
    ]
    digests = np.full((len(arrays), jax.local_device_count(), 3), NO_DEVICE, np.uint32)
    for rows, (_, leaf) in zip(digests, arrays, strict=True):
        for row, shard in zip(rows, leaf.addressable_shards, strict=False):
            part = "" if devices_.one_row_a_device(leaf) else str(shard.index)
            digest = zlib.crc32(_value(shard.data).tobytes())
            row[:] = (shard.device.id, zlib.crc32(part.encode()), digest)
    # All leaves are exchanged before any error is raised. If one process raised first, the others
    # would wait for it forever.
    digests = _from_all_processes(digests)
    for i, (name, leaf) in enumerate(arrays):
        pair = _unequal_copies(digests[:, i])
        if pair is None:
            continue
        values = np.stack([_value(shard.data) for shard in leaf.addressable_shards])
        values = _from_all_processes(values).astype(np.complex128)
        error = np.abs(values[pair[0]] - values[pair[1]]).max()
        devices = " and ".join(str(digests[p, i, d, 0]) for p, d in pair)
        processes = f" (processes {pair[0][0]} and {pair[1][0]})" if len(digests) > 1 else ""
        raise AssertionError(
            f"assert_replicated: {name} differs between devices {devices}{processes}, by "
            f"{error:.3g} at most; each device trained with statistics of its own. "
            f"Pool them with axis_name= in training, or once with "
            f"jaxbn.sync_state(state, axis_name)."
        )


NO_DEVICE = 2**32 - 1  # in place of a device's id, for a leaf that is on fewer devices


def _unequal_copies(digests: np.ndarray) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """The places (process, local device) of two unequal copies of one part; None if all agree.

    digests is [processes, local devices, 3]: the device, the digest of the name of the part that
    the device holds, and the digest of the numbers it holds.
    """
    first: dict[int, tuple[tuple[int, int], int]] = {}
    for process, local in np.ndindex(digests.shape[:2]):
        device, part, digest = digests[process, local].tolist()
        if device == NO_DEVICE:
            continue
        place, expected = first.setdefault(part, ((process, local), digest))
        if digest != expected:
            return place, (process, local)
    return None


def _value(v: jax.Array) -> np.ndarray:
    """Equals v on the host. A random key becomes its numbers."""
    is_key = jnp.issubdtype(v.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(v) if is_key else v)


def _from_all_processes(v: np.ndarray) -> np.ndarray:
    """The v of each process, stacked: [processes, *v.shape]."""
    if jax.process_count() == 1:
        return v[None]
    from jax.experimental import multihost_utils  # slow to import, and rarely needed

    return np.asarray(multihost_utils.process_allgather(v))


def sync_state(
    state: Any,
    axis_name: str | Sequence[str],
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Any:
    """Equals the running statistics of all devices' data, from each device's own statistics::

        mean = Σ w_i mean_i        var = Σ w_i (var_i + |mean_i - mean|²)

    w_i is device i's share of all counted updates. If updates are not counted (Flax counts none),
    all devices have the same share. The average of the variances alone would be too small, because
    it leaves out how far apart the means are. If devices train with statistics of their own, call
    `sync_state` once before you evaluate or save, under shard_map, pmap or vmap.

    Args:
      state: any tree that holds a `State`, or a mapping with arrays "mean" and "var", for each
        layer: Flax's batch_stats or an nnx state, for example. mean and var are [C] on each device.
        Other values are returned as they are.
      axis_name: mapped axis or axes to pool over.
      axis_index_groups: pool within groups of devices on that axis.

    Returns:
      The tree with the pooled statistics, equal on all devices. mean and var narrower than float32
      become float32. `count` becomes the mean number of updates.

    Raises:
      ValueError: the axis is not bound, the groups are no partition of it, or the tree holds
        no running statistics.

    >>> import jax, jax.numpy as jnp, jaxbn
    >>> local = jaxbn.State(jnp.array([[0.0], [2.0]]), jnp.ones((2, 1)), jnp.array([5, 5]))
    >>> pooled = jax.vmap(lambda s: jaxbn.sync_state(s, "devices"), axis_name="devices")(local)
    >>> pooled.mean[0].tolist(), pooled.var[0].tolist(), pooled.count[0].tolist()
    ([1.0], [2.0], 5)
    """
    pool = resolve("sync_state", axis_name, axis_index_groups, "leave sync_state out")
    if pool is None:
        raise ValueError(
            "sync_state: axis_name=None, expected the mapped axis over which devices hold "
            'statistics of their own; write jaxbn.sync_state(state, "data") under shard_map, '
            "pmap or vmap."
        )

    def sync(mean: jax.Array, var: jax.Array, count: jax.Array | None) -> Statistics:
        # The least weight is far below that of one update. If no device counted an update, all
        # have the least weight, so their statistics are averaged and not divided by 0.
        weight = jnp.maximum(jnp.float32(0 if count is None else count), 1e-9)
        if weight.ndim:
            weight = jnp.expand_dims(weight, feature_axes(weight.shape, mean.shape))
        own = Moments(weight, mean.astype(wide(mean.dtype)), var.astype(wide(var.dtype)))
        pooled = across(own, pool)
        if count is not None:
            count = devices_.total(count, pool) // pool.devices
        return pooled.mean, pooled.var, count

    return _by_layer("sync_state", sync, state)


def merge_updates(states: Any, momentum: float | None = 0.99) -> Any:
    """Equals one update by a batch of k microbatches, from k separate updates::

        mean = Σ mean_i / k      var = Σ var_i / k + Σ |mean_i - mean|² / (k (1 - momentum))

    State i is the *same* initial state, updated by microbatch i alone. The last term is the
    variance between the microbatches' means; each update has scaled a mean's deviation by
    1 - momentum. Use `merge_updates` with gradient accumulation: `lax.scan` over k microbatches
    then leaves the running statistics that one large batch would have left, up to rounding.

    Args:
      states: as in `sync_state`, with every leaf stacked to [k, ...], as `lax.scan` stacks them.
        The microbatches have one size.
      momentum: of the updates; None for the cumulative average.

    Returns:
      The tree without the axis k.

    Raises:
      TypeError: momentum is no number.
      ValueError: momentum is 1 (no update then leaves a trace) or out of range, the tree holds no
        running statistics, or it has no count and momentum=None needs one.

    >>> import jax, jax.numpy as jnp, jaxbn
    >>> x, (_, start) = jnp.array([[[0.0], [2.0]], [[4.0], [6.0]]]), jaxbn.init(1)
    >>> def one(x):
    ...     return jaxbn.batch_norm(x, None, start, train=True, momentum=0.5)[1]
    >>> merged, whole = jaxbn.merge_updates(jax.vmap(one)(x), 0.5), one(x.reshape(4, 1))
    >>> merged.mean.tolist(), merged.var.tolist(), whole.var.tolist()
    ([1.5], [3.0], [3.0])
    """
    if momentum is not None:
        expected = (
            "the momentum in [0, 1) of the updates that are merged, or None for the cumulative "
            "average"
        )
        check_real("merge_updates", "momentum", momentum, lambda v: 0 <= v < 1, expected, "0.99")

    def one_update(mean: jax.Array, var: jax.Array, count: jax.Array | None) -> Statistics:
        if momentum is None and count is None:
            raise ValueError(
                "merge_updates: momentum=None, but the states hold no count of updates; expected "
                "states with a count, or the momentum of the updates; write momentum=0.99."
            )
        # All counts are equal; their maximum is also there where k is sharded.
        last = None if count is None else count.max(0)
        share = 1 - momentum if momentum is not None else 1 / last.astype(jnp.float32)  # type: ignore[union-attr]
        share = jnp.expand_dims(share, feature_axes(jnp.shape(share), mean.shape[1:]))
        means, middle = mean.astype(wide(mean.dtype)), mean.astype(wide(mean.dtype)).mean(0)
        spread = jnp.square(jnp.abs(means - middle[None])).mean(0) / share
        pooled = var.astype(wide(var.dtype)).mean(0) + spread
        return middle, pooled, last

    return _by_layer("merge_updates", one_update, states)


Statistics = tuple[jax.Array, jax.Array, jax.Array | None]  # mean, var, and count if it is kept


def _by_layer(call: str, f: Callable[..., Statistics], tree: Any) -> Any:
    """The tree with `f(mean, var, count or None)` in place of every layer's statistics.

    JAX walks the tree, so it may be of any kind, a dataclass for example.
    """

    def update(v: Any) -> Any:
        if not holds_statistics(v):
            return v
        return with_state(v, State(*f(*jax.tree.map(jnp.asarray, state_of(v)))))

    leaves = jax.tree.leaves(tree, is_leaf=holds_statistics)
    if leaves and not any(map(holds_statistics, leaves)):
        raise ValueError(
            f"{call}: no running statistics in a tree with {len(leaves)} leaves; expected a State, "
            f'or a mapping with "mean" and "var", for each layer; write {call}(batch_stats, ...).'
        )
    return jax.tree.map(update, tree, is_leaf=holds_statistics)
