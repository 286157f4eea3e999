# Which networks there are, and what model_linen.py and model_nnx.py have in common.

import jax.numpy as jnp
from jax.nn.initializers import variance_scaling

MOMENTUM = 0.9  # running statistics are an average over the last ten batches or so
he_normal = variance_scaling(2.0, "fan_out", "normal")

RESNETS = {  # blocks in the stages of 32x32, 16x16, 8x8 and 4x4 pixels; 56x56 to 7x7 of 224
    "resnet18": {"blocks": (2, 2, 2, 2), "bottleneck": False},
    "resnet34": {"blocks": (3, 4, 6, 3), "bottleneck": False},
    "resnet50": {"blocks": (3, 4, 6, 3), "bottleneck": True},
}
NAMES = ["resnet9", *RESNETS]
STEMS = ("cifar", "imagenet")  # a 3x3 convolution; or a 7x7 one at stride 2, and a max pool
WIDTH = {"resnet9": 16} | dict.fromkeys(RESNETS, 64)  # channels after the first convolution


def build(module, name: str, block: str, stem: str = "cifar", **kwargs):
    """The network `name`, out of `module`: model_linen or model_nnx."""
    if name == "resnet9":
        return module.ResNet9(**kwargs)
    large = stem == "imagenet"
    return module.ResNet(**RESNETS[name], pre=block == "pre", large=large, **kwargs)


def block_convs(bottleneck: bool, f: int, stride: int):
    """(kernel, features, stride) of the convolutions of one block."""
    if bottleneck:
        return [(1, f, 1), (3, f, stride), (1, 4 * f, 1)]
    return [(3, f, stride), (3, f, 1)]


def halve(x):
    """The largest of each 2x2 pixels, [B, H, W, C] → [B, H/2, W/2, C]: on CPU beats max_pool."""
    b, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2]  # of an odd side the last pixel is left out
    return jnp.max(x.reshape(b, h // 2, 2, w // 2, 2, c), axis=(2, 4))


def finish(y, activation=None, residual=None):
    """Equals `activation(y + residual)`, for norms that do not do it themselves."""
    y = y if residual is None else y + residual
    return y if activation is None else activation(y)
