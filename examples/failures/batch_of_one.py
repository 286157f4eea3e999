"""One image at a time in train mode: it equals its batch's mean, and nothing of it is left."""

import warnings

import jax
from failure import Net, Result, accuracy, batches, digits, evaluate, moments, show, start, train

import jaxbn
from jaxbn import health


def main(seed=0):
    (x, y), (test_x, test_y) = digits()
    net = Net()
    variables = train(net.apply, start(net, x[:2], seed=seed), batches(x, y, 400, 64, seed))

    def serve(image):
        return net.apply(variables, image[None], True, mutable=["batch_stats"])[0][0]

    return Result(
        "train mode at batch size 1",
        accuracy(jax.jit(jax.vmap(serve))(test_x), test_y),
        health.check(variables, moments(net, variables, test_x[:1])),
        "health.check(variables, moments)",
        "train=False",
        evaluate(net, variables, test_x, test_y),
        health.check(variables, moments(net, variables, test_x)),
    )


def warned():
    """What this library's layer says to the same; it returns the bias, as Flax's does."""
    net = Net(jaxbn.linen.BatchNorm)
    image = digits()[0][0][:1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net.apply(start(net, image), image, True, mutable=["batch_stats"])
    return [str(warning.message) for warning in caught]


if __name__ == "__main__":
    show(main, lambda: "\n".join(warned()))
