"""The roads over meshes: kinds of axes, what is split, transforms, callers, and where state lies.

A road is one of each. What its caller returns, statistics, y and all gradients, must equal what
the same caller returns on one device, and the statistics must lie as the features do.
"""

import contextlib
import functools
import itertools
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn import Params, State, health, watch

C = 6
BATCHES = 2  # of a data set to recalibrate by
PARTS = 2  # of a batch under vmap

AXES = ("d", "h", "c")  # of a mesh of 2 x 2 x 2 devices
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
KINDS = {
    "Auto": (AUTO, AUTO, AUTO),
    "Explicit": (EXPLICIT, EXPLICIT, EXPLICIT),
    "rows Auto, others Explicit": (AUTO, EXPLICIT, EXPLICIT),
    "rows Explicit, others Auto": (EXPLICIT, AUTO, AUTO),
}
# No size divides by 8, and one position in 8 of a split axis by 2. TIME is large enough for sums by
# parts.
IMAGE, TIME = (12, 6, 6, C), (4, 1382, C)
SPLITS = {  # shape of x, and the mesh axes over each axis of it
    "data": (IMAGE, (("d", "h"), None, None, None)),
    "features": (IMAGE, (None, None, None, "c")),
    "height": (IMAGE, (None, "h", None, None)),
    "width": (IMAGE, (None, None, "h", None)),
    "time": (TIME, (None, "h", None)),
    "several": (IMAGE, ("d", "h", None, "c")),
}
TRANSFORMS = ("jit", "eager", "shard_map, all axes", "shard_map, one axis", "vmap")
STATES = ("replicated", "as features")


class Road(NamedTuple):
    kind: str
    split: str
    transform: str
    caller: str
    state: str


# Callers are written for what one device holds: `(x, params, state, mask, axis_name)` to one or
# more y, all like x, and (statistics [C], what else must be equal).


def functional(x, params, state, mask, axis_name):
    """In training, and then in eval mode."""
    y, new = jaxbn.batch_norm(x, params, state, train=True, axis_name=axis_name)
    of_eval, _ = jaxbn.batch_norm(x, params, state, train=False)
    return (y, of_eval), (new[:2], new.count)


def masked(x, params, state, mask, axis_name):
    """By a mask of rows, and by one that tells features apart."""
    run = functools.partial(jaxbn.batch_norm, train=True, axis_name=axis_name)
    of_rows, rows = run(x, params, state, mask=mask)
    of_cells, cells = run(x, params, state, mask=x > 2.5)
    return (of_rows, of_cells), ((rows[:2], cells[:2]), (rows.count, cells.count))


def linen(x, params, state, mask, axis_name, on=False):
    layer = jaxbn.linen.BatchNorm(use_running_average=False, axis_name=axis_name)
    (y, new), seen = watch.linen(layer.apply, on)(
        variables(params, state), x, mutable=["batch_stats"]
    )
    return y, with_moments(new["batch_stats"], seen)


def nnx_(x, params, state, mask, axis_name, on=False):
    layer = nnx.eval_shape(lambda: jaxbn.nnx.BatchNorm(C, axis_name=axis_name, rngs=nnx.Rngs(0)))
    for values in variables(params, state).values():
        for name, value in values.items():
            getattr(layer, name).set_value(value)
    with watch.nnx(layer, on) as seen:
        y = layer(x)
    return y, with_moments((layer.mean[...], layer.var[...]), seen)


def watched(x, params, state, mask, axis_name):
    (y, of_linen), (also_y, of_nnx) = (
        f(x, params, state, mask, axis_name, on=True) for f in (linen, nnx_)
    )
    return (y, also_y), tuple(zip(of_linen, of_nnx, strict=True))


def recalibrated(batches, params, state, mask, axis_name):
    def apply(state, x):
        return jaxbn.batch_norm(x, params, state, train=True)[1]

    new = jaxbn.recalibrate(apply, state, batches, axis_name=axis_name)
    return None, (new[:2], new.count)


def looked_at(x, params, state, mask, axis_name):
    layer, of = jaxbn.linen.BatchNorm(use_running_average=True), variables(params, state)
    gap = health.gap(layer.apply, of, x)
    _, rows = health.incoming(layer.apply)(of, x, mask=mask)
    return None, ((), (gap.outputs, gap.layers[0].gap, gap.layers[0].own, rows))


def variables(params, state):
    return {"params": params._asdict(), "batch_stats": {"mean": state.mean, "var": state.var}}


def with_moments(statistics, seen):
    # Without the count: where shard_map splits features, the count is typed as they are.
    return (statistics, [m[1:] for m in seen.values()]), ()


CALLERS = {
    "functional": functional,
    "mask": masked,
    "linen": linen,
    "nnx": nnx_,
    "watch": watched,
    "recalibrate": recalibrated,
    "gap": looked_at,
}


def differs(road: Road) -> bool:
    """Whether this road is one, and none of the others."""
    if road.caller == "gap" and road.transform != "eager":
        return False  # it looks at numbers
    if "c" not in SPLITS[road.split][1]:
        return road.state == "replicated"
    # shard_map over the axis of features splits the state, wherever it lay.
    return road.transform != "shard_map, all axes" or road.state == "as features"


def roads() -> list[Road]:
    every = itertools.product(KINDS, SPLITS, TRANSFORMS, CALLERS, STATES)
    return [road for road in map(Road._make, every) if differs(road)]


@functools.cache
def mesh(kind: str):
    return jax.make_mesh((2, 2, 2), AXES, axis_types=KINDS[kind])


