# Which learning rates train a network with batch norm, with group norm and with none, and whether
# the gradient then says more about the loss ahead (Ioffe & Szegedy 2015, Santurkar et al. 2018).
#
#   python examples/studies/learning_rate.py --tiny              handwritten digits, seconds
#   python examples/studies/learning_rate.py --data-dir DIR      CIFAR-10, five minutes
import operator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import study
from command import progress
from study import COLORS, NORMS, Table, spread

RATES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
LENGTHS = (0.03, 0.1, 0.3, 1.0)  # of a step along the gradient, as learning rates


def reached(losses, target, window=20):
    """The first step after which the mean of the last `window` losses is below target, or inf."""
    means = np.convolve(losses, np.ones(window) / window, "valid")
    below = np.flatnonzero(means < target)  # never true of NaN
    return window + int(below[0]) if len(below) else np.inf


@partial(jax.jit, static_argnums=0)
def ahead(apply, variables, x, y, lengths):
    """Along the gradient, by length: |change of the loss| and |change of the gradient| / |it|."""

    def at(params):
        return jax.value_and_grad(lambda p: study.loss(apply, p, variables, x, y)[0])(params)

    params = variables["params"]
    value, grads = at(params)

    def norm(tree):
        return jnp.sqrt(sum(jnp.sum(v**2) for v in jax.tree.leaves(tree)))

    def step(length):
        there, other = at(jax.tree.map(lambda p, g: p - length * g, params, grads))
        change = norm(jax.tree.map(operator.sub, other, grads))
        return there - value, change / norm(grads)

    return jax.lax.map(step, lengths)


# The arguments of main for --tiny.
TINY = {
    "steps": 40,
    "width": 4,
    "depth": 1,
    "target": 2.0,
    "rates": (0.1, 1.0),
    "stops": 2,
}


def main(data, seeds=3, steps=400, batch=64, width=8, depth=2, target=1.9, rates=RATES, stops=10):
    """Steps to the target by rate; then, at rate 0.03, what is found ahead along the gradient."""
    count, nets = len(data.y), {n: study.Net(norm, width, depth) for n, norm in NORMS.items()}
    to_target = {}
    cells = [(name, rate, seed) for name in nets for rate in rates for seed in range(seeds)]
    for name, rate, seed in progress(cells, "learning rates"):
        net = nets[name]
        rows = study.drawn(seed, count, steps, batch)
        _, losses = study.fit(net.apply, study.start(net, seed), data.x, data.y, rows, rate)
        to_target.setdefault((rate, name), []).append(reached(np.asarray(losses), target))

    def cell(values):
        never = sum(np.isinf(values))
        return f"never in {never} of {seeds}" if never else spread(values, 0)

    first = Table(
        ["learning rate", *nets],
        [[f"{rate:g}", *(cell(to_target[rate, name]) for name in nets)] for rate in rates],
    )
    found = {}
    for name, seed in progress([(n, s) for n in nets for s in range(seeds)], "gradients"):
        net, each = nets[name], steps // 2 // stops
        variables, looks = study.start(net, seed), []
        rows = study.drawn(seed, count, stops * each, batch).reshape(stops, each, batch)
        for some in rows:
            variables, _ = study.fit(net.apply, variables, data.x, data.y, some, 0.03)
            x, y = data.x[some[0]], data.y[some[0]]
            looks.append(ahead(net.apply, variables, x, y, jnp.array(LENGTHS)))
        found.setdefault(name, []).append(np.mean(looks, 0))  # [2, lengths]
    loss, gradient = (
        Table(
            [f"step length, {what} ahead", *nets],
            [
                [f"{length:g}", *(spread([v[k, i] for v in found[name]], 2) for name in nets)]
                for i, length in enumerate(LENGTHS)
            ],
        )
        for k, what in enumerate(("loss", "gradient"))
    )
    return first, loss, gradient


def picture(rates, *ahead):
    """From the rows of the tables: steps to the target, change of the loss and of the gradient."""
    figure, axes = study.panels(
        "Learning rate, with and without a norm: mean and range of the seeds",
        ("Steps until the loss is at its target", "learning rate", "steps (no point: some never)"),
        ("Loss, a step along the gradient", "step length", "change of the loss"),
        ("Gradient, a step along it", "step length", "|change of gradient| / |gradient|"),
        width=3.4,
    )
    for axis, rows in zip(axes, (rates, *ahead), strict=True):
        x = [float(row[0]) for row in rows]
        for i, name in enumerate(NORMS, start=1):
            study.line(axis, x, [row[i] for row in rows], name, COLORS[name], "osD"[i - 1])
        study.ticks(axis, x)
    axes[2].set_yscale("log")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False, ncols=3)
    return figure


if __name__ == "__main__":
    study.run(
        main,
        picture,
        "Batch norm, group norm and no norm by learning rate: steps to a target, and how far the "
        "gradient can be trusted ahead.",
        "Five minutes",
        TINY,
    )
