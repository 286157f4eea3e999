"""Statistics that devices, microbatches or processes hold apart: found, and brought together.

`python -m tests.adapt.test_replicas PROCESS PORT` is one of the two processes of the last test.
"""

import functools
import json
import pathlib
import socket
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from tests.support import oracle
from tests.support.compiling import environment
from tests.support.networks import NnxNet

C = 5
FIX = (
    "each device trained with statistics of its own. Pool them with axis_name= in training, or "
    "once with jaxbn.sync_state(state, axis_name)."
)


def mesh(*sizes, names=("d", "model")):
    return jax.make_mesh(sizes, names[: len(sizes)], axis_types=(AxisType.Auto,) * len(sizes))


# assert_replicated


def test_replicated_states_pass():
    _, state = jaxbn.init(8)
    everywhere = jax.device_put(state, NamedSharding(mesh(8), P()))
    by_feature = jax.device_put(state.mean, NamedSharding(mesh(8), P("d")))  # [8], one a device
    both = jax.device_put(state.mean, NamedSharding(mesh(4, 2), P("model")))
    rows = jax.pmap(lambda _: state)(np.zeros(8))
    model = jaxbn.nnx.BatchNorm(8, rngs=nnx.Rngs(0))
    keys = nnx.state(nnx.Rngs(0, dropout=1))
    trees = [state, everywhere, by_feature, both, rows, model, nnx.state(model), keys, {}, None]
    for tree in trees:
        jaxbn.assert_replicated(tree)
    jaxbn.assert_replicated(trees)


def test_the_error_names_the_leaf_the_devices_and_the_difference():
    def states(i):
        return {"norm": jaxbn.State(jnp.zeros(C), jnp.ones(C) + jnp.where(i == 5, 0.25, 0.0), i)}

    def raises(tree, difference):
        with pytest.raises(AssertionError) as error:
            jaxbn.assert_replicated(tree)
        message = f"assert_replicated: ['norm'].var differs between devices {difference} at most; "
        assert str(error.value) == message + FIX

    index = np.arange(8, dtype=np.int32)
    raises(jax.pmap(states)(index), "0 and 5, by 0.25")
    by_device = jax.shard_map(
        lambda i: jax.tree.map(lambda v: v[None], states(i[0])),
        mesh=mesh(8),
        in_specs=P("d"),
        out_specs=P("d"),
    )
    raises(jax.jit(by_device)(index), "0 and 5, by 0.25")


def test_copies_that_jax_believes_equal_are_compared():
    """Replicated over "d", features sharded over "model"; one copy of the second half is off."""
    sharding = NamedSharding(mesh(4, 2), P("model"))
    halves = [np.zeros(4, np.float32), np.ones(4, np.float32)]

    def copies(wrong, dtype=np.float32):
        arrays = [halves[i % 2].astype(dtype) + dtype(i == wrong) for i in range(8)]
        shards = list(map(jax.device_put, arrays, jax.devices()))
        return jax.make_array_from_single_device_arrays((8,), sharding, shards)

    jaxbn.assert_replicated(copies(None))
    for dtype in (np.float32, jnp.bfloat16, np.complex64, np.int32, np.bool_):
        if dtype == np.bool_:
            halves[1] = np.zeros(4)
        with pytest.raises(AssertionError) as error:
            jaxbn.assert_replicated(copies(7, dtype))
        message = "assert_replicated: the array differs between devices 1 and 7, by 1 at most; "
        assert str(error.value) == message + FIX


# sync_state


@functools.cache
def statistics(devices=8):
    """Mean and var of each device [devices, C]; means 100 sd from 0, half an sd apart."""
    rng = np.random.default_rng(0)
    mean = 100 * rng.normal(size=C) + rng.normal(size=(devices, C)) / 2
    return np.float32(mean), np.float32(rng.uniform(0.5, 2, (devices, C)))


def pooled(mean, var, weight):
    """Mean and variance of populations in the proportions of weight."""
    weight = np.float64(weight).reshape(-1, 1) / np.sum(weight)
    mean, var = np.float64(mean), np.float64(var)
    center = (weight * mean).sum(0)
    return center, (weight * (var + (mean - center) ** 2)).sum(0)


def sync(tree, **options):
    return jax.jit(jax.vmap(lambda s: jaxbn.sync_state(s, "d", **options), axis_name="d"))(tree)


# A mean of 100 is off by 2^-24 of itself, 6e-6 of an sd; the spread takes in twice that.
SYNC = 2 * 100 * 2.0**-23 + oracle.tolerance("float32", 8)


