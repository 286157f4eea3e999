"""ResNet-50, DenseNet-121, EfficientNet-B0 and MobileNetV2, whose norm is any Flax layer.

Each network is a stem, blocks, a mean over space, and logits. `Layers` says which norm a network
has, and what is recomputed in its backward pass.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.subjects.network import finished

Array = jax.Array


class Variant(NamedTuple):
    """A norm, and the options of the checkpoint around each part; None where there is none."""

    norm: Any
    inside: bool = False  # whether the norm takes activation and residual
    block: dict[str, Any] | None = None
    network: dict[str, Any] | None = None
    activation: dict[str, Any] | None = None


class Layers(NamedTuple):
    """What the blocks of one network are made of. `width` is 64 for the published network."""

    variant: Variant
    act: Callable[[Array], Array]
    width: int
    dtype: Any

    def conv(self, x: Array, channels: int, size: int = 1, stride: int = 1, **options: Any) -> Any:
        return nn.Conv(
            channels, (size, size), (stride, stride), use_bias=False, dtype=self.dtype, **options
        )(x)

    def norm(self, x: Array, act: Any = None, residual: Array | None = None) -> Array:
        """Equals `act(norm(x) + residual)`, each where it is given."""
        layer = functools.partial(
            self.variant.norm, use_running_average=False, momentum=0.9, dtype=self.dtype
        )
        if self.variant.inside:
            return layer(activation=act)(x, residual=residual)
        return finished(layer()(x), act, residual)

    def stem(self, x: Array) -> Array:
        """A 7x7 convolution, norm and pool, to a quarter of the pixels a side."""
        x = self.norm(self.conv(x, self.of(64), 7, 2), self.act)
        return nn.max_pool(x, (3, 3), (2, 2), "SAME")

    def of(self, channels: int) -> int:
        """The channels of the published network, at this width."""
        return max(channels * self.width // 64, 1)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a shortcut: He et al. 2016, with the stride on the 3x3."""

    layers: Layers
    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv, norm, act = self.layers.conv, self.layers.norm, self.layers.act
        c = self.layers.of(self.channels)
        y = norm(conv(x, c), act)
        y = norm(conv(y, c, 3, self.stride), act)
        y = conv(y, 4 * c)
        if x.shape != y.shape:
            x = norm(conv(x, 4 * c, 1, self.stride))
        return norm(y, act, x)


class DenseLayer(nn.Module):
    """Two convolutions whose result is appended to x: Huang et al. 2017."""

    layers: Layers
    growth: int = 32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv, norm, act = self.layers.conv, self.layers.norm, self.layers.act
        c = self.layers.of(self.growth)
        y = conv(norm(x, act), 4 * c)
        y = conv(norm(y, act), c, 3)
        return jnp.concatenate([x, y], -1)


class Transition(nn.Module):
    """Halves channels and pixels."""

    layers: Layers

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = self.layers.conv(self.layers.norm(x, self.layers.act), x.shape[-1] // 2)
        return nn.avg_pool(x, (2, 2), (2, 2))


class Inverted(nn.Module):
    """1x1 to more channels, one filter a channel, 1x1 back: Sandler et al. 2018.

    With `squeeze` each channel is weighted by its means over space: Tan & Le 2019.
    """

    layers: Layers
    expand: int
    channels: int
    stride: int
    size: int = 3
    squeeze: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv, norm, act = self.layers.conv, self.layers.norm, self.layers.act
        y, c = x, self.expand * x.shape[-1]
        if self.expand > 1:
            y = norm(conv(y, c), act)
        y = norm(conv(y, c, self.size, self.stride, feature_group_count=c), act)
        if self.squeeze:
            few = max(x.shape[-1] // 4, 1)
            w = y.mean((1, 2), keepdims=True)
            y = y * jax.nn.sigmoid(conv(act(conv(w, few)), c))
        y = conv(y, self.layers.of(self.channels))
        return norm(y, None, x if x.shape == y.shape else None)


class ResNet50(nn.Module):
    layers: Layers

    @nn.compact
    def __call__(self, x: Array) -> Array:
        layers = self.layers
        x, block = layers.stem(x), recomputed(Bottleneck, layers)
        for i, blocks in enumerate((3, 4, 6, 3)):
            for j in range(blocks):
                x = block(layers, 64 * 2**i, 2 if i > 0 and j == 0 else 1)(x)
        return logits(x, layers)


class DenseNet121(nn.Module):
    layers: Layers

    @nn.compact
    def __call__(self, x: Array) -> Array:
        layers = self.layers
        x = layers.stem(x)
        layer, transition = (recomputed(part, layers) for part in (DenseLayer, Transition))
        for i, count in enumerate((6, 12, 24, 16)):
            for _ in range(count):
                x = layer(layers)(x)
            x = transition(layers)(x) if i < 3 else layers.norm(x, layers.act)
        return logits(x, layers)


class Mobile(nn.Module):
    """Inverted blocks, by rows of (expand, channels, blocks, stride, size)."""

    layers: Layers
    rows: tuple[tuple[int, int, int, int, int], ...]
    squeeze: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        layers = self.layers
        x = layers.norm(layers.conv(x, layers.of(32), 3, 2), layers.act)
        block = recomputed(Inverted, layers)
        for expand, channels, blocks, stride, size in self.rows:
            for j in range(blocks):
                step = stride if j == 0 else 1
                x = block(layers, expand, channels, step, size, self.squeeze)(x)
        x = layers.norm(layers.conv(x, layers.of(1280)), layers.act)
        return logits(x, layers)


EFFICIENT_B0 = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
MOBILE_V2 = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 32, 3, 2, 3),
    (6, 64, 4, 2, 3),
    (6, 96, 3, 1, 3),
    (6, 160, 3, 2, 3),
    (6, 320, 1, 1, 3),
)


class Family(NamedTuple):
    """A network, without its layers, and the activation it was published with."""

    network: Callable[..., nn.Module]
    act: Callable[[Array], Array]


FAMILIES = {
    "ResNet-50": Family(ResNet50, jax.nn.relu),
    "DenseNet-121": Family(DenseNet121, jax.nn.relu),
    "EfficientNet-B0": Family(functools.partial(Mobile, rows=EFFICIENT_B0, squeeze=True), nn.swish),
    "MobileNetV2": Family(functools.partial(Mobile, rows=MOBILE_V2, squeeze=False), nn.relu6),
}


class Whole(nn.Module):
    """A network as one block, to be recomputed as a whole."""

    network: Callable[..., nn.Module]
    layers: Layers

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return self.network(self.layers)(x)


def model(
    family: str, variant: Variant, width: int, dtype: Any, activation: str | None = None
) -> nn.Module:
    """The network of that name; `activation` is a name in `jax.nn` in place of its own."""
    made, act = FAMILIES[family]
    act = act if activation is None else getattr(jax.nn, activation)
    layers = Layers(variant, around(act, jax.checkpoint, variant.activation), width, dtype)
    return around(Whole, nn.remat, variant.network)(made, layers)


def recomputed(block: Any, layers: Layers) -> Any:
    """The block with the checkpoint of its variant."""
    return around(block, nn.remat, layers.variant.block)


def around(f: Any, checkpoint: Callable[..., Any], options: dict[str, Any] | None) -> Any:
    """`checkpoint(f, **options)`, or f where there are none."""
    return f if options is None else checkpoint(f, **options)


def logits(x: Array, layers: Layers) -> Array:
    return nn.Dense(1000, dtype=layers.dtype)(x.mean((1, 2))).astype(jnp.float32)
