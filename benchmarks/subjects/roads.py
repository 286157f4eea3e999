"""The roads over eight devices: each makes a function of whole arrays from a batch norm.

A batch norm here is `bn(x, params, state, mask=, axis_name=, axis_index_groups=)`, written for
what one device holds; `road.build(bn)` is `f(x, params, state, mask)` on the pooled batch, and
`road.reference(bn)` is the same batch norm on one device, which it must equal. In place of a mask
any tree of arrays with a row for each of x's does.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

DEVICES = 8
GROUPS = {"contiguous": [[0, 1, 2, 3], [4, 5, 6, 7]], "interleaved": [[0, 2, 4, 6], [1, 3, 5, 7]]}


def one_device(bn):
    return lambda x, params, state, mask: bn(x, params, state, mask=mask)


class Road(NamedTuple):
    build: Callable[..., Any]
    reference: Callable[..., Any] = one_device
    place: Callable[..., Any] = lambda *arrays: arrays  # of (x, params, state, mask, dy)


def mesh(sizes, names, kind=AxisType.Auto):
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(names))


def shard_map(sizes=(DEVICES,), names=("data",), check_vma=True, features=None, groups=None):
    """Splits x and mask over `names`, features over the mesh axis `features` too."""
    axes = tuple(name for name in names if name != features)
    axes = axes if len(axes) > 1 else axes[0]
    spec = P(axes, None, None, features)
    state_spec = P(features) if groups is None else P(axes)

    def build(bn):
        def local(x, params, state, mask):
            y, state = bn(x, params, state, mask=mask, axis_name=axes, axis_index_groups=groups)
            return y, state if groups is None else jax.tree.map(lambda v: v[None], state)

        return jax.shard_map(
            local,
            mesh=mesh(sizes, names),
            in_specs=(spec, P(features), P(features), P(axes)),
            out_specs=(spec, state_spec),
            check_vma=check_vma,
        )

    return build


def by_device(transform, groups=None):
    """Maps, by pmap or vmap, over a leading axis of devices."""

    def build(bn):
        def local(x, params, state, mask):
            return bn(x, params, state, mask=mask, axis_name="data", axis_index_groups=groups)

        def whole(x, params, state, mask):
            def split(v):
                return v.reshape(DEVICES, -1, *v.shape[1:])

            mapped = transform(
                local,
                axis_name="data",
                in_axes=(0, None, None, 0),
                out_axes=(0, None if groups is None else 0),
            )
            y, state = mapped(split(x), params, state, jax.tree.map(split, mask))
            return jax.tree.map(lambda v: v.reshape(x.shape), y), state

        return whole

    return build


def placed(mesh: Mesh, features=None):
    """Arrays sharded over the mesh's "data", features over `features`."""

    def place(x, params, state, mask, dy):
        def put(arrays, *spec):
            return jax.device_put(arrays, NamedSharding(mesh, P(*spec)))

        x, dy = put((x, dy), "data", None, None, features)
        params, state = put((params, state), features)
        return x, params, state, put(mask, "data"), dy

    return place


def grouped(groups):
    """Each group of devices as one device; the state of each device, stacked."""

    def reference(bn):
        def whole(x, params, state, mask):
            device = np.arange(len(x)) // (len(x) // DEVICES)
            y, states = jnp.zeros_like(x), [None] * DEVICES
            for group in groups:
                rows = np.flatnonzero(np.isin(device, group))
                part = None if mask is None else mask[rows]
                y_group, state_group = bn(x[rows], params, state, mask=part)
                y = y.at[rows].set(y_group)
                for i in group:
                    states[i] = state_group
            return y, jax.tree.map(lambda *v: jnp.stack(v), *states)

        return whole

    return reference


def ghost(size):
    """Ghost batches of `size` rows each, under jit."""
    return lambda bn: one_device(functools.partial(bn, virtual_batch_size=size))


def ghosts(size):
    """Each ghost batch alone; the state of the whole batch."""

    def reference(bn):
        def whole(x, params, state, mask):
            parts = []
            for i in range(0, len(x), size):
                rows = slice(i, i + size)
                part = None if mask is None else mask[rows]
                parts.append(bn(x[rows], params, state, mask=part)[0])
            return jnp.concatenate(parts), bn(x, params, state, mask=mask)[1]

        return whole

    return reference


@functools.cache
def roads(ghost_size: int) -> dict[str, Road]:
    auto, explicit = mesh((DEVICES,), ("data",)), mesh((DEVICES,), ("data",), AxisType.Explicit)
    grid = mesh((4, 2), ("data", "model"))
    table = {
        "pmap": Road(by_device(jax.pmap)),
        "shard_map": Road(shard_map()),
        "shard_map, check_vma=False": Road(shard_map(check_vma=False)),
        "shard_map, two axes": Road(shard_map((4, 2), ("rows", "columns"))),
        "shard_map, data x model": Road(shard_map((4, 2), ("data", "model"), features="model")),
        "vmap": Road(by_device(jax.vmap)),
        "jit, Auto": Road(one_device, place=placed(auto)),
        "jit, Explicit": Road(one_device, place=placed(explicit)),
        "jit, data x model": Road(one_device, place=placed(grid, "model")),
    }
    for name, groups in GROUPS.items():
        reference = grouped(groups)
        table[f"pmap, groups {name}"] = Road(by_device(jax.pmap, groups), reference)
        table[f"shard_map, groups {name}"] = Road(shard_map(groups=groups), reference)
        table[f"vmap, groups {name}"] = Road(by_device(jax.vmap, groups), reference)
    table["jit, ghost batches"] = Road(ghost(ghost_size), ghosts(ghost_size), placed(auto))
    return table


def training(f):
    """Adds gradients to f: `(x, params, state, mask, dy) -> y, state, dx, dscale, dbias`."""

    def step(x, params, state, mask, dy):
        y, vjp, state = jax.vjp(
            lambda x, params: f(x, params, state, mask), x, params, has_aux=True
        )
        dx, (dscale, dbias) = vjp(dy)
        return y, state, dx, dscale, dbias

    return step
