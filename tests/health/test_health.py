"""What is wrong with what a layer holds: each finding where it should be, none where it is well."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn import calls, health, watch
from tests.support.messages import message
from tests.support.networks import NnxNet

C = 8
RNG = np.random.default_rng(0)


def healthy(c=C):
    """A layer as training leaves it."""
    rng = np.random.default_rng(1)
    return {
        "params": {"bn": {"scale": rng.uniform(0.5, 2, c), "bias": rng.normal(0, 1, c)}},
        "batch_stats": {"bn": {"mean": rng.normal(0, 2, c), "var": rng.uniform(0.1, 5, c)}},
    }


def with_leaf(collection, name, index, value, c=C):
    variables = healthy(c)
    variables[collection]["bn"][name][index] = value
    return variables


def moments_of(variables, n=64, **change):
    """Moments that agree with the running statistics, but for what is changed."""
    stats = {**variables["batch_stats"]["bn"], **change}
    return {"bn": jaxbn.Moments(n, stats["mean"], stats["var"])}


# distances


def gaussian(x, mean, var):
    return np.exp(-((x - mean) ** 2) / (2 * var)) / np.sqrt(2 * np.pi * var)


def test_distance_is_the_divergence_of_the_gaussians():
    """KL both ways by the trapezoidal rule, over 40 sd of the wider one."""
    mean, var, batch_mean, batch_var = RNG.normal(0, 1, 4), *RNG.uniform(0.5, 2, (3, 4))
    eps = 1e-3
    d = health.distance(jaxbn.State(mean, var, None), jaxbn.Moments(1, batch_mean, batch_var), eps)
    x = np.linspace(-30, 30, 20001)[:, None]
    q, p = gaussian(x, mean, var + eps), gaussian(x, batch_mean, batch_var + eps)
    inside = (p > 0) & (q > 0)
    log = np.log(np.where(inside, q / np.where(p > 0, p, 1), 1))
    expected = np.trapezoid((q - p) * log, x, axis=0)
    np.testing.assert_allclose(d.divergence, expected, rtol=1e-6)
    np.testing.assert_allclose(d.shift, (mean - batch_mean) / np.sqrt(batch_var + eps), rtol=1e-12)
    np.testing.assert_allclose(d.log_ratio, np.log((var + eps) / (batch_var + eps)), rtol=1e-12)


@pytest.mark.parametrize(("updates", "momentum"), [(1, 0.9), (20, 0.99), (100, 0.99)])
def test_initial_share_is_what_updates_leave(updates, momentum):
    x = RNG.normal(3, 2, (256, 64)).astype(np.float32)
    _, state = jaxbn.init(64)
    for _ in range(updates):
        _, state = jaxbn.batch_norm(x, None, state, train=True, momentum=momentum)
    share = health.initial_share(state, jaxbn.moments(x))
    np.testing.assert_allclose(share, momentum**updates, rtol=1e-4)  # float32 updates


# each finding


# what is sick, further arguments of check, and of the one finding: kind, severity, figure, channels
SICK = {
    "NaN": (("batch_stats", "mean", 3, np.nan), {}, ("not_finite", "error", 1, (3,))),
    "inf scale": (("params", "scale", 1, np.inf), {}, ("not_finite", "error", 1, (1,))),
    "negative": (("batch_stats", "var", 2, -0.5), {}, ("negative_variance", "error", -0.5, (2,))),
    "new": (("batch_stats", "mean", ..., 0), {}, ("never_updated", "error", 0, ())),
    "collapsed": (("batch_stats", "var", 4, 0), {}, ("dead", "warning", 0, (4,))),
    "no scale": (("params", "scale", 5, 0), {}, ("dead", "warning", 0, (5,))),
    "scale": (("params", "scale", 6, -200), {}, ("exploding", "warning", 200, (6,))),
    "bias": (("params", "bias", 7, 101), {}, ("exploding", "warning", 101, (7,))),
    "float32": (("batch_stats", "mean", 0, 3e4), {}, ("large_mean", "warning", None, (0,))),
    "bfloat16": (
        ("batch_stats", "mean", 0, -100),
        {"dtype": jnp.bfloat16},
        ("large_mean", "warning", None, (0,)),
    ),
    "float16": (
        ("batch_stats", "mean", 0, 700),
        {"dtype": jnp.float16},
        ("large_mean", "warning", None, (0,)),
    ),
}


@pytest.mark.parametrize(
    ("dtype", "severity"), [("float16", "warning"), ("bfloat16", "warning"), ("int32", "error")]
)
@pytest.mark.parametrize("leaf", ["mean", "var"])
def test_statistics_in_a_narrow_dtype_are_a_finding(leaf, dtype, severity):
    variables = with_leaf("batch_stats", "mean", 3, 1.0)
    stats = variables["batch_stats"]["bn"]
    stats[leaf] = jnp.asarray(stats[leaf] + 1, dtype)
    (finding,) = health.check(variables)
    assert finding[:3] == ("bn", "narrow_statistics", severity)
    assert finding.figure == (1 if severity == "error" else float(jnp.finfo(dtype).eps))
    if severity == "warning":  # beside what it may have led to
        stats[leaf] = stats[leaf].at[0].set(jnp.inf)
        kinds = [finding.kind for finding in health.check(variables)]
        assert kinds == ["not_finite", "narrow_statistics"]


@pytest.mark.parametrize("start", ["init", "loaded"])
def test_momentum_1_counts_and_learns_nothing(start):
    x, (_, state) = RNG.normal(3, 2, (32, 4)).astype(np.float32), jaxbn.init(4)
    if start == "loaded":
        state = state._replace(mean=state.mean + 1)
    for _ in range(3):
        _, state = jaxbn.batch_norm(x, None, state, train=True, momentum=1.0)
    assert int(state.count) == 3
    (finding,) = health.check({"bn": state}, momentum=None if start == "init" else 1.0)
    assert finding.kind == ("never_updated" if start == "init" else "hardly_updated")
    assert finding.severity == "error"
    assert finding.remedy.startswith("a momentum below 1, the share of the old statistics")


@pytest.mark.parametrize("name", SICK)
def test_each_sickness_is_one_finding(name):
    where, options, (kind, severity, figure, channels) = SICK[name]
    variables = with_leaf(*where)
    if name == "new":
        variables["batch_stats"]["bn"]["var"][:] = 1
    (finding,) = health.check(variables, **options)
    assert finding[:3] == ("bn", kind, severity)
    assert finding.channels == channels
    if figure is not None:
        assert finding.figure == figure
    assert finding.remedy
    assert "\n" not in finding.remedy
    assert kind in health.KINDS


def test_large_means_are_measured_in_the_dtypes_own_rounding():
    """The threshold is where one rounding of a value is off by a tenth of an sd."""
    for dtype, limit in ((jnp.bfloat16, 25.6), (jnp.float16, 204.8)):
        variables = with_leaf("batch_stats", "mean", 0, 1e4)
        (finding,) = health.check(variables, dtype=dtype)
        np.testing.assert_allclose(finding.threshold, limit)
        sd = np.sqrt(variables["batch_stats"]["bn"]["var"][0] + 1e-5)
        np.testing.assert_allclose(finding.figure, 1e4 / sd)
        x = jnp.linspace(0.5, 1, 1001, dtype=jnp.float32) * 256
        worst = jnp.abs(x.astype(dtype).astype(jnp.float32) - x).max() / 256
        np.testing.assert_allclose(worst * finding.threshold, 0.05, rtol=0.02)


def test_nothing_is_wrong_with_a_healthy_layer():
    assert health.check(healthy()) == []
    assert health.check(healthy(), moments_of(healthy())) == []


@pytest.mark.parametrize(
    ("momentum", "count", "severity"),
    [(0.99, 0, None), (0.99, 60, "error"), (0.99, 200, "warning"), (0.99, 300, ""), (None, 1, "")],
)
def test_counted_updates_say_what_is_left_of_the_start(momentum, count, severity):
    stats = healthy()["batch_stats"]["bn"]
    state = jaxbn.State(stats["mean"], stats["var"], np.int32(count))
    findings = health.check({"bn": state}, momentum=momentum)
    if severity == "":
        assert findings == []
        return
    (finding,) = findings
    if severity is None:
        assert (finding.kind, finding.severity) == ("never_updated", "error")
    else:
        assert (finding.kind, finding.severity) == ("hardly_updated", severity)
        np.testing.assert_allclose(finding.figure, momentum**count)
        assert finding.remedy.startswith("299 updates at momentum 0.99")  # 0.99**299 < 0.05


def test_moments_tell_stale_from_hardly_updated():
    variables = healthy(64)
    seen = moments_of(variables, 512)
    learned = variables["batch_stats"]["bn"]
    part = {"mean": 0.3 * learned["mean"], "var": 0.7 + 0.3 * learned["var"]}
    (finding,) = health.check({**variables, "batch_stats": {"bn": part}}, seen)
    assert (finding.kind, finding.severity) == ("hardly_updated", "error")
    np.testing.assert_allclose(finding.figure, 0.7, rtol=1e-6)
    moved = {"mean": learned["mean"] + np.sqrt(learned["var"]), "var": learned["var"]}
    (finding,) = health.check({**variables, "batch_stats": {"bn": moved}}, seen)
    assert (finding.kind, finding.severity) == ("stale", "warning")
    np.testing.assert_allclose(finding.figure, 1, rtol=1e-3)  # a shift by one sd; epsilon is small
    assert finding.channels == tuple(range(64))


def test_moments_of_few_or_bad_values_are_a_finding():
    variables = healthy()
    (finding,) = health.check(variables, moments_of(variables, n=15))
    assert (finding.kind, finding.figure, finding.threshold) == ("few_values", 15, 16)
    bad = np.where(np.arange(C) == 2, np.nan, 1)
    (finding,) = health.check(variables, moments_of(variables, mean=bad))
    assert (finding.kind, finding.channels) == ("not_finite", (2,))


def test_thresholds_can_be_overridden():
    variables = with_leaf("params", "scale", 0, 50)
    assert health.check(variables) == []
    limits = health.Limits(exploding=10.0)
    (finding,) = health.check(variables, limits=limits)
    assert finding.threshold == 10


def mesh():
    return jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))


def test_replicas_that_disagree_are_a_finding():
    rows = {"mean": np.zeros((8, C), np.float32), "var": np.full((8, C), 4, np.float32)}
    rows["mean"][5, 3] = 1
    rowwise = jax.device_put(rows, NamedSharding(mesh(), P("d")))  # as pmap returns it
    (finding,) = health.check({"bn": rowwise})
    assert (finding.kind, finding.severity, finding.channels) == ("replicas_differ", "error", (3,))
    np.testing.assert_allclose(finding.figure, 0.5, rtol=1e-5)  # 1 at sd 2
    copies = [jax.device_put(rows["mean"][i], d) for i, d in enumerate(jax.devices())]
    mean = jax.make_array_from_single_device_arrays((C,), NamedSharding(mesh(), P()), copies)
    var = jax.device_put(rows["var"][0], NamedSharding(mesh(), P()))
    (finding,) = health.check({"bn": {"mean": mean, "var": var}})
    assert (finding.kind, finding.channels) == ("replicas_differ", (3,))
    assert "jaxbn.sync_state" in finding.remedy


def test_one_replica_with_a_nan_is_found():
    var = np.ones((8, C), np.float32)
    var[6, 2] = np.nan
    tree = jax.device_put({"mean": 2 * var**0, "var": var}, NamedSharding(mesh(), P("d")))
    (finding,) = health.check({"bn": tree})
    assert (finding.kind, finding.channels) == ("not_finite", (2,))


def test_replicas_that_agree_and_features_that_are_split_are_none():
    stats = jax.tree.map(jnp.float32, healthy()["batch_stats"])
    for spec in (P(), P("d")):
        assert health.check(jax.device_put(stats, NamedSharding(mesh(), spec))) == []
    rows = jax.tree.map(lambda v: jnp.broadcast_to(v, (8, C)), stats)
    assert health.check(jax.device_put(rows, NamedSharding(mesh(), P("d")))) == []
    counted = {"bn": jaxbn.State(stats["bn"]["mean"], stats["bn"]["var"], np.int32(1000))}
    assert health.check(jax.device_put(counted, NamedSharding(mesh(), P()))) == []


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float64])
def test_statistics_of_any_dtype_are_judged_in_float64(dtype):
    variables = jax.tree.map(lambda v: v.astype(dtype), healthy())
    kinds = [] if dtype == np.float64 else ["narrow_statistics"]
    assert [finding.kind for finding in health.check(variables)] == kinds
    variables["batch_stats"]["bn"]["var"][1] = -1
    assert [f.kind for f in health.check(variables)] == ["negative_variance", *kinds]


def test_stacked_layers_count_channels_in_c_order():
    stats = {"mean": RNG.normal(0, 1, (3, C)), "var": np.ones((3, C))}
    stats["var"][2, 1] = -1
    (finding,) = health.check({"batch_stats": {"scanned": stats}})
    assert finding.channels == (2 * C + 1,)


def test_an_nnx_models_own_epsilon_momentum_and_dtype_are_used():
    model = jaxbn.nnx.BatchNorm(
        2, momentum=None, epsilon=1e-3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    model.mean[...], model.var[...] = jnp.array([0.0, 40.0]), jnp.array([5e-6, 1.0])
    model.count[...] = jnp.int32(1)
    large, dead = health.check(model)  # at the default of 1e-5 the variance would be no dead one
    assert (large.kind, large.channels) == ("large_mean", (1,))
    np.testing.assert_allclose(large.threshold, 25.6)
    assert (dead.kind, dead.channels, dead.threshold) == ("dead", (0,), 0.1)


def test_findings_are_sorted_worst_first():
    variables = with_leaf("params", "scale", 0, 500)
    for name, var in (("a", 0.0), ("z", -1.0)):
        variables["batch_stats"][name] = {"mean": np.ones(2), "var": np.array([1, var])}
    findings = health.check(variables)
    kinds = ["negative_variance", "exploding", "dead"]
    assert [f.kind for f in findings] == kinds
    rows = health.summary(variables, findings)
    assert [(row.layer, row.features, row.findings) for row in rows] == [
        ("z", (2,), 1),
        ("bn", (C,), 1),
        ("a", (2,), 1),
    ]
    assert [row.worst.kind for row in rows] == kinds
    assert rows[0].figures["var_min"] == -1
    assert rows[1].figures["scale_max"] == 500
    assert [row.worst for row in health.summary(variables)] == [None, None, None]


# no false alarms


class Dense(nn.Module):
    width: int
    norm: type
    dtype: object = None

    @nn.compact
    def __call__(self, x, train):
        for i in range(3):
            x = nn.Dense(self.width, dtype=self.dtype)(x)
            scale = nn.initializers.zeros if i == 1 else nn.initializers.ones  # a residual branch's
            norm = self.norm(not train, momentum=0.9, dtype=self.dtype, scale_init=scale)
            x = x + norm(x) if i == 1 else nn.relu(norm(x))
        return nn.Dense(10)(x.astype(jnp.float32))


def batch(rng, n):
    """Inputs of ten classes, with means and scales that differ by feature, and their labels."""
    label = rng.integers(0, 10, n)
    centre = np.random.default_rng(7).normal(0, 1, (10, 20))
    x = (centre[label] + rng.normal(0, 1, (n, 20))) * np.geomspace(0.1, 10, 20) + 3
    return x.astype(np.float32), label


@pytest.mark.parametrize(
    ("width", "n", "dtype", "norm"),
    [
        (8, 16, None, nn.BatchNorm),
        (512, 16, None, jaxbn.linen.BatchNorm),
        (64, 512, jnp.bfloat16, jaxbn.linen.BatchNorm),
    ],
)
def test_no_findings_on_a_network_in_training(width, n, dtype, norm):
    model = Dense(width, norm, dtype)
    rng = np.random.default_rng(width)
    variables = model.init(jax.random.key(0), batch(rng, n)[0], True)
    tx = optax.sgd(0.05, momentum=0.9)

    @jax.jit
    def step(variables, memory, x, label):
        def loss(params):
            logits, new = model.apply({**variables, "params": params}, x, True, mutable=True)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
            return losses.mean(), new["batch_stats"]

        grads, stats = jax.grad(loss, has_aux=True)(variables["params"])
        updates, memory = tx.update(grads, memory)
        params = optax.apply_updates(variables["params"], updates)
        return {"params": params, "batch_stats": stats}, memory

    seen_of = jax.jit(lambda v, x: calls.hooked_apply(model.apply)(v, x, False)[1])
    memory = tx.init(variables["params"])
    assert {f.kind for f in health.check(variables)} == {"never_updated"}
    for i in range(100):
        variables, memory = step(variables, memory, *batch(rng, n))
        if i >= 50 and i % 10 == 9:
            seen = seen_of(variables, batch(rng, n)[0])
            found = health.check(variables, seen, momentum=0.9, dtype=dtype or np.float32)
            assert found == []


def test_no_findings_on_a_convolutional_nnx_network():
    """Pixels agree with their neighbours: each image is a row, its pixels are not."""
    rng = np.random.default_rng(0)

    def images():
        coarse = rng.normal(0, 1, (16, 4, 4, 3)).repeat(4, 1).repeat(4, 2)
        return (coarse + rng.normal(0, 0.1, coarse.shape)).astype(np.float32)

    model = NnxNet(nnx.BatchNorm, rngs=nnx.Rngs(0))
    forward = nnx.jit(lambda model, x: model(x))
    for _ in range(60):
        forward(model, images())
    for _ in range(10):
        with calls.hooked_nnx(model) as seen:
            forward(model, images())
        assert health.check(model, seen, rows=16) == []


@pytest.mark.parametrize("n", [16, 64, 512])
@pytest.mark.parametrize("c", [1, 8, 512])
def test_sampling_noise_is_no_staleness(n, c):
    """Batches of n rows by c channels, heavier in the tails than Gaussian: 1 in 1000 at most."""
    rng = np.random.default_rng(n + c)
    trials, alarms = 2000 if n * c < 1e4 else 100, 0
    for _ in range(trials):
        x = rng.laplace(0, 1, (n, c))
        state = jaxbn.State(np.full(c, 1e-3), np.full(c, 2.0), None)
        figure, limit, _ = health.divergence(state, jaxbn.Moments(n, x.mean(0), x.var(0)))
        alarms += figure > limit
    assert alarms <= 1e-3 * trials


@pytest.mark.parametrize("n", [2, 15])
def test_few_values_are_no_staleness(n):
    """The variance of two is near 0 as often as not: they say that they are few, and no more."""
    x = np.random.default_rng(n).normal(0, 1, (n, C)) * np.where(np.arange(C) % 2, 1, 1e-3)
    moments = {"bn": jaxbn.Moments(n, x.mean(0), x.var(0))}
    (finding,) = health.check(healthy(), moments)
    assert finding.kind == "few_values"


# errors


def test_a_model_without_batch_norm_is_refused():
    for call in (health.check, health.summary):
        with pytest.raises(ValueError) as error:
            call({"params": {"dense": {"kernel": np.ones((2, 2))}}})
        assert str(error.value) == (
            f"{call.__name__}: no batch norm layer in a tree with 1 leaves; expected linen's "
            f'variables, an nnx model, or a tree with a State (or a mapping with "mean" and '
            f'"var") for each layer; write {call.__name__}(variables).'
        )


def test_what_a_watched_step_gives_will_do_for_moments():
    variables = healthy()
    seen = moments_of(variables, n=15)
    observed = {path: watch.Observed(of_x) for path, of_x in seen.items()}
    for moments in (observed, watch.records(seen, variables), watch.records(observed, variables)):
        assert health.check(variables, moments) == health.check(variables, seen) != []
    with pytest.raises(TypeError) as error:
        health.check(variables, {"bn": variables["batch_stats"]["bn"]})
    assert str(error.value) == (
        "check: called with dict of ['dict'], expected a dict, path → Moments of each layer, as "
        "calls.hooked_apply(model.apply)(variables, x)[1] gives; write check(variables, moments)."
    )


def test_moments_of_another_model_are_refused():
    fix = (
        "pass the moments that calls.hooked_apply(model.apply)(variables, x) returns for this "
        "model."
    )
    with pytest.raises(ValueError) as error:
        health.check(healthy(), {"norm": jaxbn.Moments(1, np.ones(C), np.ones(C))})
    assert str(error.value) == (
        f"check: moments are of a layer 'norm', but the layers are ['bn']; {fix}"
    )
    with pytest.raises(ValueError) as error:
        health.check(healthy(), {"bn": jaxbn.Moments(1, np.ones(3), np.ones(3))})
    assert str(error.value) == (
        f"check: moments of 'bn' have shape (3,), but its statistics have shape (8,); {fix}"
    )


STATS = {"bn": {"mean": np.zeros(3), "var": np.ones(3)}}


@pytest.mark.parametrize(
    ("call", "given"),
    [
        ("check", lambda v: health.check(STATS, limits=v)),
        ("gap", lambda v: health.gap(nn.BatchNorm().apply, STATS, np.eye(3), limits=v)),
        ("health.shards", lambda v: health.shards({}, limits=v)),
        ("advise", lambda v: health.advise(32, limits=v)),
    ],
)
def test_limits_that_are_none_are_refused(call, given):
    assert message(TypeError, given, 0.5) == (
        f"{call}: limits is a float, expected health.Limits; write limits=health.Limits(gap=0.5)."
    )


@pytest.mark.parametrize("momentum", [2.0, "a"])
def test_a_momentum_that_is_none_is_refused(momentum):
    kind = TypeError if momentum == "a" else ValueError
    assert message(kind, health.check, STATS, momentum=momentum) == (
        f"check: momentum={momentum!r}, expected a number in [0, 1], the fraction of the old value "
        f"that is kept (PyTorch's momentum m is 1 - m here), or None for the cumulative average; "
        f"write momentum=0.99."
    )
