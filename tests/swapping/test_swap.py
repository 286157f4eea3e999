"""Flax's own norms where batch norms were: the same parameters, under the same names."""

import functools
from pathlib import Path

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxbn
from tests.support.messages import message
from tests.support.networks import NnxNet, ResNet, TinyLinen

EXAMPLES = Path(__file__).parents[2] / "examples"
RNG = np.random.default_rng(0)
X = RNG.normal(1, 2, (2, 5, 4, 16)).astype(np.float32)
LINEN = {"flax": linen.BatchNorm, "jaxbn": jaxbn.linen.BatchNorm}
NNX = {"flax": nnx.BatchNorm, "jaxbn": jaxbn.nnx.BatchNorm}
SCALE, BIAS = RNG.normal(size=(2, 16)).astype(np.float32)  # negative ones too


def expected(x, to, groups, mask=None):
    """The three norms in float64, epsilon 1e-3."""
    x = np.asarray(x, np.float64)
    n, c = x.shape[0], x.shape[-1]
    if to == "layer":
        groups, shape, over = None, x.shape, (-1,)
    else:
        groups = c if to == "instance" else groups
        shape, over = (n, *x.shape[1:-1], groups, c // groups), (*range(1, x.ndim - 1), x.ndim)
    g = x.reshape(shape)
    valid = np.broadcast_to(True if mask is None else mask, x.shape).reshape(shape)
    mean = np.mean(g, over, keepdims=True, where=valid)
    var = np.var(g, over, keepdims=True, where=valid)
    return ((g - mean) / np.sqrt(var + 1e-3)).reshape(x.shape) * SCALE + BIAS


def swapped(kind, norm, to, **options):
    """One layer with SCALE and BIAS, swapped: f(x, …) and the result."""
    if kind == "linen":
        layer = LINEN[norm](epsilon=1e-3)
        variables = layer.init(jax.random.key(0), X, False)
        variables["params"] = {"scale": jnp.asarray(SCALE), "bias": jnp.asarray(BIAS)}
        out = jaxbn.swap(layer.apply, variables, to, **options)

        def call(x, use_running_average=False, **mask):
            return out.model(out.variables, x, use_running_average, **mask)

        return call, out
    layer = NNX[norm](16, epsilon=1e-3, rngs=nnx.Rngs(0))
    layer.scale[...], layer.bias[...] = jnp.asarray(SCALE), jnp.asarray(BIAS)
    out = jaxbn.swap(layer, to=to, **options)
    return out.model, out


@pytest.mark.parametrize("to", ["group", "layer", "instance"])
@pytest.mark.parametrize("norm", ["flax", "jaxbn"])
@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_the_new_norm_has_the_old_parameters_and_epsilon(kind, norm, to):
    options = {"groups": 4} if to == "group" else {}
    f, out = swapped(kind, norm, to, **options)
    # 1e-5: float32 of a sum over up to 320 values of order 1.
    np.testing.assert_allclose(f(X), expected(X, to, 4), rtol=1e-5, atol=1e-5)
    groups = 4 if to == "group" else None
    name = {"group": "GroupNorm", "layer": "LayerNorm", "instance": "InstanceNorm"}[to]
    row = (name, groups, ("scale", "bias"), ("mean", "var"))
    assert {path: tuple(row) for path, row in out.report.items()} == {"": row}
    # Called as a batch norm is, and masked as one.
    np.testing.assert_array_equal(f(X, True), f(X, use_running_average=False))
    mask = np.arange(5)[:, None, None] < 3
    poisoned = np.where(mask, X, 1e6).astype(np.float32)
    y = f(poisoned, mask=mask[None])
    if to == "layer":  # a position is masked or not: the others are as without
        mask, y = np.broadcast_to(mask, X.shape), np.where(mask, y, expected(X, to, 4))
    kept = np.broadcast_to(mask, X.shape)
    np.testing.assert_allclose(
        np.asarray(y)[kept],
        expected(X, to, 4, None if to == "layer" else mask)[kept],
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_activation_and_residual_stay(kind):
    x, shortcut = np.random.default_rng(0).normal(size=(2, 4, 3, 16)).astype(np.float32)
    options = {"epsilon": 1e-3, "activation": jax.nn.relu}
    if kind == "linen":
        net = jaxbn.linen.BatchNorm(use_running_average=False, **options)
        apply, variables, _ = jaxbn.swap(net.apply, net.init(jax.random.key(0), x))
        plain = linen.GroupNorm(2, epsilon=1e-3, use_fast_variance=False).apply(variables, x)
        y = apply(variables, x, residual=shortcut)
    else:
        model = nnx.Sequential(jaxbn.nnx.BatchNorm(16, **options, rngs=nnx.Rngs(0)))
        jaxbn.swap(model)
        y = model.layers[0](x, residual=shortcut)
        norm = nnx.GroupNorm(
            16, num_groups=2, epsilon=1e-3, use_fast_variance=False, rngs=nnx.Rngs(0)
        )
        plain = norm(x)
    np.testing.assert_allclose(y, jax.nn.relu(plain + shortcut), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_large_means_do_not_cancel(kind):
    f, _ = swapped(kind, "jaxbn", "group", groups=1)
    x = X + np.float32(1e4)
    np.testing.assert_allclose(f(x), expected(x, "group", 1), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_dtypes_are_kept(kind):
    if kind == "linen":
        layer = linen.BatchNorm(use_running_average=False, dtype=jnp.bfloat16)
        with jax.numpy_dtype_promotion("standard"):  # Flax promotes
            variables = layer.init(jax.random.key(0), X)
        apply, variables, _ = jaxbn.swap(layer.apply, variables)
        f = functools.partial(apply, variables)
    else:
        layer = nnx.BatchNorm(16, dtype=jnp.bfloat16, use_scale=False, rngs=nnx.Rngs(0))
        f = jaxbn.swap(layer).model
        assert layer.scale is None
    with jax.numpy_dtype_promotion("standard"):
        y = f(X)
    assert y.dtype == jnp.bfloat16


def test_groups_have_8_features_or_more():
    """At most 32, of 8 features or more, that divide."""
    expected = {1: 1, 7: 1, 16: 2, 24: 3, 64: 8, 96: 12, 100: 10, 256: 32, 2048: 32, 257: 1}
    for features, groups in expected.items():
        stats = {"bn": {"mean": np.zeros(features), "var": np.ones(features)}}
        variables = {"params": {}, "batch_stats": stats}
        assert jaxbn.swap(lambda v: v, variables).report["bn"].groups == groups


def test_a_linen_resnet_trains_on_and_no_row_sees_another():
    """Same parameters; a training step as it was written; no statistics; no row sees another."""
    net = ResNet(jaxbn.linen.BatchNorm)
    x = RNG.normal(size=(2, 8, 8, 3)).astype(np.float32)
    old = net.init(jax.random.key(0), x)
    apply, variables, report = jaxbn.swap(net.apply, old)
    assert variables["params"] is old["params"]
    assert variables["batch_stats"] == {}
    assert len(report) == 6

    @jax.jit
    def step(variables):
        def loss(params):
            y, new = apply(
                {"params": params, "batch_stats": variables["batch_stats"]},
                x,
                train=True,
                mutable=["batch_stats"],
            )
            return jnp.mean(y**2), new["batch_stats"]

        grads, stats = jax.grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda v, g: v - 0.1 * g, variables["params"], grads)
        return {"params": params, "batch_stats": stats}, grads

    new, grads = step(variables)
    assert jax.tree.structure(new) == jax.tree.structure(variables)
    assert float(jnp.abs(grads["bn_init"]["scale"]).max()) > 0
    y = apply(new, x, train=True)
    np.testing.assert_array_equal(apply(new, x, train=False), y)
    np.testing.assert_allclose(apply(new, x[:1], train=True), y[:1], rtol=1e-4, atol=1e-5)
    assert np.abs(np.asarray(net.apply(old, x, train=False) - apply(variables, x))).max() > 0


def test_linen_layers_of_other_paths_stay_batch_norm():
    net = ResNet(linen.BatchNorm)
    x = RNG.normal(size=(2, 8, 8, 3)).astype(np.float32)
    old = net.init(jax.random.key(0), x)
    apply, variables, report = jaxbn.swap(net.apply, linen.FrozenDict(old), "group", "Block_*")
    assert isinstance(variables, linen.FrozenDict)
    assert list(variables["batch_stats"]) == ["bn_init"]
    assert "bn_init" not in report
    _, new = apply(variables, x, mutable=["batch_stats"])
    _, expected = net.apply(old, x, mutable=["batch_stats"])
    np.testing.assert_array_equal(
        new["batch_stats"]["bn_init"]["mean"], expected["batch_stats"]["bn_init"]["mean"]
    )


def test_scanned_linen_layers_and_one_called_twice_are_swapped():
    class Block(linen.Module):
        @linen.compact
        def __call__(self, x, _=None):
            norm = linen.BatchNorm(use_running_average=False)
            return norm(norm(x) + 1), None

    axes = {"params": 0, "batch_stats": 0}
    net = linen.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=2)()
    variables = net.init(jax.random.key(0), X)
    apply, variables, _ = jaxbn.swap(net.apply, variables, "layer")
    (y, _), _ = apply(variables, X, mutable=["batch_stats"])
    expected = X
    for shift in (0, 1, 0, 1):
        expected = expected + shift
        mean, var = expected.mean(-1, keepdims=True), expected.var(-1, keepdims=True)
        expected = (expected - mean) / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_an_nnx_network_keeps_its_objects():
    """In place: shared layers stay shared, parameters stay the objects the optimizer knows."""
    net = NnxNet(jaxbn.nnx.BatchNorm, rngs=nnx.Rngs(0))
    net.norm2 = net.norm1
    scale, optimizer = net.norm1.scale, nnx.Optimizer(net, optax.sgd(0.1), wrt=nnx.Param)
    before = jax.tree.structure(nnx.state(net, nnx.Param))
    model, variables, report = jaxbn.swap(net)
    assert (model, variables, list(report)) == (net, None, ["norm1"])
    assert net.norm1 is net.norm2
    assert isinstance(net.norm1, nnx.GroupNorm)
    assert net.norm1.scale is scale
    assert jax.tree.structure(nnx.state(net, nnx.Param)) == before
    assert not jax.tree.leaves(nnx.state(net, nnx.BatchStat))
    x = RNG.normal(size=(2, 6, 6, 3)).astype(np.float32)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda m: jnp.mean(m(x) ** 2))(model))

    old = np.array(scale[...])
    step(net, optimizer)
    assert np.abs(np.asarray(scale[...]) - old).max() > 0
    y = net(x)
    net.eval()
    np.testing.assert_array_equal(nnx.clone(net)(x), y)
    np.testing.assert_allclose(net(x[:1]), y[:1], rtol=1e-4, atol=1e-5)