def assert_pooled(new, mean, var, weight, rows=slice(None)):
    for got, want in zip(new[:2], pooled(mean[rows], var[rows], weight), strict=True):
        got = np.asarray(got)[rows]
        oracle.assert_close(got, np.broadcast_to(want, got.shape), SYNC)


COUNTS = {
    "equal": [7] * 8,
    "unequal": [1, 2, 3, 4, 5, 6, 7, 100],
    "some never updated": [0, 3, 0, 0, 2, 0, 1, 0],
    "never updated": [0] * 8,
    "uncounted": None,
}


@pytest.mark.parametrize("counts", COUNTS)
def test_sync_weighs_devices_by_their_updates(counts):
    (mean, var), count = statistics(), COUNTS[counts]
    new = sync(jaxbn.State(mean, var, None if count is None else np.int32(count)))
    assert_pooled(new, mean, var, count if count and any(count) else np.ones(8))
    if count is None:
        assert new.count is None
    else:
        np.testing.assert_array_equal(new.count, sum(count) // 8)
    jaxbn.assert_replicated(jax.pmap(lambda s: s)(new))


@pytest.mark.parametrize("check_vma", [True, False])
def test_sync_in_shard_map_returns_one_state(check_vma):
    mean, var = statistics()
    run = jax.shard_map(
        lambda s: jaxbn.sync_state(jax.tree.map(lambda v: v[0], s), "d"),
        mesh=mesh(8),
        in_specs=P("d"),
        out_specs=P(),
        check_vma=check_vma,
    )
    new = jax.jit(run)(jaxbn.State(mean, var, np.full(8, 3, np.int32)))
    assert_pooled(jax.tree.map(lambda v: v[None], new), mean, var, np.ones(8))
    jaxbn.assert_replicated(new)


def test_sync_stays_within_groups():
    groups = [[0, 5], [7, 2], [1, 3], [4, 6]]
    (mean, var), count = statistics(), np.arange(8, dtype=np.int32)
    new = jax.pmap(lambda s: jaxbn.sync_state(s, "d", groups), axis_name="d")(
        jaxbn.State(mean, var, count)
    )
    for group in groups:
        assert_pooled(new, mean, var, count[group], group)
        np.testing.assert_array_equal(new.count[np.array(group)], count[group].sum() // 2)


def test_sync_equals_one_device_that_saw_all_batches():
    """One cumulative update on each device, then synced: the moments of all rows."""
    x = np.float32(np.random.default_rng(0).normal(3, 1, (8, 16, C)) + np.arange(8)[:, None, None])
    _, state = jaxbn.init(C)

    def local(x):
        _, new = jaxbn.batch_norm(x, None, state, train=True, momentum=None)
        return new, jaxbn.sync_state(new, "d")

    own, new = jax.jit(jax.vmap(local, axis_name="d"))(x)
    _, mean, var = oracle.moments(x)
    tolerance = 4 * oracle.tolerance("float32", 128)
    oracle.assert_close(new.mean, np.tile(mean, (8, 1)), tolerance)
    oracle.assert_close(new.var, np.tile(var, (8, 1)), tolerance)
    assert (own.var.mean(0) < var / 2).all()  # what an average over devices would keep


def test_sync_finds_the_layers_of_any_tree():
    mean, var = statistics()
    layer = {"mean": mean, "var": var}
    state = jaxbn.State(mean, var, np.full(8, 3, np.int32))
    tree = {
        "batch_stats": {"block": {"norm": layer}, "cumulative": layer | {"count": state.count}},
        "states": [state, (state,)],
        "step": np.arange(8),
    }
    new = sync(tree)
    assert jax.tree.structure(new) == jax.tree.structure(tree)
    stats, (first, (second,)) = new["batch_stats"], new["states"]
    for found in (stats["block"]["norm"], stats["cumulative"], first._asdict(), second._asdict()):
        assert_pooled((found["mean"], found["var"]), mean, var, np.ones(8))
    np.testing.assert_array_equal(new["step"], tree["step"])


@pytest.mark.parametrize("pure", [False, True])
def test_sync_makes_the_states_of_an_nnx_model_equal(pure):
    model = NnxNet(jaxbn.nnx.BatchNorm, width=C, rngs=nnx.Rngs(0))
    mean, var = statistics()
    model.norm1.mean[...] = jnp.zeros(C)
    stats = jax.tree.map(lambda v: jnp.stack([v] * 8), nnx.state(model, nnx.BatchStat))
    stats["norm1"]["mean"].set_value(mean)
    stats["norm1"]["var"].set_value(var)
    new = sync(nnx.to_pure_dict(stats) if pure else stats)
    nnx.update(model, jax.tree.map(lambda v: v[0], new))
    got = model.norm1.mean[...][None], model.norm1.var[...][None]
    assert_pooled(got, mean, var, np.ones(8))
    np.testing.assert_array_equal(model.norm2.var[...], 1)


def test_a_tree_without_statistics_is_refused():
    message = (
        "sync_state: no running statistics in a tree with 2 leaves; expected a State, or a "
        'mapping with "mean" and "var", for each layer; write sync_state(batch_stats, ...).'
    )
    with pytest.raises(ValueError) as error:
        sync({"scale": np.ones((8, 3)), "bias": np.ones((8, 3))})
    assert str(error.value) == message
    assert jaxbn.merge_updates({}) == {}  # a model without norm layers
    with pytest.raises(ValueError) as error:
        jaxbn.sync_state(jaxbn.init(3)[1], None)
    assert str(error.value) == (
        "sync_state: axis_name=None, expected the mapped axis over which devices hold statistics "
        'of their own; write jaxbn.sync_state(state, "data") under shard_map, pmap or vmap.'
    )


# merge_updates


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99, None])
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_merged_updates_equal_one_update_by_the_large_batch(momentum, dtype):
    rng = np.random.default_rng(0)
    x = rng.normal(3, 1, (4, 16, C)) + np.arange(4)[:, None, None]
    x = np.asarray(x + 1j * rng.normal(size=x.shape) if dtype == "complex64" else x, dtype)
    state = jaxbn.State(*np.abs(rng.normal(size=(2, C))).astype("float32"), np.int32(7))

    def update(x):
        return jaxbn.batch_norm(x, None, state, train=True, momentum=momentum)[1]

    merged = jaxbn.merge_updates(jax.jit(jax.vmap(update))(x), momentum)
    keep = 7 / 8 if momentum is None else momentum
    _, mean, var = oracle.moments(x)
    # The spread of the means is read off running means, where it is 1 - momentum as large.
    tolerance = 4 * oracle.tolerance("float32", 64) / (1 - keep)
    oracle.assert_close(merged.mean, oracle.running(state.mean, mean, keep), tolerance)
    oracle.assert_close(merged.var, oracle.running(state.var, var, keep), tolerance)
    assert int(merged.count) == 8
    dtypes = [leaf.dtype for leaf in update(x[0])]
    assert [leaf.dtype for leaf in merged] == dtypes


