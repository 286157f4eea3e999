"""Weights of a PyTorch model in Flax: the same outputs, and training goes on as there.

What PyTorch computes is written out in NumPy float64 from its documentation; the last tests hold
PyTorch itself, where it is installed, against it.
"""

import pathlib
import pickle
import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import jaxbn
from jaxbn import convert
from tests.support import oracle
from tests.support.conversion import assert_same, last, normal, refused, shapes
from tests.support.messages import message

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples" / "cifar10"))
sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples" / "convert"))
import model_linen
import model_nnx
import torch_roundtrip
import torchvision_resnet

# Layouts


def torch_conv(x, w, stride, groups):
    """torch.nn.functional.conv{1,2,3}d without padding: x [N, I, …], w [O, I/groups, …]."""
    d = w.ndim - 2
    axes = tuple(range(2, 2 + d))
    windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[2:], axis=axes)
    windows = windows[(slice(None), slice(None), *[slice(None, None, stride)] * d)]
    windows = windows.reshape(len(x), groups, -1, *windows.shape[2:])  # [N, G, I/G, out…, k…]
    w = w.reshape(groups, -1, *w.shape[1:])  # [G, O/G, I/G, k…]
    out, k = "abc"[:d], "uvw"[:d]
    y = np.einsum(f"ngi{out}{k},goi{k}->ngo{out}", windows, w)
    return y.reshape(len(x), -1, *y.shape[3:])


def torch_conv_transpose(x, w, stride):
    """conv_transpose{1,2,3}d without padding: every input adds its kernel. w [I, O, …]."""
    size = [(n - 1) * stride + k for n, k in zip(x.shape[2:], w.shape[2:], strict=True)]
    y = np.zeros((len(x), w.shape[1], *size))
    for at in np.ndindex(w.shape[2:]):
        part = np.tensordot(x, w[(slice(None), slice(None), *at)], (1, 0))  # [N, …, O]
        to = [slice(a, a + stride * n, stride) for a, n in zip(at, x.shape[2:], strict=True)]
        y[(slice(None), slice(None), *to)] += np.moveaxis(part, -1, 1)
    return y


