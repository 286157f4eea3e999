"""Eight ranks with statistics of their own: which accuracy is it, if rank 0 saves its copy?"""

from functools import partial

import flax.linen as nn
import jax
import numpy as np
from failure import Net, Result, batches, digits, evaluate, show, start, train
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxbn import health

RANKS, ROWS = 8, 2


def ranks(net):
    """The apply of all ranks: x [ranks, rows, ...] and statistics [ranks, C], parameters of all."""

    def apply(variables, x, train, mutable):
        rank = partial(net.apply, train=train, mutable=mutable)
        axes = ({"params": None, "batch_stats": 0}, 0)
        return jax.vmap(rank, axes, axis_name="ranks")(variables, x)

    return apply


def run(norm, seed):
    (x, y), test = digits()
    net = Net(norm)
    x, y = (
        v.reshape(200, RANKS, ROWS, *v.shape[2:]) for v in batches(x, y, 200, RANKS * ROWS, seed)
    )
    fresh = start(Net(), x[0, 0], seed=seed)
    of_ranks = jax.tree.map(lambda v: np.stack([v] * RANKS), fresh["batch_stats"])
    variables = train(ranks(net), {**fresh, "batch_stats": of_ranks}, (x, y))
    of_ranks = variables["batch_stats"]
    first = {**variables, "batch_stats": jax.tree.map(lambda v: v[0], of_ranks)}
    mesh = Mesh(jax.devices("cpu")[:RANKS], "ranks")  # a row a device, as pmap returns it
    return evaluate(net, first, *test), health.check(
        {**variables, "batch_stats": jax.device_put(of_ranks, NamedSharding(mesh, P("ranks")))}
    )


def main(seed=0):
    norm = partial(nn.BatchNorm, momentum=0.5)
    before, findings = run(norm, seed)
    after, left = run(partial(norm, axis_name="ranks"), seed)
    call, cure = "health.check(variables)", 'BatchNorm(axis_name="ranks")'
    return Result("ranks that differ", before, findings, call, cure, after, left)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", RANKS)
    show(main)
