# Small batches, and batches of few classes: one network with batch norm, and with batch
# renormalization, whose limits open while it trains.
#
#   python examples/renorm/renorm.py                       on handwritten digits
#   python examples/renorm/renorm.py --data-dir DIR        on CIFAR-10
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "cifar10"))

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from augment import normalize
from command import Parser, between, one_line, progress
from data import load
from rich import print
from rich.table import Table

import jaxbn


class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, train, renorm=None):  # [B, 32, 32, 3] → [B, 10]
        for i, c in enumerate((self.width, 2 * self.width, 4 * self.width)):
            x = nn.Conv(c, (3, 3), 2 if i else 1, use_bias=False)(x)
            norm = jaxbn.linen.BatchNorm(use_running_average=not train, activation=nn.relu)
            x = norm(x, renorm=renorm)
        return nn.Dense(10)(x.mean((1, 2)))


def limits(done):
    """(r_max, d_max) after this share of the steps: plain batch norm first, open from a half on."""
    opened = jnp.clip((done - 0.1) / 0.4, 0, 1)
    return 1 + 2 * opened, 5 * opened


@partial(jax.jit, static_argnames=("net", "renorm", "rate", "scaled"))
def trained(net, variables, x, y, rows, renorm, rate, scaled):
    """The variables after a step for each of rows [steps, batch], by Adam at this rate."""
    tx, steps = optax.adam(rate), len(rows)

    def step(carry, rows):
        variables, opt_state, i = carry

        def loss(params):
            its = {**variables, "params": params}
            at = limits(i / steps) if renorm else None
            logits, new = net.apply(
                its, scaled(x[rows]), train=True, renorm=at, mutable=["batch_stats"]
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean(), new

        grads, new = jax.grad(loss, has_aux=True)(variables["params"])
        updates, opt_state = tx.update(grads, opt_state)
        params = optax.apply_updates(variables["params"], updates)
        return ({"params": params, **new}, opt_state, i + 1), None

    start = variables, tx.init(variables["params"]), jnp.zeros(())
    return jax.lax.scan(step, start, rows)[0][0]


def drawn(rng, y, batch, classes, steps):
    """Rows of the training set [steps, batch]; each batch is of so many classes, or of any."""
    if classes is None:
        return rng.integers(len(y), size=(steps, batch))
    of_class = [np.flatnonzero(y == c) for c in range(10)]
    chosen = [rng.choice(10, classes, replace=False) for _ in range(steps)]
    each = batch // classes
    return np.stack([np.concatenate([rng.choice(of_class[c], each) for c in cs]) for cs in chosen])


def main(
    data_dir=None,
    width=8,
    images=12_800,
    batches=((4, None), (16, 2), (16, None)),
    seeds=3,
):
    data = load("cifar10" if data_dir else "digits", data_dir)
    every = np.arange(min(10_000, len(data.train_y)))
    test = np.arange(min(2000, len(data.test_y)))
    train_x, train_y = jnp.asarray(data.train_x[every]), jnp.asarray(data.train_y[every])
    test_x, test_y = normalize(data.test_x[test], data.mean, data.std), data.test_y[test]
    scaled = partial(normalize, mean=data.mean, std=data.std)
    net = Net(width)
    evaluate = jax.jit(partial(net.apply, train=False))
    table = Table("a batch of", "BatchNorm", "with renorm", title=data.name)
    for batch, classes in batches:
        cells = []
        for renorm in (False, True):
            scores = []
            for seed in progress(range(seeds), f"batches of {batch}"):
                rows = drawn(
                    np.random.default_rng(seed),
                    np.asarray(train_y),
                    batch,
                    classes,
                    images // batch,
                )
                before = net.init(jax.random.key(seed), test_x[:1], train=False)
                rate = 1e-3 * (batch / 32) ** 0.5
                after = trained(net, before, train_x, train_y, rows, renorm, rate, scaled)
                scores.append(np.mean(evaluate(after, test_x).argmax(-1) == test_y))
            low, mean, high = min(scores), np.mean(scores), max(scores)
            cells.append(f"{mean:.1%} ({low:.1%} to {high:.1%})")
        table.add_row(f"{batch}" + (f", of {classes} classes" if classes else ""), *cells)
    print(table)
    return table


if __name__ == "__main__":
    parser = Parser(
        prog="renorm.py",
        description="Batch norm beside batch renormalization, on small batches.",
        examples=[
            "python examples/renorm/renorm.py",
            "python examples/renorm/renorm.py --seeds 5",
            "python examples/renorm/renorm.py --data-dir DIR",
        ],
    )
    parser.add_argument("--data-dir", type=Path, help="CIFAR-10's binary files (else: digits)")
    parser.add_argument("--seeds", type=between(int, 1), default=3, help="(3)")
    with one_line(parser):
        main(**vars(parser.parse_args()))