@pytest.mark.parametrize("api", ["linen", "nnx"])
@pytest.mark.parametrize(("d", "groups"), [(1, 1), (2, 1), (3, 1), (2, 2), (2, 4)])
def test_convolutions(api, d, groups):
    x, w, b = normal(2, 4, *[7, 6, 5][:d]), normal(8, 4 // groups, *[3, 2, 3][:d]), normal(8)
    options = {"strides": 2, "padding": "VALID", "feature_group_count": groups}
    if api == "linen":
        layer = nn.Conv(8, w.shape[2:], **options)
        like = shapes(layer, last(x))
        new, report = convert.from_torch({"weight": w, "bias": b}, like)
        y = layer.apply(new, last(x))
    else:
        like = nnx.Conv(4, 8, w.shape[2:], rngs=nnx.Rngs(0), **options)
        new, report = convert.from_torch({"weight": w, "bias": b}, like)
        y = new(last(x))
    want = last(torch_conv(np.float64(x), w, 2, groups) + b.reshape(-1, *[1] * d))
    oracle.assert_close(y, want, oracle.tolerance("float32", w[0].size))
    letters = "DHW"[3 - d :]
    assert report.moves[0].how == f"OI{letters} → {letters}IO"
    back, _ = convert.to_torch(new)
    assert_same(back, {"weight": w, "bias": b})


@pytest.mark.parametrize("api", ["linen", "nnx"])
@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize("d", [1, 2])
def test_transposed_convolutions_of_as_many_inputs_as_outputs(api, transpose_kernel, d):
    x, w, b = normal(2, 4, *[4, 3][:d]), normal(4, 4, *[3, 2][:d]), normal(4)
    options = {"strides": (2,) * d, "padding": "VALID", "transpose_kernel": transpose_kernel}
    if api == "linen":
        layer, named = nn.ConvTranspose(4, w.shape[2:], **options), {"": transpose_kernel}
        like = shapes(layer, last(x))
        new, _ = convert.from_torch({"weight": w, "bias": b}, like, transposed=named)
        y, back = layer.apply(new, last(x)), convert.to_torch(new, transposed=named)[0]
    else:
        like = nnx.ConvTranspose(4, 4, w.shape[2:], rngs=nnx.Rngs(0), **options)
        new, _ = convert.from_torch({"weight": w, "bias": b}, like)
        y, back = new(last(x)), convert.to_torch(new)[0]
    want = last(torch_conv_transpose(np.float64(x), w, 2) + b.reshape(-1, *[1] * d))
    oracle.assert_close(y, want, oracle.tolerance("float32", w[0].size))
    assert_same(back, {"weight": w, "bias": b})


def test_a_dense_layer_after_a_flattened_image():
    x, w = normal(3, 5, 4, 2), normal(6, 40)  # [N, C, H, W]
    layer = nn.Dense(6, use_bias=False)
    flattened = {"": (4, 2, 5)}  # (H, W, C)
    flat = last(x).reshape(3, -1)
    new, report = convert.from_torch({"weight": w}, shapes(layer, flat), flattened=flattened)
    want = np.float64(x).reshape(3, -1) @ w.T
    oracle.assert_close(layer.apply(new, flat), want, oracle.tolerance("float32", 40))
    assert report.moves[0].how == "OI → IO, inputs CHW → HWC"
    back, _ = convert.to_torch(new, flattened=flattened)
    assert_same(back, {"weight": w})


def test_embeddings_and_parameters_of_their_own():
    like = {"params": {"token": {"embedding": np.zeros((5, 3))}, "position": np.zeros((2, 3))}}
    source = {"token.weight": normal(5, 3), "position": normal(2, 3)}
    new, _ = convert.from_torch(source, like)
    np.testing.assert_array_equal(new["params"]["token"]["embedding"], source["token.weight"])
    np.testing.assert_array_equal(new["params"]["position"], source["position"])
    assert_same(convert.to_torch(new)[0], source)


# Training goes on as there


class Net(nn.Module):
    """Dense, batch norm, dense: small enough to be differentiated by hand."""

    momentum: float | None
    affine: bool

    @nn.compact
    def __call__(self, x, train):
        h = nn.Dense(8, use_bias=False, name="fc1")(x)
        norm = convert.norm_arguments(self.momentum, 1e-3)
        norm |= {"use_scale": self.affine, "use_bias": self.affine}
        h = jaxbn.linen.BatchNorm(not train, name="bn", **norm)(h)
        return nn.Dense(1, name="fc2")(h)


class NnxNet(nnx.Module):
    def __init__(self, momentum, affine):
        self.fc1 = nnx.Linear(6, 8, use_bias=False, rngs=nnx.Rngs(0))
        norm = convert.norm_arguments(momentum, 1e-3)
        norm |= {"use_scale": affine, "use_bias": affine}
        self.bn = jaxbn.nnx.BatchNorm(8, **norm, rngs=nnx.Rngs(0))
        self.fc2 = nnx.Linear(8, 1, rngs=nnx.Rngs(0))

    def __call__(self, x, train):
        return self.fc2(self.bn(self.fc1(x), use_running_average=not train))


def checkpoint(affine):
    """A state_dict in the midst of training; scales are negative, zero and positive."""
    mean, var = normal(8, seed=1), np.exp(normal(8, seed=2))
    state = {"fc1.weight": normal(8, 6), "bn.running_mean": mean, "bn.running_var": var}
    state |= {"bn.num_batches_tracked": np.int64(7)}
    if affine:
        scale = np.float32([-1.5, 0, 0.5, -0.1, 2, 0, 1, -3])
        state |= {"bn.weight": scale, "bn.bias": normal(8, seed=3)}
    return state | {"fc2.weight": normal(1, 8), "fc2.bias": normal(1)}


STEPS, RATE = 50, 0.02


def torch_training(state, momentum, xs, targets):
    """SGD as PyTorch's documentation has it, in float64: each step's output; the last state."""
    s = {name: np.float64(v) for name, v in state.items()}
    outputs = []
    for x, target in zip(np.float64(xs), targets, strict=True):
        h = x @ s["fc1.weight"].T
        n, mean, var = oracle.moments(h)
        scale, bias = s.get("bn.weight", np.ones(8)), s.get("bn.bias", np.zeros(8))
        z = oracle.normalize(h, mean, var, scale, bias, epsilon=1e-3)
        y = z @ s["fc2.weight"].T + s["fc2.bias"]
        outputs.append(y)
        s["bn.num_batches_tracked"] += 1
        new = 1 / s["bn.num_batches_tracked"] if momentum is None else momentum
        s["bn.running_mean"] = (1 - new) * s["bn.running_mean"] + new * mean
        s["bn.running_var"] = (1 - new) * s["bn.running_var"] + new * var * n / (n - 1)
        dy = 2 * (y - target) / y.size
        dz = dy @ s["fc2.weight"]
        dh, dscale, dbias = oracle.gradients(h, dz, scale, epsilon=1e-3)
        gradients = {"fc1.weight": dh.T @ x, "bn.weight": dscale, "bn.bias": dbias}
        gradients |= {"fc2.weight": dy.T @ z, "fc2.bias": dy.sum(0)}
        for name in set(gradients) & set(s):
            s[name] = s[name] - RATE * gradients[name]
    return np.stack(outputs), s


def torch_eval(s, x):
    scale, bias = s.get("bn.weight", np.ones(8)), s.get("bn.bias", np.zeros(8))
    mean, var = s["bn.running_mean"], s["bn.running_var"]
    z = oracle.normalize(np.float64(x) @ s["fc1.weight"].T, mean, var, scale, bias, epsilon=1e-3)
    return z @ s["fc2.weight"].T + s["fc2.bias"]


def data(steps=STEPS):
    x = 2 * normal(steps, 16, 6, seed=4) + 1
    return x, np.sin(x.sum(-1, keepdims=True))


def flax_training(model, variables, xs, targets):
    """The same by Flax, in float32."""

    def step(variables, batch):
        x, target = batch

        def loss(params):
            new = {**variables, "params": params}
            y, updates = model.apply(new, x, True, mutable=["batch_stats"])
            return jnp.square(y - target).mean(), (y, updates)

        grads, (y, updates) = jax.grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: p - RATE * g, variables["params"], grads)
        return {"params": params, **updates}, y

    return jax.jit(lambda v: jax.lax.scan(step, v, (xs, targets)))(variables)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 0.03, None])
def test_training_goes_on_as_in_pytorch(momentum, affine):
    state, (xs, targets) = checkpoint(affine), data()
    model = Net(momentum, affine)
    like = shapes(model, xs[0], train=False)
    variables, report = convert.from_torch(state, like, momentum=momentum, eps=1e-3)
    oracle.assert_close(model.apply(variables, xs[0], False), torch_eval(state, xs[0]), 1e-6)
    variables, y = flax_training(model, variables, xs, targets)
    want, last = torch_training(state, momentum, xs, targets)
    oracle.assert_close(y, want, 1e-5)
    trained, _ = convert.to_torch(variables, state)
    assert list(trained) == list(state)
    for name in set(state) - {"bn.num_batches_tracked"}:
        oracle.assert_close(trained[name], last[name], 1e-5, name)
    # Flax keeps a count where the average is cumulative; else PyTorch's stays as it was.
    assert trained["bn.num_batches_tracked"] == (57 if momentum is None else 7)
    assert trained["bn.num_batches_tracked"].dtype == np.int64
    kept = {0.1: 0.9, 0.03: 0.97, None: None}[momentum]
    arguments = {"momentum": kept, "epsilon": 1e-3, "unbiased": True}
    assert report.batch_norm == {"bn": arguments}


