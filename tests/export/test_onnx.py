"""ONNX files have the operators and the layout that runtimes are fast with, for any signature."""

import functools
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest

from jaxbn import export

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(4, 8, 8, 4)).astype(np.float32)  # images
S = RANDOM.normal(size=(3, 12, 4)).astype(np.float32)  # sequences
V = RANDOM.normal(size=(2, 5, 4, 6, 4)).astype(np.float32)  # volumes


def operators(path):
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def with_weights(module, x, **options):
    variables = module.init(jax.random.key(0), x, **options)
    variables = jax.tree.map(lambda v: v + 0.01 * RANDOM.normal(size=v.shape), variables)
    variables = jax.tree.map(lambda v: v.astype(np.float32), variables)
    return lambda x: module.apply(variables, x, **options)


def conv(*args, **options):
    return functools.partial(with_weights, nn.Conv(*args, **options))


def transposed(*args, **options):
    return functools.partial(with_weights, nn.ConvTranspose(*args, **options))


def plain(f):
    return lambda x: f


def average(x, *args, **options):
    with jax.numpy_dtype_promotion("standard"):  # Flax divides by an integer
        return nn.avg_pool(x, *args, **options)


def pooled(x):
    return nn.max_pool(x, (2, 2), (2, 2))


CASES = {
    "max pool": (X, plain(lambda x: nn.max_pool(x, (3, 3), (2, 2), "SAME")), "MaxPool"),
    "max pool 1-D": (S, plain(lambda x: nn.max_pool(x, (3,), (2,))), "MaxPool"),
    "max pool 3-D": (V, plain(lambda x: nn.max_pool(x, (2, 2, 2), (2, 2, 2))), "MaxPool"),
    "average pool": (X, plain(lambda x: average(x, (2, 2), (2, 2))), "AveragePool"),
    "zeros counted": (X, plain(lambda x: average(x, (3, 3), (1, 1), "SAME")), "AveragePool"),
    "zeros not counted": (
        X,
        plain(lambda x: average(x, (3, 3), (2, 2), "SAME", count_include_pad=False)),
        "AveragePool",
    ),
    "sum pool": (X, plain(lambda x: nn.pool(x, 0.0, jax.lax.add, (2, 2), (1, 1), "SAME")), "Mul"),
    "mean": (X, plain(lambda x: pooled(x).mean((1, 2))), "GlobalAveragePool"),
    "mean with axes of size 1": (
        X,
        plain(lambda x: pooled(x) - pooled(x).mean((1, 2), keepdims=True)),
        "GlobalAveragePool",
    ),
    "mean of channels": (X, plain(lambda x: x.mean(-1)), "ReduceMean"),
    "maximum over the image": (X, plain(lambda x: x.max((1, 2))), "ReduceMax"),
    "pad": (X, plain(lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 1), (0, 0)))), "Pad"),
    "conv 1-D": (S, conv(6, (3,)), "Conv"),
    "causal conv": (S, conv(6, (3,), padding="CAUSAL", kernel_dilation=2), "Conv"),
    "conv 2-D strided": (X, conv(6, (3, 3), strides=2), "Conv"),
    "grouped conv": (X, conv(8, (3, 3), feature_group_count=2, use_bias=False), "Conv"),
    "depthwise conv": (X, conv(4, (3, 3), feature_group_count=4), "Conv"),
    "dilated conv": (X, conv(6, (3, 3), kernel_dilation=(2, 1)), "Conv"),
    "circular conv": (X, conv(6, (3, 3), padding="CIRCULAR"), "Conv"),
    "conv 3-D": (V, conv(6, (3, 3, 1), strides=(1, 2, 1)), "Conv"),
    "conv that cuts": (X, conv(6, (2, 2), padding=((-1, 0), (0, -2))), "Conv"),
    "transposed conv": (X, transposed(6, (3, 3), strides=(2, 2)), "ConvTranspose"),
    "transposed conv 1-D": (S, transposed(6, (4,), strides=(3,), padding="VALID"), "ConvTranspose"),
    "transposed conv widened": (
        X,
        transposed(6, (2, 2), strides=(2, 2), padding=((3, 2), (1, 4))),
        "ConvTranspose",
    ),
    "relu": (X, plain(nn.relu), "Relu"),
    "relu6": (X, plain(nn.relu6), "Clip"),
    "clip": (X, plain(lambda x: jnp.clip(x, -0.5, 0.25)), "Clip"),
    "hard swish": (X, plain(nn.hard_swish), "HardSwish"),
    "hard sigmoid": (X, plain(nn.hard_sigmoid), "HardSigmoid"),
    "sigmoid": (X, plain(nn.sigmoid), "Sigmoid"),
    "silu": (X, plain(nn.silu), "Sigmoid"),
    "gelu": (X, plain(nn.gelu), "Gelu"),
    "gelu exactly": (X, plain(functools.partial(nn.gelu, approximate=False)), "Gelu"),
    "softmax": (X, plain(nn.softmax), "Softmax"),
    "softmax of rows": (X, plain(functools.partial(nn.softmax, axis=1)), "Softmax"),
    "log softmax": (X, plain(nn.log_softmax), "LogSoftmax"),
    "leaky relu": (X, plain(nn.leaky_relu), "Where"),
    "dense": (S, functools.partial(with_weights, nn.Dense(5)), "MatMul"),
}


@pytest.mark.parametrize("name", CASES)
def test_layers_leave_as_one_operator(name, tmp_path):
    """The call itself compares the file with the function, at three batch sizes."""
    x, made, operator = CASES[name]
    path = tmp_path / "f.onnx"
    export.onnx(made(x), x, path)
    found = operators(path)
    assert found[operator] == 1
    assert found["Transpose"] <= 2  # into the runtimes' layout, and back
    assert not {"Shape", "Expand", "Gather", "Max"} & {*found}
