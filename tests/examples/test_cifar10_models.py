"""The CIFAR example's networks: linen and nnx are the same functions; what starts at zero."""

import sys
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "cifar10"))

import model
import model_linen
import model_nnx
import optimizer

NETWORKS = [("resnet9", "post"), ("resnet18", "post"), ("resnet18", "pre")]
NETWORKS += [("resnet50", "post"), ("resnet50", "pre")]
IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)  # small: fast


@pytest.fixture
def shallow(monkeypatch):
    """One block in two of the four stages: one halves the image, one does not."""
    for name, shape in model.RESNETS.items():
        monkeypatch.setitem(model.RESNETS, name, shape | {"blocks": (1, 1)})


def leaves_in_order(m: nnx.Module) -> list:
    """Convolutions and norms of an nnx network, in the order in which linen comes across them."""
    if isinstance(m, model_nnx.ConvNorm):
        return [m.conv, m.bn]
    if isinstance(m, model_nnx.NormConv):
        return [m.bn, m.conv]
    if isinstance(m, model_nnx.Pair):
        return leaves_in_order(m.first) + leaves_in_order(m.second)
    if isinstance(m, model_nnx.PostBlock):
        parts = [*m.layers, *([m.shortcut] if m.shortcut else [])]
        return [leaf for part in parts for leaf in leaves_in_order(part)]
    if isinstance(m, model_nnx.PreBlock):
        out = [leaf for layer in m.layers for leaf in leaves_in_order(layer)]
        return [out[0], *([m.shortcut] if m.shortcut else []), *out[1:]]
    if isinstance(m, model_nnx.ResNet9):
        parts = [m.stem, m.down1, m.pair1, m.down2, m.down3, m.pair3]
        return [leaf for part in parts for leaf in leaves_in_order(part)]
    blocks = [leaf for block in m.blocks for leaf in leaves_in_order(block)]
    return [m.stem, *blocks, m.bn] if m.pre else [m.stem, m.bn, *blocks]


@nnx.jit(static_argnums=(0, 1, 2))
def make_nnx(name, block, stem):
    return model.build(model_nnx, name, block, stem, width=2, rngs=nnx.Rngs(0))


def random_like(tree, seed: int):
    """Nothing at zero: every parameter and statistic counts."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(rng.uniform(0.1, 0.5, a.shape), a.dtype), tree)


@pytest.mark.parametrize(
    ("name", "block", "stem", "pixels"),
    [
        *((*network, "cifar", 8) for network in NETWORKS),
        ("resnet9", "post", "cifar", 9),  # odd sides are halved to 4, 2, 1
        ("resnet18", "post", "imagenet", 20),  # 10, 5, 3
    ],
)
def test_linen_and_nnx_are_the_same_network(name, block, stem, pixels, shallow):
    images = np.resize(IMAGES, (4, pixels, pixels, 3))
    linen = model.build(model_linen, name, block, stem, width=2)
    shapes = jax.eval_shape(lambda: linen.init(jax.random.key(0), images, train=False))
    variables = random_like(shapes, 1)
    params, stats = variables["params"], variables["batch_stats"]

    network = make_nnx(name, block, stem)
    counts = {"Conv": 0, "BatchNorm": 0}
    for leaf in leaves_in_order(network):
        kind = "Conv" if isinstance(leaf, nnx.Conv) else "BatchNorm"
        at = f"{kind}_{counts[kind]}"
        counts[kind] += 1
        for key, value in params[at].items():
            getattr(leaf, key).set_value(value)
        for key, value in stats.get(at, {}).items():
            getattr(leaf, key).set_value(value)
    network.head.kernel.set_value(params["Dense_0"]["kernel"])
    network.head.bias.set_value(params["Dense_0"]["bias"])
    assert sum(counts.values()) == len(params) - 1  # and the dense layer: nothing is left out

    @jax.jit
    def run_linen(images):
        return linen.apply(variables, images, train=True, mutable=["batch_stats"])[0]

    @nnx.jit
    def run_nnx(network, images):
        return network(images, train=True)

    np.testing.assert_allclose(run_linen(images), run_nnx(network, images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "block"), [*NETWORKS, ("resnet34", "post")])
def test_shapes_of_the_real_networks(name, block):
    """Traced, not run. ResNet-18, -34, -50 in CIFAR form have 11.2, 21.3 and 23.5 million."""
    network = model.build(model_linen, name, block, width=model.WIDTH[name])
    variables = jax.eval_shape(lambda: network.init(jax.random.key(0), IMAGES, train=False))
    size = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    millions = {"resnet9": 0.4, "resnet18": 11.2, "resnet34": 21.3, "resnet50": 23.5}
    assert round(size / 1e6, 1) == millions[name]
    last = variables["params"]["Dense_0"]["kernel"].shape
    assert last == ({"resnet9": 128, "resnet50": 2048}.get(name, 512), 10)
    convs = [v for k, v in variables["params"].items() if k.startswith("Conv")]
    assert all(set(conv) == {"kernel"} for conv in convs)  # no bias before a norm


@pytest.mark.parametrize("module", [model_linen, model_nnx])
@pytest.mark.parametrize(("name", "size"), [("resnet18", 11_689_512), ("resnet50", 25_557_032)])
def test_with_the_stem_for_imagenet_they_have_the_parameters_of_torchvisions(module, name, size):
    make = partial(model.build, module, name, "post", "imagenet", classes=1000)
    if module is model_linen:
        image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
        params = jax.eval_shape(partial(make().init, train=False), jax.random.key(0), image)
        params = params["params"]
    else:
        params = nnx.state(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))), nnx.Param)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == size


@pytest.mark.parametrize(("name", "block"), NETWORKS[1:3])
def test_every_block_starts_as_its_shortcut_and_can_leave_it(name, block, shallow):
    """The last norm's scale (or, before a relu, the last kernel) is 0, and gets a gradient."""
    network = model.build(model_linen, name, block, width=2)
    variables = jax.jit(partial(network.init, train=False))(jax.random.key(0), IMAGES)
    params = variables["params"]
    zero = {
        f"{layer}/{leaf}"
        for layer, leaves in params.items()
        for leaf, value in leaves.items()
        if leaf in ("scale", "kernel") and layer != "Dense_0" and not np.any(value)
    }
    assert len(zero) == 2  # one for each block
    assert {path.split("/")[1] for path in zero} == {"kernel" if block == "pre" else "scale"}

    # From a head that is not 0, so that a gradient reaches the blocks.
    params = {**params, "Dense_0": random_like(params["Dense_0"], 2)}

    @jax.jit
    @jax.grad
    def grad(params):
        variables_ = {"params": params, "batch_stats": variables["batch_stats"]}
        logits, _ = network.apply(variables_, IMAGES, train=True, mutable=["batch_stats"])
        return jnp.sum(logits**2)

    grads = grad(params)
    for path in zero:
        layer, leaf = path.split("/")
        assert np.any(grads[layer][leaf])


