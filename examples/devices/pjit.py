# One training step by what was `pjit`: `jit` that is told where each argument and result lies. So
# arrays of NumPy are placed by the call. The mesh has two axes here: rows of the batch lie along
# "data", the features of the hidden layer and of its norm along "model".

import jax
import network
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


def step(params, state, x, y):
    (value, state), grads = jax.value_and_grad(network.loss, has_aux=True)(params, state, x, y)
    return network.update(params, grads), state, value


def train(params, state, x, y):
    across = 2 if jax.device_count() % 2 == 0 else 1
    sizes, axes = (jax.device_count() // across, across), ("data", "model")
    mesh = jax.make_mesh(sizes, axes, axis_types=(AxisType.Auto,) * 2)

    def by(*axes):
        return NamedSharding(mesh, P(*axes))

    placed = {
        "w1": by(None, "model"),  # [16, 32]
        "norm": jax.tree.map(lambda _: by("model"), params["norm"]),  # [32]
        "w2": by("model"),  # [32, 10]
    }
    learned = state._replace(mean=by("model"), var=by("model"), count=by())
    return jax.jit(
        step,
        in_shardings=(placed, learned, by("data"), by("data")),
        out_shardings=(placed, learned, by()),
    )(params, state, x, y)


if __name__ == "__main__":
    network.main("pjit.py", {"pjit": train})
