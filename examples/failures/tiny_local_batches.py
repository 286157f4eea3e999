"""Eight replicas with two images each: what two values call their mean and sd is noise."""

from functools import partial

import flax.linen as nn
import jax
from failure import Net, Result, batches, digits, evaluate, show, start, train

from jaxbn import calls, health

REPLICAS, ROWS = 8, 2


def replicated(net):
    """The apply of all replicas, x [replicas, rows, ...]: statistics are averaged over them."""

    def apply(variables, x, train, mutable):
        replica = partial(calls.hooked_apply(net.apply), variables, train=train, mutable=mutable)
        (logits, new), seen = jax.vmap(replica, axis_name="replicas")(x)
        return (logits, jax.tree.map(lambda v: v.mean(0), new)), seen

    return apply


def run(norm, seed):
    (x, y), test = digits()
    net = Net(norm)
    apply = replicated(net)
    x, y = (v.reshape(300, REPLICAS, ROWS, *v.shape[2:]) for v in batches(x, y, 300, 16, seed))
    fresh = start(Net(), x[0, 0], seed=seed)
    variables = train(lambda *args, **kwargs: apply(*args, **kwargs)[0], fresh, (x, y))
    of_replicas = apply(variables, x[0], True, ["batch_stats"])[1]
    seen = jax.tree.map(lambda v: v[0], of_replicas)
    return evaluate(net, variables, *test), health.check(variables, seen)


def main(seed=0):
    before, findings = run(nn.BatchNorm, seed)
    after, left = run(partial(nn.BatchNorm, axis_name="replicas"), seed)
    call, cure = "health.check(variables, moments)", 'BatchNorm(axis_name="replicas")'
    return Result("two images a device", before, findings, call, cure, after, left)


if __name__ == "__main__":
    show(main)