def arguments(shape: tuple[int, ...], caller: str):
    """x, params, state, mask, dy; channels differ in mean by their own sd."""
    rng = np.random.default_rng(0)
    mask = (np.arange(shape[0]) % 4 != 2).reshape(-1, *[1] * (len(shape) - 1))
    if caller == "recalibrate":
        shape = (BATCHES, *shape)
    x, dy = np.float32(rng.normal(size=(2, *shape)))
    vectors = np.float32(rng.uniform(1, 2, (4, C)))
    x += 2 + vectors[0]
    return x, Params(*vectors[:2]), State(*vectors[2:], np.int32(3)), mask, dy


def spec_of(road: Road) -> P:
    """How x lies."""
    rows, *rest = SPLITS[road.split][1]
    if road.transform.startswith("shard_map"):
        rows = rows or "d"
    before = [None] if road.caller == "recalibrate" else []
    if road.transform == "vmap":
        part, *rows = rows if isinstance(rows, tuple) else (rows,)
        before, rows = [part, *before], rows[0] if rows else None
    return P(*before, rows, *rest)


def in_parts(road: Road, v, axis=0):
    """For vmap, the parts of a batch along a new first axis."""
    return np.stack(np.split(v, PARTS, axis)) if road.transform == "vmap" else v


def placed(road: Road):
    x, params, state, mask, dy = arguments(SPLITS[road.split][0], road.caller)
    vector = P("c") if road.state == "as features" else P()

    def put(v, spec):
        return jax.device_put(v, NamedSharding(mesh(road.kind), spec))

    rows = 1 if road.caller == "recalibrate" else 0
    x, dy = (put(in_parts(road, v, rows), spec_of(road)) for v in (x, dy))
    mask = put(in_parts(road, mask), mask_spec(road))
    state = State(*put(state[:2], vector), put(state.count, P()))
    return x, put(params, vector), state, mask, dy


def mask_spec(road: Road) -> P:
    """How a mask of rows lies: where a transform maps rows, as they do, and else otherwise."""
    if road.transform in ("jit", "eager"):
        return P("c")
    spec = spec_of(road._replace(caller="mask"))
    return P(*spec[: 2 if road.transform == "vmap" else 1])


def of(axes, spec: P) -> P:
    """What a spec says of these mesh axes."""
    names = [part if isinstance(part, tuple) else (part,) for part in spec]
    kept = [tuple(name for name in part if name in axes) for part in names]
    return P(*(part or None for part in kept))


def over(road: Road):
    """The caller as a function of whole arrays."""
    f = CALLERS[road.caller]
    if road.transform in ("jit", "eager"):
        return functools.partial(f, axis_name=None)
    if road.transform == "vmap":
        f = functools.partial(f, axis_name="v")
        return jax.vmap(f, (0, None, None, 0), (0, None), axis_name="v")
    manual = AXES if road.transform.endswith("all axes") else AXES[:1]
    spec = of(manual, spec_of(road))
    vector = P("c") if "c" in str(spec) else P()
    return jax.shard_map(
        functools.partial(f, axis_name=tuple(name for name in "dh" if name in str(spec))),
        mesh=mesh(road.kind),
        in_specs=(spec, vector, State(vector, vector, P()), of(manual, mask_spec(road))),
        out_specs=(P() if road.caller == "recalibrate" else spec, (vector, P())),
        axis_names=set(manual),
    )


def run(road: Road, x, params, state, mask, dy) -> tuple[Any, ...]:
    """Every y, (statistics, others), dx and the gradients of params; without y only the second."""

    def step(x, params, state, mask, dy):
        f = over(road)
        if road.caller in ("recalibrate", "gap"):
            return f(x, params, state, mask)[1:]
        y, vjp, aux = jax.vjp(lambda *p: f(*p, state, mask), x, params, has_aux=True)
        return y, aux, *vjp(jax.tree.map(lambda _: dy, y))

    if road.transform != "eager":
        return jax.jit(step)(x, params, state, mask, dy)
    return step(list(x) if road.caller == "recalibrate" else x, params, state, mask, dy)


@functools.cache
def expected(shape: tuple[int, ...], caller: str) -> tuple[Any, ...]:
    transform = "eager" if caller in ("recalibrate", "gap") else "jit"
    return run(Road("", "", transform, caller, ""), *arguments(shape, caller))


def value(road: Road) -> tuple[Any, ...]:
    # Eager JAX wants to know of a mesh that is Explicit; all else works without.
    known = jax.set_mesh(mesh(road.kind)) if road.transform == "eager" else contextlib.nullcontext()
    with known:
        return run(road, *placed(road))


def error(road: Road, got: tuple[Any, ...]) -> float:
    """The largest error of any array, relative to its largest value."""

    def of_leaf(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        b = b if a.shape == b.shape else in_parts(road, b)
        return float(np.abs(a - b).max() / np.abs(b).max())

    want = expected(SPLITS[road.split][0], road.caller)
    return max(jax.tree.leaves(jax.tree.map(of_leaf, got, want)))


def lie_as_features(road: Road, got: tuple[Any, ...]) -> bool:
    """Whether each device has the statistics of its features and of no others.

    Recalibration outside of jit leaves a model where it was.
    """
    aux = got[0] if len(got) == 1 else got[1]
    stays = road.caller == "recalibrate" and road.transform == "eager"
    split = "c" in SPLITS[road.split][1] and not (stays and road.state == "replicated")
    sizes = {v.sharding.shard_shape(v.shape)[0] for v in jax.tree.leaves(aux[0])}
    return sizes <= {C // 2 if split else C}