# Bad input

THREE = {
    "params": {},
    "batch_stats": {
        name: {"mean": np.zeros(n), "var": np.ones(n)} for name, n in (("a", 16), ("b", 24))
    },
}
ROWS = X.reshape(-1, 16)
BAD = {
    "no variables": (
        lambda: jaxbn.swap(linen.BatchNorm().apply),
        TypeError,
        "swap: method without variables, expected an nnx model, or linen's apply and its "
        'variables, "params" and "batch_stats"; write swap(net.apply, variables).',
    ),
    "no such norm": (
        lambda: jaxbn.swap(lambda v: v, THREE, "power"),
        ValueError,
        "swap: to='power', expected one of ['batch', 'flax', 'group', 'layer', 'instance'].",
    ),
    "groups that do not divide": (
        lambda: jaxbn.swap(lambda v: v, THREE, groups=16),
        ValueError,
        "swap: groups=16 does not divide the features of ['b (24)']; expected one of [1, 2, 4, 8], "
        "which divide the features of all layers, or None to choose for each layer.",
    ),
    "no groups at all": (
        lambda: jaxbn.swap(lambda v: v, THREE, groups=0),
        ValueError,
        "swap: groups=0 does not divide the features of ['a (16)', 'b (24)']; expected one of "
        "[1, 2, 4, 8], which divide the features of all layers, or None to choose for each layer.",
    ),
    "groups of a layer norm": (
        lambda: jaxbn.swap(lambda v: v, THREE, "layer", groups=2),
        ValueError,
        "swap: groups=2 with to='layer', which has no groups; write to=\"group\", or leave groups "
        "out.",
    ),
    "no batch norm": (
        lambda: jaxbn.swap(nnx.Linear(2, 2, rngs=nnx.Rngs(0))),
        ValueError,
        "swap: no batch norm layer in this Linear; expected variables with "
        '"batch_stats", an nnx model that holds a BatchNorm, or a tree of jaxbn.State.',
    ),
    "an instance of one position": (
        lambda: swapped("nnx", "flax", "instance")[0](ROWS),
        ValueError,
        "swap: InstanceNorm of x with shape (40, 16), but InstanceNorm normalizes over the axes "
        'between the first and the last, and x has none; write to="group".',
    ),
    "an instance of one position, linen": (
        lambda: swapped("linen", "flax", "instance")[0](ROWS),
        ValueError,
        "swap: InstanceNorm of x with shape (40, 16), but InstanceNorm normalizes over the axes "
        'between the first and the last, and x has none; write to="group".',
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_calls_are_told_what_to_write(what):
    call, kind, expected = BAD[what]
    assert message(kind, call) == expected


def test_features_that_are_not_last_are_refused():
    expected = (
        "swap: GroupNorm has its features on the last axis, but ['{} (axis=1)'] have theirs "
        "elsewhere; write axis=-1 in the model, or leave these layers out by where=."
    )
    model = nnx.Sequential(nnx.BatchNorm(5, axis=1, rngs=nnx.Rngs(0)))
    assert message(ValueError, jaxbn.swap, model) == expected.format("layers/0")
    assert type(model.layers[0]) is nnx.BatchNorm
    layer = linen.BatchNorm(axis=1, use_running_average=False)
    apply, variables, _ = jaxbn.swap(layer.apply, layer.init(jax.random.key(0), X))
    assert message(ValueError, apply, variables, X) == expected.format("")


# The example


def test_the_example_runs(monkeypatch, capsys):
    """On digits, in its smallest form: both norms give a score, all layers are reported."""
    monkeypatch.syspath_prepend(EXAMPLES / "swap")
    import swap

    monkeypatch.setattr(swap, "ResNet9", TinyLinen)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        table = swap.main(width=2, images=16, batches=(4,))
    columns = [list(column.cells) for column in table.columns]
    assert columns[0] == ["4"]
    assert all(0 <= float(cells[0].rstrip("%")) <= 100 for cells in columns[1:])
    assert capsys.readouterr().out.count("GroupNorm of") == 2


# Standardized kernels


def standardized(kernel):
    """In float64, over all axes but the last."""
    v = np.asarray(kernel, np.float64)
    axes = tuple(range(v.ndim - 1))
    return (v - v.mean(axes)) / np.sqrt(v.var(axes) + 1e-5)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_kernels_of_selected_convolutions_are_standardized(kind):
    """As in a net whose kernels are standardized already. The gradient flows, and others stay."""
    x = RNG.normal(size=(2, 6, 6, 3)).astype(np.float32)
    if kind == "linen":
        net = ResNet(linen.BatchNorm, stages=(1,))
        old = jax.tree.map(lambda v: v + 0.5, net.init(jax.random.key(0), x))  # no scales of 0
        apply, variables, _ = jaxbn.swap(net.apply, old, standardize="Block_*")
        assert variables["params"] is old["params"]
        plain = jaxbn.swap(net.apply, old).model
        by_hand = jax.tree_util.tree_map_with_path(
            lambda path, v: (
                standardized(v).astype(np.float32) if "Block" in path[0].key and v.ndim == 4 else v
            ),
            old["params"],
        )
        expected = plain({"params": by_hand}, x)
        got = apply(variables, x)
    else:
        net, other = (NnxNet(nnx.BatchNorm, rngs=nnx.Rngs(0)) for _ in range(2))
        jaxbn.swap(net, to="group", standardize=lambda path: path == "conv2")
        jaxbn.swap(other, to="group")
        other.conv2.kernel[...] = jnp.asarray(standardized(other.conv2.kernel[...]), jnp.float32)
        got, expected = net(x), other(x)
        grad = nnx.grad(lambda net: (net(x) ** 2).sum())(net)["conv2"]["kernel"][...]
        assert np.abs(grad).max() > 0
        # A kernel that is moved or stretched is standardized to the same.
        np.testing.assert_allclose(np.sum(grad, (0, 1, 2)), 0, atol=1e-5 * np.abs(grad).sum())
        net.conv2.kernel[...] = 2 * net.conv2.kernel[...] + 1
        np.testing.assert_allclose(net(x), got, rtol=1e-3, atol=1e-3)
        assert nnx.graphdef(nnx.clone(net)) == nnx.graphdef(net)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


STANDARDIZE = {
    "layer": (
        lambda: jaxbn.swap(lambda v: v, THREE, "layer", standardize="*"),
        "swap: standardize='*' with to='layer', expected to=\"group\"; standardized kernels make "
        "GroupNorm as good as batch norm on small batches; leave standardize out.",
    ),
    "no such convolution": (
        lambda: jaxbn.swap(NnxNet(nnx.BatchNorm, rngs=nnx.Rngs(0)), standardize="head"),
        "swap: standardize='head' selects none of the convolutions ['conv1', 'conv2']; expected a "
        'glob such as "*" for all, several of them, or a function of the path.',
    ),
}


@pytest.mark.parametrize("what", STANDARDIZE)
def test_standardize_asks_for_groups_and_convolutions(what):
    call, expected = STANDARDIZE[what]
    assert message(ValueError, call) == expected
