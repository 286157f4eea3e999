"""Layers whose shapes differ between the libraries, or whose order no shape can tell."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
from jaxbn import convert
from jaxbn.convert._matching import MisfitError
from tests.support import oracle
from tests.support.conversion import assert_same, last, normal, refused, shapes
from tests.support.messages import message
from tests.support.networks import ResNet


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_prelu(api):
    state = {"weight": np.float32([0.3])}
    layer = nn.PReLU() if api == "linen" else nnx.PReLU()
    like = shapes(layer, normal(1, 2)) if api == "linen" else layer
    new, report = convert.from_torch(state, like)
    x = normal(4, 2)
    y = layer.apply(new, x) if api == "linen" else new(x)
    np.testing.assert_allclose(y, np.where(x < 0, np.float32(0.3) * x, x))
    assert report.moves[0].how == "1 → ()"
    assert_same(convert.to_torch(new)[0], state)
    said = message(MisfitError, convert.from_torch, {"weight": normal(2)}, like)
    where = "params/negative_slope" if api == "linen" else "negative_slope"
    assert said == refused("from_torch", f"misshapen: weight (2,) becomes (2,), but {where} is ()")


def test_prelus_between_other_layers_are_matched_by_order():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.PReLU()(nn.Dense(3)(x))
            x = nn.Dense(2)(x)
            return nn.PReLU()(x)

    state = {"act1.weight": np.float32([0.1]), "act2.weight": np.float32([0.2])}
    state |= {"fc1.weight": normal(3, 4), "fc1.bias": normal(3)}
    state |= {"fc2.weight": normal(2, 3), "fc2.bias": normal(2)}
    new, _ = convert.from_torch(state, shapes(Net(), normal(1, 4)))
    slopes = [float(new["params"][f"PReLU_{i}"]["negative_slope"]) for i in (0, 1)]
    np.testing.assert_allclose(slopes, [0.1, 0.2])


@pytest.mark.parametrize("d", [1, 2, 3])
def test_a_convolution_by_1x1_is_a_dense_layer(d):
    w, b = normal(5, 3), normal(5)
    conv, dense = {"weight": w.reshape(5, 3, *[1] * d), "bias": b}, {"weight": w, "bias": b}
    x = normal(2, *[4] * d, 3)
    want = np.float64(x) @ w.T + b
    ones = "1" * d
    for state, layer, how in (
        (conv, nn.Dense(5), f"OI{ones} → IO"),
        (dense, nn.Conv(5, (1,) * d), f"OI → {ones}IO"),
    ):
        new, report = convert.from_torch(state, shapes(layer, x))
        oracle.assert_close(layer.apply(new, x), want, oracle.tolerance("float32", 3))
        assert report.moves[0].how == how
        for other in (conv, dense):
            assert_same(convert.to_torch(new, other)[0], other)


# Flattened images


class Decoder(nn.Module):
    """A dense layer whose outputs become an image; a norm and a dense layer on a flattened one."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(12, name="make")(x).reshape(-1, 2, 3, 2)
        x = nn.Conv(4, (1, 1), name="conv")(x).reshape(-1, 24)
        x = jaxbn.linen.BatchNorm(True, name="bn")(x)
        return nn.Dense(24, name="both")(x)


DECODER = {
    "make.weight": normal(12, 5),
    "make.bias": normal(12),
    "conv.weight": normal(4, 2, 1, 1),
    "conv.bias": normal(4),
    "bn.weight": normal(24),
    "bn.bias": normal(24, seed=1),
    "bn.running_mean": normal(24, seed=2),
    "bn.running_var": np.abs(normal(24, seed=3)) + 1,
    "both.weight": normal(24, 24),
    "both.bias": normal(24, seed=4),
}
FLATTENED = {
    "make": (None, (2, 3, 2)),
    "bn": (2, 3, 4),
    "both": ((2, 3, 4), (2, 3, 4)),
}


