# SGD with Nesterov momentum, its learning rate over the run, and the loss.

import jax
import jax.numpy as jnp
import optax


def schedule(kind: str, peak: float, steps: int) -> optax.Schedule:
    """Learning rate by step. Both end near 0: the last steps only average the noise away."""
    if kind == "cosine":  # up over a tenth of the run, down along half a cosine
        return optax.warmup_cosine_decay_schedule(
            0.1 * peak, peak, warmup_steps=max(1, steps // 10), decay_steps=max(2, steps)
        )
    up = max(1, steps // 4)  # one-cycle: up over a quarter, down over the rest, both straight
    return optax.join_schedules(
        [
            optax.linear_schedule(0.1 * peak, peak, up),
            optax.linear_schedule(peak, 0.001 * peak, max(1, steps - up)),
        ],
        boundaries=[up],
    )


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
