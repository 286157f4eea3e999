# ResNets for small images in Flax nnx; model_linen.py has the same networks in linen.

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import ones, zeros
from model import MOMENTUM, block_convs, finish, halve, he_normal

import jaxbn.nnx


class ConvNorm(nnx.Module):
    """Convolution, norm, activation: [B, H, W, C] → [B, H/stride, W/stride, F].

    Equals `activation(norm(conv(x)) + residual)`.
    """

    def __init__(self, make, c, kernel, f, stride=1, activation=None, scale_init=ones):
        self.conv = make.conv(c, kernel, f, stride)
        self.bn = make.bn(f, activation, scale_init)

    def __call__(self, x, train, residual=None):
        return self.bn(self.conv(x), not train, residual=residual)


class NormConv(nnx.Module):
    """Norm, relu, then convolution. Returns what the relu returned, too."""

    def __init__(self, make, c, kernel, f, stride=1, init=he_normal):
        self.bn = make.bn(c, nnx.relu)
        self.conv = make.conv(c, kernel, f, stride, init)

    def __call__(self, x, train):
        x = self.bn(x, not train)
        return self.conv(x), x


class Make:
    """What every network here is built with; `norm` is a class, so that another may stand in."""

    def __init__(self, rngs: nnx.Rngs, dtype: Any, norm: Callable[..., nnx.Module]):
        self.rngs, self.dtype, self.norm = rngs, dtype, norm

    def conv(self, c, kernel, f, stride=1, init=he_normal):  # no bias: a norm follows
        return nnx.Conv(
            c,
            f,
            (kernel, kernel),
            (stride, stride),
            use_bias=False,
            dtype=self.dtype,
            kernel_init=init,
            rngs=self.rngs,
        )

    def bn(self, c, activation=None, scale_init=ones):
        """The norm as `layer(x, use_running_average, residual=None)`, with its activation.

        Activation and residual are part of the layer, which so moves fewer bytes on a GPU.
        """
        options = {"momentum": MOMENTUM, "dtype": self.dtype, "scale_init": scale_init}
        if getattr(self.norm, "func", self.norm) is jaxbn.nnx.BatchNorm:  # or a partial of it
            return self.norm(c, **options, activation=activation, rngs=self.rngs)
        return Foreign(self.norm(c, **options, rngs=self.rngs), activation)

    def head(self, c, classes):  # float32 whatever `dtype` is, logits all 0 at the start
        return nnx.Linear(c, classes, kernel_init=zeros, rngs=self.rngs)


class Foreign(nnx.Module):
    """A norm that knows no activation and no residual, and then these two."""

    def __init__(self, norm, activation):
        self.norm, self.activation = norm, activation

    def __call__(self, x, use_running_average, residual=None):
        y = self.norm(x, use_running_average=use_running_average)
        return finish(y, self.activation, residual)


class Pair(nnx.Module):
    def __init__(self, make, c):
        self.first = ConvNorm(make, c, 3, c, activation=nnx.relu)
        self.second = ConvNorm(make, c, 3, c, activation=nnx.relu, scale_init=zeros)

    def __call__(self, x, train):
        return self.second(self.first(x, train), train, residual=x)


class ResNet9(nnx.Module):
    """Small and fast: eight convolutions, of which two pairs are residual, and a dense layer."""

    def __init__(
        self,
        *,
        width: int = 16,
        classes: int = 10,
        dtype: Any = jnp.float32,
        norm: Callable[..., nnx.Module] = jaxbn.nnx.BatchNorm,
        rngs: nnx.Rngs,
    ):
        make, w = Make(rngs, dtype, norm), width

        def layer(c, f):
            return ConvNorm(make, c, 3, f, activation=nnx.relu)

        self.stem = layer(3, w)
        self.down1, self.pair1 = layer(w, 2 * w), Pair(make, 2 * w)
        self.down2 = layer(2 * w, 4 * w)
        self.down3, self.pair3 = layer(4 * w, 8 * w), Pair(make, 8 * w)
        self.head = make.head(8 * w, classes)

    def __call__(self, x, train: bool):  # [B, 32, 32, 3]
        # The maximum is taken before the convolution, which then runs on a quarter of the pixels.
        x = self.stem(x, train)  # [B, 32, 32, w]
        x = self.pair1(self.down1(halve(x), train), train)  # [B, 16, 16, 2w]
        x = self.down2(halve(x), train)  # [B, 8, 8, 4w]
        x = self.pair3(self.down3(halve(x), train), train)  # [B, 4, 4, 8w]
        return self.head(x.max(axis=(1, 2)).astype(jnp.float32))  # [B, 8w] → [B, classes]