def decoded(x):
    """The decoder as PyTorch computes it, images as (C, H, W)."""
    s = {name: np.float64(v) for name, v in DECODER.items()}
    x = (x @ s["make.weight"].T + s["make.bias"]).reshape(-1, 2, 2, 3)
    x = np.einsum("nchw,oc->nohw", x, s["conv.weight"][..., 0, 0])
    x = (x + s["conv.bias"][:, None, None]).reshape(len(x), 24)
    x = oracle.normalize(
        x, *(s[f"bn.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
    )
    return (x @ s["both.weight"].T + s["both.bias"]).reshape(-1, 4, 2, 3)


def test_inputs_outputs_and_norms_of_flattened_images():
    x = normal(3, 5)
    new, report = convert.from_torch(DECODER, shapes(Decoder(), x), flattened=FLATTENED)
    y = np.asarray(Decoder().apply(new, x)).reshape(-1, 2, 3, 4)
    oracle.assert_close(y, last(decoded(x)), oracle.tolerance("float32", 24))
    how = {move.source: move.how for move in report.moves}
    assert how["make.weight"] == "OI → IO, outputs CHW → HWC"
    assert how["both.weight"] == "OI → IO, inputs CHW → HWC, outputs CHW → HWC"
    assert {how[f"bn.{k}"] for k in ("weight", "bias", "running_mean")} == {"CHW → HWC"}
    again, _ = convert.to_torch(new, DECODER, flattened=FLATTENED)
    assert_same(again, DECODER)


def test_sizes_that_are_not_those_of_the_layer():
    wrong = {"make": (None, (2, 2, 2)), "bn": (5, 5), "both": ((1, 1, 1), (2, 2)), "no": (2, 2)}
    like = shapes(Decoder(), normal(1, 5))
    assert message(MisfitError, convert.from_torch, DECODER, like, flattened=wrong) == refused(
        "from_torch",
        "flattened: 'make' with (2, 2, 2) is no dense layer of that many outputs",
        "flattened: 'bn' with (5, 5) is no norm of that many features",
        "flattened: 'both' with (1, 1, 1) is no dense layer of that many inputs",
        "flattened: 'both' with (2, 2) is no dense layer of that many outputs",
        "flattened: 'no' with (2, 2) is no dense layer of that many inputs",
    )


def test_the_report_names_what_may_be_a_flattened_image():
    """Shapes alone do not tell: it is a note, not where a layer before gives as many features."""

    class Net(nn.Module):
        pooled: bool

        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3), name="conv")(x)  # [B, 3, 3, 4]
            x = x.mean((1, 2)) if self.pooled else x.reshape(len(x), -1)
            return nn.Dense(9, name="head")(nn.Dense(4, name="fc")(x))

    for pooled, n in ((False, 36), (True, 4)):
        state = {"conv.weight": normal(4, 2, 3, 3), "conv.bias": normal(4), "fc.bias": normal(4)}
        state |= {"fc.weight": normal(4, n), "head.weight": normal(9, 4), "head.bias": normal(9)}
        like = shapes(Net(pooled), normal(1, 3, 3, 2))
        note = (
            "fc: 36 inputs may be an image of 3x3x4; if so, the order is wrong without "
            "flattened={'fc': (3, 3, 4)}"
        )
        notes = convert.from_torch(state, like)[1].notes
        assert notes[1:] == (() if pooled else (note,))
        told = {"flattened": {"fc": (3, 3, 4)}} if not pooled else {}
        assert convert.from_torch(state, like, **told)[1].notes[1:] == ()


# Names


