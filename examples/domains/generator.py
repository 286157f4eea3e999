# A generator of small images that learns the class by a scale and a bias for each label in its
# norms, beside one that gets the label with its noise.
#
#   python examples/domains/generator.py                     handwritten digits, 8x8
#   python examples/domains/generator.py --data-dir DIR      CIFAR-10, 8x8 in color
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "cifar10"))

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from command import Parser, between, one_line
from data import load
from rich import print
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import jaxbn

NOISE = 16


class Generator(nn.Module):
    width: int
    pixels: int  # how many numbers an image has
    in_norms: bool  # whether the label chooses scale and bias; else it stands beside the noise

    @nn.compact
    def __call__(self, z, label, train):  # [B, 16], [B] → [B, pixels]
        h = z if self.in_norms else jnp.concatenate([z, jax.nn.one_hot(label, 10)], -1)
        for _ in range(2):
            norm = jaxbn.linen.BatchNorm(
                use_running_average=not train,
                momentum=0.9,
                classes=10 if self.in_norms else None,
                bias_init=nn.initializers.normal(0.3) if self.in_norms else nn.initializers.zeros,
                activation=nn.relu,
            )
            h = norm(nn.Dense(self.width)(h), labels=label if self.in_norms else None)
        return nn.tanh(nn.Dense(self.pixels)(h))


class Discriminator(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, label):  # [B, pixels], [B] → [B]
        for _ in range(2):
            x = nn.leaky_relu(nn.Dense(self.width)(x), 0.2)
        # Whether x is real, and whether it is of that class (Miyato & Koyama 2018).
        return nn.Dense(1)(x)[:, 0] + (nn.Embed(10, self.width)(label) * x).sum(-1)


@partial(jax.jit, static_argnames=("g", "d", "steps", "batch"))
def trained(g, d, variables, weights, x, y, key, steps, batch):
    """The generator's variables after so many steps of both, by Adam."""
    tx = optax.adam(5e-4, b1=0.5)
    loss = optax.sigmoid_binary_cross_entropy

    def step(carry, key):
        variables, weights, opt_g, opt_d = carry
        keys = jax.random.split(key, 3)
        rows = jax.random.randint(keys[0], (batch,), 0, len(x))
        z, label = jax.random.normal(keys[1], (batch, NOISE)), y[rows]

        def drawn(params):
            its = {**variables, "params": params}
            return g.apply(its, z, label, train=True, mutable=["batch_stats"])

        def d_loss(weights):
            real, fake = (d.apply(weights, v, label) for v in (x[rows], fakes))
            return loss(real, jnp.ones(batch)).mean() + loss(fake, jnp.zeros(batch)).mean()

        def g_loss(params):
            fakes, new = drawn(params)
            return loss(d.apply(weights, fakes, label), jnp.ones(batch)).mean(), new

        fakes, _ = drawn(variables["params"])
        updates, opt_d = tx.update(jax.grad(d_loss)(weights), opt_d)
        weights = optax.apply_updates(weights, updates)
        grads, new = jax.grad(g_loss, has_aux=True)(variables["params"])
        updates, opt_g = tx.update(grads, opt_g)
        params = optax.apply_updates(variables["params"], updates)
        return ({"params": params, **new}, weights, opt_g, opt_d), None

    start = variables, weights, tx.init(variables["params"]), tx.init(weights)
    return jax.lax.scan(step, start, jax.random.split(key, steps))[0][0]


def images(data_dir):
    """(x, y, test_x, test_y): images of 8x8 as rows of numbers from -1 to 1, and their classes."""
    if data_dir is None:
        digits = load_digits()
        x, y = np.float32(digits.data / 8 - 1), digits.target
        return x, y, x, y
    data = load("cifar10", data_dir)
    x, test_x = (
        np.float32(v.reshape(len(v), 8, 4, 8, 4, 3).mean((2, 4)).reshape(len(v), -1) / 127.5 - 1)
        for v in (data.train_x[np.arange(20_000)], data.test_x[np.arange(10_000)])
    )
    return x, np.asarray(data.train_y[:20_000]), test_x, np.asarray(data.test_y)


def main(data_dir=None, width=128, steps=4000, batch=64, seeds=3):
    x, y, test_x, test_y = images(data_dir)
    judge = LogisticRegression(max_iter=1000).fit(x, y)
    label = np.repeat(np.arange(10), 50)
    title = "CIFAR-10" if data_dir else "digits"
    table = Table("the label is", "right class", "sd of a pixel", title=title)
    real = f"{np.std(x, axis=0).mean():.2f}"
    table.add_row("(real images)", f"{judge.score(test_x, test_y):.1%}", real)
    x, y = jnp.asarray(x), jnp.asarray(y)
    for name, in_norms in (("beside the noise", False), ("in the norms", True)):
        g, d = Generator(width, x.shape[1], in_norms), Discriminator(width)
        right, spread = [], []
        for seed in range(seeds):
            keys = jax.random.split(jax.random.key(seed), 4)
            z = jax.random.normal(keys[0], (len(label), NOISE))
            before = g.init(keys[1], z, label, train=False)
            weights = d.init(keys[2], x[:1], y[:1])
            after = trained(g, d, before, weights, x, y, keys[3], steps, batch)
            fakes = np.asarray(g.apply(after, z, label, train=False))
            right.append(judge.score(fakes, label))
            spread.append(np.std(fakes, axis=0).mean())
        mean, low, high = np.mean(right), min(right), max(right)
        table.add_row(name, f"{mean:.1%} ({low:.1%} to {high:.1%})", f"{np.mean(spread):.2f}")
    print(table)
    return table


if __name__ == "__main__":
    parser = Parser(
        prog="generator.py",
        description="Images of a class, by a scale and a bias for each label.",
        examples=[
            "python examples/domains/generator.py",
            "python examples/domains/generator.py --steps 500 --seeds 1",
            "python examples/domains/generator.py --data-dir DIR",
        ],
    )
    positive = between(int, 1)
    parser.add_argument("--data-dir", type=Path, help="CIFAR-10's binary files (else: digits)")
    parser.add_argument("--steps", type=positive, default=4000, help="of training (4000)")
    parser.add_argument("--width", type=positive, default=128, help="of the hidden layers (128)")
    parser.add_argument("--seeds", type=positive, default=3, help="generators of each kind (3)")
    with one_line(parser):
        main(**vars(parser.parse_args()))
