# Five networks as functions of their layers and of x [B, H, W, 3]. The names are torchvision's.
#
# `Linen` makes the layers for Flax. `Reference` applies a state_dict as it is, in PyTorch's layout
# and in float64: what a converted network is compared with.

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxbn
from jaxbn import convert

BN = convert.norm_arguments(momentum=0.1, eps=1e-5)  # PyTorch's defaults, in Flax's terms


def resnet(net, x, blocks=(2, 2, 2, 2), bottleneck=False, width=64, classes=1000):
    """He et al. 2015; with bottlenecks the stride is in the 3x3 convolution."""

    def block(x, name, f, stride):
        out = 4 * f if bottleneck else f
        convs = (
            ((1, f, 1), (3, f, stride), (1, out, 1)) if bottleneck else ((3, f, stride), (3, f, 1))
        )
        y = x
        for i, (kernel, features, s) in enumerate(convs, 1):
            y = net.norm(net.conv(y, f"{name}.conv{i}", features, kernel, s), f"{name}.bn{i}")
            y = nn.relu(y) if i < len(convs) else y
        if x.shape != y.shape:
            x = net.conv(x, f"{name}.downsample.0", out, 1, stride)
            x = net.norm(x, f"{name}.downsample.1")
        return nn.relu(x + y)

    x = nn.relu(net.norm(net.conv(x, "conv1", width, 7, 2), "bn1"))
    x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # [B, H/4, W/4, width]
    for stage, count in enumerate(blocks):
        for i in range(count):
            stride = 2 if stage and not i else 1
            x = block(x, f"layer{stage + 1}.{i}", width * 2**stage, stride)
    return net.dense(x.mean((1, 2)), "fc", classes)


