# Statistics of corrupted images whose classes are not those that will be served, and weights that
# make up for that.
#
#   python examples/adapt/weights.py                       on handwritten digits
#   python examples/adapt/weights.py --data-dir DIR        on CIFAR-10
from functools import partial

import jax.numpy as jnp
import numpy as np
from rich import print
from rich.table import Table
from task import CORRUPTIONS, Task, corrupted, run, spread

import jaxbn

BATCH = 200


def uneven(y, share, rng):
    """All rows of class 0, and as many of the others as leave class 0 with this share."""
    first, others = np.flatnonzero(y == 0), np.flatnonzero(y != 0)
    some = rng.choice(others, round(len(first) * (1 / share - 1)), replace=False)
    return rng.permutation(np.concatenate([first, some]))


def evened(labels):
    """A weight for each row: every class that is there weighs the same."""
    found, places, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return np.float32(len(labels) / len(found) / counts)[places]


def statistics(task, variables, x, w):
    """The variables with the statistics of images x under weights w, half of them at a time."""
    batches = [(x[i : i + BATCH], w[i : i + BATCH]) for i in range(0, len(x), BATCH)]
    return jaxbn.recalibrate(task.observed, variables, batches, progress=False)


WAYS = ("source", "unweighted", "weights by guesses", "weights by labels")


def main(data_dir=None, width=16, images=100_000, test=10_000, share=0.7, seeds=3):
    task = Task(data_dir, width, images, test)

    def observed(variables, batch, **options):
        x, w = batch
        return task.net.apply(variables, x, weights=w, **options)

    task.observed = observed
    half = len(task.test_y) // 2  # gives statistics, and the other half is answered
    table = Table("images", *WAYS, title=task.data.name)
    trained = [task.trained(seed) for seed in range(seeds)]
    for name in CORRUPTIONS:
        errors = {way: [] for way in WAYS}
        for seed, variables in enumerate(trained):
            x = corrupted(name, task.test_x, seed)
            rows = uneven(task.test_y[:half], share, np.random.default_rng(seed))
            seen, served = task.scaled(x[rows]), task.scaled(x[half:])
            take = partial(statistics, task, variables, seen)
            unweighted = take(np.ones(len(rows), np.float32))
            guesses = np.asarray(task.apply(unweighted, seen).argmax(-1))
            chosen = (
                variables,
                unweighted,
                take(evened(guesses)),
                take(evened(task.test_y[rows])),
            )
            for way, its in zip(WAYS, chosen, strict=True):
                answers = task.apply(its, served).argmax(-1)
                errors[way].append(jnp.mean(answers != task.test_y[half:]))
        table.add_row(name, *map(spread, errors.values()))
    print(table)
    return table


if __name__ == "__main__":
    run("weights.py", main)
