"""Small residual networks in Flax's own style, with the norm layer as an argument."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected where shapes change."""

    filters: int
    strides: int
    norm: Callable[..., nn.Module]
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        y = conv(self.filters, (3, 3), (self.strides, self.strides))(x)
        y = nn.relu(self.norm()(y))
        y = conv(self.filters, (3, 3))(y)
        y = self.norm(scale_init=nn.initializers.zeros_init())(y)
        if x.shape != y.shape:
            x = conv(self.filters, (1, 1), (self.strides, self.strides), name="conv_proj")(x)
            x = self.norm(name="norm_proj")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Stem, blocks of doubling width, mean over space, logits. The norm class is `norm`."""

    norm: Any
    stages: tuple[int, ...] = (1, 1)
    width: int = 8
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        norm = functools.partial(
            self.norm, use_running_average=not train, momentum=0.9, dtype=self.dtype
        )
        x = nn.Conv(self.width, (3, 3), use_bias=False, dtype=self.dtype, name="conv_init")(x)
        x = nn.relu(norm(name="bn_init")(x))  # [B, H, W, width]
        for i, blocks in enumerate(self.stages):
            for j in range(blocks):
                strides = 2 if i > 0 and j == 0 else 1
                x = Block(self.width * 2**i, strides, norm, self.dtype)(x)
        x = nn.Dense(10, dtype=self.dtype)(x.mean((1, 2)))
        return x.astype(jnp.float32)


class NnxNet(nnx.Module):
    """Two convolutions with norms and a linear head. The norm class is `norm`."""

    def __init__(self, norm: Any, *, width: int = 8, rngs: nnx.Rngs, **options: Any):
        self.conv1 = nnx.Conv(3, width, (3, 3), use_bias=False, rngs=rngs)
        self.norm1 = norm(width, momentum=0.9, rngs=rngs, **options)
        self.conv2 = nnx.Conv(width, width, (3, 3), use_bias=False, rngs=rngs)
        self.norm2 = norm(width, momentum=0.9, rngs=rngs, **options)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(self.norm1(self.conv1(x)))
        x = jax.nn.relu(x + self.norm2(self.conv2(x)))
        return self.head(x.mean((1, 2)))


class TinyLinen(nn.Module):
    """Stands in for an example's ResNet where compiling that is most of the time."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for name in ("a", "b"):
            x = nn.Conv(8 * self.width, (4, 4), (4, 4), name=f"conv_{name}")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, name=name)(x))
        return nn.Dense(10)(x.mean((1, 2)))


class TinyNnx(nnx.Module):
    """The same in nnx."""

    def __init__(self, *, width: int, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 8 * width, (4, 4), (4, 4), rngs=rngs)
        self.norm, self.head = (
            nnx.BatchNorm(8 * width, rngs=rngs),
            nnx.Linear(8 * width, 10, rngs=rngs),
        )

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nnx.relu(self.norm(self.conv(x), use_running_average=not train))
        return self.head(x.mean((1, 2)))
