"""Shards of a batch: what is recorded on every road, what is found, and how often by mistake."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn
from benchmarks.studies import skewed
from jaxbn import health, watch
from jaxbn.health import _shards
from tests.support.messages import message

R, ROWS, PIXELS, C = 4, 3, 5, 2
N = R * ROWS
RNG = np.random.default_rng(0)
X = RNG.normal([3.0, -50.0], [2.0, 0.1], (N, PIXELS, C)).astype(np.float32)
MASK = RNG.random((N, PIXELS, 1)) < 0.7
MASK[0] = False  # a row without a valid cell counts for nothing


def oracle(x, mask=None):
    """Mean and biased variance over the rows of each shard, of the rows' means and sds; float64."""
    x = np.asarray(x, np.float64)
    w = np.broadcast_to(True if mask is None else mask, x.shape).astype(float)
    n = w.sum(1)
    rows = n > 0  # [N, C]
    mean = np.divide((w * x).sum(1), n, where=rows, out=np.zeros_like(n))
    center = mean.sum(0) / rows.sum(0)
    squares = np.divide((w * (x - center) ** 2).sum(1), n, where=rows, out=np.zeros_like(n))

    def of_shards(v):
        v, valid = (u.reshape(R, ROWS, C) for u in (v, rows.astype(float)))
        count = valid.sum(1)
        middle = (valid * v).sum(1) / count
        var = (valid * (v - middle[:, None]) ** 2).sum(1) / count
        return jaxbn.Moments(count.T, middle.T, var.T)

    return health.Shards(of_shards(mean), of_shards(np.sqrt(squares)))


def look(x, mask=None, shards=R, axis_name=None):
    model = nn.BatchNorm(use_running_average=False, axis_name=axis_name)
    variables = {
        "params": {"scale": jnp.ones(C), "bias": jnp.zeros(C)},
        "batch_stats": {"mean": jnp.zeros(C), "var": jnp.ones(C)},
    }
    looked = watch.linen(model.apply, shards=shards)
    seen = looked(variables, x, mutable=["batch_stats"], mask=mask)[1]
    return watch.records(seen, variables)[""].shards


def of_nnx(x, mask=None):
    model = nnx.BatchNorm(C, rngs=nnx.Rngs(0))
    with watch.nnx(model, shards=R) as seen:
        model(x, mask=mask)
    return watch.records(seen, model)[""].shards


