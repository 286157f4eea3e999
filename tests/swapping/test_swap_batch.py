"""Batch norms of this library where Flax's were, and back, in models that stay as written."""

import functools
import pickle

import chex
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn import calls, health
from tests.support import oracle
from tests.support.messages import message
from tests.support.networks import NnxNet, ResNet

RNG = np.random.default_rng(0)
X = RNG.normal(1, 2, (8, 6, 6, 3)).astype(np.float32)
DY = RNG.normal(size=(8, 10)).astype(np.float32)
ROWS = RNG.normal(1, 2, (8, 4)).astype(np.float32)


def assert_close(got, expected):
    """To a few roundings of float32, through a handful of layers: 1e-5 of the largest value."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=3e-5 * max(1, np.abs(b).max()))


# What it is for


def linen_step(apply, variables, x, dy, axis_name=None):
    """(y, gradients, statistics) of Σ y dy, over all devices."""

    def loss(params):
        y, new = apply({**variables, "params": params}, x, mutable=["batch_stats"])
        value = (y * dy).sum()
        return (value if axis_name is None else jax.lax.psum(value, axis_name)), (y, new)

    grads, (y, new) = jax.grad(loss, has_aux=True)(variables["params"])
    return y, grads, new["batch_stats"]


def over_devices(step, devices=4):
    """The step on each of the devices, with its rows of x and dy."""
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    out = (P("data"), P(), P())
    return jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=out)
    )


def test_a_flax_resnet_on_several_devices_equals_the_large_batch():
    """Synchronized, in y, statistics and all gradients; as it is written, it does not."""
    net = ResNet(linen.BatchNorm, stages=(1,), width=4)
    variables = net.init(jax.random.key(0), X)
    # Scales of 0, as the last of a block has at first, would hide what comes before.
    params = jax.tree.map(lambda v: v + 0.5 if v.ndim == 1 else v, variables["params"])
    variables = {**variables, "params": params}
    expected = jax.jit(functools.partial(linen_step, net.apply))(variables, X, DY)
    apply, same, report = jaxbn.swap(net.apply, variables, "batch", axis_name="data")
    assert same is variables
    kept = ("scale", "bias", "mean", "var")
    assert set(report.values()) == {("jaxbn.linen.BatchNorm", None, kept, ())}
    assert len(report) == 3

    def step(variables, x, dy):
        return linen_step(apply, variables, x, dy, "data")

    assert_close(over_devices(step)(variables, X, DY), expected)
    alone, _ = net.apply(variables, X[:2], mutable=["batch_stats"])
    assert np.abs(alone - expected[0][:2]).max() > 0.01


def test_an_nnx_network_on_several_devices_equals_the_large_batch():
    net = NnxNet(nnx.BatchNorm, rngs=nnx.Rngs(0))
    leaves = jax.tree.leaves(nnx.state(net))

    def step(graphdef, state, x, dy, axis_name=None):
        def loss(params, rest):
            model = nnx.merge(graphdef, params, rest, copy=True)
            y = model(x)
            value = (y * dy).sum()
            value = value if axis_name is None else jax.lax.psum(value, axis_name)
            return value, (y, nnx.state(model, nnx.BatchStat))

        params, rest = nnx.split_state(state, nnx.Param, ...)
        grads, (y, stats) = jax.grad(loss, has_aux=True)(params, rest)
        return y, grads, stats

    expected = step(*nnx.split(net), X, DY)
    scale = net.norm1.scale
    model, none, report = jaxbn.swap(net, to="batch", axis_name="data")
    assert (model, none, list(report)) == (net, None, ["norm1", "norm2"])
    assert type(net.norm1) is jaxbn.nnx.BatchNorm
    assert net.norm1.scale is scale
    assert all(a is b for a, b in zip(jax.tree.leaves(nnx.state(net)), leaves, strict=True))
    graphdef, state = nnx.split(net)
    got = over_devices(lambda state, x, dy: step(graphdef, state, x, dy, "data"))(state, X, DY)
    assert_close(got, expected)


# Layers wherever they stand


class InSetup(linen.Module):
    def setup(self):
        self.norms = [linen.BatchNorm(use_running_average=False, name=f"n{i}") for i in range(2)]

    def __call__(self, x):
        return self.norms[1](self.norms[0](x) ** 3)


class Block(linen.Module):
    @linen.compact
    def __call__(self, x, _=None):
        return linen.BatchNorm(use_running_average=False)(x) ** 3 + x, None


class Twice(linen.Module):
    @linen.compact
    def __call__(self, x):
        norm = linen.BatchNorm(use_running_average=False)
        return norm(norm(x) ** 3)


AXES = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
PLACES = {
    "setup": InSetup(),
    "compact": Block(),
    "an attribute": linen.Sequential([linen.BatchNorm(use_running_average=False)]),
    "the model itself": linen.BatchNorm(use_running_average=False),
    "called twice": Twice(),
    "scan": linen.scan(Block, length=2, **AXES)(),
    "vmap": linen.vmap(Block, in_axes=None, axis_size=2, **AXES)(),
    "remat": linen.remat(Block)(),
    "scan of remat": linen.scan(linen.remat(Block), length=2, **AXES)(),
}


@pytest.mark.parametrize("place", PLACES)
def test_linen_layers_in_any_place_are_swapped(place):
    net = PLACES[place]
    variables = net.init(jax.random.key(0), ROWS)
    y, new = net.apply(variables, ROWS, mutable=["batch_stats"])
    apply, variables, _ = jaxbn.swap(net.apply, variables, "batch", axis_name="d")
    y_, new_ = jax.vmap(
        lambda x: apply(variables, x, mutable=["batch_stats"]), axis_name="d", out_axes=(0, None)
    )(ROWS.reshape(4, 2, 4))
    together = jax.tree.map(
        lambda a, b: np.moveaxis(a, 0, b.ndim - 2).reshape(b.shape), y_, y
    )  # vmap of a layer makes one more axis before the rows
    assert_close((together, new_), (y, new))


@pytest.mark.parametrize("transform", ["scan", "vmap"])
def test_nnx_layers_of_a_transform_are_swapped(transform):
    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def make(rngs):
        return nnx.BatchNorm(4, rngs=rngs)

    def run(layer, x):
        if transform == "vmap":
            return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(layer, x)

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def through(x, layer):
            return layer(x) ** 3

        return through(x, layer)

    layer, plain = make(nnx.Rngs(0)), make(nnx.Rngs(0))
    y = run(plain, ROWS)
    jaxbn.swap(layer, to="batch", momentum=None)
    assert layer.count.shape == (2,)
    assert_close(run(layer, ROWS), y)
    np.testing.assert_array_equal(layer.count[...], [1, 1])
    jaxbn.swap(layer, to="batch", momentum=0.5)
    assert not hasattr(layer, "count")


# What is kept and what is changed

FLAX = {
    "momentum": 0.7,
    "epsilon": 1e-2,
    "use_bias": False,
    "axis": 1,
    "dtype": jnp.bfloat16,
    "scale_init": jax.nn.initializers.constant(3.0),
}
OPTIONS = {
    "none": {},
    "ghosts": {"virtual_batch_size": 2},
    "unbiased": {"unbiased": True},
    "cumulative": {"momentum": None},
    "momentum": {"momentum": 0.5},
}


@pytest.mark.parametrize("what", OPTIONS)
@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_a_swapped_layer_is_the_layer_with_these_arguments(kind, what):
    """To the bit, in two steps of training and one of eval: settings are kept unless given."""
    x = ROWS.reshape(4, 2, 4)
    given = FLAX | OPTIONS[what]
    if kind == "linen":
        layer, other = linen.BatchNorm(**FLAX), jaxbn.linen.BatchNorm(**given)
        with jax.numpy_dtype_promotion("standard"):  # Flax promotes
            variables = layer.init(jax.random.key(0), x, False)
        expected = other.init(jax.random.key(0), x, False)
        apply, variables, _ = jaxbn.swap(layer.apply, variables, "batch", **OPTIONS[what])
        chex.assert_trees_all_equal(variables, expected)
        got = [apply, variables, []], [other.apply, expected, []]
        for side in got:
            for _ in range(2):
                y, new = side[0](side[1], x, False, mutable=["batch_stats"])
                side[1] = side[1] | new
                side[2].append(y)
            side[2].append(side[0](side[1], x, True))
        chex.assert_trees_all_equal(got[0][1:], got[1][1:])
    else:
        layer = nnx.BatchNorm(2, **FLAX, rngs=nnx.Rngs(0))
        other = jaxbn.nnx.BatchNorm(2, **given, rngs=nnx.Rngs(0))
        jaxbn.swap(layer, to="batch", **OPTIONS[what])
        for _ in range(2):
            np.testing.assert_array_equal(layer(x), other(x))
        np.testing.assert_array_equal(layer(x, True), other(x, True))
        assert vars(layer).keys() == vars(other).keys()
        chex.assert_trees_all_equal(
            nnx.to_pure_dict(nnx.state(layer)), nnx.to_pure_dict(nnx.state(other))
        )


def test_another_axis_drops_the_groups_of_the_old():
    layer = nnx.BatchNorm(4, axis_name="a", axis_index_groups=[[0], [1]], rngs=nnx.Rngs(0))
    assert jaxbn.swap(layer, to="batch", axis_name="a").model.axis_index_groups == [[0], [1]]
    assert jaxbn.swap(layer, to="batch", axis_name="b").model.axis_index_groups is None
    net = linen.BatchNorm(use_running_average=False, axis_name="a", axis_index_groups=[[0], [1]])
    variables = net.init(jax.random.key(0), ROWS)
    apply, _, _ = jaxbn.swap(net.apply, variables, "batch", axis_name=None)
    y, _ = apply(variables, ROWS, mutable=["batch_stats"])
    assert_close(y, oracle.normalize(ROWS, *oracle.moments(ROWS)[1:], 1, 0).astype(np.float32))


def test_large_means_do_not_cancel():
    net = linen.BatchNorm(use_running_average=False)
    x = ROWS + np.float32(1e4)
    variables = net.init(jax.random.key(0), x)
    y, _ = jaxbn.swap(net.apply, variables, "batch").model(variables, x, mutable=["batch_stats"])
    expected = oracle.normalize(x, *oracle.moments(x)[1:], 1, 0)
    np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_to_flax_is_the_way_back(kind):
    """A model of this library's layers with activation and residual computes on as Flax's."""
    options = {"momentum": None, "activation": jax.nn.relu, "epsilon": 1e-2}
    shortcut = RNG.normal(size=ROWS.shape).astype(np.float32)
    if kind == "linen":
        net = jaxbn.linen.BatchNorm(**options)
        variables = net.init(jax.random.key(0), ROWS, False)
        apply, flax, report = jaxbn.swap(net.apply, variables, "flax", momentum=0.9)
        assert set(flax["batch_stats"]) == {"mean", "var"}
        back, again, _ = jaxbn.swap(apply, flax, "batch", momentum=None)
        chex.assert_trees_all_equal(again, variables)
        runs = [
            f(v, ROWS, False, residual=shortcut, mutable=["batch_stats"])
            for f, v in ((apply, flax), (back, again), (net.apply, variables))
        ]
        plain = linen.BatchNorm(momentum=0.9, epsilon=1e-2)
        y, new = plain.apply(flax, ROWS, False, mutable=["batch_stats"])
    else:
        net = jaxbn.nnx.BatchNorm(4, **options, rngs=nnx.Rngs(0))
        report = jaxbn.swap(net, to="flax", momentum=0.9).report
        assert isinstance(net, nnx.BatchNorm)
        assert not isinstance(net, jaxbn.nnx.BatchNorm)
        assert health.check(net)[0].kind == "never_updated"
        plain = nnx.BatchNorm(4, momentum=0.9, epsilon=1e-2, rngs=nnx.Rngs(0))
        runs, y = [(net(ROWS, residual=shortcut), {})], plain(ROWS)
        chex.assert_trees_all_equal(nnx.state(net), nnx.state(plain))
        again = jaxbn.swap(net, to="batch", momentum=None).model
        assert type(again) is jaxbn.nnx.BatchNorm
        ours = jaxbn.nnx.BatchNorm(4, **options, rngs=nnx.Rngs(0))
        runs += [(model(ROWS, residual=shortcut), {}) for model in (again, ours)]
        new = {}
    (row,) = report.values()
    assert row == ("BatchNorm", None, ("scale", "bias", "mean", "var"), ("count",))
    np.testing.assert_array_equal(runs[0][0], jax.nn.relu(y + shortcut))
    chex.assert_trees_all_equal(runs[0][1], new)
    chex.assert_trees_all_equal(runs[1], runs[2])


# Beside the other tools


def test_hooks_around_and_inside_see_the_layer_that_stands_in():
    """With its axis_name, by which they pool; each call once."""
    net = linen.Sequential([linen.BatchNorm(use_running_average=False)])
    variables = net.init(jax.random.key(0), ROWS)
    apply, _, _ = jaxbn.swap(net.apply, variables, "batch", axis_name="d", unbiased=True)
    inside = []

    def inner(variables, x, **keywords):
        def look(call, run):
            inside.append((call.layer.axis_name, call.layer.unbiased, call.path))
            return run(call.train), None

        return calls.hooked_apply(net.apply, look)(variables, x, **keywords)[0]

    around = jaxbn.swap(inner, variables, "batch", axis_name="d", unbiased=True).model
    for f in (apply, around):
        _, seen = jax.vmap(lambda x, f=f: calls.hooked_apply(f)(variables, x), axis_name="d")(
            ROWS.reshape(4, 2, 4)
        )
        np.testing.assert_array_equal(seen["layers_0"].count, [8, 8, 8, 8])
        np.testing.assert_allclose(seen["layers_0"].mean[0], ROWS.mean(0), rtol=1e-6)
    assert inside == [("d", True, "layers_0")]


@pytest.mark.parametrize("order", ["freeze first", "swap first"])
def test_a_frozen_linen_layer_stays_frozen(order):
    net = Twice()
    variables = net.init(jax.random.key(0), ROWS)
    freeze = functools.partial(jaxbn.freeze, variables=variables, allow_untrained=True)

    def swap(apply):
        return jaxbn.swap(apply, variables, "batch").model

    apply = swap(freeze(net.apply)) if order == "freeze first" else freeze(swap(net.apply))
    y, new = apply(variables, ROWS, mutable=["batch_stats"])
    chex.assert_trees_all_equal(new["batch_stats"], variables["batch_stats"])
    np.testing.assert_allclose(y, (ROWS / np.sqrt(1 + 1e-5)) ** 3 / np.sqrt(1 + 1e-5), rtol=1e-5)


def test_recalibrate_takes_a_swapped_model():
    net = ResNet(linen.BatchNorm)
    variables = net.init(jax.random.key(0), X)
    apply, _, _ = jaxbn.swap(net.apply, variables, "batch", where="bn_init", unbiased=True)
    stats = jaxbn.recalibrate(apply, variables, [X])["batch_stats"]["bn_init"]
    x = linen.Conv(8, (3, 3), use_bias=False).apply({"params": variables["params"]["conv_init"]}, X)
    n, mean, var = oracle.moments(x)
    np.testing.assert_allclose(stats["mean"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats["var"], var * n / (n - 1), rtol=1e-5)


def test_other_layers_stay_and_may_be_swapped_for_groups():
    net = ResNet(linen.BatchNorm)
    variables = net.init(jax.random.key(0), X)
    apply, _, _ = jaxbn.swap(net.apply, variables, "batch", lambda path: path == "bn_init")
    seen = []

    def look(call, run):
        seen.append((call.path, type(call.layer).__module__))
        return run(call.train), None

    calls.hooked_apply(apply, look)(variables, X)
    assert seen[0] == ("bn_init", "jaxbn.linen")
    assert {module for _, module in seen[1:]} == {"flax.linen.normalization"}
    both, grouped, report = jaxbn.swap(apply, variables, "group", "bn_init")
    alone = jaxbn.swap(net.apply, variables, "group", "bn_init")
    assert alone.report == report
    np.testing.assert_array_equal(both(grouped, X), alone.model(alone.variables, X))


def initial(key, shape, dtype):
    """As Flax's own, which are lambdas and do not pickle."""
    return jnp.ones(shape, dtype)


