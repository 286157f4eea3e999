# What the roads of this folder share: a network, a batch, and one device to compare with.

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "cifar10"))

import jax
import jax.numpy as jnp
import numpy as np
from command import Parser, between, one_line
from rich import print
from rich.table import Table

import jaxbn

ROWS = 16  # of the batch, on each device


def init():
    norm, state = jaxbn.init(32)
    k1, k2 = jax.random.split(jax.random.key(0))
    w1, w2 = jax.random.normal(k1, (16, 32)) / 4, jax.random.normal(k2, (32, 10)) / 6
    return {"w1": w1, "norm": norm, "w2": w2}, state


def batch():
    rng, rows = np.random.default_rng(0), ROWS * jax.device_count()
    x = rng.normal(3, 2, (rows, 16)).astype(np.float32)
    return x, rng.integers(0, 10, rows, np.int32)  # [B, 16], [B]


def loss(params, state, x, y, axis_name=None):
    h, state = jaxbn.batch_norm(
        x @ params["w1"], params["norm"], state, train=True, axis_name=axis_name
    )
    logits = jax.nn.log_softmax(jax.nn.relu(h) @ params["w2"])  # [B, 10]
    return -jnp.take_along_axis(logits, y[:, None], axis=1).mean(), state


def update(params, grads):
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)


def one_device(params, state, x, y):
    (value, state), grads = jax.value_and_grad(loss, has_aux=True)(params, state, x, y)
    return update(params, grads), state, value


def compare(roads):
    """A row a road: its loss, and how far params and state are from those of one device."""
    arguments = *init(), *batch()
    # Without this, GPUs round the factors of a product to 11 bits or fewer, by its shape.
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(one_device)(*arguments)
        found = {name: road(*arguments) for name, road in roads.items()}
    rows = {}
    for name, result in found.items():
        off = [  # in units of float32's rounding of the largest number of each array
            float(np.abs(a - np.asarray(b)).max() / (np.abs(b).max() * 2**-24))
            for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True)
        ]
        rows[name] = float(result[2]), max(off)
    return rows


def limit():
    """
    The difference that order alone can make. A sum over B rows in another order is off by some
    sqrt(B) roundings, and each array is made of a few such sums, one after the other.
    """
    return 8 * (ROWS * jax.device_count()) ** 0.5


def main(name, roads):
    """The command line of a script: its table, and exit status 1 where a road disagrees."""
    line = f"python examples/devices/{name}"
    p = Parser(
        prog=name,
        description=f"One training step by {', '.join(roads)}, compared with one device.",
        examples=[line, f"{line} --cpus 4", f"{line} --cpus 1"],
    )
    p.add_argument("--cpus", type=between(int, 1), default=8, help="devices to make of a CPU (8)")
    cpus = p.parse_args().cpus
    with one_line(p):
        table_of(roads, cpus)


def table_of(roads, cpus):
    jax.config.update("jax_num_cpu_devices", cpus)  # GPUs stay as many as there are
    rows = compare(roads)
    where = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    table = Table("road", "loss", "largest difference", title=f"One step on {where}")
    for road, (value, off) in rows.items():
        table.add_row(road, f"{value:.6f}", f"{off:.1f} roundings")
    print(table)
    if worst := [road for road, (_, off) in rows.items() if off > limit()]:
        print(f"{', '.join(worst)}: not what one device gives")
        raise SystemExit(1)
    print("All agree with one device, up to rounding.")
