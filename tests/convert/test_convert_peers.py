"""Weights of Keras, Haiku and Equinox in Flax: the same outputs and the same running statistics."""

import os
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
from jaxbn import convert
from tests.support import oracle
from tests.support.conversion import assert_same, last, normal, refused, shapes


@pytest.fixture(autouse=True)
def _as_peers_expect():
    """Haiku, Equinox and Keras rely on JAX's default promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


X = normal(3, 9, 9, 4) + 1


class Net(nn.Module):
    """What each peer below builds: convolutions of three kinds with norms, and a dense layer."""

    momentum: float
    epsilon: float
    depthwise: int = 2

    @nn.compact
    def __call__(self, x, train=False):
        def bn(x, **options):
            norm = {"momentum": self.momentum, "epsilon": self.epsilon} | options
            return nn.relu(jaxbn.linen.BatchNorm(not train, **norm)(x))

        x = bn(nn.Conv(6, (3, 3), 2, padding="VALID")(x))
        groups = {"feature_group_count": 6, "padding": "VALID"}
        if self.depthwise:
            x = nn.Conv(6 * self.depthwise, (2, 2), use_bias=False, name="each", **groups)(x)
        x = bn(x)
        x = nn.ConvTranspose(x.shape[-1], (3, 2), (2, 2), padding="VALID", name="up")(x)
        x = bn(x, use_scale=False, use_bias=False)
        return nn.Dense(5)(x.mean((1, 2)))


def evaluated(net, variables):
    return jax.jit(net.apply)(variables, X)


def trained(net, variables):
    """The output in training, and the statistics after it."""
    return jax.jit(lambda v: net.apply(v, X, True, mutable=["batch_stats"]))(variables)


def fresh_statistics(net):
    return jax.jit(net.init)(jax.random.key(0), X)["batch_stats"]


def statistics(variables):
    return jax.tree.map(np.float64, variables["batch_stats"])


def assert_close(tree, other, tolerance):
    jax.tree.map(lambda a, b: oracle.assert_close(a, b, tolerance), tree, other)


# The peers' sums over 3 * 9 * 9 values, of one layer after another, are rounded in another order.
CLOSE = 3 * oracle.tolerance("float32", X[..., 0].size)


# Keras


@pytest.fixture(scope="module")
def keras():
    os.environ["KERAS_BACKEND"] = "jax"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import keras

        yield keras


def keras_model(keras):
    layers = keras.layers
    block = keras.Sequential(
        [
            layers.DepthwiseConv2D(2, depth_multiplier=2, use_bias=False, name="each"),
            layers.BatchNormalization(momentum=0.8, epsilon=1e-2, name="norm"),
        ],
        name="block",
    )
    model = keras.Sequential(
        [
            keras.Input(X.shape[1:]),
            layers.Conv2D(6, 3, 2, name="first"),
            layers.BatchNormalization(momentum=0.8, epsilon=1e-2, name="norm"),
            layers.ReLU(),
            block,
            layers.ReLU(),
            layers.Conv2DTranspose(12, (3, 2), 2, name="up"),
            layers.BatchNormalization(
                momentum=0.8, epsilon=1e-2, center=False, scale=False, name="last"
            ),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(5, name="head"),
        ]
    )
    rng = np.random.default_rng(0)
    for v in model.weights:
        v.assign(rng.uniform(0.5, 2, v.shape) if "variance" in v.path else rng.normal(size=v.shape))
    return model


KERAS = {
    "first": "Conv_0",
    "norm": "BatchNorm_0",
    "block/each": "each",
    "block/norm": "BatchNorm_1",
}
KERAS |= {"last": "BatchNorm_2", "head": "Dense_0"}


@pytest.mark.filterwarnings("ignore")
def test_keras(keras):
    model, net = keras_model(keras), Net(0.8, 1e-2)
    like, options = shapes(net, X), {"rename": KERAS, "transposed": {"up": False}}
    variables, report = convert.from_keras(model, like, **options)
    oracle.assert_close(evaluated(net, variables), np.float64(model(X, training=False)), 1e-6)
    y, new = trained(net, variables)
    oracle.assert_close(y, np.float64(model(X, training=True)), CLOSE)
    want, _ = convert.from_keras(model, like, **options)  # whose statistics have moved as well
    assert_close(statistics(new), statistics(want), CLOSE)
    arguments = {"momentum": 0.8, "epsilon": 1e-2, "unbiased": False}
    assert report.batch_norm == {f"BatchNorm_{i}": arguments for i in range(3)}
    hows = {move.source: move.how for move in report.moves}
    assert hows["up/kernel"] == "HWOI → HWIO, flipped"
    assert hows["block/each/kernel"] == "HWIM → HW1(IM)"

    class Up(nnx.Module):
        def __init__(self, transpose_kernel):
            options = {"padding": "VALID", "transpose_kernel": transpose_kernel}
            self.up = nnx.ConvTranspose(12, 12, (3, 2), (2, 2), rngs=nnx.Rngs(0), **options)

    inner = keras.Sequential([keras.Input((4, 4, 12)), keras.layers.Conv2DTranspose(12, (3, 2), 2)])
    x = normal(1, 4, 4, 12)
    for transpose_kernel in (False, True):
        new, _ = convert.from_keras(inner, Up(transpose_kernel))
        oracle.assert_close(new.up(x), np.float64(inner(x)), CLOSE)


@pytest.mark.filterwarnings("ignore")
def test_keras_separable_convolutions_are_two_layers(keras):
    layer = keras.layers.SeparableConv2D(5, 3, depth_multiplier=2)
    x = normal(1, 6, 6, 4)
    want = np.float64(layer(x))

    class Separable(nn.Module):
        @nn.compact
        def __call__(self, x):
            options = {"feature_group_count": 4, "use_bias": False, "padding": "VALID"}
            x = nn.Conv(8, (3, 3), name="depthwise", **options)(x)
            return nn.Conv(5, (1, 1), name="pointwise")(x)

    new, report = convert.from_keras(layer, shapes(Separable(), x))
    assert report.matched_by == "names"
    oracle.assert_close(Separable().apply(new, x), want, CLOSE)


@pytest.mark.filterwarnings("ignore")
def test_keras_is_refused(keras):
    with pytest.raises(ValueError) as error:
        convert.from_keras(keras.layers.Dense(3), {"params": {}})
    assert str(error.value) == (
        "from_keras: a Dense without weights came; expected a Keras model that is built; call it "
        "once, or give it a keras.Input."
    )
    with pytest.raises(ValueError) as error:
        convert.from_keras("net.keras", {"params": {}})
    assert str(error.value) == (
        "from_keras: a str without weights came; expected a Keras model that is built; call it "
        "once, or give it a keras.Input."
    )
    model = keras.Sequential([keras.Input((2, 2, 3)), keras.layers.Conv2DTranspose(3, 1, name="a")])
    like = {"params": {"a": {"kernel": np.zeros((1, 1, 3, 3)), "bias": np.zeros(3)}}}
    with pytest.raises(ValueError) as error:
        convert.from_keras(model, like)
    assert str(error.value) == refused(
        "from_keras",
        "unknown, in the source alone: a/kernel (1, 1, 3, 3)",
        "missing, in the target alone: params/a/kernel (1, 1, 3, 3)",
    )


# Haiku


def test_haiku():
    hk = pytest.importorskip("haiku")

    def f(x, train):
        def bn(x, affine=True):
            return jax.nn.relu(hk.BatchNorm(affine, affine, 0.9, eps=1e-2)(x, train))

        x = bn(hk.Conv2D(6, 3, 2, padding="VALID")(x))
        x = bn(hk.DepthwiseConv2D(2, 2, padding="VALID", with_bias=False)(x))
        x = bn(hk.Conv2DTranspose(12, (3, 2), 2, padding="VALID")(x), affine=False)
        return hk.Linear(5)(x.mean((1, 2)))

    model = hk.without_apply_rng(hk.transform_with_state(f))
    params, fresh = jax.jit(lambda key: model.init(key, X, True))(jax.random.key(0))
    params = jax.tree.map(lambda v: v + 0.1 * normal(*v.shape), params)
    train = jax.jit(lambda state, x: model.apply(params, state, x, True))
    state, net = fresh, Net(0.9, 1e-2)
    for i in range(3):
        _, state = train(state, X + i)
    places = {"conv2_d": "Conv_0", "depthwise_conv2_d": "each", "conv2_d_transpose": "up"}
    places |= {"linear": "Dense_0", "batch_norm": "BatchNorm_0"}
    places |= {f"batch_norm_{i}": f"BatchNorm_{i}" for i in (1, 2)}
    options = {"decay_rate": 0.9, "eps": 1e-2, "rename": places, "transposed": {"up": False}}
    variables, report = convert.from_haiku(params, state, shapes(net, X), **options)
    want, _ = jax.jit(lambda state: model.apply(params, state, X, False))(state)
    oracle.assert_close(evaluated(net, variables), np.float64(want), 1e-6)
    arguments = {"momentum": 0.9, "epsilon": 1e-2, "unbiased": False}
    assert report.batch_norm == {f"BatchNorm_{i}": arguments for i in range(3)}
    assert report.notes[0] == "batch_norm: debiased averages of 3 updates"

    # One more update there is that of here, but for the debiasing: 0.9^3 of the past at most.
    updates = trained(net, variables)[1]["batch_stats"]
    average = train(state, X)[1]["batch_norm/~/mean_ema"]["average"].reshape(-1)
    old = np.float64(state["batch_norm/~/mean_ema"]["average"]).reshape(-1)
    value = (np.float64(updates["BatchNorm_0"]["mean"]) - 0.9 * old) / 0.1
    debiased = ((1 - 0.9**3) * 0.9 * old + 0.1 * value) / (1 - 0.9**4)
    oracle.assert_close(average, debiased, 1e-5)

    # Before any update Haiku's averages are 0, and so is its variance; here it is 1.
    variables, _ = convert.from_haiku(params, fresh, shapes(net, X), **options)
    assert_same(variables["batch_stats"], fresh_statistics(net))


@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_haiku_transposed_convolutions(transpose_kernel):
    hk = pytest.importorskip("haiku")
    model = hk.without_apply_rng(
        hk.transform(lambda x: hk.Conv2DTranspose(4, (3, 2), 2, padding="VALID", name="up")(x))
    )
    x = normal(1, 4, 4, 4)
    params = model.init(jax.random.key(0), x)
    options = {"padding": "VALID", "transpose_kernel": transpose_kernel, "name": "up"}
    layer = nn.ConvTranspose(4, (3, 2), (2, 2), **options)
    named = {"": transpose_kernel}
    rename, like = {"up": ""}, shapes(layer, x)
    options = {"rename": rename, "transposed": named, "decay_rate": 0.9}
    new, _ = convert.from_haiku(params, {}, like, **options)
    oracle.assert_close(layer.apply(new, x), np.float64(model.apply(params, x)), CLOSE)


# Equinox


@pytest.mark.parametrize("mode", ["ema", "batch"])
def test_equinox(mode):
    eqx = pytest.importorskip("equinox")

    class Model(eqx.Module):
        layers: list

        def __init__(self, key):
            def bn(c, **options):
                return eqx.nn.BatchNorm(c, "batch", 1e-2, momentum=0.9, mode=mode, **options)

            keys = iter(jax.random.split(key, 4))
            up = {"padding": 0, "stride": 2}
            self.layers = [
                eqx.nn.Conv2d(4, 6, 3, stride=2, key=next(keys)),
                bn(6),
                eqx.nn.Conv2d(6, 12, 2, groups=6, use_bias=False, key=next(keys)),
                bn(12),
                eqx.nn.ConvTranspose2d(12, 12, (3, 2), **up, key=next(keys)),
                bn(12, channelwise_affine=False),
                eqx.nn.Linear(12, 5, key=next(keys)),
            ]

        def __call__(self, x, state):
            for conv, norm in zip(self.layers[0:6:2], self.layers[1:6:2], strict=True):
                x, state = norm(conv(x), state)
                x = jax.nn.relu(x)
            return self.layers[-1](x.mean((1, 2))), state

    places = ["Conv_0", "BatchNorm_0", "each", "BatchNorm_1", "up", "BatchNorm_2", "Dense_0"]
    rename = {f"layers.{i}": place for i, place in enumerate(places)}
    options = {"rename": rename, "transposed": {"up": False}}
    model, fresh = eqx.nn.make_with_state(Model)(jax.random.key(0))
    net, x = Net(0.9, 1e-2), np.moveaxis(X, -1, 1)

    @eqx.filter_jit
    def run(model, state, x):
        return jax.vmap(model, in_axes=(0, None), out_axes=(0, None), axis_name="batch")(x, state)

    state = fresh
    for i in range(3):
        _, state = run(model, state, x + i)
    variables, report = convert.from_equinox(model, state, shapes(net, X), **options)
    want, _ = run(eqx.nn.inference_mode(model), state, x)
    oracle.assert_close(evaluated(net, variables), np.float64(want), 1e-6)
    arguments = {"momentum": 0.9, "epsilon": 1e-2, "unbiased": False}
    assert report.batch_norm == {f"BatchNorm_{i}": arguments for i in range(3)}

    if mode == "ema":  # in mode "batch" the past is debiased
        _, updates = trained(net, variables)
        _, state = run(model, state, x)
        # Equinox normalizes by the average in this mode, so the first layer alone sees the same x.
        want, _ = convert.from_equinox(model, state, shapes(net, X), **options)
        first = [v["BatchNorm_0"] for v in (statistics(updates), statistics(want))]
        assert_close(*first, CLOSE)
    fresh_variables, _ = convert.from_equinox(model, fresh, shapes(net, X), **options)
    assert_same(fresh_variables["batch_stats"], fresh_statistics(net))


@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_equinox_transposed_convolutions_and_flattened_maps(transpose_kernel):
    eqx = pytest.importorskip("equinox")
    up = eqx.nn.ConvTranspose2d(4, 4, (3, 2), stride=2, padding=0, key=jax.random.key(0))
    dense = eqx.nn.Linear(4 * 9 * 8, 3, key=jax.random.key(1))
    x = normal(4, 4, 4)
    y = up(x)
    want = np.float64(dense(y.reshape(-1)))

    class Same(nnx.Module):
        def __init__(self):
            options = {"padding": "VALID", "transpose_kernel": transpose_kernel}
            self.layers = nnx.List(
                [
                    nnx.ConvTranspose(4, 4, (3, 2), (2, 2), rngs=nnx.Rngs(0), **options),
                    nnx.Linear(4 * 9 * 8, 3, rngs=nnx.Rngs(0)),
                ]
            )

    flattened = {"layers/1": (9, 8, 4)}
    new, _ = convert.from_equinox([up, dense], None, Same(), flattened=flattened)
    y = new.layers[0](last(x[None]))
    oracle.assert_close(new.layers[1](y.reshape(1, -1)), want[None], 4 * CLOSE)
    assert jnp.all(jnp.isfinite(y))


# Bad input

LAYER = {"w": np.ones((3, 2))}
WRITE = "write params, state = net.init(rng, x)."
NO_SOURCE = {  # what is no model of the library → the whole message
    "haiku-params": (
        lambda like: convert.from_haiku(object(), {}, like, decay_rate=0.9),
        "from_haiku: params is an object, expected a dict for each module, as "
        f"hk.transform_with_state gives; {WRITE}",
    ),
    "haiku-state": (
        lambda like: convert.from_haiku({"linear": LAYER}, {"counter": 1}, like, decay_rate=0.9),
        "from_haiku: state is a dict of others than dicts, expected a dict for each module, as "
        f"hk.transform_with_state gives; {WRITE}",
    ),
    "haiku-empty": (
        lambda like: convert.from_haiku({}, {}, like, decay_rate=0.9),
        "from_haiku: params and state hold nothing, expected those of hk.transform_with_state; "
        f"{WRITE}",
    ),
    "equinox-model": (
        lambda like: convert.from_equinox(object(), None, like),
        "from_equinox: an object without arrays came; expected an Equinox model; write model, "
        "state = eqx.nn.make_with_state(Net)(key).",
    ),
    "equinox-state": (
        lambda like: convert.from_equinox([equinox_norm()], {}, like),
        "from_equinox: state is a dict, expected the eqx.nn.State that holds the statistics of "
        "'0'; write model, state = eqx.nn.make_with_state(Net)(key).",
    ),
}


def equinox_norm():
    return pytest.importorskip("equinox").nn.BatchNorm(3, "batch", mode="ema")


@pytest.mark.parametrize("name", NO_SOURCE)
def test_what_is_no_model_of_the_library_is_refused(name):
    pytest.importorskip(name.partition("-")[0])
    call, message = NO_SOURCE[name]
    with pytest.raises((TypeError, ValueError)) as error:
        call({"params": {"fc": {"kernel": np.zeros((3, 2))}}})
    assert str(error.value) == message
