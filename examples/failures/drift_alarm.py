"""A new client sends pixels from 0 to 255 to a model that was trained on pixels from 0 to 16."""

import jax
import numpy as np
from failure import Net, Result, batches, digits, evaluate, show, start, train

from jaxbn import health

WINDOW = 128


def main(seed=0):
    (x, y), (test_x, test_y) = digits()
    net = Net()
    variables = train(net.apply, start(net, x[:2], seed=seed), batches(x, y, 400, 64, seed))
    watched = jax.jit(health.incoming(net.apply))
    reference = health.drift(variables, [watched(variables, x)[1]])

    def verdict(images):
        """Of the last window of a stream; merged as the requests come in."""
        total = {}
        for request in np.split(images[:WINDOW], 4):
            total = health.merge(total, health.seen(variables, watched(variables, request)[1]))
        return health.decide(total, reference=reference)

    served = np.round(test_x * 255 / 16)
    mended = served * 16 / 255
    before, after = verdict(served), verdict(mended)
    return Result(
        "drift alarm",
        evaluate(net, variables, served, test_y),
        list(before.findings),
        "health.decide(total, reference=reference)",
        "the client prepares images as training did",
        evaluate(net, variables, mended, test_y),
        list(after.findings),
    )


if __name__ == "__main__":
    show(main)