class PostBlock(nnx.Module):
    def __init__(self, make, c, convs):
        channels = [c, *(f for _, f, _ in convs)]
        # Scale 0: at the start every block is its shortcut, and the network is shallow.
        inits = [ones] * (len(convs) - 1) + [zeros]
        self.layers = nnx.List(
            ConvNorm(make, c, *conv, activation=nnx.relu, scale_init=init)
            for c, conv, init in zip(channels, convs, inits, strict=False)
        )
        features, stride = convs[-1][1], max(stride for _, _, stride in convs)
        reshapes = c != features or stride != 1
        self.shortcut = ConvNorm(make, c, 1, features, stride) if reshapes else None

    def __call__(self, x, train):
        y = x
        for layer in self.layers[:-1]:
            y = layer(y, train)
        shortcut = self.shortcut(x, train) if self.shortcut else x
        return self.layers[-1](y, train, residual=shortcut)


class PreBlock(nnx.Module):
    def __init__(self, make, c, convs):
        channels = [c, *(f for _, f, _ in convs)]
        # The last norm stands before a relu here, which would pass no gradient from scale 0:
        # the last kernel starts at 0 instead.
        inits = [he_normal] * (len(convs) - 1) + [zeros]
        self.layers = nnx.List(
            NormConv(make, c, *conv, init=init)
            for c, conv, init in zip(channels, convs, inits, strict=False)
        )
        features, stride = convs[-1][1], max(stride for _, _, stride in convs)
        reshapes = c != features or stride != 1
        self.shortcut = make.conv(c, 1, features, stride) if reshapes else None

    def __call__(self, x, train):
        y, activated = self.layers[0](x, train)
        for layer in self.layers[1:]:
            y, _ = layer(y, train)
        return y + (self.shortcut(activated) if self.shortcut else x)


class ResNet(nnx.Module):
    """
    ResNet-18, -34, -50 in CIFAR form, a 3x3 stem and no max pool; or `large`, as for ImageNet. He
    et al. 2015 and 2016.
    """

    def __init__(
        self,
        *,
        blocks: Sequence[int] = (2, 2, 2, 2),
        bottleneck: bool = False,
        pre: bool = False,
        width: int = 64,
        large: bool = False,
        classes: int = 10,
        dtype: Any = jnp.float32,
        norm: Callable[..., nnx.Module] = jaxbn.nnx.BatchNorm,
        rngs: nnx.Rngs,
    ):
        make, block = Make(rngs, dtype, norm), PreBlock if pre else PostBlock
        self.stem = make.conv(3, 7, width, 2) if large else make.conv(3, 3, width)
        c, layers = width, []
        for stage, count in enumerate(blocks):
            for i in range(count):
                convs = block_convs(bottleneck, width * 2**stage, 2 if stage > 0 and i == 0 else 1)
                layers.append(block(make, c, convs))
                c = convs[-1][1]
        self.bn = make.bn(c if pre else width, nnx.relu)  # after the blocks, or before them
        self.blocks = nnx.List(layers)
        self.head = make.head(c, classes)
        self.pre, self.large = pre, large

    def __call__(self, x, train: bool):  # [B, 32, 32, 3], or large [B, 224, 224, 3]
        x = self.stem(x)  # [B, 32, 32, w], or [B, 112, 112, w]
        if not self.pre:
            x = self.bn(x, not train)
        if self.large:
            x = nnx.max_pool(x, (3, 3), (2, 2), "SAME")  # [B, 56, 56, w]
        for block in self.blocks:  # 32x32, 16x16, 8x8, 4x4 pixels, or 56x56 to 7x7
            x = block(x, train)
        if self.pre:
            x = self.bn(x, not train)
        x = x.mean(axis=(1, 2))  # [B, 8w] or [B, 32w]
        return self.head(x.astype(jnp.float32))  # [B, classes]
