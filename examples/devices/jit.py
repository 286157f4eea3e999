# One training step by `jit` over a mesh. The step is that of one device, with no word about the
# others: rows of the batch are placed on all devices, and the compiler adds what devices must tell
# one another. Take this road unless something forbids it.

import jax
import network
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


@jax.jit
def step(params, state, x, y):
    (value, state), grads = jax.value_and_grad(network.loss, has_aux=True)(params, state, x, y)
    return network.update(params, grads), state, value


def train(params, state, x, y):
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    params, state = jax.device_put((params, state), NamedSharding(mesh, P()))
    x, y = jax.device_put((x, y), NamedSharding(mesh, P("data")))
    return step(params, state, x, y)


if __name__ == "__main__":
    network.main("jit.py", {"jit": train})