@pytest.mark.parametrize("momentum", [0.1, None])
def test_nnx_updates_as_in_pytorch(momentum):
    state, (xs, targets) = checkpoint(True), data(1)
    like = NnxNet(momentum, True)
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(like)))
    model, _ = convert.from_torch(state, like, momentum=momentum, eps=1e-3)
    assert_same(nnx.to_pure_dict(nnx.state(like)), before)
    oracle.assert_close(model(xs[0], False), torch_eval(state, xs[0]), 1e-6)
    y = model(xs[0], True)
    want, last = torch_training(state, momentum, xs, targets)
    oracle.assert_close(y, want[0], 1e-5)
    new, torch_report = convert.to_torch(model, state)
    for name in ("bn.running_mean", "bn.running_var"):
        oracle.assert_close(new[name], last[name], 1e-5)
    assert torch_report.batch_norm == {"bn": {"momentum": momentum, "eps": 1e-3}}
    abstract = nnx.eval_shape(lambda: NnxNet(momentum, True))
    same, _ = convert.from_torch(state, abstract, momentum=momentum, eps=1e-3)
    part, _ = convert.from_torch(state, nnx.state(like), momentum=momentum, eps=1e-3)
    model, _ = convert.from_torch(state, like, momentum=momentum, eps=1e-3)
    assert_same(nnx.to_pure_dict(nnx.state(same)), nnx.to_pure_dict(nnx.state(model)))
    assert_same(nnx.to_pure_dict(part), nnx.to_pure_dict(nnx.state(model)))


def aligned(*shape):
    """Ones that begin at a multiple of 64 bytes, whose memory `jax.device_put` shares."""
    size = 4 * int(np.prod(shape))
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    array = memory[start : start + size].view(np.float32).reshape(shape)
    array[:] = 1
    return array


def test_the_source_may_go_on_training():
    source = {"fc.weight": aligned(32, 16), "fc.bias": aligned(32)}
    like = {"params": {"fc": {"kernel": np.zeros((16, 32)), "bias": np.zeros(32)}}}
    like = jax.device_put(jax.tree.map(np.float32, like), jax.devices()[1])
    new, _ = convert.from_torch(source, like)
    back, _ = convert.to_torch(new)
    for array in [*source.values(), *back.values()]:
        array += 1
    assert_same(new, jax.tree.map(np.ones_like, like))


def test_arrays_lie_where_those_of_like_do():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    w = normal(3, 8)
    for leaf in (jax.device_put(jnp.zeros((8, 3)), split), shape_in(split)):
        new, _ = convert.from_torch({"fc.weight": w}, {"params": {"fc": {"kernel": leaf}}})
        assert new["params"]["fc"]["kernel"].sharding == split
    np.testing.assert_array_equal(new["params"]["fc"]["kernel"], w.T)


def shape_in(sharding):
    return jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=sharding)


def test_boxed_variables_and_collections_that_stay():
    init = nn.with_partitioning(nn.initializers.ones, (None, "d"))
    variables = nn.Dense(2, kernel_init=init).init(jax.random.key(0), jnp.ones((1, 3)))
    like = nn.FrozenDict({**variables, "cache": {"index": jnp.int32(3)}})
    w, b = normal(2, 3), normal(2)
    new, report = convert.from_torch({"weight": w, "bias": b}, like)
    assert jax.tree.structure(new) == jax.tree.structure(like)
    np.testing.assert_array_equal(new["params"]["kernel"].value, w.T)
    assert [move.target for move in report.moves] == ["params/kernel", "params/bias"]


# ResNets by their names


def resnet_state(blocks=(1, 2), bottleneck=False, width=8, classes=5, seed=0, stem=3):
    """A state_dict with the names and shapes of torchvision, in the order of definition."""
    rng = np.random.default_rng(seed)
    state = {}

    def conv(name, o, i, k):
        state[f"{name}.weight"] = np.float32(rng.normal(size=(o, i, k, k)) / np.sqrt(i * k * k))

    def bn(name, c):
        arrays = rng.normal(1, 0.2, c), rng.normal(size=c) / 4, rng.normal(size=c) / 4
        arrays += (rng.uniform(0.5, 2, c),)
        names = ("weight", "bias", "running_mean", "running_var")
        state.update({f"{name}.{n}": np.float32(v) for n, v in zip(names, arrays, strict=True)})
        state[f"{name}.num_batches_tracked"] = np.array(9)

    conv("conv1", width, 3, stem)
    bn("bn1", width)
    c = width
    for stage, count in enumerate(blocks):
        f = width * 2**stage
        out = 4 * f if bottleneck else f
        for i in range(count):
            at = f"layer{stage + 1}.{i}"
            sizes = [(f, c, 1), (f, f, 3), (out, f, 1)] if bottleneck else [(f, c, 3), (f, f, 3)]
            for k, size in enumerate(sizes):
                conv(f"{at}.conv{k + 1}", *size)
                bn(f"{at}.bn{k + 1}", size[0])
            if i == 0 and (stage > 0 or c != out):
                conv(f"{at}.downsample.0", out, c, 1)
                bn(f"{at}.downsample.1", out)
            c = out
    state["fc.weight"] = np.float32(rng.normal(size=(classes, c)))
    state["fc.bias"] = np.float32(rng.normal(size=classes))
    return state


def as_in_model_nnx(name, blocks=(1, 2)):
    """A layer of torchvision → the one of examples/cifar10/model_nnx.py."""
    if not name.startswith("layer"):
        return {"conv1": "stem", "bn1": "bn", "fc": "head"}[name]
    stage, block, *rest = name.removeprefix("layer").split(".")
    at = f"blocks/{sum(blocks[: int(stage) - 1]) + int(block)}"
    if rest[0] == "downsample":
        return f"{at}/shortcut/{['conv', 'bn'][int(rest[1])]}"
    return f"{at}/layers/{int(rest[0][-1]) - 1}/{rest[0][:-1]}"


