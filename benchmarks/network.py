"""A ResNet for 32x32 images whose norm is exchangeable, and its loss."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Block(nn.Module):
    channels: int
    stride: int
    norm: Any
    dtype: Any

    @nn.compact
    def __call__(self, x):
        def conv(size, stride=1):
            return nn.Conv(self.channels, size, stride, use_bias=False, dtype=self.dtype)

        y = nn.relu(self.norm()(conv((3, 3), self.stride)(x)))
        y = self.norm(scale_init=nn.initializers.zeros)(conv((3, 3))(y))
        if x.shape != y.shape:
            x = self.norm()(conv((1, 1), self.stride)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    norm: Any  # of a linen BatchNorm's arguments, in training
    dtype: Any
    stages: tuple[int, ...] = (2, 2, 2)
    width: int = 32

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (3, 3), use_bias=False, dtype=self.dtype)(x)
        x = nn.relu(self.norm()(x))
        for i, blocks in enumerate(self.stages):
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                x = Block(self.width * 2**i, stride, self.norm, self.dtype)(x)
        return nn.Dense(10, dtype=self.dtype)(x.mean((1, 2))).astype(jnp.float32)


def loss(model, params, batch_stats, x, label):
    """Cross-entropy and the new batch_stats."""
    variables = {"params": params, "batch_stats": batch_stats}
    logits, updates = model.apply(variables, x, mutable=["batch_stats"])
    log_p = jax.nn.log_softmax(logits)
    return -(log_p * jax.nn.one_hot(label, 10)).sum(-1).mean(), updates["batch_stats"]
