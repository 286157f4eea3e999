"""One value per channel in training: the Flax modules equal Flax's, and say so each time."""

import functools
import warnings

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
from jaxbn import calls, health

X = jax.random.normal(jax.random.key(0), (5, 3))
EVAL = "normalize by the running statistics with use_running_average=True (nnx: model.eval())."
REMEDY = f"Use a larger batch, pool devices with axis_name=, or {EVAL}"
VARIABLES = {
    "params": {"scale": jnp.arange(3.0), "bias": jnp.arange(3.0) - 1},
    "batch_stats": {"mean": jnp.ones(3), "var": jnp.full(3, 4.0)},
}
# Options, x, and what is said of it; Flax's own layer has no virtual_batch_size.
CASES = {
    "a row": (
        {},
        X[:1],
        f"x with shape (1, 3) has one value per channel over all devices, {{}} {REMEDY}",
    ),
    "an image of a pixel": (
        {},
        X[:1, None, None],
        f"x with shape (1, 1, 1, 3) has one value per channel over all devices, {{}} {REMEDY}",
    ),
    "a ghost of a row": (
        {"virtual_batch_size": 1},
        X[:1],
        "x with shape (1, 3) has one value per channel in each group of virtual_batch_size=1, {} "
        f"Use a larger virtual_batch_size, or {EVAL}",
    ),
}
SO = "so y is bias whatever x is; expected at least 2 in training."


def linen_step(layer, x):
    y, updates = layer.apply(VARIABLES, x, mutable=["batch_stats"])
    return y, updates["batch_stats"]


def nnx_layer(cls=jaxbn.nnx.BatchNorm, **options):
    layer = cls(3, **options, rngs=nnx.Rngs(0))
    nnx.update(layer, {**VARIABLES["params"], **VARIABLES["batch_stats"]})
    return layer


def nnx_step(layer, x):
    y = layer(x)
    return y, {"mean": layer.mean[...], "var": layer.var[...]}


