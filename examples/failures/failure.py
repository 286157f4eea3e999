"""What the scripts beside this one share: a small network on handwritten digits, and `Result`."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "cifar10"))

import flax.linen as nn
import jax
import numpy as np
import optax
from command import Parser, between, one_line, progress
from sklearn.datasets import load_digits

import jaxbn
from jaxbn import calls
from jaxbn.health import Finding


class Result(NamedTuple):
    failure: str
    before: float  # test accuracy, in eval mode
    findings: list[Finding]  # what `call` says before the cure, worst first
    call: str
    cure: str
    after: float
    left: list[Finding]  # what `call` says after it


def several(main, seeds):
    """The results of the seeds 0, 1, ...: other weights to start from, other batches."""
    return [main(seed) for seed in progress(range(seeds), "training")]


def spread(figures):
    """Mean, least and largest, as docs/troubleshooting.md has them."""
    return f"{np.mean(figures):.2f} ({min(figures):.2f} to {max(figures):.2f})"


def with_seeds(description):
    """The command line of a script, and of the table of all."""
    name = Path(sys.argv[0]).name
    line = f"python examples/failures/{name}"
    examples = [line, f"{line} --seeds 3", f"{line} --seeds 10"]
    parser = Parser(prog=name, description=description, examples=examples)
    parser.add_argument("--seeds", type=between(int, 1), default=1, metavar="N", help="runs (1)")
    return parser


def show(main, *more):
    """The command line of a script: its result, and the text that each of `more` returns."""
    parser = with_seeds("A failure, its finding and its cure.")
    seeds = parser.parse_args().seeds
    with one_line(parser):
        report(several(main, seeds))
        for text in more:
            print(text())


def report(results):
    first = results[0]
    before, after = ([getattr(r, name) for r in results] for name in ("before", "after"))
    print(f"{first.failure}: test accuracy {spread(before)}")
    for f in first.findings:
        print(f"  {f.layer}: {f.kind} ({f.severity}), {f.figure:.3g} beside {f.threshold:.3g}")
        print(f"    {f.remedy}")
    left = sum(len(r.left) for r in results)
    print(f"cure, {first.cure}: test accuracy {spread(after)}, findings {left}")


class Net(nn.Module):
    norm: Any = nn.BatchNorm  # or a partial of one
    depth: int = 1

    @nn.compact
    def __call__(self, x, train=False):
        for i in range(self.depth):
            x = nn.Dense(32)(x)
            x = nn.relu(self.norm(use_running_average=not train, name=f"norm{i}")(x))
        return nn.Dense(10)(x)


def digits():
    """1280 images to train on, 517 to test on; 64 pixels from 0 to 16."""
    x, y = load_digits(return_X_y=True)
    rows = np.random.default_rng(0).permutation(len(x))
    x, y = x[rows].astype(np.float32), y[rows].astype(np.int32)
    return (x[:1280], y[:1280]), (x[1280:], y[1280:])


def batches(x, y, steps, rows, seed):
    """Drawn at random: arrays [steps, rows, ...]."""
    some = np.random.default_rng(seed).integers(0, len(x), (steps, rows))
    return x[some], y[some]


def start(net, *x, seed=0):
    return jax.jit(net.init)(jax.random.key(seed), *x)


def train(apply, variables, data, rate=0.1, decay=0.0, mode=True, keep=True):
    """SGD over the batches (*x, y); without `keep` the new statistics are dropped."""

    def step(variables, batch):
        *x, y = batch
        params = variables["params"]

        def loss(params):
            held = {**variables, "params": params}
            logits, new = apply(held, *x, train=mode, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new

        def descend(p, g, decayed):
            return p - rate * (g + decay * p if decayed else g)

        grads, new = jax.grad(loss, has_aux=True)(params)
        params = jax.tree.map(descend, params, grads, jaxbn.decay_mask(params))
        return {**variables, **(new if keep else {}), "params": params}, None

    return jax.jit(lambda v, data: jax.lax.scan(step, v, data)[0])(variables, data)


def accuracy(logits, y):
    return float((np.asarray(logits).argmax(-1) == y).mean())


def evaluate(net, variables, *test):
    *x, y = test
    return accuracy(net.apply(variables, *x), y)


def moments(net, variables, x):
    """Of what comes to each norm in train mode, for `health.check`."""
    return calls.hooked_apply(net.apply)(variables, x, True, mutable=["batch_stats"])[1]
