# ResNets for small images in Flax linen; model_nnx.py has the same networks in nnx.

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.nn.initializers import ones, zeros
from model import MOMENTUM, block_convs, finish, halve, he_normal

import jaxbn.linen


class Layers(nn.Module):
    """What every network here is built with; `norm` is a class, so that another may stand in."""

    classes: int = 10
    dtype: Any = jnp.float32  # of the computation; parameters are float32
    norm: Callable[..., nn.Module] = jaxbn.linen.BatchNorm

    def conv(self, x, kernel: int, features: int, stride: int = 1, init=he_normal):
        """[B, H, W, C] → [B, H/stride, W/stride, features]. No bias: a norm follows."""
        return nn.Conv(
            features,
            (kernel, kernel),
            (stride, stride),
            use_bias=False,
            dtype=self.dtype,
            kernel_init=init,
        )(x)

    def bn(self, train: bool, activation=None, scale_init=ones):
        """The norm as `layer(x, residual=None)`, which equals `activation(norm(x) + residual)`.

        Activation and residual are part of the layer, which so moves fewer bytes on a GPU.
        """
        options = {
            "use_running_average": not train,
            "momentum": MOMENTUM,
            "dtype": self.dtype,
            "scale_init": scale_init,
        }
        if getattr(self.norm, "func", self.norm) is jaxbn.linen.BatchNorm:  # or a partial of it
            return self.norm(**options, activation=activation)
        norm = self.norm(**options)
        return lambda x, residual=None: finish(norm(x), activation, residual)

    def head(self, x):
        """[B, C] → logits [B, classes], float32 whatever `dtype` is, and all 0 at the start."""
        return nn.Dense(self.classes, kernel_init=zeros)(x.astype(jnp.float32))


class ResNet9(Layers):
    """Small and fast: eight convolutions, of which two pairs are residual, and a dense layer."""

    width: int = 16

    @nn.compact
    def __call__(self, x, train: bool):  # [B, 32, 32, 3]
        w = self.width

        def layer(x, features):
            return self.bn(train, nn.relu)(self.conv(x, 3, features))

        def pair(x):
            y = layer(x, x.shape[-1])
            y = self.conv(y, 3, x.shape[-1])
            return self.bn(train, nn.relu, scale_init=zeros)(y, residual=x)

        # The maximum is taken before the convolution, which then runs on a quarter of the pixels.
        x = layer(x, w)  # [B, 32, 32, w]
        x = pair(layer(halve(x), 2 * w))  # [B, 16, 16, 2w]
        x = layer(halve(x), 4 * w)  # [B, 8, 8, 4w]
        x = pair(layer(halve(x), 8 * w))  # [B, 4, 4, 8w]
        return self.head(x.max(axis=(1, 2)))  # [B, 8w] → [B, classes]


class ResNet(Layers):
    """
    ResNet-18, -34, -50 in CIFAR form, a 3x3 stem and no max pool; or `large`, as for ImageNet. He
    et al. 2015 and 2016.
    """

    blocks: Sequence[int] = (2, 2, 2, 2)
    bottleneck: bool = False
    pre: bool = False  # pre-activation: norm, relu, conv, instead of conv, norm, relu
    width: int = 64
    large: bool = False

    @nn.compact
    def __call__(self, x, train: bool):  # [B, 32, 32, 3], or large [B, 224, 224, 3]
        block = self.pre_block if self.pre else self.post_block
        kernel, stride = (7, 2) if self.large else (3, 1)
        x = self.conv(x, kernel, self.width, stride)  # [B, 32, 32, w], or [B, 112, 112, w]
        if not self.pre:
            x = self.bn(train, nn.relu)(x)
        if self.large:
            x = nn.max_pool(x, (3, 3), (2, 2), "SAME")  # [B, 56, 56, w]
        for stage, count in enumerate(
            self.blocks
        ):  # 32x32, 16x16, 8x8, 4x4 pixels, or 56x56 to 7x7
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                x = block(x, block_convs(self.bottleneck, self.width * 2**stage, stride), train)
        if self.pre:
            x = self.bn(train, nn.relu)(x)
        return self.head(x.mean(axis=(1, 2)))  # [B, 8w] or [B, 32w] → [B, classes]

    def post_block(self, x, convs, train):
        y = x
        for conv in convs[:-1]:
            y = self.bn(train, nn.relu)(self.conv(y, *conv))
        y = self.conv(y, *convs[-1])
        # Scale 0: at the start every block is its shortcut, and the network is shallow. This norm
        # is made before the shortcut's, and so named before it.
        last = self.bn(train, nn.relu, scale_init=zeros)
        stride = max(stride for _, _, stride in convs)
        if x.shape != y.shape:
            x = self.bn(train)(self.conv(x, 1, y.shape[-1], stride))
        return last(y, residual=x)

    def pre_block(self, x, convs, train):
        y = self.bn(train, nn.relu)(x)
        features, stride = convs[-1][1], max(stride for _, _, stride in convs)
        if x.shape[-1] != features or stride != 1:
            x = self.conv(y, 1, features, stride)
        for conv in convs[:-1]:
            y = self.bn(train, nn.relu)(self.conv(y, *conv))
        # The last norm stands before a relu here, which would pass no gradient from scale 0:
        # the last kernel starts at 0 instead.
        return x + self.conv(y, *convs[-1], init=zeros)
