"""Served images are under a grey veil, which those of the training were not."""

from failure import Net, Result, batches, digits, evaluate, show, start, train

import jaxbn
from jaxbn import health


def main(seed=0):
    (x, y), (test_x, test_y) = digits()
    net = Net()
    variables = train(net.apply, start(net, x[:2], seed=seed), batches(x, y, 400, 64, seed))
    served = 12 + 0.2 * test_x
    cured = jaxbn.recalibrate(net.apply, variables, [served])
    watched = health.incoming(net.apply)
    before, after = (health.drift(v, watched(v, served)[1]) for v in (variables, cured))
    return Result(
        "domain shift",
        evaluate(net, variables, served, test_y),
        list(before.findings),
        "health.drift(variables, rows)",
        "jaxbn.recalibrate on served images, without labels",
        evaluate(net, cured, served, test_y),
        list(after.findings),
    )


if __name__ == "__main__":
    show(main)
