# When to freeze batch norm in fine-tuning: a network of five classes learns the other five from few
# images, of the same kind or darkened and noisy, in batches of 4 or of 32.
#
#   python examples/studies/freeze_when.py --tiny              handwritten digits, seconds
#   python examples/studies/freeze_when.py --data-dir DIR      CIFAR-10, four minutes
import itertools
from functools import partial

import jax
import numpy as np
import study
from command import progress
from study import Table, spread

import jaxbn

QUARTERS = 4  # of fine-tuning; a way says what is frozen in each


def without_norms(apply, variables, x, **options):
    """apply, where scales and biases of norms get no gradient."""
    labels = jaxbn.labels(variables["params"], frozen="*")
    params = jax.tree.map(
        lambda label, p: jax.lax.stop_gradient(p) if label == "frozen" else p,
        labels,
        variables["params"],
    )
    return apply({**variables, "params": params}, x, **options)


WAYS = {  # whether the statistics are recalibrated first; then, in each quarter, what is frozen
    "nothing": (False, "----"),
    "statistics from the start": (False, "ssss"),
    "statistics, scales and biases from the start": (False, "aaaa"),
    "statistics after a quarter of the steps": (False, "-sss"),
    "statistics after three quarters": (False, "---s"),
    "statistics from the start, recalibrated first": (True, "ssss"),
}
KINDS = {  # images of the new classes, and a batch
    "same images, batch 4": (False, 4),
    "same images, batch 32": (False, 32),
    "dark and noisy, batch 4": (True, 4),
    "dark and noisy, batch 32": (True, 32),
}

RATES = (0.003, 0.01, 0.03, 0.1, 0.3)


def darkened(x):
    """A third of the contrast, less light, and noise."""
    noise = jax.random.normal(jax.random.key(0), x.shape)
    return 0.3 * x - 0.7 + 0.15 * noise


# The arguments of main for --tiny.
TINY = {
    "before": 60,
    "steps": 20,
    "width": 4,
    "depth": 1,
    "kinds": {"same images, batch 4": (False, 4)},
    "rates": (0.1,),
}


def main(
    data, seeds=3, before=600, steps=200, shots=40, width=8, depth=2, kinds=KINDS, rates=RATES
):
    """Test accuracy on the new classes by what is frozen, each at the best of the rates."""
    old, new = (np.flatnonzero(np.asarray(data.y) // 5 == half) for half in (0, 1))
    tests = np.flatnonzero(np.asarray(data.test_y) >= 5)
    net = study.Net(width=width, depth=depth)
    evaluate = partial(net.apply, train=False)
    scores, modes = {}, {"-": net.apply}  # what a letter of a way's plan means
    for seed in range(seeds):
        variables = study.start(net, seed)
        rows = old[study.drawn(seed, len(old), before, 64)]
        trained, _ = study.fit(net.apply, variables, data.x, data.y, rows, 0.3)
        if "s" not in modes:
            modes["s"] = jaxbn.freeze(net.apply, trained)
            modes["a"] = partial(without_norms, modes["s"])
        few = np.random.default_rng(seed).permutation(new)
        few = np.concatenate([few[np.asarray(data.y)[few] == c][:shots] for c in range(5, 10)])
        cells = [*itertools.product(kinds, WAYS, rates)]
        for kind, way, rate in progress(cells, f"freeze, seed {seed}"):
            (shifted, batch), (again, plan) = kinds[kind], WAYS[way]
            x, y, test_x = data.x[few], data.y[few], data.test_x[tests]
            if shifted:
                x, test_x = darkened(x), darkened(test_x)
            held = jaxbn.recalibrate(evaluate, trained, [x]) if again else trained
            rows = study.drawn(seed, len(few), steps, batch).reshape(QUARTERS, -1, batch)
            for mode, some in zip(plan, rows, strict=True):
                held, _ = study.fit(modes[mode], held, x, y, some, rate)
            score = study.accuracy(net.apply, held, test_x, data.test_y[tests])
            scores.setdefault((way, kind), {}).setdefault(rate, []).append(score)
    best = {cell: max(tried, key=lambda r: np.mean(tried[r])) for cell, tried in scores.items()}
    return (
        Table(
            ["frozen in fine-tuning", *kinds],
            [[w, *(spread(scores[w, k][best[w, k]]) for k in kinds)] for w in WAYS],
        ),
        Table(
            ["best rate, by what is frozen", *kinds],
            [[w, *(f"{best[w, k]:g}" for k in kinds)] for w in WAYS],
        ),
    )


def picture(rows, _):
    figure, axes = study.panels(
        "What to freeze in fine-tuning: mean and range of the seeds",
        *((kind, "test accuracy, %", "") for kind in list(KINDS)[: len(rows[0]) - 1]),
        height=3.2,
        width=2.9,
    )
    ways = [row[0] for row in rows]
    for i, axis in enumerate(axes, start=1):
        study.dots(axis, range(len(rows)), [row[i] for row in rows], None, "#d62728")
        axis.set_yticks(range(len(rows)), ways if i == 1 else [""] * len(rows))
        axis.invert_yaxis()
    return figure


if __name__ == "__main__":
    study.run(
        main,
        picture,
        "When to freeze batch norm in fine-tuning on few images of new classes.",
        "Four minutes",
        TINY,
    )
