# One training step by `pmap`. The step is that of `shard_map`, and each array has a leading axis
# of devices: the batch is cut along it, params and state are copied along it. Take this road where
# old code takes it already.

import jax
import jax.numpy as jnp
import network


def step(params, state, x, y):
    def loss(params):
        value, new = network.loss(params, state, x, y, axis_name="data")
        return jax.lax.pmean(value, "data"), new

    (value, new), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return network.update(params, jax.lax.pmean(grads, "data")), new, value


def train(params, state, x, y):
    n = jax.device_count()
    params, state = jax.tree.map(lambda v: jnp.stack([v] * n), (params, state))
    x, y = x.reshape(n, -1, *x.shape[1:]), y.reshape(n, -1)  # [devices, rows of each, ...]
    result = jax.pmap(step, axis_name="data")(params, state, x, y)
    return jax.tree.map(lambda v: v[0], result)  # devices hold copies: one is kept


if __name__ == "__main__":
    network.main("pmap.py", {"pmap": train})
