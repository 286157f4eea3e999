# A training loop that is watched: each batch norm layer's figures, every 50 steps, to JSON lines,
# TensorBoard and Prometheus; grafana.json beside this file is a dashboard for the last of them.
#   python examples/watch/watched.py FOLDER [STEPS [PORT]]
#   tensorboard --logdir FOLDER        and http://127.0.0.1:9464/metrics while it runs

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "cifar10"))

import flax.linen as nn
import jax
import jax.numpy as jnp
from command import Parser, between, one_line

import jaxbn
from jaxbn import watch, writers


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):  # [B, 8]
        for _ in range(2):
            norm = jaxbn.linen.BatchNorm(use_running_average=False, momentum=0.9)
            x = nn.relu(norm(nn.Dense(32)(x)))
        return nn.Dense(1)(x)[:, 0]  # [B]


model = Model()


# `watched` is static: the same lines make two programs, the plain one as if nobody ever watched.
@partial(jax.jit, static_argnames="watched")
def step(variables, key, watched):
    x = jax.random.normal(key, (256, 8)) * 3 + 10  # [B, 8]
    y = jnp.sin(x).sum(axis=1)  # [B]

    def loss(params):
        # Are rows 0 to 63 like rows 64 to 127, and so on? As if four devices had loaded them.
        (out, updates), seen = watch.linen(model.apply, on=watched, shards=4)(
            {**variables, "params": params}, x, mutable=["batch_stats"]
        )
        return jnp.square(out - y).mean(), (updates, seen)

    (value, (updates, seen)), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    seen = watch.records(seen, {**variables, **updates}, grads)
    params = jax.tree.map(lambda p, g: p - 0.01 * g, variables["params"], grads)
    return {"params": params, **updates}, value, seen


def main(folder: str, steps: int = 500, port: int = 9464) -> None:
    with writers.open(["jsonl", "prometheus", "tensorboard"], folder, every=50, port=port) as log:
        print(*log.writers, sep="\n")
        variables = model.init(jax.random.key(0), jnp.zeros((1, 8)))
        for i in range(steps):
            variables, loss, seen = step(variables, jax.random.key(i), watched=log.due(i))
            if seen:
                log.write(i, seen)
                off = [f"{v['symmetric_kl_max']:.3g}" for v in watch.metrics(seen).values()]
                print(f"step {i}  loss {loss:.3f}  statistics off by {', '.join(off)} nats")


if __name__ == "__main__":
    parser = Parser(
        prog="watched.py",
        description="A training loop that is watched: figures of each norm layer, every 50 steps.",
        examples=[
            "python examples/watch/watched.py FOLDER",
            "python examples/watch/watched.py FOLDER 2000",
            "python examples/watch/watched.py FOLDER 500 0",
        ],
    )
    parser.add_argument("folder", help="of the figures")
    parser.add_argument("steps", type=between(int, 1), nargs="?", default=500, help="(500)")
    port = between(int, 0, 65535)
    parser.add_argument("port", type=port, nargs="?", default=9464, help="of Prometheus (9464)")
    args = parser.parse_args()
    with one_line(parser):
        main(**vars(args))