class Linen(nn.Module):
    """Two norm layers."""

    momentum: float | None
    virtual_batch_size: int | None = None

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            norm = jaxbn.linen.BatchNorm(
                use_running_average=False,
                momentum=self.momentum,
                virtual_batch_size=self.virtual_batch_size,
            )
            x = nn.relu(norm(nn.Dense(8, use_bias=False)(x)))
        return x


@pytest.mark.parametrize("momentum", [0.9, None])
def test_merged_updates_of_linen_equal_ghost_batches_in_every_layer(momentum):
    x = np.float32(np.random.default_rng(0).normal(1, 1, (4, 16, 6)) + np.arange(4)[:, None, None])
    variables = Linen(momentum).init(jax.random.key(0), x[0])

    def update(x, **options):
        return Linen(momentum, **options).apply(variables, x, mutable=["batch_stats"])[1]

    merged = jaxbn.merge_updates(jax.jit(jax.vmap(update))(x), momentum)
    large = jax.jit(functools.partial(update, virtual_batch_size=16))(x.reshape(64, 6))
    assert jax.tree.structure(merged) == jax.tree.structure(large)
    for got, want in zip(jax.tree.leaves(merged), jax.tree.leaves(large), strict=True):
        oracle.assert_close(got, np.float64(want), 40 * oracle.tolerance("float32", 64))


def test_merged_updates_of_nnx_equal_ghost_batches_in_every_layer():
    x = np.float32(np.random.default_rng(0).normal(1, 1, (4, 2, 4, 4, 3)))
    x += np.arange(4, dtype=np.float32).reshape(4, 1, 1, 1, 1)
    graphdef, params, stats = nnx.split(
        NnxNet(jaxbn.nnx.BatchNorm, rngs=nnx.Rngs(0)), nnx.Param, nnx.BatchStat
    )

    def update(x, ghosts=None):
        model = nnx.merge(graphdef, params, stats, copy=True)
        model.norm1.virtual_batch_size = model.norm2.virtual_batch_size = ghosts
        model(x)
        return nnx.state(model, nnx.BatchStat)

    merged = jaxbn.merge_updates(jax.jit(jax.vmap(update))(x), 0.9)
    large = jax.jit(functools.partial(update, ghosts=2))(x.reshape(8, 4, 4, 3))
    for got, want in zip(jax.tree.leaves(merged), jax.tree.leaves(large), strict=True):
        oracle.assert_close(got, np.float64(want), 40 * oracle.tolerance("float32", 128))


