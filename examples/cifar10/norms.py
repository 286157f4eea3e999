# The norms of `--norm`, as the classes that the networks take: with the arguments of Flax's batch
# norm. model_linen.py and model_nnx.py call them; `linen` and `nnx` here choose one.

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx as fnnx
from jax.nn.initializers import ones, zeros

import jaxbn

BATCH = ("batch", "sync", "ghost", "renorm")
OTHERS = ("group", "layer", "none")  # without statistics of a batch
NAMES = (*BATCH, *OTHERS)
LIMITS = (3.0, 5.0)  # of batch renormalization: r_max, d_max


def batch_options(args) -> dict:
    """Of jaxbn's BatchNorm. Under jit its statistics are those of the batch on all devices."""
    if args.norm == "renorm":
        return {"renorm": LIMITS}
    if args.norm == "ghost":
        return {"virtual_batch_size": args.ghost_rows}
    if args.norm == "batch" and (args.devices or 1) > 1:
        return {"virtual_batch_size": args.batch // args.devices}
    return {}


def groups(features: int) -> int:
    """The largest number up to 32 that divides the features into groups of 8 or more."""
    fits = [n for n in range(1, 33) if features % n == 0 and features // n >= 8]
    return max(fits, default=1)


def affine(x, scale, bias, dtype):
    """Equals `x * scale + bias`, per channel."""
    scale, bias = (v.astype(dtype).reshape((1,) * (x.ndim - 1) + v.shape) for v in (scale, bias))
    return x.astype(dtype) * scale + bias


# --- linen ------------------------------------------------------------------------------------


def linen(args):
    others = {"group": linen_group, "layer": linen_layer, "none": Affine}
    if args.norm in others:
        return others[args.norm]
    options = batch_options(args)
    return partial(jaxbn.linen.BatchNorm, **options) if options else jaxbn.linen.BatchNorm


def linen_group(*, use_running_average, momentum, **options):
    return lambda x: nn.GroupNorm(num_groups=groups(x.shape[-1]), **options)(x)


def linen_layer(*, use_running_average, momentum, **options):
    return nn.LayerNorm(**options)


class Affine(nn.Module):
    """A norm that does not normalize."""

    use_running_average: bool
    momentum: float
    dtype: jnp.dtype
    scale_init: nn.initializers.Initializer = ones

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", self.scale_init, x.shape[-1:], jnp.float32)
        bias = self.param("bias", zeros, x.shape[-1:], jnp.float32)
        return affine(x, scale, bias, self.dtype)


# --- nnx --------------------------------------------------------------------------------------


def nnx(args):
    if args.norm in OTHERS:
        return partial(OneSample, args.norm)
    options = batch_options(args)
    return partial(jaxbn.nnx.BatchNorm, **options) if options else jaxbn.nnx.BatchNorm


class OneSample(fnnx.Module):
    """A norm without statistics of a batch, which does the same in both modes."""

    def __init__(self, kind, features, *, momentum, dtype, scale_init, rngs):
        options = {"dtype": dtype, "scale_init": scale_init, "rngs": rngs}
        if kind == "group":
            self.norm = fnnx.GroupNorm(features, num_groups=groups(features), **options)
        elif kind == "layer":
            self.norm = fnnx.LayerNorm(features, **options)
        else:
            self.norm = NnxAffine(features, **options)

    def __call__(self, x, use_running_average):
        return self.norm(x)


class NnxAffine(fnnx.Module):
    """A norm that does not normalize."""

    def __init__(self, features, *, dtype, scale_init, rngs):
        self.scale = fnnx.Param(scale_init(rngs.params(), (features,), jnp.float32))
        self.bias = fnnx.Param(jnp.zeros(features, jnp.float32))
        self.dtype = dtype

    def __call__(self, x):
        return affine(x, self.scale[...], self.bias[...], self.dtype)