@pytest.mark.parametrize("module", [model_linen, model_nnx])
def test_another_norm_may_stand_in(module):
    """For comparisons: `norm` is a class with Flax's arguments."""
    made = []

    def norm(*args, **kwargs):
        made.append(kwargs)
        return (nn if module is model_linen else nnx).BatchNorm(*args, **kwargs)

    if module is model_linen:
        network = model.build(module, "resnet9", "post", width=2, norm=norm)
        jax.eval_shape(lambda: network.init(jax.random.key(0), IMAGES, train=False))
    else:
        make = partial(model.build, module, "resnet9", "post", width=2, norm=norm)
        nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    assert len(made) == 8
    assert all(kwargs["momentum"] == model.MOMENTUM for kwargs in made)


@pytest.mark.parametrize("module", [model_linen, model_nnx])
def test_bfloat16_is_for_the_computation_only(module):
    """Parameters, statistics and logits stay float32."""
    make = partial(model.build, module, "resnet9", "post", width=2, dtype="bfloat16")
    images = jnp.asarray(IMAGES, jnp.bfloat16)
    if module is model_linen:
        network = make()
        variables = jax.eval_shape(lambda: network.init(jax.random.key(0), images, train=False))
        logits = jax.eval_shape(lambda v: network.apply(v, images, train=False), variables)
    else:
        network = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
        variables = nnx.state(network, (nnx.Param, nnx.BatchStat))
        logits = nnx.eval_shape(lambda m: m(images, train=False), network)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert logits.dtype == jnp.float32


def test_weight_decay_pulls_on_kernels_and_nothing_else():
    network = model.build(model_linen, "resnet9", "post", width=2)
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), IMAGES, train=False))
    params = random_like(shapes["params"], 3)
    tx = optimizer.sgd(lambda step: 1.0, weight_decay=0.1)
    no_grads = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(no_grads, tx.init(params), params)
    moved = {path[-1].key for path, u in jax.tree.leaves_with_path(updates) if np.any(u)}
    still = {path[-1].key for path, u in jax.tree.leaves_with_path(updates) if not np.any(u)}
    assert moved == {"kernel"}
    assert still == {"scale", "bias"}


@pytest.mark.parametrize("kind", ["onecycle", "cosine"])
@pytest.mark.parametrize("steps", [2, 100])
def test_the_learning_rate_rises_to_its_peak_and_falls_to_almost_nothing(kind, steps):
    rates = [float(optimizer.schedule(kind, 0.4, steps)(i)) for i in range(steps + 1)]
    top = rates.index(max(rates))
    assert 0 < top <= max(1, steps // 4)
    assert max(rates) == pytest.approx(0.4)
    assert rates == sorted(rates[: top + 1]) + sorted(rates[top + 1 :], reverse=True)
    assert rates[-1] == 0


def test_label_smoothing_is_cross_entropy_against_the_smoothed_distribution():
    rng = np.random.default_rng(4)
    logits, labels = rng.normal(size=(8, 10)).astype(np.float32), rng.integers(0, 10, 8)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    target = 0.9 * np.eye(10)[labels] + 0.1 / 10
    expected = -(target * np.log(p)).sum(axis=1).mean()
    got = optimizer.smooth_cross_entropy(jnp.asarray(logits), jnp.asarray(labels), 0.1)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