MOBILE = (  # expansion, features, blocks, stride
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def mobilenet_v2(net, x, stages, stem=32, head=1280, classes=1000):
    """Sandler et al. 2018: expand by 1x1, filter each channel by 3x3, project by 1x1."""

    def unit(x, name, features, kernel=1, stride=1, groups=1):
        x = net.norm(net.conv(x, f"{name}.0", features, kernel, stride, groups), f"{name}.1")
        return jax.nn.relu6(x)

    x = unit(x, "features.0", stem, 3, 2)
    n = 1
    for expansion, features, count, stride in stages:
        for i in range(count):
            inner, name, y = expansion * x.shape[-1], f"features.{n}.conv", x
            if expansion > 1:
                y = unit(y, f"{name}.0", inner)
            k = int(expansion > 1)
            y = unit(y, f"{name}.{k}", inner, 3, 1 if i else stride, groups=inner)
            y = net.norm(net.conv(y, f"{name}.{k + 1}", features), f"{name}.{k + 2}")
            x = x + y if x.shape == y.shape else y
            n += 1
    x = unit(x, f"features.{n}", head)
    return net.dense(x.mean((1, 2)), "classifier.1", classes)


EFFICIENT = (  # expansion, kernel, stride, features, blocks
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)


def efficientnet_b0(net, x, stages, stem=32, head=1280, classes=1000):
    """Tan & Le 2019: as MobileNetV2, with silu and a gate on the channels of every block."""

    def unit(x, name, features, kernel=1, stride=1, groups=1, act=nn.silu):
        x = net.conv(x, f"{name}.0", features, kernel, stride, groups)
        return act(net.norm(x, f"{name}.1"))

    def gate(x, name, squeezed):
        s = x.mean((1, 2), keepdims=True)  # [B, 1, 1, C]
        s = nn.silu(net.conv(s, f"{name}.fc1", squeezed, bias=True))
        return x * nn.sigmoid(net.conv(s, f"{name}.fc2", x.shape[-1], bias=True))

    x = unit(x, "features.0", stem, 3, 2)
    for stage, (expansion, kernel, stride, features, count) in enumerate(stages, 1):
        for i in range(count):
            c, name, y = x.shape[-1], f"features.{stage}.{i}.block", x
            if expansion > 1:
                y = unit(y, f"{name}.0", expansion * c)
            k = int(expansion > 1)
            y = unit(y, f"{name}.{k}", expansion * c, kernel, 1 if i else stride, expansion * c)
            y = gate(y, f"{name}.{k + 1}", max(1, c // 4))
            y = unit(y, f"{name}.{k + 2}", features, act=lambda y: y)
            x = x + y if x.shape == y.shape else y
    x = unit(x, f"features.{len(stages) + 1}", head)
    return net.dense(x.mean((1, 2)), "classifier.1", classes)


def densenet121(net, x, blocks=(6, 12, 24, 16), width=64, growth=32, classes=1000):
    """Huang et al. 2016: each layer reads all those before it in its block, norm and relu first."""

    def normed(x, name):
        return nn.relu(net.norm(x, name))

    x = normed(net.conv(x, "features.conv0", width, 7, 2), "features.norm0")
    x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    for b, count in enumerate(blocks, 1):
        for i in range(1, count + 1):
            name = f"features.denseblock{b}.denselayer{i}"
            y = net.conv(normed(x, f"{name}.norm1"), f"{name}.conv1", 4 * growth)
            y = net.conv(normed(y, f"{name}.norm2"), f"{name}.conv2", growth, 3)
            x = jnp.concatenate([x, y], -1)
        if b < len(blocks):
            name = f"features.transition{b}"
            x = net.conv(normed(x, f"{name}.norm"), f"{name}.conv", x.shape[-1] // 2)
            x = nn.avg_pool(x, (2, 2), (2, 2))
    x = normed(x, "features.norm5")
    return net.dense(x.mean((1, 2)), "classifier", classes)


class Entry(NamedTuple):
    """A network, its arguments, and those of a small one for tests."""

    net: Callable[..., Any]
    arguments: dict[str, Any]
    tiny: dict[str, Any]


ZOO = {  # by torchvision's names
    "resnet18": Entry(resnet, {}, {"blocks": (1, 1), "width": 8, "classes": 5}),
    "resnet50": Entry(
        resnet,
        {"blocks": (3, 4, 6, 3), "bottleneck": True},
        {"blocks": (1, 1), "bottleneck": True, "width": 8, "classes": 5},
    ),
    "mobilenet_v2": Entry(
        mobilenet_v2,
        {"stages": MOBILE},
        {"stages": ((1, 4, 1, 1), (2, 6, 2, 2)), "stem": 8, "head": 16, "classes": 5},
    ),
    "efficientnet_b0": Entry(
        efficientnet_b0,
        {"stages": EFFICIENT},
        {"stages": ((1, 3, 1, 4, 1), (2, 5, 2, 6, 2)), "stem": 8, "head": 16, "classes": 5},
    ),
    "densenet121": Entry(
        densenet121, {}, {"blocks": (1, 1), "width": 8, "growth": 4, "classes": 5}
    ),
}


class Linen(nn.Module):
    """A network of the zoo in Flax. For `convert`, `_` and `.` in a name are the same."""

    net: Callable[..., Any]
    arguments: Any  # pairs, so that the module can be hashed

    @nn.compact
    def __call__(self, x, train=False):
        layers = LinenLayers(train)
        return self.net(layers, x, **dict(self.arguments))


class LinenLayers:
    """The layers of a network, made where a module's `__call__` asks for them."""

    def __init__(self, train):
        self.train = train

    def conv(self, x, name, features, kernel=1, stride=1, groups=1, bias=False):
        pad = ((kernel // 2, kernel // 2),) * 2  # PyTorch's; "SAME" pads otherwise at stride 2
        options = {"feature_group_count": groups, "use_bias": bias, "name": name.replace(".", "_")}
        return nn.Conv(features, (kernel, kernel), stride, pad, **options)(x)

    def norm(self, x, name):
        return jaxbn.linen.BatchNorm(not self.train, name=name.replace(".", "_"), **BN)(x)

    def dense(self, x, name, features):
        return nn.Dense(features, name=name.replace(".", "_"))(x)


class Reference:
    """The layers of a state_dict as PyTorch applies them: kernels OIHW, images NCHW, float64."""

    def __init__(self, state):
        self.state = {name: np.asarray(v, np.float64) for name, v in state.items()}

    def conv(self, x, name, features, kernel=1, stride=1, groups=1, bias=False):
        x = lax.conv_general_dilated(
            jnp.moveaxis(x, -1, 1),
            self.state[f"{name}.weight"],
            (stride, stride),
            ((kernel // 2, kernel // 2),) * 2,
            dimension_numbers=("NCHW", "OIHW", "NCHW"),
            feature_group_count=groups,
        )
        return jnp.moveaxis(x, 1, -1) + (self.state[f"{name}.bias"] if bias else 0)

    def norm(self, x, name):
        mean, var, scale, bias = (
            self.state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / np.sqrt(var + 1e-5) * scale + bias

    def dense(self, x, name, features):
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]
