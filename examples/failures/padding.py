"""Sequences sorted by length and padded to 32, and no mask: the zeros are in the statistics."""

import flax.linen as nn
import numpy as np
from failure import Result, evaluate, show, start, train

from jaxbn import health

CELLS, CLASSES, ROWS = 32, 8, 32


class Sequences(nn.Module):
    masked: bool

    @nn.compact
    def __call__(self, x, valid, train=False):
        x = nn.Dense(16)(x)
        x = nn.BatchNorm(not train, momentum=0.97, name="norm")(
            x, mask=valid if self.masked else None
        )
        return nn.Dense(CLASSES)((nn.relu(x) * valid).sum(1) / valid.sum(1))


def sequences(steps, seed):
    """Arrays [steps, rows, ...]: those of one batch are of one length."""
    centers = np.random.default_rng(0).normal(5, 1, (CLASSES, 8))  # the same for all seeds
    rng = np.random.default_rng(seed)
    y = rng.integers(0, CLASSES, (steps, ROWS))
    length = np.resize([2, 4, 8, 16, 32], (steps, 1, 1, 1))
    valid = np.broadcast_to(np.arange(CELLS)[:, None] < length, (steps, ROWS, CELLS, 1))
    x = centers[y][:, :, None] + rng.normal(0, 1, (steps, ROWS, CELLS, 8))
    return (x * valid).astype(np.float32), valid, y.astype(np.int32)


def run(masked, seed):
    data = sequences(320, seed)
    test = [v[300:].reshape(-1, *v.shape[2:]) for v in data]
    net = Sequences(masked)
    variables = start(net, *(v[0] for v in data[:2]), seed=seed)
    variables = train(net.apply, variables, [v[:300] for v in data])
    gap = health.gap(Sequences(True).apply, variables, *test[:2])
    return evaluate(net, variables, *test), list(gap.findings)


def main(seed=0):
    before, findings = run(False, seed)
    after, left = run(True, seed)
    call, cure = "health.gap(apply, variables, x, mask)", "mask= in training"
    return Result("padding not masked", before, findings, call, cure, after, left)


if __name__ == "__main__":
    show(main)
