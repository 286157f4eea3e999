"""Residual networks whose batch norm is any library's, their loss, training step and eval."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.subjects import peers


def finished(y, activation, residual):
    """Equals `activation(y + residual)`, each where it is given."""
    y = y if residual is None else y + residual
    return y if activation is None else activation(y)


class Norm(nn.Module):
    """A function of `benchmarks.subjects.peers` as a layer, or None for a network without norms."""

    batch_norm: Callable[..., Any] | None
    train: bool
    scale_init: Any = nn.initializers.ones

    @nn.compact
    def __call__(self, x, activation=None, residual=None):
        if self.batch_norm is None:
            return finished(x, activation, residual)
        c = x.shape[-1:]
        params = (
            self.param("scale", self.scale_init, c),
            self.param("bias", nn.initializers.zeros, c),
        )
        mean = self.variable("batch_stats", "mean", jnp.zeros, c)
        var = self.variable("batch_stats", "var", jnp.ones, c)
        if self.is_initializing():
            return x
        state = mean.value, var.value
        inside = {}
        if self.batch_norm is peers.fused:
            inside = {"activation": activation, "residual": residual}
        y, state = self.batch_norm(x, params, state, train=self.train, momentum=0.9, **inside)
        if self.train:
            mean.value, var.value = state
        return y if inside else finished(y, activation, residual)


class Block(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3, 1x1 with four times the channels; and a shortcut."""

    channels: int
    stride: int
    bottleneck: bool
    norm: Callable[..., nn.Module]
    dtype: Any

    @nn.compact
    def __call__(self, x):
        def conv(channels, size, stride=1):
            return nn.Conv(channels, (size, size), stride, use_bias=False, dtype=self.dtype)

        c = self.channels
        convs = [conv(c, 3, self.stride), conv(c, 3)]
        if self.bottleneck:
            convs = [conv(c, 1), conv(c, 3, self.stride), conv(4 * c, 1)]
        y = x
        for layer in convs[:-1]:
            y = self.norm()(layer(y), nn.relu)
        y = convs[-1](y)
        last = self.norm(scale_init=nn.initializers.zeros)
        if x.shape != y.shape:
            x = self.norm()(conv(y.shape[-1], 1, self.stride)(x))
        return last(y, nn.relu, x)


class ResNet(nn.Module):
    """He et al. 2016, the stride of a bottleneck on its 3x3; CIFAR's stem below 64 pixels."""

    batch_norm: Callable[..., Any] | None
    dtype: Any = jnp.float32
    stages: tuple[int, ...] = (2, 2, 2)
    width: int = 32
    bottleneck: bool = False

    @nn.compact
    def __call__(self, x, train=True):
        def norm(**options):
            return Norm(self.batch_norm, train, **options)

        size, stride = ((7, 7), 2) if x.shape[1] >= 64 else ((3, 3), 1)
        x = nn.Conv(self.width, size, stride, use_bias=False, dtype=self.dtype)(x)
        x = norm()(x, nn.relu)
        if stride == 2:
            x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for i, blocks in enumerate(self.stages):
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                x = Block(self.width * 2**i, stride, self.bottleneck, norm, self.dtype)(x)
        return nn.Dense(10, dtype=self.dtype)(x.mean((1, 2))).astype(jnp.float32)


class Task(NamedTuple):
    """A network and what goes in."""

    name: str
    stages: tuple[int, ...]
    bottleneck: bool
    width: int
    batch: int
    pixels: int

    def model(self, batch_norm, dtype) -> ResNet:
        return ResNet(batch_norm, dtype, self.stages, self.width, self.bottleneck)

    def shapes(self, model) -> tuple[Any, Any, Any, Any]:
        """Shapes and dtypes of params, batch_stats, x and label."""
        x = jax.ShapeDtypeStruct((self.batch, self.pixels, self.pixels, 3), model.dtype)
        variables = jax.eval_shape(model.init, jax.random.key(0), x)
        label = jax.ShapeDtypeStruct((self.batch,), jnp.int32)
        return variables["params"], variables.get("batch_stats", {}), x, label

    def arrays(self, model) -> tuple[Any, Any, jax.Array, jax.Array]:
        """The same, filled by NumPy: to compile Flax's own initializers takes minutes."""
        rng = np.random.default_rng(0)

        def fill(path, leaf):
            name = path[-1].key if path else ""
            if name in ("scale", "var"):
                return jnp.ones(leaf.shape, leaf.dtype)
            if name in ("bias", "mean") or leaf.dtype == jnp.int32:
                return jnp.zeros(leaf.shape, leaf.dtype)
            sd = np.prod(leaf.shape[:-1]) ** -0.5 if name == "kernel" else 1.0
            values = sd * rng.standard_normal(leaf.shape, np.float32)
            return jnp.asarray(values, leaf.dtype)

        # Of each part alone, for a path inside it.
        return tuple(jax.tree_util.tree_map_with_path(fill, part) for part in self.shapes(model))

    def __str__(self):
        return f"{self.name}, width {self.width}, {self.batch} x {self.pixels}²"


def forward(model, params, batch_stats, x, label):
    """(loss, the linear map from its cotangent to the gradients, new batch_stats)."""

    def loss(params):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updates = model.apply(variables, x, mutable=["batch_stats"])
        return negative_log_likelihood(logits, label), updates.get("batch_stats", {})

    return jax.vjp(loss, params, has_aux=True)


def negative_log_likelihood(logits, label):
    """Its mean over the batch."""
    log_p = jax.nn.log_softmax(logits)
    return -(log_p * jax.nn.one_hot(label, logits.shape[-1])).sum(-1).mean()


def step(model, params, batch_stats, x, label):
    """One step of gradient descent: (params, batch_stats, loss)."""
    loss, vjp, batch_stats = forward(model, params, batch_stats, x, label)
    (grads,) = vjp(jnp.ones_like(loss))
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), batch_stats, loss


def infer(model, params, batch_stats, x):
    """Logits by the running statistics."""
    return model.apply({"params": params, "batch_stats": batch_stats}, x, train=False)
