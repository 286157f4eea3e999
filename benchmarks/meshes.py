"""The roads over meshes: kinds of axes, what is split, transforms, callers, and where state lies.

A road is one of each. Its value is a tree of arrays, y, state, dx, dscale and dbias of a training
call for most callers, which must equal that of the same caller on one device.
"""

import functools
import itertools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn import Params, State, health, watch

C = 6
BATCHES = 2  # of a data set to recalibrate by
AXES = ("d", "h", "c")  # of a mesh of 2 x 2 x 2 devices

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
KINDS = {
    "Auto": (AUTO, AUTO, AUTO),
    "Explicit": (EXPLICIT, EXPLICIT, EXPLICIT),
    "mixed": (AUTO, EXPLICIT, EXPLICIT),
    "mixed, rows Explicit": (EXPLICIT, AUTO, AUTO),
}
# No size but the rows of "data" divides by 8: the pivot's sample of one in 8 is 1 or 87 long.
IMAGE, TIME = (4, 6, 6, C), (4, 1390, C)
SPLITS = {  # shape of x, and the mesh axis over each of its axes
    "data": ((8, 3, 3, C), (("d", "h"), None, None, None)),
    "features": (IMAGE, (None, None, None, "c")),
    "height": (IMAGE, (None, "h", None, None)),
    "width": (IMAGE, (None, None, "h", None)),
    "time": (TIME, (None, "h", None)),
    "several": (IMAGE, ("d", "h", None, "c")),
}
TRANSFORMS = ("jit", "eager", "shard_map, all axes", "shard_map, one axis", "vmap")
STATES = ("replicated", "sharded")


class Road(NamedTuple):
    kind: str
    split: str
    transform: str
    caller: str
    state: str


def functional(x, params, state, axis_name):
    y, new = jaxbn.batch_norm(x, params, state, train=True, axis_name=axis_name)
    return y, (new[:2], new.count)


def linen(x, params, state, axis_name, watched=False):
    layer = jaxbn.linen.BatchNorm(use_running_average=False, axis_name=axis_name)
    variables = {"params": params._asdict(), "batch_stats": {"mean": state.mean, "var": state.var}}
    (y, new), seen = watch.linen(layer.apply, watched)(variables, x, mutable=["batch_stats"])
    return y, _with_moments(new["batch_stats"], seen)


def nnx_(x, params, state, axis_name, watched=False):
    layer = nnx.eval_shape(lambda: jaxbn.nnx.BatchNorm(C, axis_name=axis_name, rngs=nnx.Rngs(0)))
    for name, v in {**params._asdict(), "mean": state.mean, "var": state.var}.items():
        getattr(layer, name).set_value(v)
    with watch.nnx(layer, watched) as seen:
        y = layer(x)
    return y, _with_moments({"mean": layer.mean[...], "var": layer.var[...]}, seen)


def watched(x, params, state, axis_name):
    (y, of_linen), (_, of_nnx) = (f(x, params, state, axis_name, True) for f in (linen, nnx_))
    return y, tuple(zip(of_linen, of_nnx, strict=True))


def _with_moments(state, seen):
    return (state, [m[1:] for m in seen.values()]), [m.count for m in seen.values()]


def recalibrated(batches, params, state, axis_name):
    def apply(state, x):
        return jaxbn.batch_norm(x, params, state, train=True)[1]

    new = jaxbn.recalibrate(apply, state, batches, axis_name=axis_name)
    return None, (new[:2], new.count)


def gap(x, params, state, axis_name):
    layer = jaxbn.linen.BatchNorm()
    variables = {"params": params._asdict(), "batch_stats": {"mean": state.mean, "var": state.var}}
    found = health.gap(layer.apply, variables, x, use_running_average=True)
    return None, ((), (*found.outputs[""], found.layers[0].gap, found.layers[0].own))


# Each is written for what one device holds: (x, params, state, axis_name) to y, (statistics [C],
# what else must be equal).
CALLERS = {
    "functional": functional,
    "linen": linen,
    "nnx": nnx_,
    "recalibrate": recalibrated,
    "gap": gap,
    "watch": watched,
}


def roads() -> list[Road]:
    """All of them, without those that are another one."""
    every = map(Road._make, itertools.product(KINDS, SPLITS, TRANSFORMS, CALLERS, STATES))
    return [
        road
        for road in every
        if (road.caller != "gap" or road.transform == "eager")  # it reads its numbers
        and (road.state == "replicated" or "c" in SPLITS[road.split][1])
    ]


@functools.cache
def mesh(kind: str):
    return jax.make_mesh((2, 2, 2), AXES, axis_types=KINDS[kind])


