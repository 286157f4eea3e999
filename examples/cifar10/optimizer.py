# SGD with Nesterov momentum, its learning rate over the run, and the loss.

import jax
import jax.numpy as jnp
import optax


def schedule(kind: str, peak: float, steps: int) -> optax.Schedule:
    """Learning rate by step: up a straight line, then down to 0 along another or half a cosine."""
    up = max(1, steps // {"onecycle": 4, "cosine": 10}[kind])

    def rate(step):
        t = jnp.asarray(step, jnp.float32)
        rise = 0.1 + 0.9 * t / up  # 1 at the peak
        fall = jnp.clip((steps - t) / max(1, steps - up), 0, 1)  # 1 until the peak, 0 at the end
        if kind == "cosine":
            fall = 0.5 - 0.5 * jnp.cos(jnp.pi * fall)
        return peak * jnp.minimum(rise, fall)

    return rate


def sgd(learning_rate: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """Nesterov momentum 0.9; weight decay pulls on the kernels only."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=kernels),
        optax.sgd(learning_rate, momentum=0.9, nesterov=True),
    )


def kernels(params):
    """True for convolution and dense kernels, which have two axes or more. The scales and biases
    of norms have one: a norm undoes what decay does to the kernel before it, but nothing undoes
    what it does to them.
    """
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def smooth_cross_entropy(logits, labels, smoothing: float):
    """Mean cross entropy: [B, classes], [B] → []. All classes alike share `smoothing` of it."""
    log_p = jax.nn.log_softmax(logits)  # [B, classes]
    hit = jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]  # [B]
    return -jnp.mean((1 - smoothing) * hit + smoothing * log_p.mean(axis=1))