@pytest.mark.parametrize("bottleneck", [False, True])
def test_a_resnet_by_its_names_in_linen_and_nnx(bottleneck):
    """By the order of the forward pass in linen, by names in nnx: both compute the same."""
    options = {"blocks": (1, 2), "bottleneck": bottleneck, "width": 8, "classes": 5}
    state, x = resnet_state(bottleneck=bottleneck), normal(2, 32, 32, 3)
    linen = model_linen.ResNet(**options)
    like = shapes(linen, x, train=False)
    variables, report = convert.from_torch(state, like)
    assert report.matched_by == "order"
    # Neither the order of a file, which is sorted, nor that of definition matters.
    again, _ = convert.from_torch(dict(sorted(state.items())), like)
    assert_same(again, variables)
    y = jax.jit(lambda v: linen.apply(v, x, False))(variables)

    empty = model_nnx.ResNet(**options, rngs=nnx.Rngs(0))
    model, report = convert.from_torch(state, empty, rename=as_in_model_nnx)
    assert report.matched_by == "rename"
    oracle.assert_close(nnx.jit(lambda m: m(x, False))(model), np.float64(y), 1e-6)
    assert report.notes[1].startswith("like has unbiased=False in blocks/0/layers/0/bn, ")

    names = {move.target.rsplit("/", 1)[0]: move.source for move in report.moves}
    assert names["blocks/1/shortcut/bn"].startswith("layer2.0.downsample.1.")
    back, _ = convert.to_torch(model, state, rename={v: k for k, v in layers_of(state).items()})
    assert_same(back, state)


def layers_of(state):
    layers = sorted({key.rpartition(".")[0] for key in state})
    return {layer: as_in_model_nnx(layer) for layer in layers}


def test_linen_to_nnx_and_back():
    options = {"blocks": (1, 2), "width": 8, "classes": 5}
    x = normal(2, 32, 32, 3)
    linen = model_linen.ResNet(**options)
    like = shapes(linen, x, train=False)
    variables, by_order = convert.from_torch(resnet_state(), like)
    targets = {move.source: move.target.split("/")[1] for move in by_order.moves}
    rename = {target: as_in_model_nnx(key.rpartition(".")[0]) for key, target in targets.items()}
    empty = model_nnx.ResNet(**options, rngs=nnx.Rngs(0))
    model, report = convert.linen_to_nnx(variables, empty, rename=rename)
    direct, _ = convert.from_torch(resnet_state(), empty, rename=as_in_model_nnx)
    assert_same(nnx.to_pure_dict(nnx.state(model)), nnx.to_pure_dict(nnx.state(direct)))
    back, _ = convert.nnx_to_linen(model, like, rename={v: k for k, v in rename.items()})
    assert_same(back, variables)
    assert {move.how for move in report.moves} == {"as it is"}


