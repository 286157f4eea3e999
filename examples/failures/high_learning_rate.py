"""A rate that is high to the last step: the weights run ahead of their statistics."""

import numpy as np
from failure import Net, Result, batches, digits, evaluate, moments, show, start, train

import jaxbn
from jaxbn import health

LOOKS = [320, 340, 360, 380, 400]  # steps; one look alone may be a lucky one


def main(seed=0):
    (x, y), test = digits()
    net = Net(depth=2)
    x_of, y_of = batches(x, y, LOOKS[-1], 64, seed)
    sick, before, after = start(net, x[:2], seed=seed), [], []
    for begin, end in zip([0, *LOOKS], LOOKS, strict=False):
        data = x_of[begin:end], y_of[begin:end]
        # Without decay the kernels grow, and a large step turns a large kernel by little.
        sick = train(net.apply, sick, data, rate=0.5, decay=0.1)
        cured = jaxbn.recalibrate(net.apply, sick, [x])
        before.append(evaluate(net, sick, *test))
        after.append(evaluate(net, cured, *test))
    return Result(
        "high learning rate to the end",
        float(np.mean(before)),
        health.check(sick, moments(net, sick, x)),
        "health.check(variables, moments)",
        "jaxbn.recalibrate",
        float(np.mean(after)),
        health.check(cured, moments(net, cured, x)),
    )


if __name__ == "__main__":
    show(main)
