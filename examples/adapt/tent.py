# A trained network on corrupted images, without labels: four ways to normalize them.
#
#   python examples/adapt/tent.py                       on handwritten digits
#   python examples/adapt/tent.py --data-dir DIR        on CIFAR-10
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich import print
from rich.table import Table
from task import CORRUPTIONS, Task, corrupted, run, spread

import jaxbn

PRIOR = 8  # images that the running statistics weigh as much as, where they are blended
BATCHES = 125  # at most, of each size
RATE = 1e-3  # of TENT's Adam, for a batch of 200


def source(task, variables, batches):
    """By the running statistics of the training."""
    return [task.apply(variables, x) for x in batches]


def adapted(task, variables, batches):
    """By the statistics of each batch (AdaBN, Li et al. 2016)."""
    observed = partial(jaxbn.recalibrate, task.observed, variables, progress=False)
    return [task.apply(observed([x]), x) for x in batches]


def blended(task, variables, batches, prior=PRIOR):
    """By those of each batch, blended with those of the training (Schneider et al. 2020).

    A layer at a time, so that each sees what the blend before it passes on.
    """
    logits = []
    for x in batches:
        new, momentum = variables, prior / (prior + len(x))
        for path in jaxbn.layers.find(variables):  # BatchNorm_0 to BatchNorm_3, as x passes
            new = jaxbn.recalibrate(
                task.observed, new, [x], where=path, momentum=momentum, progress=False
            )
        logits.append(task.apply(new, x))
    return logits


def tent(task, variables, batches):
    """By those of each batch; scales and biases descend the entropy (TENT, Wang et al. 2021)."""
    adam = optax.adam(RATE * len(batches[0]) / 200)
    labels = jaxbn.labels(variables["params"])
    tx = optax.multi_transform({"scale": adam, "bias": adam, "rest": optax.set_to_zero()}, labels)

    @jax.jit
    def step(params, opt_state, x):
        def entropy(params):
            logits = task.net.apply(
                {**variables, "params": params}, x, train=True, update_stats=False
            )
            p = jax.nn.softmax(logits)
            return -(p * jax.nn.log_softmax(logits)).sum(-1).mean(), logits

        grads, logits = jax.grad(entropy, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, logits

    params, opt_state, logits = variables["params"], tx.init(variables["params"]), []
    for x in batches:  # answered as it comes; the step serves those after it
        params, opt_state, of_batch = step(params, opt_state, x)
        logits.append(of_batch)
    return logits


WAYS = {"source": source, "batch": adapted, "blend": blended, "TENT": tent}


def main(data_dir=None, width=16, images=100_000, test=5000, sizes=(200, 8), seeds=3):
    task = Task(data_dir, width, images, test)
    task.observed = partial(task.net.apply, train=False)  # one function: compiled once
    trained = [task.trained(seed) for seed in range(seeds)]
    table = Table("a batch of", "images", *WAYS, title=task.data.name)
    for size in sizes:
        for name in CORRUPTIONS:
            errors = {way: [] for way in WAYS}
            for seed, variables in enumerate(trained):
                x = corrupted(name, task.test_x, seed)
                n = min(len(x) // size, BATCHES) * size
                batches = [task.scaled(x[i : i + size]) for i in range(0, n, size)]
                for way, f in WAYS.items():
                    answers = jnp.concatenate(f(task, variables, batches)).argmax(-1)
                    errors[way].append(np.mean(answers != task.test_y[:n]))
            table.add_row(f"{size}", name, *map(spread, errors.values()))
    print(table)
    return table


if __name__ == "__main__":
    run("tent.py", main)
