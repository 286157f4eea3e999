"""Norms in eval mode from the first step, by mean 0 and var 1: a network without norm."""

from failure import Net, Result, batches, digits, evaluate, show, start, train

import jaxbn
from jaxbn import health


def main(seed=0):
    (x, y), (test_x, test_y) = digits()
    x, test = x / 16, (test_x / 16, test_y)
    net, data = Net(depth=3), batches(x, y, 100, 64, seed)
    fresh = start(net, x[:2], seed=seed)
    sick = train(net.apply, fresh, data, rate=0.03, mode=False)
    cured = train(net.apply, jaxbn.recalibrate(net.apply, fresh, [x]), data, rate=0.03, mode=False)
    return Result(
        "frozen at initialization",
        evaluate(net, sick, *test),
        health.check(sick),
        "health.check(variables)",
        "jaxbn.recalibrate, or a checkpoint, before training",
        evaluate(net, cured, *test),
        health.check(cured),
    )


def refused():
    """What `jaxbn.freeze` says to the same."""
    net = Net()
    try:
        jaxbn.freeze(net.apply, start(net, digits()[0][0][:2]))
    except ValueError as error:
        return str(error)
    return None


if __name__ == "__main__":
    show(main, refused)