@pytest.mark.parametrize("momentum", [0.9, None])
@pytest.mark.parametrize("at", [P("d"), P(None, "d")])
def test_merged_updates_may_be_sharded_by_type(at, momentum):
    """Along the stack or along the features."""
    rng = np.random.default_rng(0)
    states = jaxbn.State(*np.float32(rng.random((2, 4, 4))), np.full(4, 3, "int32"))
    want = jaxbn.merge_updates(jax.tree.map(jnp.asarray, states), momentum)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharded = (NamedSharding(mesh, P(*at[: v.ndim])) for v in states)
        got = jaxbn.merge_updates(jaxbn.State(*map(jax.device_put, states, sharded)), momentum)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), got, want)


STACKED = {  # how the axes of layers and domains lie, and where those of the features are
    "domains": ("d", "df"),
    "layers": ("l", "lf"),
    "layers of domains": ("ld", "ldf"),
    "layers last": ("l", "fl"),
    "layers of domains last": ("dl", "dfl"),
}


@pytest.mark.parametrize("stacked", STACKED)
@pytest.mark.parametrize("call", ["merge_updates", "sync_state"])
def test_each_of_several_layers_and_domains_has_its_own_count(call, stacked):
    """As each alone, by the counts of updates; as many features as domains, so none may pass."""
    of_count, of_mean = STACKED[stacked]
    sizes = {"k": 4, "l": 2, "d": 3, "f": 3}
    rng = np.random.default_rng(0)
    mean, var = np.float32(rng.random((2, *(sizes[a] for a in "k" + of_mean))))
    count = np.broadcast_to(np.arange(1, 4, dtype=np.int32), (4, 2, 3))  # of the domains
    if call == "sync_state":
        count = count + np.arange(4, dtype=np.int32)[:, None, None]
    count = np.einsum(f"kld->k{of_count}", count if "d" in of_count else count[..., :1])
    if call == "merge_updates":
        one = functools.partial(jaxbn.merge_updates, momentum=None)
    else:

        def one(states):
            pooled = jax.vmap(lambda s: jaxbn.sync_state(s, "k"), axis_name="k")(states)
            return jax.tree.map(lambda v: v[0], pooled)

    got = one(jaxbn.State(mean, var, count))
    at = [of_mean.index(a) for a in of_count]
    for index in np.ndindex(got.count.shape):
        here: list = [slice(None)] * len(of_mean)
        for axis, i in zip(at, index, strict=True):
            here[axis] = i
        alone = (mean[:, *here], var[:, *here], count[:, *index])
        want = one(jaxbn.State(*alone))
        np.testing.assert_allclose(got.mean[*here], want.mean, rtol=1e-5)
        np.testing.assert_allclose(got.var[*here], want.var, rtol=1e-5)
        assert got.count[index] == want.count


def test_merge_updates_refuses_momentum_1_and_no_count():
    states = jax.tree.map(lambda v: jnp.stack([v] * 2), jaxbn.init(3)[1])
    with pytest.raises(ValueError) as error:
        jaxbn.merge_updates(states, 1.0)
    assert str(error.value) == (
        "merge_updates: momentum=1.0, expected the momentum in [0, 1) of the updates that are "
        "merged, or None for the cumulative average; write momentum=0.99."
    )
    with pytest.raises(ValueError) as error:
        jaxbn.merge_updates({"mean": states.mean, "var": states.var}, None)
    assert str(error.value) == (
        "merge_updates: momentum=None, but the states hold no count of updates; expected "
        "states with a count, or the momentum of the updates; write momentum=0.99."
    )


# Processes

DEVICES = 4  # two processes with two each, or the first four of one