def heard(f, *args):
    """The result, and the warnings that came: of our class, each pointing at this file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = f(*args)
    assert [w.category for w in caught] == [jaxbn.OneValueWarning] * len(caught)
    assert {w.filename for w in caught} <= {__file__}
    return out, [str(w.message) for w in caught]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_y_and_statistics_are_flaxs_and_a_warning_comes(kind, case):
    options, x, message = CASES[case]
    plain = {k: v for k, v in options.items() if k != "virtual_batch_size"}
    if kind == "linen":
        make = functools.partial(jaxbn.linen.BatchNorm, use_running_average=False)
        flaxs = nn.BatchNorm(use_running_average=False, **plain)
        (y, stats), said = heard(linen_step, make(**options), x)
        expected = linen_step(flaxs, x)
    else:
        (y, stats), said = heard(nnx_step, nnx_layer(**options), x)
        expected = nnx_step(nnx_layer(nnx.BatchNorm, **plain), x)
    assert said == ["BatchNorm: " + message.format(SO)]
    assert y.dtype == expected[0].dtype
    np.testing.assert_array_equal(y, jnp.broadcast_to(VARIABLES["params"]["bias"], x.shape))
    np.testing.assert_array_equal(y, expected[0])
    chex.assert_trees_all_close(stats, expected[1], rtol=1e-6)


class Net(nn.Module):
    train: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Sequential([nn.Dense(3)], name="head")(x)
        return jaxbn.linen.BatchNorm(use_running_average=not self.train, name="bn")(x)


class NnxNet(nnx.Module):
    def __init__(self):
        self.bn = nnx.List([jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))])

    def __call__(self, x):
        return self.bn[0](x)


def named(path):
    message = CASES["a row"][2].format(SO)
    return f"BatchNorm {path!r}: {message}"


def test_it_comes_with_every_call_and_every_trace_but_not_in_init():
    variables, said = heard(Net().init, jax.random.key(0), X[:1])
    assert said == []
    apply = functools.partial(Net().apply, variables, mutable=["batch_stats"])
    for _ in range(2):
        assert heard(apply, X[:1])[1] == [named("bn")]
    jitted = jax.jit(apply)
    assert [len(heard(jitted, X[:1])[1]) for _ in range(2)] == [1, 0]
    with pytest.warns(jaxbn.OneValueWarning, match="one value per channel"):  # an error here, say
        apply(X[:1])


@pytest.mark.parametrize(
    "silent",
    [
        lambda net, v: net.apply(v, X[:2], mutable=["batch_stats"]),
        lambda net, v: Net(train=False).apply(v, X[:1]),
        lambda net, v: jaxbn.linen.BatchNorm(use_running_average=False).apply(
            VARIABLES, X[:1], mask=jnp.ones((1, 3), bool), mutable=["batch_stats"]
        ),
        lambda net, v: jax.vmap(
            lambda x: linen_step(
                jaxbn.linen.BatchNorm(use_running_average=False, axis_name="devices"), x[None]
            ),
            axis_name="devices",
        )(X),
    ],
    ids=["two rows", "eval", "a mask", "a row on each of five devices"],
)
def test_nothing_is_said_where_there_is_more_to_go_by(silent):
    net = Net()
    assert heard(silent, net, net.init(jax.random.key(0), X))[1] == []


def test_one_device_alone_in_its_group_counts_its_own_values():
    layer = jaxbn.linen.BatchNorm(
        use_running_average=False, axis_name="d", axis_index_groups=[[0], [1]]
    )
    step = jax.vmap(lambda x: linen_step(layer, x[None]), axis_name="d")
    (y, stats), said = heard(step, X[:2])
    assert said == ["BatchNorm: " + CASES["a row"][2].format(SO)]
    np.testing.assert_array_equal(y[:, 0], jnp.tile(VARIABLES["params"]["bias"], (2, 1)))
    np.testing.assert_allclose(stats["mean"], 0.99 + 0.01 * X[:2], rtol=1e-6)


def test_filters_can_make_it_an_error():
    with warnings.catch_warnings():
        warnings.simplefilter("error", jaxbn.OneValueWarning)
        with pytest.raises(jaxbn.OneValueWarning, match="'bn'"):
            Net().apply(Net().init(jax.random.key(0), X), X[:1], mutable=["batch_stats"])


def test_nnx_knows_its_path_while_a_hook_runs():
    model = NnxNet()
    with calls.hooked_nnx(model) as seen:
        _, said = heard(model, X[:1])
    assert said == [named("bn/0")]
    np.testing.assert_array_equal(seen["bn/0"].mean, X[0])
    np.testing.assert_array_equal(seen["bn/0"].var, 0)


def test_tabulate_and_eval_shape_take_a_row():
    table, said = heard(nnx.tabulate, NnxNet(), X[:1])
    assert "BatchNorm" in table
    assert len(said) >= 1
    shape, said = heard(nnx.eval_shape, lambda: NnxNet()(X[:1]))
    assert (shape.shape, len(said)) == ((1, 3), 1)


@pytest.mark.parametrize("norm", [nn.BatchNorm, jaxbn.linen.BatchNorm])
def test_recalibrate_takes_a_last_batch_of_one_row(norm):
    net = norm(use_running_average=True)
    variables = net.init(jax.random.key(0), X)
    batches = [X[:2], X[2:4], X[4:]]
    new, said = heard(jaxbn.recalibrate, net.apply, variables, batches)
    assert len(said) == (norm is jaxbn.linen.BatchNorm)
    whole = jaxbn.moments(X)
    expected = {"mean": whole.mean, "var": whole.var}
    chex.assert_trees_all_close(new["batch_stats"], expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_gap_and_check_take_a_row_and_find_few_values(kind):
    if kind == "linen":
        net = jaxbn.linen.BatchNorm(use_running_average=True)
        gap, said = heard(health.gap, net.apply, VARIABLES, X[:1])
    else:
        gap, said = heard(health.gap, nnx_layer(), X[:1])
    assert len(said) == 1
    assert "few_values" in {finding.kind for finding in gap.findings}
    np.testing.assert_array_equal(gap.outputs[""][0][0], VARIABLES["params"]["bias"])
