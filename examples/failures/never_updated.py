"""The step drops the new batch_stats: training goes well, and eval normalizes by 0 and 1."""

from failure import Net, Result, batches, digits, evaluate, show, start, train

import jaxbn
from jaxbn import health


def main(seed=0):
    (x, y), test = digits()
    net = Net()
    sick = train(net.apply, start(net, x[:2], seed=seed), batches(x, y, 100, 64, seed), keep=False)
    cured = jaxbn.recalibrate(net.apply, sick, [x])
    return Result(
        "statistics never updated",
        evaluate(net, sick, *test),
        health.check(sick),
        "health.check(variables)",
        "jaxbn.recalibrate; or keep what apply returns",
        evaluate(net, cured, *test),
        health.check(cured),
    )


if __name__ == "__main__":
    show(main)