def test_a_deep_stem_in_order():
    """That of timm's resnet50d: conv1.0, bn conv1.1, conv1.3, bn conv1.4, conv1.6; then bn1."""
    state = resnet_state(blocks=())
    stem = {}
    for name, c in {"conv1.0": 3, "conv1.3": 8, "conv1.6": 8}.items():
        stem[f"{name}.weight"] = normal(8, c, 3, 3)
    norms = {key: v for key, v in state.items() if key.startswith("bn1.")}
    for name in ("conv1.1", "conv1.4"):
        stem |= {key.replace("bn1", name): v for key, v in norms.items()}
    del state["conv1.weight"]

    class Stem(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(3):
                x = nn.Conv(8, (3, 3), use_bias=False)(x)
                x = jaxbn.linen.BatchNorm(use_running_average=True)(x)
            return nn.Dense(5)(x)

    _, report = convert.from_torch(state | stem, shapes(Stem(), jnp.ones((1, 4, 4, 3))))
    pairs = {move.source: move.target.split("/")[1] for move in report.moves}
    assert {k: v for k, v in pairs.items() if v.startswith("Conv")} == {
        "conv1.0.weight": "Conv_0",
        "conv1.3.weight": "Conv_1",
        "conv1.6.weight": "Conv_2",
    }
    norms = {k: v for k, v in pairs.items() if k.endswith("running_var")}
    assert norms == {
        "conv1.1.running_var": "BatchNorm_0",
        "conv1.4.running_var": "BatchNorm_1",
        "bn1.running_var": "BatchNorm_2",
    }


class ShortcutFirst(nn.Module):
    """A block whose shortcut is computed before the rest: 64 → 256 comes first, not last."""

    @nn.compact
    def __call__(self, x):
        short = nn.Conv(32, (1, 1), use_bias=False)(x)
        for f, k in ((8, 1), (8, 3), (32, 1)):
            x = nn.Conv(f, (k, k), use_bias=False)(x)
        return x + short


def test_an_order_that_does_not_hold_is_refused():
    """Of four kernels two have one shape: by shapes alone they would have been exchanged."""
    sizes = {
        "conv1": (8, 8, 1),
        "conv2": (8, 8, 3),
        "conv3": (32, 8, 1),
        "downsample.0": (32, 8, 1),
    }
    state = {f"layer1.0.{k}.weight": normal(o, i, n, n) for k, (o, i, n) in sizes.items()}
    like = shapes(ShortcutFirst(), jnp.ones((1, 4, 4, 8)))
    expected = refused(
        "from_torch",
        "names, order and shapes do not tell which of these is which:",
        "  source layer1.0.conv1: 8x8x1x1",
        "  source layer1.0.conv2: 8x8x3x3",
        "  source layer1.0.conv3: 32x8x1x1",
        "  source layer1.0.downsample.0: 32x8x1x1",
        "  target Conv_0: 1x1x8x32",
        "  target Conv_1: 1x1x8x8",
        "  target Conv_2: 3x3x8x8",
        "  target Conv_3: 1x1x8x32",
    )
    with pytest.raises(ValueError) as error:
        convert.from_torch(state, like)
    assert str(error.value) == expected


def test_layers_with_no_choice_are_told_as_unknown_missing_and_misshapen():
    """Names differ, and so do the shapes of the only convolution; each side has more of a kind."""
    state = {"a.weight": normal(8, 3, 3, 3), "b.weight": normal(2, 3)}
    state |= {f"n.{name}": normal(4) for name in ("running_mean", "running_var")}
    like = {
        "params": {"Conv_0": {"kernel": np.zeros((3, 3, 3, 4))}, "PReLU_0": {"x": np.zeros(())}}
    }
    with pytest.raises(ValueError) as error:
        convert.from_torch(state, like)
    assert str(error.value) == refused(
        "from_torch",
        "missing, in the target alone: params/PReLU_0/x ()",
        "unknown, in the source alone: n.running_mean (4,)",
        "unknown, in the source alone: n.running_var (4,)",
        "unknown, in the source alone: b.weight (2, 3)",
        "misshapen: a.weight (8, 3, 3, 3) becomes (3, 3, 3, 8), but params/Conv_0/kernel is "
        "(3, 3, 3, 4)",
    )


def test_other_names_are_matched_where_shapes_occur_once():
    source = {"a.weight": normal(2, 3), "b.weight": normal(4, 2), "n.weight": normal(7)}
    like = {"params": {"one": {"kernel": np.zeros((2, 4))}, "two": {"kernel": np.zeros((3, 2))}}}
    like["params"]["three"] = {"scale": np.zeros(7)}
    new, report = convert.from_torch(source, like)
    assert report.matched_by == "order"
    np.testing.assert_array_equal(new["params"]["two"]["kernel"], source["a.weight"].T)
    np.testing.assert_array_equal(new["params"]["one"]["kernel"], source["b.weight"].T)
    source["b.weight"] = normal(2, 3)
    like["params"]["one"]["kernel"] = np.zeros((3, 2))
    with pytest.raises(ValueError, match=r"nothing was converted\.\n  names, order and shapes"):
        convert.from_torch(source, like)


def test_numbers_are_ordered_as_numbers():
    source = {f"conv{i + 1}.weight": np.full((1, 1, 1), i, np.float32) for i in range(12)}
    like = {"params": {f"Conv_{i}": {"kernel": np.zeros((1, 1, 1))} for i in range(12)}}
    new, _ = convert.from_torch(dict(sorted(source.items())), like)
    for i in range(12):
        assert new["params"][f"Conv_{i}"]["kernel"].item() == i


SAME = ["layer1.0.conv1", "layer1_0/conv1", "layer1/0/conv1", "layer1/layers/0/conv1"]


@pytest.mark.parametrize("name", SAME)
def test_names_are_the_same_up_to_separators(name):
    params = {"kernel": np.zeros((1, 1, 1, 1))}
    for part in reversed(name.split("/")):
        params = {part: params}
    source = {"layer1.0.conv1.weight": np.ones((1, 1, 1, 1))}
    new, report = convert.from_torch(source, {"params": params})
    assert report.matched_by == "names"
    assert jax.tree.leaves(new)[0].item() == 1


def test_rename_by_beginnings_and_a_new_head():
    state = {f"module.{key}": v for key, v in checkpoint(True).items()}
    state["module.fc2.weight"] = normal(1000, 8)
    model = Net(0.1, True)
    like = model.init(jax.random.key(0), data(1)[0][0], False)
    rename = {"module": "", "module.fc2": None}
    new, report = convert.from_torch(state, like, rename=rename, keep=["fc2"], eps=1e-3)
    np.testing.assert_array_equal(new["params"]["bn"]["scale"], state["module.bn.weight"])
    assert_same(new["params"]["fc2"], like["params"]["fc2"])
    assert report.kept == ("params/fc2/bias", "params/fc2/kernel")
    dropped = ("module.bn.num_batches_tracked", "module.fc2.weight", "module.fc2.bias")
    assert report.dropped == dropped
    back, _ = convert.to_torch(new, rename=lambda name: f"backbone.{name}")
    assert sorted(back) == sorted(f"backbone.{key}" for key in checkpoint(True))


def test_arguments_of_like_that_differ_are_reported():
    state, x = checkpoint(True), data(1)[0][0]
    counting = shapes(Net(None, True), x, train=False)
    _, report = convert.from_torch(state, counting, momentum=0.1)
    assert report.notes[1:] == ("like has momentum=None in bn",)
    like = NnxNet(0.1, True)
    like.bn = nnx.BatchNorm(8, epsilon=1e-3, rngs=nnx.Rngs(0))  # Flax's own
    _, report = convert.from_torch(state, like, eps=1e-3)
    assert report.notes[1:] == ("like has momentum=0.99, unbiased=False in bn",)


def test_the_report_is_a_table():
    state = checkpoint(True) | {"fc2.bias": np.zeros(1, np.float16)}
    like = shapes(Net(0.1, True), data(1)[0][0], train=False)
    _, report = convert.from_torch(state, like, eps=1e-3)
    assert str(report) == (
        "source           target               shape  how\n"
        "fc1.weight       params/fc1/kernel    6x8    OI → IO\n"
        "bn.running_mean  batch_stats/bn/mean  8      as it is\n"
        "bn.running_var   batch_stats/bn/var   8      as it is\n"
        "bn.weight        params/bn/scale      8      as it is\n"
        "bn.bias          params/bn/bias       8      as it is\n"
        "fc2.weight       params/fc2/kernel    8x1    OI → IO\n"
        "fc2.bias         params/fc2/bias      1      float16 → float32\n"
        "7 arrays, matched by names\n"
        "dropped: bn.num_batches_tracked\n"
        "BatchNorm(momentum=0.9, epsilon=0.001, unbiased=True) for bn\n"
        "momentum: 0.1 of PyTorch (weight of the new) is 0.9 here (weight of the old)"
    )


# The example


def test_the_example(tmp_path, capsys):
    state = resnet_state(blocks=(1, 1, 2, 1), stem=7)
    source, target = tmp_path / "net.safetensors", tmp_path / "again.safetensors"
    save_file(state, source)
    torch_roundtrip.main(source, target)
    table, linen_and_nnx, end = capsys.readouterr().out.rstrip().rsplit("\n", 2)
    keys = len(state)
    assert end == f"{target}: {keys} arrays, the same bits"
    assert float(linen_and_nnx.split()[-3]) <= 1e-5
    assert f"\n{keys - keys // 6} arrays, matched by names" in table


def test_a_resnet_of_pytorch_with_the_names_of_torchvision():
    torch = pytest.importorskip("torch")
    t = torch.nn

    def conv(i, o, k, stride=1):
        return t.Conv2d(i, o, k, stride, k // 2, bias=False)

    class Block(t.Module):
        def __init__(self, i, o, stride):
            super().__init__()
            self.conv1, self.bn1 = conv(i, o, 3, stride), t.BatchNorm2d(o)
            self.conv2, self.bn2 = conv(o, o, 3), t.BatchNorm2d(o)
            if i != o:
                self.downsample = t.Sequential(conv(i, o, 1, stride), t.BatchNorm2d(o))

        def forward(self, x):
            y = torch.relu(self.bn1(self.conv1(x)))
            y = self.bn2(self.conv2(y))
            return torch.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))

    state = resnet_state(blocks=(2, 2, 2, 2), stem=7)
    net = t.Sequential()
    net.add_module("conv1", conv(3, 8, 7, 2))
    net.add_module("bn1", t.BatchNorm2d(8))
    net.add_module("relu", t.ReLU())
    net.add_module("maxpool", t.MaxPool2d(3, 2, 1))
    for s in range(4):
        o = 8 * 2**s
        first = Block(8 if s == 0 else o // 2, o, 1 if s == 0 else 2)
        net.add_module(f"layer{s + 1}", t.Sequential(first, Block(o, o, 1)))
    net.add_module("avgpool", t.AdaptiveAvgPool2d(1))
    net.add_module("flatten", t.Flatten())
    net.add_module("fc", t.Linear(64, 5))
    net.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()})
    x = normal(2, 3, 64, 64)
    model = torchvision_resnet.ResNet(width=8, classes=5)
    variables, report = convert.from_torch(net.state_dict(), shapes(model, last(x)))
    assert report.matched_by == "names"
    want = net.eval()(torch.from_numpy(x)).detach().numpy()
    # Twenty convolutions, whose sums of up to 576 terms PyTorch rounds in another order.
    tolerance = 20 * oracle.tolerance("float32", 576)
    y = jax.jit(model.apply)(variables, last(x))
    oracle.assert_close(y, np.float64(want), tolerance)


