"""Train against eval, layer by layer: where the gap opens, why, and the model left as it was."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
from jaxbn import health, layers
from tests.support.messages import message
from tests.support.networks import NnxNet

RNG = np.random.default_rng(0)
X = (RNG.normal(0, 1, (256, 6)) @ RNG.normal(0, 1, (6, 6)) + 2).astype(np.float32)
PATHS = ["norm0", "norm1", "norm2"]


class Net(nn.Module):
    """Three norms; called in the order of their numbers, which is not that of their names."""

    norm: type = nn.BatchNorm
    width: int = 32
    kind: str = "plain"
    names: tuple = tuple(PATHS)
    options: tuple = ()

    @nn.compact
    def __call__(self, x, train=False, mask=None):
        norm = nn.remat(self.norm) if self.kind == "remat" else self.norm
        for name in self.names:
            x = nn.Dense(self.width, name=f"dense_{name}")(x)
            x = norm(not train, momentum=0.9, name=name, **dict(self.options))(x, mask=mask)
            x = nn.relu(x)
        return nn.Dropout(0.5, deterministic=not train)(x)


def trained(model, x=X, updates=150, **kwargs):
    """Its variables after so many updates of the running statistics, the weights as they were."""
    variables = model.init(jax.random.key(0), x)
    keys = {"dropout": jax.random.key(1)}

    @jax.jit
    def step(stats):
        both = {**variables, "batch_stats": stats}
        return model.apply(both, x, True, mutable=["batch_stats"], rngs=keys, **kwargs)[1]

    stats = variables["batch_stats"]
    for _ in range(updates):
        stats = step(stats)["batch_stats"]
    return {**variables, "batch_stats": stats}


@pytest.fixture(scope="module")
def variables():
    return trained(Net())


def changed(variables, path, f):
    """The variables with f of one layer's State in place of it."""
    return layers.replace(variables, {path: f(layers.find(variables)[path].state)})


def test_a_trained_model_has_no_gap(variables):
    for n in (16, 256):
        gap = health.gap(Net().apply, variables, X[:n])
        assert gap.first is None
        assert gap.findings == ()
        assert [report.layer for report in gap.layers] == PATHS
        assert all(report.own <= report.limit for report in gap.layers)
        assert len(str(gap).splitlines()) == len(PATHS) + 2  # no array in it
    assert all(report.own < 1e-3 for report in gap.layers)  # 0.9**150 of the start is left


@pytest.mark.parametrize("path", PATHS)
def test_the_gap_opens_at_the_layer_that_was_changed(variables, path):
    """Layers before have no gap, those after inherit one, and only the sick one is named."""
    sick = changed(variables, path, lambda s: s._replace(mean=s.mean + 2 * jnp.sqrt(s.var)))
    gap = health.gap(Net().apply, sick, X)
    assert gap.first.layer == path
    assert [f.layer for f in gap.findings] == [path]
    at = PATHS.index(path)
    for i, report in enumerate(gap.layers):
        assert (report.gap > 0.1) == (i >= at)
        assert (report.own > 0.1) == (i == at)
    np.testing.assert_allclose(gap.first.own, 2, rtol=1e-2)  # a shift by 2 sd
    np.testing.assert_allclose(gap.first.own, gap.first.gap, rtol=1e-4)


def test_the_order_is_that_of_the_calls():
    model = Net(names=("z", "a", "m"))
    gap = health.gap(model.apply, model.init(jax.random.key(0), X), X)
    assert [report.layer for report in gap.layers] == ["z", "a", "m"]


def test_outputs_are_those_of_both_modes(variables):
    sick = changed(variables, "norm1", lambda s: s._replace(mean=s.mean + 1))
    gap = health.gap(Net().apply, sick, X)
    for train, at in ((True, 0), (False, 1)):
        x = np.asarray(X, np.float64)
        for path in PATHS:
            kernel = np.asarray(sick["params"][f"dense_{path}"]["kernel"], np.float64)
            x = x @ kernel
            stats = jax.tree.map(np.asarray, sick["batch_stats"][path])
            mean, var = (x.mean(0), x.var(0)) if train else (stats["mean"], stats["var"])
            x = (x - mean) / np.sqrt(var + 1e-5)
            np.testing.assert_allclose(gap.outputs[path][at], x, rtol=1e-3, atol=1e-3)
            x = np.maximum(x, 0)


