# What the scripts beside this one share: a small network, its training on clean images, and what
# a camera may do to the images that are served.
import sys
from argparse import SUPPRESS, RawDescriptionHelpFormatter
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "cifar10"))

import flax.linen as nn
import jax
import numpy as np
import optax
from augment import normalize
from command import Parser, between, one_line
from data import load

import jaxbn


class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, train=False, weights=None, update_stats=True):  # [B, 32, 32, 3] → [B, 10]
        share = None if weights is None else weights[:, None, None, None]
        for c, stride in ((1, 2), (2, 2), (4, 1), (8, 2)):
            x = nn.Conv(c * self.width, (3, 3), stride, use_bias=False)(x)
            norm = jaxbn.linen.BatchNorm(use_running_average=not train, momentum=0.9)
            x = nn.relu(norm(x, weights=share, update_stats=update_stats))
        return nn.Dense(10)(x.mean((1, 2)))


def blurred(x):
    """Each pixel as 1, 4, 6, 4, 1 of its neighbours, down and across."""
    for axis in (1, 2):
        pad = [(0, 0)] * 4
        pad[axis] = (2, 2)
        padded, n = np.pad(x, pad, mode="edge"), x.shape[axis]
        parts = [np.take(padded, range(i, i + n), axis) for i in range(5)]
        x = sum(w / 16 * part for w, part in zip((1, 4, 6, 4, 1), parts, strict=True))
    return x


CORRUPTIONS = {  # of images [N, 32, 32, 3], float32 of 0 to 255
    "none": lambda x, rng: x,
    "noise": lambda x, rng: x + rng.normal(0, 30, x.shape),
    "blur": lambda x, rng: blurred(x),
    "contrast": lambda x, rng: 0.3 * x + 0.7 * x.mean((1, 2, 3), keepdims=True),
    "brightness": lambda x, rng: x + 80,
}


def corrupted(name, x, seed):
    """The images as uint8, as a camera would give them."""
    changed = CORRUPTIONS[name](np.float32(x), np.random.default_rng(seed))
    return np.rint(np.clip(changed, 0, 255)).astype(np.uint8)


class Task:
    """The data, the network, and `trained(seed)`."""

    def __init__(self, data_dir, width, images, test):
        self.data = data = load("cifar10" if data_dir else "digits", data_dir)
        some = np.arange(min(test, len(data.test_y)))
        self.test_x, self.test_y = data.test_x[some], data.test_y[some]  # uint8, int32
        self.scaled = jax.jit(partial(normalize, mean=data.mean, std=data.std))
        self.net, self.images = Net(width), images
        self.apply = jax.jit(partial(self.net.apply, train=False))

    def trained(self, seed, batch=128):
        """The variables after so many clean images, by Adam, whose rate falls to 0."""
        data, steps, rng = self.data, self.images // batch, np.random.default_rng(seed)
        tx = optax.adam(optax.cosine_decay_schedule(0.003, steps))

        @jax.jit
        def step(variables, opt_state, x, y):
            def loss(params):
                its = {**variables, "params": params}
                logits, new = self.net.apply(its, x, train=True, mutable=["batch_stats"])
                return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new

            grads, new = jax.grad(loss, has_aux=True)(variables["params"])
            updates, opt_state = tx.update(grads, opt_state)
            return {"params": optax.apply_updates(variables["params"], updates), **new}, opt_state

        variables = self.net.init(jax.random.key(seed), self.scaled(self.test_x[:1]))
        opt_state, every = tx.init(variables["params"]), data.train_x[np.arange(len(data.train_y))]
        for rows in rng.integers(len(every), size=(steps, batch)):
            x = self.scaled(every[rows])
            variables, opt_state = step(variables, opt_state, x, data.train_y[rows])
        return variables


def spread(errors):
    """Mean and range, of shares."""
    return f"{np.mean(errors):.1%} ({min(errors):.1%} to {max(errors):.1%})"


def run(name, main):
    """`main` by the options of the command line."""
    lines = ("", " --data-dir DIR", " --data-dir DIR --seeds 5 --images 200000")
    p = Parser(name, formatter_class=RawDescriptionHelpFormatter, argument_default=SUPPRESS)
    p.epilog = "\n  ".join(["examples:", *(f"python examples/adapt/{name}{v}" for v in lines)])
    positive = between(int, 1)
    p.add_argument("--data-dir", type=Path, help="CIFAR-10's binary files (else: digits)")
    p.add_argument("--seeds", type=positive, help="networks, trained one by one (3)")
    p.add_argument("--images", type=positive, help="that each learns (100,000)")
    p.add_argument("--test", type=positive, help="test images (tent.py 5,000; weights.py 10,000)")
    with one_line(p):
        main(**vars(p.parse_args()))
