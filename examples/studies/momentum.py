# How good running statistics are after n updates, by momentum, and what that costs in accuracy.
#
#   python examples/studies/momentum.py --tiny              handwritten digits, seconds
#   python examples/studies/momentum.py --data-dir DIR      CIFAR-10, two minutes
#
# Training does not depend on the running statistics, so one run serves every momentum.
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import study
from command import progress
from study import Table, spread

import jaxbn
from jaxbn import health

MOMENTA = {"0.9": 0.9, "0.99": 0.99, "0.999": 0.999, "None": None}
STYLES = (("#2ca02c", "s"), ("#1f77b4", "^"), ("#9467bd", "D"), ("#d62728", "o"), ("black", "x"))
UPDATES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def of_the_batch(train):
    """With momentum 0 the running statistics are those of the last batch."""
    return jaxbn.linen.BatchNorm(use_running_average=not train, momentum=0.0)


def updated(old, batch, momentum, done):
    """The running statistics after one more update; done updates were before."""
    keep = done / (done + 1) if momentum is None else momentum
    return jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, old, batch)


@partial(jax.jit, static_argnums=0)
def history(apply, variables, x, y, rows, rate):
    """params, and running statistics by momentum, after a step for each of rows: [steps, ...]."""

    def step(carry, rows):
        variables, running, done = carry
        variables, _ = study.descend(apply, variables, x[rows], y[rows], rate)
        running = {
            name: updated(running[name], variables["batch_stats"], momentum, done)
            for name, momentum in MOMENTA.items()
        }
        return (variables, running, done + 1), (variables["params"], running)

    running = dict.fromkeys(MOMENTA, variables["batch_stats"])
    return jax.lax.scan(step, (variables, running, jnp.zeros(())), rows)[1]


def apart(stats, true):
    """The median over all channels of the divergence of the statistics from the true ones, nats."""
    found = [
        health.distance(
            jaxbn.State(layer["mean"], layer["var"], None),
            jaxbn.Moments(1, true[name]["mean"], true[name]["var"]),
        ).divergence
        for name, layer in stats.items()
    ]
    return float(np.median(np.concatenate(found)))


# The arguments of main for --tiny.
TINY = {"width": 4, "depth": 1, "updates": (1, 10, 40)}


def main(data, seeds=3, batch=64, width=8, depth=2, updates=UPDATES, rate=0.3):
    """Test accuracy by updates and momentum, and how far the statistics are off."""
    net = study.Net(of_the_batch, width, depth)
    apply = partial(net.apply, train=False)
    scores, errors = {}, {}
    for seed in progress(range(seeds), "momentum"):
        rows = study.drawn(seed, len(data.y), max(updates), batch)
        before = study.start(net, seed)
        params, running = history(net.apply, before, data.x, data.y, rows, rate)
        some = data.x[study.drawn(seed, len(data.y), 4, min(1000, len(data.y) // 4))]
        for n in updates:
            at, statistics = jax.tree.map(lambda v, n=n: v[n - 1], (params, running))
            held = {"params": at, "batch_stats": statistics["None"]}
            true = jaxbn.recalibrate(apply, held, list(some))["batch_stats"]
            for name, stats in {**statistics, "recalibrated": true}.items():
                held = {"params": at, "batch_stats": stats}
                score = study.accuracy(net.apply, held, data.test_x, data.test_y)
                scores.setdefault((n, name), []).append(score)
                errors.setdefault((n, name), []).append(apart(stats, true))
    names = [*MOMENTA, "recalibrated"]
    return (
        Table(
            ["updates", *names], [[str(n), *(spread(scores[n, m]) for m in names)] for n in updates]
        ),
        Table(
            ["after updates", *MOMENTA],
            [[str(n), *(spread(errors[n, m], 3) for m in MOMENTA)] for n in updates],
        ),
    )


def picture(scores, errors):
    figure, (left, right) = study.panels(
        "Running statistics by momentum: mean and range of the seeds",
        ("Accuracy in eval mode", "updates", "test accuracy, %"),
        ("Running statistics off by", "updates", "divergence, nats (median channel)"),
    )
    for rows, axis in ((scores, left), (errors, right)):
        n = [int(row[0]) for row in rows]
        names = [*(f"momentum {m}" for m in MOMENTA), "recalibrated"][: len(rows[0]) - 1]
        for i, (name, (color, marker)) in enumerate(zip(names, STYLES, strict=False), start=1):
            study.line(axis, n, [row[i] for row in rows], name, color, marker)
        study.ticks(axis, n[::3])
    right.set_yscale("log")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False, ncols=3)
    return figure


if __name__ == "__main__":
    study.run(
        main,
        picture,
        "Running statistics after n updates, by momentum: their error, and accuracy in eval mode.",
        "Two minutes",
        TINY,
    )