# Bad input


def test_all_that_does_not_fit_is_one_error():
    state = checkpoint(True)
    del state["bn.running_var"], state["fc1.weight"]
    state |= {"fc2.weight": normal(1, 9), "gate": normal(3), "bn.bias": np.arange(8)}
    like = shapes(Net(None, True), data(1)[0][0], train=False)
    options = {"rename": {"fc3": "fc2"}, "keep": ["bn2"], "transposed": {"up": True}}
    options |= {"flattened": {"fc1": (2, 2)}}
    with pytest.raises(ValueError) as error:
        convert.from_torch(state, like, **options)
    assert str(error.value) == refused(
        "from_torch",
        "transposed: 'up' is no convolution of Flax's",
        "flattened: 'fc1' with (2, 2) is no dense layer of that many inputs",
        "keep: 'bn2' is no layer of the target",
        "rename: 'fc3' is no layer of the source",
        "of another type: bn.bias is int64, but params/bn/bias is float32",
        "missing, in the target alone: batch_stats/bn/var (8,)",
        "misshapen: fc2.weight (1, 9) becomes (9, 1), but params/fc2/kernel is (8, 1)",
        "unknown, in the source alone: gate (3,)",
        "missing, in the target alone: params/fc1/kernel (6, 8)",
    )


@pytest.mark.parametrize("target", [np.bool_, np.float32])
def test_booleans_are_converted_into_booleans_alone(target):
    """As the buffer of a mask is."""
    source = {"fc.weight": np.eye(2) > 0}
    like = {"params": {"fc": {"kernel": np.eye(2).astype(target)}}}
    if target is np.bool_:
        variables, _ = convert.from_torch(source, like)
        np.testing.assert_array_equal(variables["params"]["fc"]["kernel"], np.eye(2) > 0)
        return
    with pytest.raises(ValueError) as error:
        convert.from_torch(source, like)
    assert str(error.value) == refused(
        "from_torch", "of another type: fc.weight is bool, but params/fc/kernel is float32"
    )


def test_two_layers_for_one_place():
    source = {"a.b.weight": normal(2, 3), "a_b.weight": normal(2, 3)}
    like = {"params": {"a_b": {"kernel": np.zeros((3, 2))}}}
    with pytest.raises(ValueError) as error:
        convert.from_torch(source, like)
    assert str(error.value) == refused(
        "from_torch",
        "two layers of the source go to 'a_b': 'a.b', 'a_b'",
    )
    twins = {"a_b": {"kernel": np.zeros((3, 2))}, "a": {"b": {"kernel": np.zeros((3, 2))}}}
    with pytest.raises(ValueError) as error:
        convert.from_torch({"a.b.weight": normal(2, 3)}, {"params": twins})
    assert str(error.value).splitlines()[1] == (
        "  two layers of the target read alike: 'a/b' and 'a_b'"
    )


def test_a_cumulative_average_needs_a_count():
    like = shapes(Net(0.1, True), data(1)[0][0], train=False)
    with pytest.raises(ValueError) as error:
        convert.from_torch(checkpoint(True), like, momentum=None, eps=1e-3)
    assert str(error.value) == refused(
        "from_torch", "missing, in the target: a count in 'bn': BatchNorm(momentum=None)"
    )
    state = checkpoint(True)
    del state["bn.num_batches_tracked"]
    like = shapes(Net(None, True), data(1)[0][0], train=False)
    with pytest.raises(ValueError) as error:
        convert.from_torch(state, like, momentum=None, eps=1e-3)
    assert str(error.value) == refused(
        "from_torch",
        "missing, in the target alone: batch_stats/bn/count (), the number of updates; write "
        "source['bn.num_batches_tracked'] = n, or a large n to let later updates count little",
    )


