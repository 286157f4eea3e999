# ResNet-18 and -34 in Flax linen and nnx, with torchvision's names and padding.

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import jaxbn
from jaxbn import convert

BN = convert.norm_arguments(momentum=0.1, eps=1e-5)  # momentum=0.9, epsilon=1e-5, unbiased=True
PAD = ((1, 1), (1, 1))  # "SAME" pads 0 and 1 at stride 2, PyTorch 1 and 1


def maximum(x):  # [B, H, W, C] → [B, H/2, W/2, C]: 3x3 at stride 2
    return nn.max_pool(x, (3, 3), (2, 2), PAD)


class Block(nn.Module):
    features: int
    stride: int
    shortcut: bool

    def setup(self):  # names of attributes are names of layers
        f, norm = self.features, jaxbn.linen.BatchNorm
        self.conv1 = nn.Conv(f, (3, 3), self.stride, PAD, use_bias=False)
        self.conv2 = nn.Conv(f, (3, 3), 1, PAD, use_bias=False)
        self.bn1, self.bn2 = norm(**BN), norm(**BN)
        if self.shortcut:  # downsample_0, downsample_1
            self.downsample = [nn.Conv(f, (1, 1), self.stride, use_bias=False), norm(**BN)]

    def __call__(self, x, train):  # [B, H, W, C] → [B, H/stride, W/stride, features]
        y = nn.relu(self.bn1(self.conv1(x), not train))
        y = self.bn2(self.conv2(y), not train)
        if self.shortcut:
            x = self.downsample[1](self.downsample[0](x), not train)
        return nn.relu(x + y)


class ResNet(nn.Module):
    blocks: Sequence[int] = (2, 2, 2, 2)
    width: int = 64
    classes: int = 1000

    @nn.compact
    def __call__(self, x, train=False):  # [B, H, W, 3] → [B, classes]
        pad = ((3, 3), (3, 3))
        x = nn.Conv(self.width, (7, 7), 2, pad, use_bias=False, name="conv1")(x)
        x = maximum(nn.relu(jaxbn.linen.BatchNorm(not train, name="bn1", **BN)(x)))
        for stage, count in enumerate(self.blocks):
            for i in range(count):
                first = stage > 0 and i == 0
                name = f"layer{stage + 1}_{i}"
                x = Block(self.width * 2**stage, 1 + first, first, name=name)(x, train)
        return nn.Dense(self.classes, name="fc")(x.mean((1, 2)))


class NnxBlock(nnx.Module):
    def __init__(self, c, f, stride, rngs):
        def conv(c, kernel, stride, pad):
            size = (kernel, kernel)
            return nnx.Conv(c, f, size, stride, padding=pad, use_bias=False, rngs=rngs)

        def norm():
            return jaxbn.nnx.BatchNorm(f, **BN, rngs=rngs)

        self.conv1, self.bn1 = conv(c, 3, stride, PAD), norm()
        self.conv2, self.bn2 = conv(f, 3, 1, PAD), norm()
        self.downsample = nnx.List([conv(c, 1, stride, "VALID"), norm()] if c != f else [])

    def __call__(self, x):
        y = jax.nn.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        for layer in self.downsample:
            x = layer(x)
        return jax.nn.relu(x + y)


class NnxResNet(nnx.Module):
    def __init__(self, blocks=(2, 2, 2, 2), width=64, classes=1000, *, rngs):
        conv = {"padding": ((3, 3), (3, 3)), "use_bias": False, "rngs": rngs}
        self.conv1 = nnx.Conv(3, width, (7, 7), 2, **conv)
        self.bn1 = jaxbn.nnx.BatchNorm(width, **BN, rngs=rngs)
        self.stages, c = len(blocks), width
        for stage, count in enumerate(blocks):
            f = width * 2**stage
            sizes = [(c if i == 0 else f, f, 2 if stage and i == 0 else 1) for i in range(count)]
            layer = nnx.List([NnxBlock(*size, rngs) for size in sizes])
            setattr(self, f"layer{stage + 1}", layer)
            c = f
        self.fc = nnx.Linear(c, classes, rngs=rngs)

    def __call__(self, x):
        x = maximum(jax.nn.relu(self.bn1(self.conv1(x))))
        for stage in range(self.stages):
            for block in getattr(self, f"layer{stage + 1}"):
                x = block(x)
        return self.fc(jnp.mean(x, (1, 2)))
