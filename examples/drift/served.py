# A served model that says when the data is no longer what it was trained on, and whether that is so
# for all sources alike: here four cameras, from each of which comes a quarter of every request.
#
#   python examples/drift/served.py       handwritten digits; from the sixth window on they fade
#   python examples/drift/served.py --port 9464 --wait 15     also for Prometheus: a window a scrape
#   curl http://127.0.0.1:9464/metrics                        while it runs

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "cifar10"))

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from command import Parser, between, one_line
from sklearn.datasets import load_digits

import jaxbn
from jaxbn import health, watch, writers

RNG = np.random.default_rng(0)
CAMERAS = 4


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):  # [B, 8, 8, 1]
        for width in (16, 32):
            x = nn.Conv(width, (3, 3), use_bias=False)(x)
            x = nn.relu(jaxbn.linen.BatchNorm(not train, momentum=0.9)(x))
        return nn.Dense(10)(x.mean((1, 2)))


def trained(model, x, y, steps=200):
    variables, tx = model.init(jax.random.key(0), x[:1], False), optax.adam(0.01)

    @jax.jit
    def step(variables, memory, x, y):
        def loss(params):
            logits, new = model.apply({**variables, "params": params}, x, True, mutable=True)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return losses.mean(), new["batch_stats"]

        grads, stats = jax.grad(loss, has_aux=True)(variables["params"])
        updates, memory = tx.update(grads, memory)
        params = optax.apply_updates(variables["params"], updates)
        return {"params": params, "batch_stats": stats}, memory

    memory = tx.init(variables["params"])
    for _ in range(steps):
        rows = RNG.choice(len(x), 64, replace=False)
        variables, memory = step(variables, memory, x[rows], y[rows])
    return variables


def main(windows=10, window=128, port=None, wait=0.0):
    # Prometheus asks for the verdict on the last window, whenever it likes; without a port, nobody.
    with writers.open([] if port is None else ["prometheus"], ".", port=port or 0) as log:
        print(*log.writers, sep="\n", end="\n" if log.writers else "")
        return serve(log, windows, window, wait)


def serve(log, windows, window, wait):
    x, y = load_digits(return_X_y=True)
    x = (x.reshape(-1, 8, 8, 1) / 16).astype(np.float32)
    order = RNG.permutation(len(x))
    train, clean, test = np.split(order, [900, 1300])
    model = Net()
    variables = trained(model, x[train], y[train])

    # The served model, and what came to its norm layers: compiled once, no copy of the images.
    # The network stands there twice, for two questions, and runs once: the compiler sees to that.
    @jax.jit
    def watched(variables, x):
        logits, rows = health.incoming(model.apply)(variables, x, False)
        _, cameras = watch.linen(model.apply, shards=CAMERAS)(variables, x, False)
        return logits, rows, watch.records(cameras, variables)

    # What clean data looks like: the running statistics know it only roughly, for they are of
    # the last ten batches or so, while the network was still learning.
    reference = health.drift(variables, [watched(variables, x[clean])[1]])
    decisions = []
    for i in range(windows):
        total = {}  # a few numbers per channel, however many requests
        images = RNG.choice(test, window, replace=False)
        light = 1 - 0.1 * max(0, i - 4)  # 1, then 0.9, 0.8, …
        hits = []
        for request in np.split(images, 4):
            logits, rows, records = watched(variables, jnp.asarray(light * x[request]))
            total = health.merge(total, health.seen(variables, rows))
            hits += list(logits.argmax(-1) == y[request])
        verdict = health.decide(total, reference=reference)
        log.write(i, verdict, records)  # of the window, and of its last request
        decisions.append((light, float(np.mean(hits)), verdict))
        worst = max(verdict.layers, key=lambda layer: layer.figure / layer.threshold)
        print(
            f"light {light:.1f}  accuracy {np.mean(hits):6.1%}  "
            f"{'ALARM' if verdict.alarm else 'ok':5}  {worst.layer}: beyond the tolerance by "
            f"{worst.figure:.1f} standard errors, alarm at {worst.threshold:.1f}",
            flush=True,
        )
        time.sleep(wait)
    return decisions


if __name__ == "__main__":
    parser = Parser(
        prog="served.py",
        description="A served model that says when its data has drifted.",
        examples=[
            "python examples/drift/served.py",
            "python examples/drift/served.py --windows 20",
            "python examples/drift/served.py --port 9464 --wait 15",
        ],
    )
    windows = between(int, 1)
    parser.add_argument("--windows", type=windows, default=10, metavar="N", help="decisions (10)")
    parser.add_argument(
        "--port", type=between(int, 0, 65535), help="serve the verdicts to Prometheus at this port"
    )
    wait = between(float, 0, 86_400)
    parser.add_argument("--wait", type=wait, default=0.0, metavar="SECONDS", help="a window (0)")
    args = parser.parse_args()
    with one_line(parser):
        main(**vars(args))