def test_another_epsilon_in_like_is_refused():
    with pytest.raises(ValueError) as error:
        convert.from_torch(checkpoint(True), NnxNet(0.1, True))
    assert str(error.value) == refused("from_torch", "epsilon: 'bn' has 0.001, the source 1e-05")


def test_a_layer_to_keep_must_be_there():
    like = {"params": {"a": {"kernel": jax.ShapeDtypeStruct((3, 2), "float32")}}}
    like["params"]["b"] = like["params"]["a"]
    with pytest.raises(ValueError) as error:
        convert.from_torch({"a.weight": normal(2, 3)}, like, keep=["b"])
    problem = "keep: params/b/kernel is a shape; expected an array that can stay"
    assert str(error.value) == refused("from_torch", problem)


VARIABLES = (
    "came for Flax's variables; expected linen's, with 'params' and 'batch_stats', or an nnx "
    "module or its state; write model.init(key, x), or jax.eval_shape(model.init, key, x)."
)
BAD = {
    "like is a model": (
        lambda: convert.from_torch({"weight": normal(2, 3)}, nn.Dense(3)),
        TypeError,
        f"from_torch: a Dense {VARIABLES}",
    ),
    "like is params": (
        lambda: convert.linen_to_nnx({"fc": {"kernel": 0}}, nnx.Linear(2, 3, rngs=nnx.Rngs(0))),
        TypeError,
        f"linen_to_nnx: a dict of ['fc'] {VARIABLES}",
    ),
    "source is a list": (
        lambda: convert.from_torch([normal(2, 3)], {"params": {}}),
        TypeError,
        "from_torch: the source is a list, expected a mapping of names to arrays, or a path; "
        "write model.state_dict().",
    ),
    "source is a checkpoint": (
        lambda: convert.from_torch({"epoch": 3, "model": {"w": normal(1)}}, {"params": {}}),
        ValueError,
        "from_torch: the source holds 'epoch', 'model', expected arrays by name; write the "
        "state_dict alone: checkpoint['model'].",
    ),
    "source is empty": (
        lambda: convert.from_torch({}, {"params": {}}),
        ValueError,
        "from_torch: the source holds nothing, expected arrays by name; write model.state_dict().",
    ),
    "momentum": (
        lambda: convert.from_torch({"w": normal(1)}, {"params": {}}, momentum=9),
        ValueError,
        "from_torch: momentum=9, expected PyTorch's, in [0, 1], or None for the cumulative "
        "average; write momentum=0.1.",
    ),
    "eps": (
        lambda: convert.norm_arguments(eps=-1.0),
        ValueError,
        "norm_arguments: eps=-1.0, expected at least 0; write eps=1e-5.",
    ),
    "another file": (
        lambda: convert.from_torch(__file__, {"params": {}}),
        ValueError,
        f"from_torch: {__file__!r} is no file of weights by its name; expected .safetensors, or "
        f"PyTorch's .pt, .pth, .bin, .ckpt, .pth.tar; write "
        f"safetensors.torch.save_file(model.state_dict(), path).",
    ),
    "no file": (
        lambda: convert.from_torch("nowhere.pt", {"params": {}}),
        FileNotFoundError,
        "from_torch: no file 'nowhere.pt'.",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, kind, expected = BAD[case]
    assert message(kind, call) == expected


# Files


def test_a_safetensors_file(tmp_path):
    state = checkpoint(True)
    state["fc2.weight"] = state["fc2.weight"].astype(jnp.bfloat16)
    path = tmp_path / "net.safetensors"
    save_file({k: np.asarray(v) for k, v in state.items()}, path)
    like = shapes(Net(None, True), data(1)[0][0], train=False)
    from_file, report = convert.from_torch(path, like, momentum=None)
    from_memory, _ = convert.from_torch(state, like, momentum=None)
    assert_same(from_file, from_memory)
    assert int(from_file["batch_stats"]["bn"]["count"]) == 7
    hows = {move.source: move.how for move in report.moves}
    assert hows["fc2.weight"] == "OI → IO, bfloat16 → float32"
    back, _ = convert.to_torch(from_file, path)
    assert_same({k: back[k] for k in state}, state)

    whole = path.read_bytes()
    for size in (0, 5, 30, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError) as error:
            convert.from_torch(path, like, momentum=None)
        assert str(error.value) == (
            f"from_torch: {str(path)!r} is no whole safetensors file ({error.value.__cause__}); "
            f"expected one that safetensors wrote to the end; copy or save it again."
        )
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]


class Runs:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def refusal(path):
    return (
        f"from_torch: {str(path)!r} was refused by torch.load(weights_only=True): it would run "
        f"code, is cut off, or is no file of PyTorch; nothing in it was run. Where the model comes "
        f"from, write torch.save(model.state_dict(), path)."
    )


def test_a_pt_file_is_never_unpickled_here(tmp_path, monkeypatch):
    """Without torch it is refused unread; with it, by weights_only=True alone."""
    path, marker = tmp_path / "net.pt", tmp_path / "ran"
    path.write_bytes(pickle.dumps({"weight": Runs(marker)}))
    like = {"params": {"kernel": np.zeros((3, 2))}}
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError) as error:
        convert.from_torch(path, like)
    assert str(error.value) == (
        f"from_torch: {str(path)!r} is a pickle, which only torch reads without running what is in "
        f"it, and torch is not installed; where it is, write "
        f"safetensors.torch.save_file(torch.load(path, weights_only=True), new_path)."
    )

    calls = []

    def load(path, **options):
        calls.append(options)
        raise pickle.UnpicklingError("Weights only load failed")

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(load=load))
    with pytest.raises(ValueError) as error:
        convert.from_torch(path, like)
    assert str(error.value) == refusal(path)
    assert calls == [{"map_location": "cpu", "weights_only": True}]
    assert [p.name for p in tmp_path.iterdir()] == ["net.pt"]


