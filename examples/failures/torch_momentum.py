"""momentum=0.1 out of a PyTorch script: here it weighs the old, so 0.9 is the last batch's."""

from functools import partial

import flax.linen as nn
from failure import Net, Result, batches, digits, evaluate, moments, show, start, train

import jaxbn
from jaxbn import convert, health


def run(norm, seed):
    (x, y), test = digits()
    net = Net(norm)
    variables = train(net.apply, start(net, x[:2], seed=seed), batches(x, y, 400, 4, seed))
    findings = health.check(variables, moments(net, variables, x))
    return evaluate(net, variables, *test), findings


def main(seed=0):
    before, findings = run(partial(nn.BatchNorm, momentum=0.1), seed)
    arguments = convert.norm_arguments(momentum=0.1)  # momentum 0.9, epsilon 1e-5, unbiased
    after, left = run(partial(jaxbn.linen.BatchNorm, **arguments), seed)
    call, cure = "health.check(variables, moments)", "norm_arguments(momentum=0.1)"
    return Result("momentum as PyTorch means it", before, findings, call, cure, after, left)


if __name__ == "__main__":
    show(main)
