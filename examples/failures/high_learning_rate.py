"""A rate that is high to the last step: the weights run ahead of their statistics."""

from failure import Net, Result, batches, digits, evaluate, moments, show, start, train

import jaxbn
from jaxbn import health


def main():
    (x, y), test = digits()
    net = Net(depth=2)
    # Without decay the kernels grow, and a large step turns a large kernel by little.
    sick = train(net.apply, start(net, x[:2]), batches(x, y, 400, 64), rate=2.0, decay=0.02)
    cured = jaxbn.recalibrate(net.apply, sick, [x])
    return Result(
        "high learning rate to the end",
        evaluate(net, sick, *test),
        health.check(sick, moments(net, sick, x)),
        "health.check(variables, moments)",
        "jaxbn.recalibrate",
        evaluate(net, cured, *test),
        health.check(cured, moments(net, cured, x)),
    )


if __name__ == "__main__":
    show(main())
