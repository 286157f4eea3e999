"""The residual networks of `network` as nnx modules, and their training step."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.subjects.network import Task, negative_log_likelihood


class Block(nnx.Module):
    """As `network.Block`."""

    def __init__(self, features, channels, stride, bottleneck, norm, conv):
        c = channels
        sizes = [(features, c, 3, stride), (c, c, 3, 1)]
        if bottleneck:
            sizes = [(features, c, 1, 1), (c, c, 3, stride), (c, 4 * c, 1, 1)]
        self.convs = nnx.List([conv(*each) for each in sizes])
        self.norms = nnx.List([norm(each[1]) for each in sizes])
        out = sizes[-1][1]
        self.shortcut = nnx.List()
        if features != out or stride > 1:
            self.shortcut = nnx.List([conv(features, out, 1, stride), norm(out)])

    def __call__(self, x):
        y = x
        for conv, norm in zip(self.convs[:-1], self.norms[:-1], strict=True):
            y = nnx.relu(norm(conv(y)))
        y = self.norms[-1](self.convs[-1](y))
        for layer in self.shortcut:
            x = layer(x)
        return nnx.relu(y + x)


class ResNet(nnx.Module):
    """As `network.ResNet`."""

    def __init__(self, task: Task, norm: Callable[..., Any], dtype: Any):
        rngs = nnx.Rngs(0)
        norm = functools.partial(norm, momentum=0.9, dtype=dtype, rngs=rngs)

        def conv(features, channels, size, stride):
            options = {"use_bias": False, "dtype": dtype, "rngs": rngs}
            return nnx.Conv(features, channels, (size, size), stride, **options)

        self.dtype = dtype
        self.large = task.pixels >= 64
        c = task.width
        self.stem = conv(3, c, 7, 2) if self.large else conv(3, c, 3, 1)
        self.norm = norm(c)
        self.blocks = nnx.List()
        for i, blocks in enumerate(task.stages):
            for j in range(blocks):
                channels, stride = task.width * 2**i, 2 if i > 0 and j == 0 else 1
                self.blocks.append(Block(c, channels, stride, task.bottleneck, norm, conv))
                c = 4 * channels if task.bottleneck else channels
        self.dense = nnx.Linear(c, 10, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        if self.large:
            x = nnx.max_pool(x, (3, 3), (2, 2), "SAME")
        for block in self.blocks:
            x = block(x)
        return self.dense(x.mean((1, 2))).astype(jnp.float32)


def training(task: Task, norm: Callable[..., Any], dtype: Any) -> tuple[Callable[..., Any], Any]:
    """One step of gradient descent, (state, x, label) -> (state, loss), and its shapes."""
    model = nnx.eval_shape(lambda: ResNet(task, norm, dtype))
    graph, state = nnx.split(model)
    x = jax.ShapeDtypeStruct((task.batch, task.pixels, task.pixels, 3), dtype)

    def step(state, x, label):
        model = nnx.merge(graph, state)
        loss, grads = nnx.value_and_grad(lambda m: negative_log_likelihood(m(x), label))(model)
        params = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads))
        return nnx.state(model), loss

    return step, (state, x, jax.ShapeDtypeStruct((task.batch,), jnp.int32))