def imagenet(block, convs, stages=(1, 1), width=8):
    """A state_dict by torchvision's names for the network of tests/support, or the example's."""
    state, c = {}, width

    def add(conv, bn, o, i, k):
        state[f"{conv}.weight"] = normal(o, i, k, k, seed=len(state))
        for j, name in enumerate(("weight", "bias", "running_mean", "running_var")):
            state[f"{bn}.{name}"] = np.abs(normal(o, seed=len(state) + j)) + 0.5

    add("conv1", "bn1", width, 3, 3)
    for stage, count in enumerate(stages):
        for b in range(count):
            f, name = width * 2**stage, f"layer{stage + 1}.{b}"
            for j, k in enumerate(convs, 1):
                add(f"{name}.conv{j}", f"{name}.bn{j}", f, c if j == 1 else f, k)
            if c != f:
                add(f"{name}.downsample.0", f"{name}.downsample.1", f, c, 1)
            c = f
    return state | {"fc.weight": normal(10, c), "fc.bias": normal(10)}


def test_names_of_flaxs_imagenet_example():
    """conv_init, bn_init, Block_0/Conv_0, Block_1/conv_proj, Dense_0: by the forward pass."""
    state = imagenet("Block", (3, 3))
    like = shapes(ResNet(jaxbn.linen.BatchNorm), normal(1, 8, 8, 3))
    _, report = convert.from_torch(state, like)
    assert report.matched_by == "order"
    moved = {move.target.removesuffix("/kernel"): move.source for move in report.moves}
    assert moved["params/conv_init"] == "conv1.weight"
    assert moved["params/Block_1/Conv_0"] == "layer2.0.conv1.weight"
    assert moved["params/Block_1/conv_proj"] == "layer2.0.downsample.0.weight"
    assert moved["batch_stats/Block_1/norm_proj/var"] == "layer2.0.downsample.1.running_var"
    assert moved["batch_stats/Block_0/BatchNorm_1/mean"] == "layer1.0.bn2.running_mean"
    alike = [note for note in report.notes if note.startswith("equal shapes")]
    assert alike == [
        "equal shapes, matched by their order alone: layer1.0.conv1, layer1.0.conv2",
    ]


# Numbers, and the way back


def test_statistics_that_are_not_finite_are_noted():
    state = {f"{n}.{k}": np.ones(2, "f") for n in ("a", "b") for k in ("running_mean", "weight")}
    state |= {f"{n}.{k}": np.ones(2, "f") for n in ("a", "b") for k in ("running_var", "bias")}
    state["b.running_var"] = np.float32([1, np.nan])
    layers = {n: jaxbn.init(2) for n in ("a", "b")}
    like = {
        "params": {n: p._asdict() for n, (p, _) in layers.items()},
        "batch_stats": {n: {"mean": s.mean, "var": s.var} for n, (_, s) in layers.items()},
    }
    notes = convert.from_torch(state, like)[1].notes
    assert notes[1:] == ("statistics that are not finite, as in the source: b",)
    assert convert.from_torch({**state, "b.running_var": np.ones(2, "f")}, like)[1].notes[1:] == ()


def test_layers_of_a_pytorch_model_that_stay():
    variables = {"params": {"fc": {"kernel": normal(3, 2)}}}
    like = {"fc.weight": normal(2, 3), "head.0.weight": normal(4, 2), "head.1.bias": normal(4)}
    new, report = convert.to_torch(variables, like, keep=["head"])
    assert_same(new, {**like, "fc.weight": variables["params"]["fc"]["kernel"].T})
    assert report.kept == ("head.0.weight", "head.1.bias")
    said = message(MisfitError, convert.to_torch, variables, like, keep=["tail", "head"])
    assert said == refused("to_torch", "keep: 'tail' is no layer of the target")


def test_bfloat16_becomes_what_torch_can_take():
    variables = jax.tree.map(jnp.bfloat16, {"params": {"fc": {"kernel": normal(3, 2)}}})
    for like in (None, {"fc.weight": np.zeros((2, 3), jnp.bfloat16)}):
        new, report = convert.to_torch(variables, like)
        assert new["fc.weight"].dtype == np.float32
        kernel = np.float32(variables["params"]["fc"]["kernel"])
        np.testing.assert_array_equal(new["fc.weight"], kernel.T)
        assert report.notes == ("bfloat16 → float32, which torch.from_numpy takes: fc.weight",)
