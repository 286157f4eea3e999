"""What a training step of a small ResNet keeps for backward, and the memory it compiles to."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

import jaxbn
from benchmarks import network
from benchmarks.report import Table

NORMS = {"Flax linen": nn.BatchNorm, "jaxbn": jaxbn.linen.BatchNorm}


def measure(norm, dtype, batch, stages):
    """(bytes kept for backward, bytes of temporaries) of one step; nothing is run."""
    norm = functools.partial(norm, use_running_average=False, dtype=dtype)
    model = network.ResNet(norm, dtype, stages)
    x = jax.ShapeDtypeStruct((batch, 32, 32, 3), dtype)
    label = jax.ShapeDtypeStruct((batch,), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)

    def forward(params, batch_stats, x, label):
        def loss(params):
            return network.loss(model, params, batch_stats, x, label)

        return jax.vjp(loss, params, has_aux=True)

    def step(params, batch_stats, x, label):
        loss, vjp, batch_stats = forward(params, batch_stats, x, label)
        (grads,) = vjp(jnp.ones_like(loss))
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        return params, batch_stats, loss

    arguments = (variables["params"], variables["batch_stats"], x, label)
    residuals = jax.tree.leaves(jax.eval_shape(forward, *arguments)[1])
    compiled = jax.jit(step).lower(*arguments).compile()
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in residuals)
    return kept, compiled.memory_analysis().temp_size_in_bytes


def run(batch=64, stages=(2, 2, 2)) -> list[Table]:
    rows = []
    for dtype in (jnp.float32, jnp.bfloat16):
        with jax.numpy_dtype_promotion("standard"):  # Flax mixes dtypes
            measured = {name: measure(norm, dtype, batch, stages) for name, norm in NORMS.items()}
        for name, (kept, temp) in measured.items():
            kept_flax, temp_flax = measured["Flax linen"]
            rows.append(
                [
                    f"{jnp.dtype(dtype)}, {name}",
                    *(kept / 1e6, kept / kept_flax, temp / 1e6, temp / temp_flax),
                ]
            )
    return [
        Table(
            f"Memory of a ResNet training step, batch {batch}",
            ["norm", "kept for backward, MB", "of Flax's", "compiled temporaries, MB", "of Flax's"],
            rows,
            [
                f"Stages {stages} of width 32 on 32x32 images. Kept: all that forward hands to "
                "backward, weights and convolutions included.",
                "Temporaries: temp_size_in_bytes of the compiled step.",
            ],
        )
    ]