@pytest.mark.parametrize("to", ["batch", "flax"])
def test_swapped_models_pickle(to):
    layer = linen.BatchNorm(scale_init=initial, bias_init=initial)
    variables = linen.BatchNorm().init(jax.random.key(0), ROWS, True)
    apply = jaxbn.swap(layer.apply, variables, to).model
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(apply))(variables, ROWS, True), apply(variables, ROWS, True)
    )
    model = NnxNet({"batch": nnx, "flax": jaxbn.nnx}[to].BatchNorm, rngs=nnx.Rngs(0))
    jaxbn.swap(model, to=to)
    loaded = pickle.loads(pickle.dumps(model))
    assert type(loaded.norm1) is type(model.norm1)
    np.testing.assert_array_equal(loaded(X), model(X))


# Bad input


class Own(nnx.BatchNorm):
    def __call__(self, x):
        return 2 * super().__call__(x)


class OwnLinen(linen.BatchNorm):
    @linen.compact
    def __call__(self, x):
        return 2 * super().__call__(x, False)


LAYER = linen.BatchNorm()
VARIABLES = {
    "params": {},
    "batch_stats": {"bn": {"mean": np.zeros(4), "var": np.ones(4), "count": np.zeros((), int)}},
}


def swap(*args, **options):
    return jaxbn.swap(LAYER.apply, VARIABLES, *args, **options)


