"""Eight replicas load shards that are sorted by class, and each normalizes by its own."""

from functools import partial

import flax.linen as nn
import jax
import numpy as np
from failure import Net, Result, batches, digits, evaluate, show, start, train

from jaxbn import health, watch

STEPS, SHARDS, ROWS = 200, 8, 32


def replicated(net, shards=None):
    """The apply of all replicas, x [shards, rows, ...]; with shards, what they have seen too."""

    def apply(variables, x, train, mutable):
        look = watch.linen(net.apply, on=shards is not None, shards=shards)
        replica = partial(look, variables, train=train, mutable=mutable)
        (logits, new), seen = jax.vmap(replica, axis_name="replicas")(x)
        return (logits, jax.tree.map(lambda v: v.mean(0), new)), seen

    return apply


def run(load, seed):
    (x, y), test = digits()
    net = Net(partial(nn.BatchNorm, momentum=0.9))
    x, y = (v.reshape(STEPS, SHARDS, ROWS, *v.shape[2:]) for v in load(x, y, seed))
    fresh = start(net, x[0, 0], seed=seed)
    apply = replicated(net)
    variables = train(lambda *args, **kwargs: apply(*args, **kwargs)[0], fresh, (x, y))
    seen = replicated(net, "replicas")(variables, x[0], True, ["batch_stats"])[1]
    records = watch.records(jax.tree.map(lambda v: v[0], seen), variables)
    return evaluate(net, variables, *test), health.shards(records)


def sorted_by_class(x, y, seed):
    """As from files of one class each, that are dealt to the replicas in their order."""
    x, y = batches(x, y, STEPS, SHARDS * ROWS, seed)
    order = np.argsort(y, axis=1, kind="stable")
    return np.take_along_axis(x, order[..., None], 1), np.take_along_axis(y, order, 1)


def main(seed=0):
    before, findings = run(sorted_by_class, seed)
    after, left = run(lambda x, y, seed: batches(x, y, STEPS, SHARDS * ROWS, seed), seed)
    call, cure = "health.shards(records)", "shuffle before the data is split"
    return Result("skewed shards", before, findings, call, cure, after, left)


if __name__ == "__main__":
    show(main)