# PyTorch itself


def test_pt_files_of_pytorch(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "net.pt"
    net = torch.nn.Linear(3, 2).to(torch.bfloat16)
    torch.save(net.state_dict(), path)
    like = {"params": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}
    new, _ = convert.from_torch(path, like)
    want = net.weight.detach().float().numpy().T
    np.testing.assert_array_equal(new["params"]["kernel"], want)
    whole = path.read_bytes()
    marker = tmp_path / "ran"
    torch.save({"weight": Runs(marker)}, path)
    for content in (path.read_bytes(), whole[:-100], b"", b"no checkpoint at all"):
        path.write_bytes(content)
        with pytest.raises(ValueError) as error:
            convert.from_torch(path, like)
        assert str(error.value) == refusal(path)
    torch.save({"epoch": 1, "state_dict": net.state_dict()}, path)
    with pytest.raises(ValueError) as error:
        convert.from_torch(path, like)
    assert str(error.value) == (
        f"from_torch: {path} holds 'epoch', 'state_dict', expected arrays by name; write the "
        f"state_dict alone: checkpoint['state_dict']."
    )
    assert not marker.exists()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_the_oracle_is_pytorch(momentum, affine):
    torch = pytest.importorskip("torch")
    state, (xs, targets) = checkpoint(affine), data()
    net = torch.nn.Sequential()
    net.add_module("fc1", torch.nn.Linear(6, 8, bias=False))
    norm = torch.nn.BatchNorm1d(8, eps=1e-3, momentum=momentum, affine=affine)
    net.add_module("bn", norm)
    net.add_module("fc2", torch.nn.Linear(8, 1))
    net.load_state_dict({k: torch.from_numpy(np.asarray(v)) for k, v in state.items()})
    net.double()
    optimizer = torch.optim.SGD(net.parameters(), RATE)
    outputs = []
    for x, target in zip(torch.from_numpy(np.float64(xs)), np.float64(targets), strict=True):
        y = net(x)
        outputs.append(y.detach().numpy())
        optimizer.zero_grad()
        ((y - torch.from_numpy(target)) ** 2).mean().backward()
        optimizer.step()
    want, last = torch_training(state, momentum, xs, targets)
    oracle.assert_close(np.stack(outputs), want, 1e-12)
    for name, v in net.state_dict().items():
        oracle.assert_close(v.numpy(), last[name], 1e-12, name)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_fifty_steps_of_a_pytorch_network(momentum):
    """Convolution, norm, a transposed and a grouped convolution, norm, dense on a flattened map."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    t, norm = torch.nn, {"momentum": momentum}
    net = t.Sequential(
        *[t.Conv2d(3, 8, 3, stride=2, padding=1), t.BatchNorm2d(8, **norm), t.Tanh()],
        *[t.ConvTranspose2d(8, 8, 3, stride=2, padding=1), t.BatchNorm2d(8, affine=False, **norm)],
        *[t.Tanh(), t.Conv2d(8, 8, 2, groups=4), t.BatchNorm2d(8, **norm), t.Tanh()],
        *[t.Flatten(), t.Linear(8 * 6 * 6, 2)],
    )
    with torch.no_grad():
        net[1].weight[:3] = torch.tensor([-1.0, 0.0, -0.2])

    class Same(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            def bn(x, **affine):
                arguments = convert.norm_arguments(momentum) | affine
                return jaxbn.linen.BatchNorm(not train, **arguments)(x)

            pad = ((1, 1), (1, 1))  # k - 1 - p of the transposed one
            x = nn.tanh(bn(nn.Conv(8, (3, 3), 2, pad)(x)))
            x = nn.ConvTranspose(8, (3, 3), (2, 2), pad)(x)
            x = nn.tanh(bn(x, use_scale=False, use_bias=False))
            x = nn.tanh(bn(nn.Conv(8, (2, 2), padding="VALID", feature_group_count=4)(x)))
            return nn.Dense(2)(x.reshape(len(x), -1))

    x, target = normal(50, 8, 3, 8, 8), normal(50, 8, 2)
    model = Same()
    like = shapes(model, last(x[0]), train=False)
    places = ["Conv_0", "BatchNorm_0", None, "ConvTranspose_0", "BatchNorm_1", None, "Conv_1"]
    places += ["BatchNorm_2", None, None, "Dense_0"]
    variables, _ = convert.from_torch(
        net.state_dict(),
        like,
        rename={str(i): place for i, place in enumerate(places) if place},
        transposed={"ConvTranspose_0": False},
        flattened={"Dense_0": (6, 6, 8)},
        momentum=momentum,
    )
    net.eval()
    want = net(torch.from_numpy(x[0])).detach().numpy()
    oracle.assert_close(model.apply(variables, last(x[0]), False), np.float64(want), 1e-6)
    net.train()
    optimizer, outputs = torch.optim.SGD(net.parameters(), RATE), []
    for batch, t in zip(torch.from_numpy(x), torch.from_numpy(target), strict=True):
        y = net(batch)
        outputs.append(y.detach().numpy())
        optimizer.zero_grad()
        ((y - t) ** 2).mean().backward()
        optimizer.step()
    variables, y = flax_training(model, variables, np.moveaxis(x, 2, -1), target)
    oracle.assert_close(y, np.float64(np.stack(outputs)), 1e-5)
    trained, _ = convert.to_torch(
        variables,
        net.state_dict(),
        rename={place: str(i) for i, place in enumerate(places) if place},
        transposed={"ConvTranspose_0": False},
        flattened={"Dense_0": (6, 6, 8)},
    )
    for name, v in net.state_dict().items():
        oracle.assert_close(trained[name], np.float64(v.numpy()), 1e-5, name)
