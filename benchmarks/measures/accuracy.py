"""The cases in which batch norm goes wrong quietly, one row each, all libraries side by side."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.reporting.report import Table
from benchmarks.subjects import peers

C = 64


def fresh(features=C, mean=0.0):
    """(scale, bias), (mean, var) before any step."""
    ones, zeros = jnp.ones(features), jnp.zeros(features)
    return (ones, zeros), (zeros + mean, ones)


def normal(shape, mean, sd, dtype=jnp.float32):
    x = np.random.default_rng(0).normal(mean, sd, shape)
    return jnp.asarray(x, dtype)


def moments(x):
    """Float64 mean and var [C] of the rounded x."""
    x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    return x.mean(0), x.var(0)


def var_at(mean):
    """Relative error of var, the largest over channels; read off the state with momentum 0."""

    def case(batch_norm):
        x = normal((256, C), mean, 1)
        _, (_, var) = batch_norm(x, *fresh(), train=True, momentum=0.0)
        true = moments(x)[1]
        return float(np.abs(np.asarray(var) / true - 1).max())

    return case


def y_at_1e5(batch_norm):
    x = normal((256, C), 1e5, 1)
    y, _ = batch_norm(x, *fresh(), train=True)
    mean, var = moments(x)
    true = (np.asarray(x, np.float64) - mean) / np.sqrt(var + 1e-5)
    return float(np.abs(np.asarray(y, np.float64) - true).max())


def y_at_1e5_floor():
    """What rounding the true mean to float32 costs."""
    mean, var = moments(normal((256, C), 1e5, 1))
    return float((np.abs(mean.astype(np.float32) - mean) / np.sqrt(var + 1e-5)).max())


def sd_of_y(batch_norm):
    """The sd of y in the channel where it is furthest from 1."""
    x = normal((1024, C), 5, 0.1, jnp.bfloat16)
    y, _ = batch_norm(x, *fresh(), train=True)
    sd = moments(y)[1] ** 0.5
    return float(sd[np.argmax(abs(sd - 1))])


def uneven_shards(batch_norm):
    """The mean of 0, 0, 0, 0 on one shard and 6.6 on the other, the rest masked out."""
    x = jnp.zeros((2, 4, 1)).at[1].set(6.6)
    mask = jnp.ones((2, 4, 1), bool).at[1, 1:].set(False)

    def shard(x, mask):
        options = {"train": True, "momentum": 0.0, "mask": mask, "axis_name": "shards"}
        return batch_norm(x, *fresh(1), **options)

    _, (mean, _) = jax.vmap(shard, axis_name="shards")(x, mask)
    return float(mean[0, 0])


def state_after(x, mask=None, channels=C):
    """What a batch that says nothing of so many first channels leaves in their statistics."""

    def case(batch_norm):
        before = fresh(mean=0.5)
        _, after = batch_norm(x(), *before, train=True, mask=None if mask is None else mask())
        after, begun = ([v[:channels] for v in state] for state in (after, before[1]))
        if all(bool((a == b).all()) for a, b in zip(after, begun, strict=True)):
            return "unchanged"
        return "NaN" if any(bool(jnp.isnan(v).any()) for v in after) else "changed"

    return case


def eval_batch():
    return normal((1024, C), 100.3, 1, jnp.bfloat16)


def eval_true():
    """The y of float64, at the running statistics in float32."""
    x = np.asarray(eval_batch(), np.float64)
    return (x - float(np.float32(100.3))) / np.sqrt(1 + 1e-5)


def eval_error(batch_norm):
    y, _ = batch_norm(eval_batch(), *fresh(mean=100.3), train=False)
    return float(np.abs(np.asarray(y, np.float64) - eval_true()).max())


def eval_floor():
    """What rounding the true y to bfloat16 costs."""
    true = eval_true()
    return float(np.abs(np.asarray(jnp.asarray(true, jnp.bfloat16), np.float64) - true).max())


def constant_channel(batch_norm):
    x = jnp.full((32, 7, 7, C), 99.9)
    y, _ = batch_norm(x, *fresh(), train=True)
    return float(np.abs(np.asarray(y)).max())


def kept(batch_norm):
    """Bytes that wait for the backward pass, each array once, per element of a bfloat16 x."""
    x = normal((256, 8, 8, C), 0, 1, jnp.bfloat16)
    if batch_norm is peers.torch:
        return torch_kept(x) / x.size
    params, state = fresh()

    def train(x, params):
        return batch_norm(x, params, state, train=True)

    _, vjp, _ = jax.vjp(train, x, params, has_aux=True)
    arrays = {id(leaf): leaf.nbytes for leaf in jax.tree.leaves(vjp)}
    return sum(arrays.values()) / x.size


def torch_kept(x):
    import torch

    arrays = {}

    def pack(v):
        arrays[v.data_ptr()] = v.nbytes
        return v

    scale, bias, mean, var = (peers.to_torch(v) for v in (*fresh()[0], *fresh()[1]))
    scale.requires_grad_()
    x = peers.channels_first(peers.to_torch(x)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        torch.nn.functional.batch_norm(x, mean, var, scale, bias, True)
    return sum(arrays.values())


CASES = {
    "float32 N(1e3, 1), 256 rows: relative error of var": (var_at(1e3), 0),
    "float32 N(1e4, 1), 256 rows: relative error of var": (var_at(1e4), 0),
    "float32 N(1e5, 1), 256 rows: relative error of var": (var_at(1e5), 0),
    "float32 N(1e5, 1), 256 rows: largest error of y": (y_at_1e5, y_at_1e5_floor),
    "bfloat16 N(5, 0.1): sd of y": (sd_of_y, 1),
    "4 valid rows on one shard, 1 on the other: mean": (uneven_shards, 1.32),
    "mask all False: running statistics after": (
        state_after(lambda: normal((8, C), 0, 1), lambda: jnp.zeros((8, 1), bool)),
        "unchanged",
    ),
    "batch of 0 rows: running statistics after": (
        state_after(lambda: jnp.zeros((0, C))),
        "unchanged",
    ),
    "one NaN in the batch: running statistics after": (
        state_after(lambda: normal((8, C), 0, 1).at[0, 0].set(jnp.nan), channels=1),
        "unchanged",
    ),
    "eval, bfloat16, running mean 100.3: largest error of y": (eval_error, eval_floor),
    "channel constant at 99.9: largest |y - bias|": (constant_channel, 0),
    "bfloat16 x: bytes kept for backward per element": (kept, 2),
}


def measure(case, batch_norm):
    if batch_norm is None:
        return "not installed"
    try:
        # Peers mix Python scalars and dtypes more freely than strict promotion allows.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return case(batch_norm)
    except NotImplementedError as missing:
        return str(missing)
    except Exception as error:
        return type(error).__name__


def run(names=None) -> list[Table]:
    libraries = peers.installed()
    libraries = {name: libraries[name] for name in names or libraries}
    rows = [
        [
            name,
            *(measure(case, bn) for bn in libraries.values()),
            true() if callable(true) else true,
        ]
        for name, (case, true) in CASES.items()
    ]
    return [
        Table(
            "Accuracy, and what is kept for backward",
            ["case", *libraries, "true"],
            rows,
            [
                f"Errors against float64 statistics of the same rounded x, worst of {C} channels.",
                "'true' of the largest errors of y: cost of rounding the mean to float32 at 1e5, "
                "y to bfloat16 in eval.",
                "Shards by vmap. An error's name stands where a library raised it.",
            ],
            key="accuracy",
        )
    ]