def train(road):
    """Three steps of a small dense net on a mesh of four devices; each process brings its rows."""
    rng = np.random.default_rng(0)
    x, target = np.float32(rng.normal(3, 2, (24, 6))), np.float32(rng.normal(size=24))
    norm, state = jaxbn.init(8)
    params = {
        "w1": np.float32(rng.normal(size=(6, 8))),
        "norm": norm,
        "w2": np.float32(rng.normal(size=8)),
    }
    devices = jax.make_mesh((DEVICES,), ("d",), (AxisType.Auto,), devices=jax.devices()[:DEVICES])

    def loss(params, state, x, target, axis_name=None):
        h, state = jaxbn.batch_norm(
            x @ params["w1"], params["norm"], state, train=True, axis_name=axis_name
        )
        return jnp.square(jax.nn.relu(h) @ params["w2"] - target).mean(), state

    def mapped(params, state, x, target):
        value, state = loss(params, state, x, target, "d")
        return jax.lax.pmean(value, "d"), state

    specs = (P(), P(), P("d"), P("d"))
    global_loss = {
        "jit": loss,
        "shard_map": jax.shard_map(mapped, mesh=devices, in_specs=specs, out_specs=P()),
    }[road]

    @jax.jit
    def step(params, state, x, target):
        grads, state = jax.grad(global_loss, has_aux=True)(params, state, x, target)
        return jax.tree.map(lambda p, g: p - 0.05 * g, params, grads), state

    def place(v, spec):
        mine = np.array_split(v, jax.process_count())[jax.process_index()] if spec else v
        sharding = NamedSharding(devices, P(*spec))
        return jax.make_array_from_process_local_data(sharding, np.asarray(mine), v.shape)

    params, state = jax.tree.map(lambda v: place(v, ()), (params, state))
    for _ in range(3):
        params, state = step(params, state, place(x, ("d",)), place(target, ("d",)))
    return params, state


def differences():
    """What assert_replicated says, in a process of two, of three states that differ."""
    devices = jax.make_mesh((DEVICES,), ("d",), (AxisType.Auto,))
    _, state = jaxbn.init(3)
    mine = state._replace(mean=state.mean + jax.process_index())
    believed = jax.tree.map(
        lambda v: jax.make_array_from_process_local_data(NamedSharding(devices, P()), v, v.shape),
        jax.tree.map(np.asarray, mine),
    )
    rows = jax.make_array_from_callback(  # the last device alone differs
        (DEVICES, 3),
        NamedSharding(devices, P("d")),
        lambda index: np.full((1, 3), index[0].start // (DEVICES - 1), np.float32),
    )
    messages = []
    for tree in (mine, believed, rows):
        try:
            jaxbn.assert_replicated(tree)
        except AssertionError as error:
            messages.append(str(error))
    return messages


@pytest.fixture(scope="module")
def two_processes():
    """What the two processes report."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.adapt.test_replicas", str(rank), port],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(JAX_PLATFORMS="cpu"),
            cwd=pathlib.Path(__file__).parents[2],
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=90)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    reports = [
        [json.loads(line[7:]) for line in output.splitlines() if line.startswith("RESULT ")]
        for output in outputs
    ]
    assert all(len(report) == 1 for report in reports), "\n".join(outputs)
    return [report[0] for report in reports]


@pytest.mark.parametrize("road", ["jit", "shard_map"])
def test_two_processes_equal_one(two_processes, road):
    want = [np.float64(v) for v in jax.tree.leaves(train(road))]
    for report in two_processes:
        for got, leaf in zip(report[road], want, strict=True):
            oracle.assert_close(np.float64(got), leaf, 1e-5, road)


def test_processes_that_differ_all_get_the_error(two_processes):
    """And none hangs: the last device differs from the others, so process 0 alone saw no fault."""
    first, second = (report["differences"] for report in two_processes)
    assert first == second
    message = "assert_replicated: {} differs between devices 0 and {} (processes 0 and 1), by 1"
    two, three = two_processes[1]["devices"]
    assert first == [
        message.format(*place) + " at most; " + FIX
        for place in ((".mean", two), (".mean", two), ("the array", three))
    ]


def report(rank, port):
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_disable_most_optimizations", True)
    jax.distributed.initialize(
        f"127.0.0.1:{port}",
        num_processes=2,
        process_id=rank,
        initialization_timeout=60,
        heartbeat_timeout_seconds=10,
    )
    result = {"devices": [device.id for device in jax.local_devices()]}
    for road in ("jit", "shard_map"):
        trained = train(road)
        jaxbn.assert_replicated(trained)
        result[road] = [np.asarray(v).tolist() for v in jax.tree.leaves(trained)]
    result["differences"] = differences()
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    report(int(sys.argv[1]), sys.argv[2])


def test_statistics_stored_narrow_are_brought_together_in_float32():
    mean = jnp.asarray([[0.0], [600.0]], jnp.float16)  # var between them is beyond float16
    states = jaxbn.State(mean, jnp.ones_like(mean), jnp.asarray([1, 1]))
    synced = jax.vmap(lambda s: jaxbn.sync_state(s, "d"), axis_name="d")(states)
    np.testing.assert_array_equal(synced.var, [[90001.0], [90001.0]])
    merged = jaxbn.merge_updates(states, 0.5)
    np.testing.assert_array_equal(merged.var, [180001.0])
    assert synced.mean.dtype == merged.mean.dtype == jnp.float32
