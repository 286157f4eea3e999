# Small batches: one network with batch norm, and with Flax's group norm put in its place.
#
#   python examples/swap/swap.py                       on handwritten digits
#   python examples/swap/swap.py --data-dir DIR        on CIFAR-10
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "cifar10"))

import jax
import numpy as np
import optax
from augment import normalize
from command import Parser, between, one_line, progress
from data import load
from model_linen import ResNet9
from rich import print
from rich.table import Table

import jaxbn


def trained(data, images, apply, variables, batch):
    """The variables after so many images; the step is written for batch norm, and serves both."""
    tx = optax.adam(1e-3 * (batch / 32) ** 0.5)

    @jax.jit
    def step(variables, opt_state, x, y):
        def loss(params):
            its = {**variables, "params": params}
            logits, new = apply(its, x, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new

        grads, new = jax.grad(loss, has_aux=True)(variables["params"])
        updates, opt_state = tx.update(grads, opt_state)
        return {"params": optax.apply_updates(variables["params"], updates), **new}, opt_state

    rng, opt_state = np.random.default_rng(0), tx.init(variables["params"])
    for _ in progress(range(images // batch), f"batches of {batch}"):
        rows = rng.choice(len(data.train_y), batch, replace=False)
        x = normalize(data.train_x[rows], data.mean, data.std)
        variables, opt_state = step(variables, opt_state, x, data.train_y[rows])
    return variables


def main(data_dir=None, width=16, images=3200, batches=(2, 8, 32)):
    data = load("cifar10" if data_dir else "digits", data_dir)
    test = np.arange(min(2000, len(data.test_y)))
    test_x, test_y = normalize(data.test_x[test], data.mean, data.std), data.test_y[test]
    net = ResNet9(width=width)
    before = net.init(jax.random.key(0), test_x[:1], train=False)
    swapped = jaxbn.swap(net.apply, before)  # scales and biases stay, under their names

    table = Table("rows in a batch", "BatchNorm", "GroupNorm", title=data.name)
    for batch in batches:
        scores = []
        for apply, variables in ((net.apply, before), (swapped.model, swapped.variables)):
            after = trained(data, images, apply, variables, batch)
            logits = jax.jit(partial(apply, train=False))(after, test_x)
            scores.append(f"{np.mean(logits.argmax(-1) == test_y):.2%}")
        table.add_row(str(batch), *scores)
    print(table)
    for path, row in swapped.report.items():
        print(f"{path}: {row.norm} of {row.groups} groups, without {', '.join(row.dropped)}")
    return table


if __name__ == "__main__":
    parser = Parser(
        prog="swap.py",
        description="Batch norm, and group norm in its place, on small batches.",
        examples=[
            "python examples/swap/swap.py",
            "python examples/swap/swap.py --images 12800",
            "python examples/swap/swap.py --data-dir DIR",
        ],
    )
    parser.add_argument("--data-dir", type=Path, help="CIFAR-10's binary files (else: digits)")
    parser.add_argument("--images", type=between(int, 32), default=3200, help="to train on (3200)")
    with one_line(parser):
        main(**vars(parser.parse_args()))
