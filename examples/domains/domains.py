# Images by day and by night: one network with one set of statistics for both, and with a set of
# statistics for each.
#
#   python examples/domains/domains.py                       on handwritten digits
#   python examples/domains/domains.py --data-dir DIR        on CIFAR-10
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
from data import load
from options import Parser, one_line
from rich import print
from rich.table import Table

import jaxbn

DAY, NIGHT = 0, 1


class Net(nn.Module):
    width: int
    domains: int | None  # None: one set of statistics for all

    @nn.compact
    def __call__(self, x, domain, train):  # [B, 16, 16, 3], [B] or [] → [B, 10]
        norm = partial(
            jaxbn.linen.BatchNorm,
            use_running_average=not train,
            momentum=0.95,
            domains=self.domains,
            activation=nn.relu,
        )
        domain = None if self.domains is None else domain
        for i, c in enumerate((self.width, 2 * self.width, 4 * self.width)):
            x = nn.Conv(c, (3, 3), 2 if i else 1, use_bias=False)(x)
            x = norm()(x, domain=domain)
        return nn.Dense(10)(x.mean((1, 2)))


def seen(x, domain):
    """Normalized images as they are by day; by night dark, and of a quarter of the contrast."""
    night = jnp.reshape(domain == NIGHT, (-1, 1, 1, 1))
    return jnp.where(night, 0.25 * x - 1.5, x)


TX = optax.adam(2e-3)


@partial(jax.jit, static_argnames="net")
def step(net, variables, opt_state, images, label, domain):
    def loss(params):
        its = {**variables, "params": params}
        logits, new = net.apply(
            its, seen(images, domain), domain, train=True, mutable=["batch_stats"]
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean(), new

    grads, new = jax.grad(loss, has_aux=True)(variables["params"])
    updates, opt_state = TX.update(grads, opt_state)
    return {"params": optax.apply_updates(variables["params"], updates), **new}, opt_state


KINDS = ("of day or night", "of both")


def main(data_dir=None, width=8, images=12_800, batch=64, seeds=3, kinds=KINDS):
    data = load("cifar10" if data_dir else "digits", data_dir)
    train = np.arange(min(10_000, len(data.train_y)))
    test = np.arange(min(2000, len(data.test_y)))
    train_x, test_x = (
        normalize(v[:, ::2, ::2], data.mean, data.std)  # [N, 16, 16, 3]
        for v in (data.train_x[train], data.test_x[test])
    )
    train_y, test_y = data.train_y[train], data.test_y[test]
    table = Table("a batch", "tested", "one set", "a set for each", title=data.name)
    steps = images // batch
    for kind in kinds:
        scores = {}  # (domain, sets) → of each seed
        for sets in (None, 2):
            net = Net(width, sets)
            evaluate = jax.jit(partial(net.apply, train=False))
            for seed in range(seeds):
                rng = np.random.default_rng(seed)
                variables = net.init(jax.random.key(seed), test_x[:1], DAY, train=False)
                opt_state = TX.init(variables["params"])
                for i in range(steps):
                    rows = rng.integers(len(train_y), size=batch)
                    domain = jnp.asarray(i % 2 if kind == KINDS[0] else np.arange(batch) % 2)
                    variables, opt_state = step(
                        net, variables, opt_state, train_x[rows], train_y[rows], domain
                    )
                for domain in (DAY, NIGHT):
                    logits = evaluate(variables, seen(test_x, jnp.asarray(domain)), domain)
                    right = np.mean(logits.argmax(-1) == test_y)
                    scores.setdefault((domain, sets), []).append(right)
        for domain, name in ((DAY, "by day"), (NIGHT, "by night")):
            cells = []
            for sets in (None, 2):
                of_seeds = scores[domain, sets]
                mean, low, high = np.mean(of_seeds), min(of_seeds), max(of_seeds)
                cells.append(f"{mean:.1%} ({low:.1%} to {high:.1%})")
            table.add_row(kind, name, *cells)
    print(table)
    return table


if __name__ == "__main__":
    parser = Parser(prog="domains.py")
    parser.add_argument("--data-dir", type=Path, help="CIFAR-10's binary files (else: digits)")
    with one_line(parser):
        main(**vars(parser.parse_args()))
