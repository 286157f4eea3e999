# One training step by `shard_map`. The step is that of one device, which holds some rows of the
# batch: `axis_name` pools the statistics over all devices, the two `pmean` the loss and the
# gradients. Take this road where you write the collectives yourself.

from functools import partial

import jax
import network
from jax.sharding import PartitionSpec as P


def step(params, state, x, y):
    def loss(params):
        value, new = network.loss(params, state, x, y, axis_name="data")
        return jax.lax.pmean(value, "data"), new

    (value, new), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return network.update(params, jax.lax.pmean(grads, "data")), new, value


def train(params, state, x, y):
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    over = partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(), P("data"), P("data")))
    x, y = jax.device_put((x, y), jax.NamedSharding(mesh, P("data")))
    return jax.jit(over(step, out_specs=P()))(params, state, x, y)


if __name__ == "__main__":
    network.main("shard_map.py", {"shard_map": train})