CAUSES = {  # what is done to norm1's State, the cause it must be given, its severity
    "never": (lambda s: s._replace(mean=0 * s.mean, var=0 * s.var + 1), "never_updated", "error"),
    "slow": (
        lambda s: s._replace(mean=0.2 * s.mean, var=0.8 + 0.2 * s.var),
        "hardly_updated",
        "error",
    ),
    "var": (lambda s: s._replace(var=9 * s.var), "stale", "error"),
    "NaN": (lambda s: s._replace(mean=s.mean.at[1].set(jnp.nan)), "not_finite", "error"),
    "negative": (lambda s: s._replace(var=s.var.at[1].set(-1.0)), "negative_variance", "error"),
    "few channels": (lambda s: s._replace(mean=s.mean.at[:4].add(9.0)), "gap", "warning"),
}


@pytest.mark.parametrize("name", CAUSES)
def test_the_cause_of_a_gap_is_named(variables, name):
    change, kind, severity = CAUSES[name]
    gap = health.gap(Net().apply, changed(variables, "norm1", change), X)
    assert gap.first.layer == "norm1"
    assert gap.first.cause[1:3] == (kind, severity)
    assert gap.findings[0] is gap.first.cause
    if name == "slow":
        np.testing.assert_allclose(gap.first.cause.figure, 0.8, rtol=1e-3)
        assert gap.first.cause.remedy.startswith("29 updates at momentum 0.9")  # 0.9**29 < 0.05


def test_too_few_updates_are_named():
    gap = health.gap(Net().apply, trained(Net(), updates=5), X)
    assert {f.kind for f in gap.findings} == {"hardly_updated"}
    np.testing.assert_allclose(gap.first.cause.figure, 0.9**5, rtol=1e-3)


@pytest.mark.parametrize("masked_in_training", [True, False])
def test_padding_in_training_or_here_alone_is_named(masked_in_training):
    """Statistics with the padding in, a batch with it masked; and the other way round."""
    x = np.concatenate([X[:64], np.full((192, 6), 9, np.float32)])
    mask = (np.arange(256) < 64)[:, None]
    given = {"mask": mask}
    model = Net()
    sick = trained(model, x, **(given if masked_in_training else {}))
    assert health.gap(model.apply, sick, x, **(given if masked_in_training else {})).first is None
    gap = health.gap(model.apply, sick, x, **({} if masked_in_training else given))
    assert (gap.first.layer, gap.first.cause.kind) == ("norm0", "padding")
    assert gap.first.cause.figure == 0.75
    here = "pass mask= here as well: the batch ends in padding that the statistics never saw"
    assert (gap.first.cause.remedy == here) == masked_in_training


def test_unbiased_statistics_of_small_batches_are_named():
    """Eval divides by an sd that is sqrt(n / (n - 1)) times the larger."""
    for n, unbiased in ((4, True), (4, False), (64, True)):
        model = Net(jaxbn.linen.BatchNorm, options=(("unbiased", unbiased),))
        variables = trained(model, X[:n])
        found = [
            f for f in health.gap(model.apply, variables, X[:n]).findings if f.kind == "unbiased"
        ]
        assert len(found) == (3 if unbiased and n == 4 else 0)
        for finding in found:
            np.testing.assert_allclose(finding.figure, np.sqrt(4 / 3) - 1)
    reports = health.gap(model.apply, trained(model, X[:4]), X[:4]).layers
    eval_sd_too_large = 1 - np.sqrt(3 / 4)
    np.testing.assert_allclose(reports[0].own, eval_sd_too_large, rtol=1e-3)


@pytest.mark.parametrize("kind", ["plain", "remat"])
@pytest.mark.parametrize("norm", [nn.BatchNorm, jaxbn.linen.BatchNorm])
def test_linen_variables_stay_and_any_mode_may_be_asked_for(norm, kind):
    model = Net(norm, kind=kind)
    variables = trained(model, updates=2)
    before = jax.tree.map(np.array, variables)
    keys = {"dropout": jax.random.key(3)}
    calls = [
        health.gap(model.apply, variables, X),
        health.gap(model.apply, variables, X, train=True, rngs=keys),
        health.gap(model.apply, variables, X, train=True, rngs=keys, mutable=["batch_stats"]),
    ]
    jax.tree.map(np.testing.assert_array_equal, before, variables)
    for gap in calls[1:]:
        np.testing.assert_array_equal(
            [report[1:4] for report in gap.layers], [report[1:4] for report in calls[0].layers]
        )


