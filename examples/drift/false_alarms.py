# How often health.drift raises an alarm where nothing drifted: 8 layers of 32 channels, 16 pixels
# an image; pixels of an image agree with one another, and so do channels of a layer.
#
#   python examples/drift/false_alarms.py --windows 1000

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "cifar10"))

import jax
import jax.numpy as jnp
import numpy as np
from command import Parser, between, one_line, progress
from rich.console import Console
from rich.table import Table

import jaxbn
from jaxbn import health

LAYERS, CHANNELS, PIXELS = 8, 32, 16
STATE = {str(i): jaxbn.State(jnp.zeros(CHANNELS), jnp.ones(CHANNELS), None) for i in range(LAYERS)}
DRAWS = {  # mean 0, variance 1
    "gaussian": jax.random.normal,
    "laplace": lambda key, shape: jax.random.laplace(key, shape) / np.sqrt(2),
    "exponential": lambda key, shape: jax.random.exponential(key, shape) - 1,
}


def window(key, draw, n):
    """What n images without drift show."""
    rows = {}
    shapes = (n, 1, 1), (n, 1, CHANNELS), (n, PIXELS, CHANNELS)
    for path, keys in zip(STATE, jax.random.split(key, (LAYERS, 3)), strict=True):
        image, channel, pixel = (draw(k, s) for k, s in zip(keys, shapes, strict=True))
        x = np.sqrt(0.3) * image + np.sqrt(0.3) * channel + np.sqrt(0.4) * pixel
        rows[path] = jax.vmap(jaxbn.moments, out_axes=-1)(x)
    return health.seen(STATE, rows)


def main(argv=None):
    parser = Parser(
        prog="false_alarms.py",
        description="How often health.drift raises an alarm where nothing drifted.",
        examples=[
            "python examples/drift/false_alarms.py",
            "python examples/drift/false_alarms.py --windows 100",
            "python examples/drift/false_alarms.py --images 16 64 256",
        ],
    )
    add, default = parser.add_argument, [32, 128, 512]
    add("--windows", type=between(int, 10), default=1000, help="decisions of each kind (1000)")
    add("--images", type=between(int, 2), nargs="+", default=default, help="a window")
    args = parser.parse_args(argv)
    with one_line(parser):
        return measured(args)


def measured(args):
    """Shares of alarms, by kind of values and images a window."""
    asked = (0.1, 0.01, 0.001)
    rates = {}
    for name, draw in DRAWS.items():
        for n in args.images:
            some = jax.jit(jax.vmap(lambda key, draw=draw, n=n: window(key, draw, n)))
            alarms = np.zeros(4)
            keys = jax.random.split(jax.random.key(0), args.windows // 10)
            for key in progress(keys, name):
                ten = jax.device_get(some(jax.random.split(key, 10)))
                for i in range(10):
                    seen = jax.tree.map(lambda v, i=i: v[i], ten)
                    strict = [health.decide(seen, false_alarm=a, tolerance=0.0) for a in asked]
                    alarms += [d.alarm for d in (*strict, health.decide(seen))]
            rates[name, n] = alarms / (args.windows // 10 * 10)
            print(f"{name}, {n} images: done", flush=True)
    table = Table("values", "images", *(f"asked {a:g}" for a in asked), "0.001, tolerance")
    for (name, n), shares in rates.items():
        table.add_row(name, str(n), *(f"{share:.4f}" for share in shares))
    Console().print(table)
    return rates


if __name__ == "__main__":
    main()