def arguments(road: Road):
    """x, params, state, dy; channels differ in mean by their own sd."""
    rng = np.random.default_rng(0)
    shape = SPLITS[road.split][0]
    if road.caller == "recalibrate":
        shape = (BATCHES, *shape)
    x, dy = np.float32(rng.normal(size=(2, *shape)))
    x += np.float32(rng.normal(3, 1, C))
    vectors = np.float32(rng.uniform(1, 2, (4, C)))
    return x, Params(*vectors[:2]), State(*vectors[2:], np.int32(3)), dy


def specs(road: Road):
    """The specs of x and of a vector of channels."""
    rows, *rest = SPLITS[road.split][1]
    if road.transform.startswith("shard_map"):
        rows = rows or "d"
    if road.transform == "vmap":
        rest = [rows[1] if isinstance(rows, tuple) else None, *rest]
        rows = rows and rows[0]
    if road.caller == "recalibrate":
        rest.insert(0, rows)
        rows = None
        if road.transform == "vmap":
            rest[0], rows = rows, rest[0]
    return P(rows, *rest), P("c") if road.state == "sharded" else P()


def in_parts(road, v):
    """For vmap: the rows of each of two devices, along a new first axis."""
    if road.transform != "vmap":
        return v
    if road.caller == "recalibrate":
        return v.reshape(BATCHES, 2, v.shape[1] // 2, *v.shape[2:]).swapaxes(0, 1)
    return v.reshape(2, v.shape[0] // 2, *v.shape[1:])


def placed(road: Road):
    x, params, state, dy = arguments(road)
    x_spec, vector = specs(road)

    def put(v, spec):
        return jax.device_put(v, NamedSharding(mesh(road.kind), spec))

    x, dy = (put(in_parts(road, v), x_spec) for v in (x, dy))
    state = State(*put(state[:2], vector), put(state.count, P()))
    return x, put(params, vector), state, dy


def only(spec: P, manual) -> P:
    """What a spec says of these mesh axes."""

    def part(names):
        kept = tuple(n for n in (names if isinstance(names, tuple) else (names,)) if n in manual)
        return kept if len(kept) > 1 else kept[0] if kept else None

    return P(*map(part, spec))


def over(road: Road):
    """The caller as a function of whole arrays."""
    f = CALLERS[road.caller]
    if road.transform in ("jit", "eager"):
        return functools.partial(f, axis_name=None)
    if road.transform == "vmap":
        f = functools.partial(f, axis_name="v")
        return jax.vmap(f, (0, None, None), (0, None), axis_name="v")
    manual = AXES if road.transform.endswith("all axes") else AXES[:1]
    spec, _ = specs(road)
    x_spec = only(spec, manual)
    pooled = tuple(axis for axis in ("d", "h") if axis in str(x_spec))
    vector = P("c") if "c" in str(x_spec) else P()
    y_spec = P() if road.caller == "recalibrate" else x_spec
    return jax.shard_map(
        functools.partial(f, axis_name=pooled),
        mesh=mesh(road.kind),
        in_specs=(x_spec, vector, State(vector, vector, P())),
        out_specs=(y_spec, (vector, P())),
        axis_names=set(manual),
    )


def trained(road, f):
    if road.caller in ("recalibrate", "gap"):
        return lambda x, params, state, dy: f(x, params, state)

    def step(x, params, state, dy):
        y, vjp, aux = jax.vjp(lambda x, params: f(x, params, state), x, params, has_aux=True)
        return y, aux, *vjp(dy)

    return step


def run(road, f, arguments):
    x, *rest = arguments
    if road.caller == "recalibrate" and road.transform == "eager":
        x = [v for v in x]
    step = trained(road, f)
    return (step if road.transform == "eager" else jax.jit(step))(x, *rest)


def value(road: Road) -> Any:
    return run(road, over(road), placed(road))


@functools.cache
def expected(split, caller):
    road = Road("Auto", split, "eager", caller, "replicated")
    with jax.set_mesh(jax.sharding.Mesh(np.array(jax.devices()[:1]), ("one",), axis_types=(AUTO,))):
        return run(road, over(road), arguments(road))


def errors(road):
    """Largest error of each quantity relative to its largest value"""
    got, want = value(road), expected(road.split, road.caller)
    want = list(want)
    for i in (0, 2):
        if i < len(want) and want[i] is not None:
            want[i] = in_parts(road, np.asarray(want[i]))

    def error(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape, (a.shape, b.shape)
        return float(np.abs(a - b).max() / np.abs(b).max())
    out = [max(jax.tree.leaves(jax.tree.map(error, a, b)), default=0.0) for a, b in zip(got, want, strict=True)]
    # statistics sharded as features
    if road.caller != "gap":
        where = "c" in str(SPLITS[road.split][1][-1])
        for leaf in jax.tree.leaves(got[1][0]):
            local = leaf.sharding.shard_shape(leaf.shape)[0]
            out.append(f"{leaf.sharding.spec}" if (local != (C // 2 if where else C)) else "")
    return out