def test_a_scanned_layer_is_one_layer():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.relu(nn.BatchNorm(use_running_average=True)(nn.Dense(6)(x))), None

    axes = {"params": 0, "batch_stats": 0}
    scanned = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=3)
    model = scanned()
    variables = model.init(jax.random.key(0), X, None)
    gap = health.gap(model.apply, variables, X, None)
    assert gap.first.layer == "BatchNorm_0"
    assert gap.first.cause.kind == "never_updated"
    assert gap.outputs["BatchNorm_0"][0].shape == (3, 256, 6)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_layer_that_is_called_twice_is_judged_by_the_worse_call(order):
    """Its statistics are those of one input; the other input is 3 sd away."""

    class Twice(nn.Module):
        @nn.compact
        def __call__(self, xs):
            norm = nn.BatchNorm(use_running_average=True, name="norm")
            return [norm(x) for x in xs]

    x = RNG.normal(0, 2, (256, 6)).astype(np.float32)
    xs = [x, x + 6]
    variables = {
        "params": {"norm": {"scale": np.ones(6), "bias": np.zeros(6)}},
        "batch_stats": {"norm": {"mean": x.mean(0), "var": x.var(0)}},
    }
    gap = health.gap(Twice().apply, variables, [xs[i] for i in order])
    assert (gap.first.layer, gap.first.cause.kind) == ("norm", "stale")
    np.testing.assert_allclose([gap.first.own, gap.first.gap], 3, rtol=0.05)
    of_train, of_eval = gap.outputs["norm"]
    np.testing.assert_allclose((of_eval - of_train).mean(), 3, rtol=0.05)


@pytest.mark.parametrize("norm", [nnx.BatchNorm, jaxbn.nnx.BatchNorm])
def test_an_nnx_model_stays_as_it_is_in_any_mode(norm):
    images = RNG.normal(1, 2, (64, 4, 4, 3)).astype(np.float32)
    model = NnxNet(norm, rngs=nnx.Rngs(0))
    forward = nnx.jit(lambda model, x: model(x))
    for _ in range(100):
        forward(model, images)
    before = jax.tree.map(np.array, nnx.state(model))
    for mode in (model.train, model.eval):
        mode()
        assert health.gap(model, images).first is None
    model.norm2.mean[...] += 1
    gap = health.gap(model, images)
    assert [report.layer for report in gap.layers] == ["norm1", "norm2"]
    assert (gap.first.layer, gap.first.cause.kind) == ("norm2", "stale")
    model.norm2.mean[...] -= 1
    after = nnx.state(model)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), before, after)
    assert type(model.norm1) is norm


@pytest.mark.parametrize("bad", [0, 1])
def test_a_nan_in_any_call_of_a_layer_is_its_gap(bad):
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, xs):
            shared = nn.BatchNorm(use_running_average=True, name="shared")
            return [shared(x) for x in xs]

    held = {"mean": X.mean(0), "var": X.var(0)}
    weights = {"scale": np.ones(X.shape[-1], X.dtype), "bias": np.zeros(X.shape[-1], X.dtype)}
    variables = {"params": {"shared": weights}, "batch_stats": {"shared": held}}
    xs = [X, X.copy()]
    xs[bad][0, 0] = np.nan
    gap = health.gap(Twice().apply, variables, xs)
    assert np.isnan(gap.layers[0].own)
    assert gap.first.cause.kind == "not_finite"


def test_bad_calls_are_told_what_to_write(variables):
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(x)

    cases = [
        (
            (Plain().apply, Plain().init(jax.random.key(0), X), X),
            ValueError,
            "gap: the model called no batch norm layer; expected a model with Flax's "
            "BatchNorm, jaxbn.linen.BatchNorm or jaxbn.nnx.BatchNorm.",
        ),
        (
            (Net(), variables, X),
            TypeError,
            "gap: called with (Net, dict, ndarray), expected linen's apply, its variables and a "
            "batch, or an nnx model and a batch; write gap(model.apply, variables, x) or "
            "gap(model, x).",
        ),
        (
            (Net().apply, X),
            TypeError,
            "gap: called with (method, ndarray), expected linen's apply, its variables and a "
            "batch, or an nnx model and a batch; write gap(model.apply, variables, x) or "
            "gap(model, x).",
        ),
        (
            (Net().apply, variables, X[:0]),
            ValueError,
            "gap: x of a batch norm layer has shape (0, 32), which holds no values; pass a "
            "batch as in training.",
        ),
    ]
    for args, kind, expected in cases:
        assert message(kind, health.gap, *args) == expected