def called(net):
    variables = net.init(jax.random.key(0), ROWS)
    return jaxbn.swap(net.apply, variables, "batch").model(variables, ROWS, mutable=["batch_stats"])


BAD = {
    "an axis for groups": (
        lambda: swap("group", axis_name="data"),
        ValueError,
        "swap: axis_name='data' with to='group', whose norm has no axis_name; write to=\"batch\", "
        "or leave axis_name out.",
    ),
    "ghosts of Flax": (
        lambda: swap("flax", virtual_batch_size=4),
        ValueError,
        "swap: virtual_batch_size=4 with to='flax', whose norm has no virtual_batch_size; write "
        'to="batch", or leave virtual_batch_size out.',
    ),
    "groups of a batch norm": (
        lambda: swap("batch", groups=4),
        ValueError,
        "swap: groups=4 with to='batch', which has no groups; write to=\"group\", or leave groups "
        "out.",
    ),
    "an axis by number": (
        lambda: swap("batch", axis_name=0),
        TypeError,
        "swap: axis_name=0, expected the name of a mapped axis, several in a tuple, or None for "
        'statistics of each device; write axis_name="data".',
    ),
    "no rows in a group": (
        lambda: swap("batch", virtual_batch_size=0),
        ValueError,
        "swap: virtual_batch_size=0, expected how many rows a group has, an integer of at least "
        "1, or None for no groups; write virtual_batch_size=32.",
    ),
    "unbiased by number": (
        lambda: swap("batch", unbiased=1),
        TypeError,
        "swap: unbiased=1, expected True or False; write unbiased=True for the running variance "
        "of PyTorch.",
    ),
    "momentum of PyTorch's kind": (
        lambda: swap("batch", momentum=1.1),
        ValueError,
        "swap: momentum=1.1, expected a number in [0, 1], the fraction of the old value that is "
        "kept (PyTorch's momentum m is 1 - m here), or None for the cumulative average; write "
        "momentum=0.99.",
    ),
    "Flax without momentum": (
        lambda: swap("flax", momentum=None),
        ValueError,
        "swap: momentum=None with to='flax', whose norm has no cumulative average; write "
        "momentum=0.99.",
    ),
    "Flax for a count": (
        lambda: swap("flax"),
        ValueError,
        "swap: ['bn'] have momentum=None, the cumulative average, which Flax's BatchNorm does not "
        "have; write momentum=0.99.",
    ),
    "a call of its own": (
        lambda: jaxbn.swap(Own(4, rngs=nnx.Rngs(0)), to="batch"),
        ValueError,
        "swap: layer '' is an Own with a call of its own, which would be lost; call "
        "jaxbn.unfreeze(model) first if the layer is frozen, or leave the layer out by where=.",
    ),
    "a call of its own, linen": (
        lambda: called(OwnLinen()),
        ValueError,
        "swap: layer '' is an OwnLinen with a call of its own, which would be lost; call "
        "jaxbn.unfreeze(model) first if the layer is frozen, or leave the layer out by where=.",
    ),
    "a frozen layer": (
        lambda: jaxbn.swap(
            jaxbn.freeze(nnx.BatchNorm(4, rngs=nnx.Rngs(0)), allow_untrained=True), to="batch"
        ),
        ValueError,
        "swap: layer '' is a FrozenBatchNorm with a call of its own, which would be lost; call "
        "jaxbn.unfreeze(model) first if the layer is frozen, or leave the layer out by where=.",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_calls_are_told_what_to_write(what):
    call, kind, expected = BAD[what]
    assert message(kind, call) == expected
