"""Two images in a whole batch: each is normalized by the other, and the loss oscillates."""

import jax
import jax.numpy as jnp
import optax
from failure import Net, Result, accuracy, batches, digits, moments, show, start, train

import jaxbn
from jaxbn import health

STEPS, ROWS = 600, 2


def oscillation(apply, variables, x, y):
    """How much the loss of an image changes with the image beside it: sd, mean over images."""

    def loss(x, y):
        logits, _ = apply(variables, x, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y)[0]

    def beside(i):  # the losses of image i beside each other image
        pairs = jnp.stack([jnp.broadcast_to(x[i], x.shape), x], 1)
        return jax.vmap(loss)(pairs, jnp.stack([jnp.broadcast_to(y[i], y.shape), y], 1)).std()

    return float(jax.jit(jax.vmap(beside))(jnp.arange(len(x))).mean())


def runs(seed):
    """Apply and variables with batch norm, and with group norm in its place."""
    (x, y), _ = digits()
    net = Net(depth=2)
    fresh = start(net, x[:2], seed=seed)
    data = batches(x, y, STEPS, ROWS, seed)
    swapped = jaxbn.swap(net.apply, fresh, "group")
    for apply, variables in ((net.apply, fresh), (swapped.model, swapped.variables)):
        yield apply, train(apply, variables, data, rate=0.03)


def main(seed=0):
    _, (test_x, test_y) = digits()
    (apply, sick), (swapped, cured) = runs(seed)
    findings = health.check(sick, moments(Net(depth=2), sick, test_x[:ROWS]))
    before, after = (
        accuracy(f(v, test_x, train=False), test_y) for f, v in ((apply, sick), (swapped, cured))
    )
    return Result(
        "two images a batch",
        before,
        findings,
        "health.check(variables, moments)",
        'jaxbn.swap(apply, variables, "group")',
        after,
        [],  # there is no batch norm left to check
    )


def oscillations():
    x, y = (jnp.asarray(v[:100]) for v in digits()[1])
    return "\n".join(
        f"{name}: sd of an image's loss over the images beside it {oscillation(*run, x, y):.2f}"
        for name, run in zip(("batch norm", "group norm"), runs(0), strict=True)
    )


if __name__ == "__main__":
    show(main, oscillations)
