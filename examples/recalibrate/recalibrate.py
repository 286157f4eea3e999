# Statistics that fit the data and the weights: accuracy before and after jaxbn.recalibrate.
#
#   python examples/recalibrate/recalibrate.py                      on handwritten digits
#   python examples/recalibrate/recalibrate.py --data-dir DIR --run runs/NAME     on CIFAR-10, with
#                                                     the network that examples/cifar10 trained
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "cifar10"))

import jax
import numpy as np
import optax
from augment import normalize
from checkpoint import last_state
from command import Parser, one_line, progress
from data import load
from model_linen import ResNet9
from optimizer import sgd, smooth_cross_entropy
from rich import print
from rich.table import Table
from scipy.ndimage import gaussian_filter
from steps import Linen

import jaxbn

RNG = np.random.default_rng(0)
SHIFTS = {  # of images [N, 32, 32, 3], float32 of 0 to 255: what a camera may do to them
    "none": lambda x: x,
    "blur": lambda x: gaussian_filter(x, (0, 1.2, 1.2, 0)),
    "contrast": lambda x: 0.3 * x + 0.7 * x.mean((1, 2, 3), keepdims=True),
    "noise": lambda x: np.clip(x + RNG.normal(0, 30, x.shape), 0, 255).astype(np.float32),
}


def main(data_dir=None, run=None, width=16, steps=300, batch=128):
    data = load("cifar10" if data_dir else "digits", data_dir)
    scale = partial(normalize, mean=data.mean, std=data.std)
    net = ResNet9(width=width)
    training = Linen(net, sgd(lambda _: 0.05, 5e-4), partial(smooth_cross_entropy, smoothing=0.1))
    init = partial(jax.jit(training.init), jax.random.key(0))
    state = last_state(run, init) if run else init()

    # Stochastic weight averaging (Izmailov et al. 2018): the mean of every 10th step's weights.
    step, average = jax.jit(training.train), state.params
    for i in progress(range(steps), "training"):
        rows = RNG.choice(len(data.train_y), batch, replace=False)
        state, *_ = step(state, scale(data.train_x[rows]), data.train_y[rows])
        if i % 10 == 9:
            average = optax.incremental_update(state.params, average, 10 / (i + 1))

    apply = partial(net.apply, train=False)  # one function: compiled once for all that follows
    evaluate = jax.jit(apply)

    def batches(x):  # [N, 32, 32, 3] → [256, 32, 32, 3] at a time, the last one smaller
        return (scale(x[i : i + 256]) for i in range(0, len(x), 256))

    def accuracy(variables, x, y):
        logits = np.concatenate([evaluate(variables, images) for images in batches(x)])
        return f"{np.mean(logits.argmax(-1) == y):.2%}"

    x, y = data.test_x[np.arange(len(data.test_y))].astype(np.float32), data.test_y
    some = data.train_x[RNG.choice(len(data.train_y), min(5000, len(data.train_y)), replace=False)]
    last = {"params": state.params, "batch_stats": state.batch_stats}
    averaged = {"params": average, "batch_stats": state.batch_stats}
    again = jaxbn.recalibrate(apply, averaged, batches(some))

    table = Table("weights", "test images", "before", "recalibrated", title=data.name)
    table.add_row("of the last step", "all", accuracy(last, x, y), "")
    table.add_row("averaged", "all", accuracy(averaged, x, y), accuracy(again, x, y))
    # Adaptive BN (Li et al. 2016): half of the images, without their labels, give statistics of
    # their own, and the other half are classified by them.
    half = len(y) // 2
    for name, shift in progress(SHIFTS.items(), "recalibrating"):
        shifted = shift(x)
        adapted = jaxbn.recalibrate(apply, again, batches(shifted[:half]))
        scores = [accuracy(v, shifted[half:], y[half:]) for v in (again, adapted)]
        table.add_row("averaged, recalibrated", f"second half, {name}", *scores)
    print(table)
    return table


if __name__ == "__main__":
    parser = Parser(
        prog="recalibrate.py",
        description="Accuracy before and after jaxbn.recalibrate.",
        examples=[
            "python examples/recalibrate/recalibrate.py",
            "python examples/recalibrate/recalibrate.py --data-dir DIR",
            "python examples/recalibrate/recalibrate.py --data-dir DIR --run runs/mine",
        ],
    )
    parser.add_argument("--data-dir", type=Path, help="CIFAR-10's binary files (else: digits)")
    parser.add_argument("--run", type=Path, help="a run of examples/cifar10 to start from")
    with one_line(parser):
        main(**vars(parser.parse_args()))