def on_mesh(kind, f, spec, x, mask):
    """F on a mesh of one axis, of R devices; its arguments are sharded by rows."""
    mesh = jax.make_mesh((R,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        arguments = jax.device_put((x, mask), jax.NamedSharding(mesh, P("data")))
        if spec is not None:
            f = jax.shard_map(f, in_specs=(P("data"), P("data")), out_specs=spec)
        return jax.jit(f)(*arguments)


named = functools.partial(look, shards="data", axis_name="data")
alone = functools.partial(look, shards=["data"])  # local statistics, shards compared all the same
ROADS = {
    "jit": lambda x, mask: jax.jit(look)(x, mask),
    "nnx": lambda x, mask: nnx.jit(of_nnx)(x, mask),
    "jit over a mesh": functools.partial(on_mesh, AxisType.Auto, look, None),
    "jit over an Explicit mesh": functools.partial(on_mesh, AxisType.Explicit, look, None),
    "shard_map": functools.partial(on_mesh, AxisType.Auto, named, P()),
    "shard_map, local": functools.partial(on_mesh, AxisType.Explicit, alone, P()),
}


def mapped(map_, x, mask):
    parts = (v.reshape(R, ROWS, *v.shape[1:]) for v in (x, mask))
    of_all = map_(named, axis_name="data")(*parts)
    return jax.tree.map(lambda v: v[-1], of_all)


ROADS |= {name: functools.partial(mapped, getattr(jax, name)) for name in ("pmap", "vmap")}


@pytest.mark.parametrize("road", ROADS)
def test_shards_on_every_road_are_those_of_numpy(road):
    got, expected = ROADS[road](X, MASK), oracle(X, MASK)
    # Means to eps of x, which are 500 sd off in the second channel; 2e-3 sd and squares of it.
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5)


def test_the_spread_is_that_of_an_analysis_of_variance():
    of = oracle(X)
    rows = X.mean(1, dtype=float).reshape(R, ROWS, C)
    expected = [scipy.stats.f_oneway(*rows[..., c]).statistic for c in range(C)]
    np.testing.assert_allclose(_shards.ratios(of.mean), expected, rtol=1e-9)
    assert _shards.spread(of.mean) == pytest.approx(np.sqrt(np.mean(expected)), rel=1e-9)
    chance = scipy.stats.f(R - 1, N - R)
    low, high = _shards.bounds(of, 0.01)
    assert (low**2, high**2) == pytest.approx((chance.ppf(0.01), chance.isf(0.005)), rel=1e-6)


@pytest.mark.parametrize("name", skewed.DRAWS)
def test_false_alarms_are_as_rare_as_was_asked(name):
    """With channels that are all alike, the worst case, and with others.

    4 sd of a share of 20,000 batches are 0.0028 at a rate of 0.01. Figures of means and of sds are
    independent for Gaussian rows, so that the bound of the larger is met; tails of other
    distributions only make the variance within a shard larger with that between.
    """
    number, asked = 20_000, skewed.ASKED[0]
    for channels in skewed.CHANNELS:
        above, below = skewed.rates(name, number, R, ROWS, channels)
        assert above[0] < asked + 4 * np.sqrt(asked / number)
        assert below[0] < asked
        if channels == 1 and name == "Gaussian":
            assert above[0] > asked / 2  # and not because nothing is found


# --- what is found ----------------------------------------------------------------------------


def found(x, shards=R):
    record = watch.Record(None, None, None, None, look(x, shards=shards))
    return health.shards({"bn": record})


LABELS = np.repeat(np.arange(4), 16)
IMAGES = np.random.default_rng(1).normal(0, 1, (64, 5, 2)).astype(np.float32)
IMAGES[..., 0] += LABELS[:, None]
SHUFFLED = np.random.default_rng(2).permutation(64)


def test_sound_shards_are_no_finding():
    assert found(IMAGES[SHUFFLED]) == []


def test_shards_sorted_by_class_are_skewed():
    (finding,) = found(IMAGES)
    assert (finding.layer, finding.kind, finding.severity) == ("bn", "skewed_shards", "warning")
    assert finding.channels == (0,)  # the classes do not differ in the other
    assert finding.figure > finding.threshold
    assert finding.remedy in [
        f"shuffle before the data is split, and prepare all shards alike: shard {i} lies farthest "
        f"off"
        for i in (0, 3)  # the first class and the last
    ]


@pytest.mark.parametrize("fault", [lambda x: 30 * x, lambda x: x + 1], ids=["sd", "mean"])
def test_a_shard_that_is_not_prepared_as_the_others_is_named(fault):
    x = IMAGES[SHUFFLED]
    (finding,) = found(np.concatenate([x[:32], fault(x[32:48]), x[48:]]))
    assert finding.kind == "skewed_shards"
    assert finding.remedy.endswith(": shard 2 lies farthest off")


def test_copies_are_repeated():
    (finding,) = found(np.tile(IMAGES[SHUFFLED][:16], (R, 1, 1)))
    assert finding.kind == "repeated_shards"
    assert finding.figure < finding.threshold
    assert finding.channels == ()
    assert finding.remedy.startswith("give each shard rows of its own, by jax.process_index()")


def test_one_layer_of_equal_means_is_no_repetition():
    """Statistics of each shard alone make the next layer's means equal, of whatever rows."""
    sound, copies = look(IMAGES[SHUFFLED]), look(np.tile(IMAGES[SHUFFLED][:16], (R, 1, 1)))
    records = {
        str(i): watch.Record(None, None, None, None, of) for i, of in enumerate((sound, copies))
    }
    assert health.shards(records) == []


def test_what_cannot_be_judged_is_no_finding():
    for x in (np.full((N, 2, C), 3.3, np.float32), X[:4], np.full_like(X, np.nan)):
        assert found(x) == []
    one = look(np.full((N, 2, C), 3.3, np.float32))
    assert np.isnan(_shards.spread(one.mean))


def test_a_layer_that_is_called_twice_counts_its_rows_once():
    norm = nn.BatchNorm(use_running_average=False)

    def twice(variables, x, **options):
        def call(module, x):
            return module(x), module(2 * x)

        return nn.apply(call, norm, **options)(variables, x)

    variables = norm.init(jax.random.key(0), X)
    _, seen = watch.linen(twice, shards=R)(variables, X, mutable=["batch_stats"])
    assert float(seen[""].batch.count) == 2 * N * PIXELS
    np.testing.assert_allclose(seen[""].shards.mean.mean, look(X).mean.mean, rtol=1e-6)


# --- bad input --------------------------------------------------------------------------------


def test_shards_that_are_none_are_refused():
    model = nn.BatchNorm(use_running_average=False)
    for wrong in (0, -1, 2.0, (), "", ["data", 1]):
        assert message(ValueError, watch.linen, model.apply, shards=wrong) == (
            f"watch.linen: shards={wrong!r}, expected the number of parts that the rows are split "
            f"into, or the names of mapped axes; write shards=jax.device_count(), or "
            f'shards="data" under shard_map and pmap.'
        )
    assert message(ValueError, look, X, shards=5) == (
        "watch: shards=5 and x of a batch norm layer has 12 rows, expected a number that divides "
        "the rows; write shards=jax.device_count(), or the name of the mapped axis under shard_map "
        "and pmap."
    )
    assert message(ValueError, look, X, shards="data").startswith(
        "watch: axis_name=('data',) is not bound here; bound axes: []."
    )


def test_records_without_shards_are_refused():
    record = watch.Record(None, None, None, None)
    assert message(ValueError, health.shards, {"bn": record}) == (
        "health.shards: the records of ['bn'] have no shards, expected those of a step that was "
        "watched with shards=; write watch.linen(model.apply, shards=jax.device_count()), or "
        "watch.nnx(model, shards=jax.device_count())."
    )
