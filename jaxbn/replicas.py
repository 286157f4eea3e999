"""Running statistics that devices, or microbatches, hold apart: check them, bring them together."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn import collectives
from jaxbn.axes import wide
from jaxbn.moments import across
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
    arrays = [
        (jax.tree_util.keystr(path) or "the array", leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if isinstance(leaf, jax.Array)
    ]
    digests = np.full((len(arrays), jax.local_device_count(), 3), NO_DEVICE, np.uint32)
    for rows, (_, leaf) in zip(digests, arrays, strict=True):
        for row, shard in zip(rows, leaf.addressable_shards, strict=False):
            part = "" if collectives.one_row_a_device(leaf) else str(shard.index)
            digest = zlib.crc32(_value(shard.data).tobytes())
            row[:] = (shard.device.id, zlib.crc32(part.encode()), digest)
    # One exchange for all leaves, before any verdict: a process that raised alone would leave
    # the others waiting for it.
    digests = _from_all_processes(digests)
    for i, (name, leaf) in enumerate(arrays):
        pair = _difference(digests[:, i])
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


NO_DEVICE = 2**32 - 1  # in place of a device's id, where a leaf lives on fewer


def _difference(digests: np.ndarray) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Places (process, local device) of two copies of one part that differ.

    Of [processes, local devices, 3]: device, digest of the part it holds, digest of its copy.
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
    """Equals v on the host; the numbers of a random key."""
    is_key = jnp.issubdtype(v.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(v) if is_key else v)


def _from_all_processes(v: np.ndarray) -> np.ndarray:
    """The v of each process, stacked: [processes, *v.shape]."""
    if jax.process_count() == 1:
        return v[None]
    from jax.experimental import multihost_utils  # slow to import, and for many hosts alone

    return np.asarray(multihost_utils.process_allgather(v))


def sync_state(
    state: Any,
    axis_name: str | Sequence[str],
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Any:
    """Equals the running statistics of all devices' data, from those of each device's own::

        mean = Σ w mean_i        var = Σ w (var_i + |mean_i - mean|²)

    with w a device's share of all updates counted, or the same for all where none are (Flax
    counts none). The mean of the variances alone, without the spread of the means, would be too
    small. Call it under shard_map, pmap or vmap, once before evaluating or saving.

    Args:
      state: any tree with a `State`, or a mapping with "mean" and "var", for each layer (Flax's
        batch_stats, an nnx state); everything else in it returns as it came.
      axis_name: mapped axis or axes to pool over.
      axis_index_groups: pool within subgroups of that axis.

    Returns:
      The same tree, equal on all devices; `count` becomes the mean number of updates.

    Raises:
      ValueError: the axis is not bound, the groups are no partition of it, or the tree holds
        no running statistics.

    >>> import jax, jax.numpy as jnp, jaxbn
    >>> local = jaxbn.State(jnp.array([[0.0], [2.0]]), jnp.ones((2, 1)), jnp.array([5, 5]))
    >>> pooled = jax.vmap(lambda s: jaxbn.sync_state(s, "devices"), axis_name="devices")(local)
    >>> pooled.mean[0].tolist(), pooled.var[0].tolist(), pooled.count[0].tolist()
    ([1.0], [2.0], 5)
    """
    pool = collectives.resolve("sync_state", axis_name, axis_index_groups)
    if pool is None:
        raise ValueError(
            "sync_state: axis_name=None, expected the mapped axis over which devices hold "
            'statistics of their own; write jaxbn.sync_state(state, "data") under shard_map, '
            "pmap or vmap."
        )

    def sync(mean: jax.Array, var: jax.Array, count: jax.Array | None) -> Layer:
        # A weight that vanishes beside one update, and is the same for all where there is none.
        weight = jnp.maximum(jnp.float32(0 if count is None else count), 1e-9)
        own = Moments(weight, mean.astype(wide(mean.dtype)), var.astype(wide(var.dtype)))
        pooled = across(own, pool)
        if count is not None:
            count = collectives.total(count, pool) // pool.devices
        return pooled.mean, pooled.var, count

    return _by_layer("sync_state", sync, state)


def merge_updates(states: Any, momentum: float | None = 0.99) -> Any:
    """Equals one update by the pooled moments of k microbatches, from k updates side by side::

        mean = Σ mean_i / k      var = Σ var_i / k + Σ |mean_i - mean|² / (k (1 - momentum))

    where state i is the *same* start, updated by microbatch i alone. The last term is the
    spread of the microbatches' means, which the update has scaled by (1 - momentum)². So
    gradient accumulation by `lax.scan` can train on k microbatches and leave the running
    statistics that one large batch would have left, up to rounding.

    Args:
      states: as in `sync_state`, leaves stacked [k, ...] as `lax.scan` stacks them.
        Microbatches of one size.
      momentum: the one they were updated with; None for the cumulative average.

    Raises:
      ValueError: momentum is 1, with which no update leaves a trace, or out of range; or the
        tree holds no running statistics, or no count that momentum=None needs.

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
        return middle, pooled, last

    return _by_layer("merge_updates", merge, states)


Layer = tuple[jax.Array, jax.Array, jax.Array | None]  # mean, var, and count where it is kept


def _by_layer(call: str, f: Callable[..., Layer], tree: Any) -> Any:
    """The tree with `f(mean, var, count or None)` in place of every layer's statistics."""

    def is_layer(v: Any) -> bool:
        return isinstance(v, State) or (isinstance(v, Mapping) and {"mean", "var"} <= set(v))

    def update(v: Any) -> Any:
        if not is_layer(v):
            return v
        old = v._asdict() if isinstance(v, State) else v
        boxes = [old.get(name) for name in State._fields]  # arrays, or nnx variables around them
        arrays = (None if box is None else jnp.asarray(*jax.tree.leaves(box)) for box in boxes)
        new = {
            name: jax.tree.unflatten(jax.tree.structure(box), [array])
            for name, box, array in zip(State._fields, boxes, f(*arrays), strict=True)
            if box is not None
        }
        return v._replace(**new) if isinstance(v, State) else type(v)({**old, **new})

    leaves = jax.tree.leaves(tree, is_leaf=is_layer)
    if leaves and not any(map(is_layer, leaves)):
        raise ValueError(
            f"{call}: no running statistics in a tree with {len(leaves)} leaves; expected a State, "
            f'or a mapping with "mean" and "var", for each layer; write {call}(batch_stats, ...).'
        )
    return jax.tree.map(update, tree, is_leaf=is_layer)
