# What the studies beside this file share: images, a network, its training, tables and pictures.
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "cifar10"))

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from augment import normalize
from command import Parser, between, check_place, new_file, one_line
from data import load

import jaxbn

# --- images


class Images(NamedTuple):
    name: str
    x: jax.Array  # [N, 16, 16, 3] float32, about mean 0 and sd 1
    y: jax.Array  # [N] int32, 0 to 9
    test_x: jax.Array  # [M, 16, 16, 3]
    test_y: jax.Array  # [M]


def images(data_dir=None, most=20_000, most_tests=4000) -> Images:
    """CIFAR-10, or digits without a folder; a pixel is the mean of 2 x 2 pixels."""
    data = load("cifar10" if data_dir else "digits", data_dir)

    def halved(x, most):
        x = normalize(x[np.arange(min(most, len(x)))], data.mean, data.std)
        return x.reshape(-1, 16, 2, 16, 2, 3).mean((2, 4))

    return Images(
        data.name,
        halved(data.train_x, most),
        jnp.asarray(data.train_y[:most]),
        halved(data.test_x, most_tests),
        jnp.asarray(data.test_y[:most_tests]),
    )


# --- the network and its training


def batch_norm(train):
    return jaxbn.linen.BatchNorm(use_running_average=not train, momentum=0.9)


def group_norm(train):
    return nn.GroupNorm(num_groups=4)


NORMS = {"batch norm": batch_norm, "group norm": group_norm, "no norm": None}
COLORS = {"batch norm": "#d62728", "group norm": "#1f77b4", "no norm": "#555555"}


class Conv(nn.Module):
    """A 3 x 3 convolution as a product of matrices: in a scan on CPUs, eight times as fast."""

    features: int
    strides: int = 1
    use_bias: bool = False

    @nn.compact
    def __call__(self, x):
        (_, height, width, _), by = x.shape, self.strides
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        around = [x[:, i : i + height : by, j : j + width : by] for i in range(3) for j in range(3)]
        start = nn.initializers.he_normal()
        dense = nn.Dense(self.features, self.use_bias, kernel_init=start, name="dense")
        return dense(jnp.concatenate(around, -1))


class Net(nn.Module):
    """Three stages of convolutions, each with its norm and relu."""

    norm: Callable[[bool], Any] | None = batch_norm  # train → a layer; None: none, but a bias
    width: int = 8
    depth: int = 2  # convolutions a stage

    @nn.compact
    def __call__(self, x, train):  # [B, 16, 16, 3] → [B, 10]
        for stage in range(3):
            for i in range(self.depth):
                strides = 1 if i else 2
                x = Conv(self.width * 2**stage, strides, use_bias=self.norm is None)(x)
                x = nn.relu(self.norm(train)(x) if self.norm else x)
        return nn.Dense(10)(x.mean((1, 2)))


def start(net, seed):
    """Variables of a seed."""
    return _start(net, jax.random.key(seed))


@partial(jax.jit, static_argnums=0)
def _start(net, key):
    return net.init(key, jnp.zeros((1, 16, 16, 3)), train=False)


def loss(apply, params, variables, x, y):
    """The mean cross entropy of a batch in train mode, and the new statistics."""
    held = {**variables, "params": params}
    logits, new = apply(held, x, train=True, mutable=["batch_stats"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new


def descend(apply, variables, x, y, rate):
    """A step of gradient descent, without momentum: the variables, and the loss before the step."""
    params = variables["params"]
    (value, new), grads = jax.value_and_grad(partial(loss, apply), has_aux=True)(
        params, variables, x, y
    )
    params = jax.tree.map(lambda p, g: p - rate * g, params, grads)
    return {**variables, **new, "params": params}, value


@partial(jax.jit, static_argnums=0)
def fit(apply, variables, x, y, rows, rate):
    """The variables after a step for each of rows [steps, batch], and the losses [steps]."""

    def step(variables, rows):
        return descend(apply, variables, x[rows], y[rows], rate)

    return jax.lax.scan(step, variables, rows)


def drawn(seed, count, steps, batch):
    """Rows below count [steps, batch]: epoch after epoch, each in an order of its own."""
    rng = np.random.default_rng(seed)
    epochs = -(-steps * batch // count)
    rows = np.concatenate([rng.permutation(count) for _ in range(epochs)])
    return rows[: steps * batch].reshape(steps, batch)


@partial(jax.jit, static_argnums=0)
def _right(apply, variables, x, y):
    return jnp.mean(apply(variables, x, train=False).argmax(-1) == y)


def accuracy(apply, variables, x, y):
    """In eval mode, %."""
    return 100 * float(_right(apply, variables, x, y))


# --- tables and pictures


class Table(NamedTuple):
    headers: list[str]
    rows: list[list[str]]

    def __str__(self):
        """As Markdown, with aligned columns."""
        lines = [self.headers, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.headers))]
        bars = ["-" * (width - 1) + ":" for width in widths]
        bars[0] = "-" * widths[0]
        return "\n".join(
            f"| {' | '.join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(cells))} |"
            for line in (self.headers, bars, *self.rows)
            for cells in [list(zip(line, widths, strict=True))]
        )


def spread(values, digits=1):
    """Mean, least and largest of the seeds: "36.1 (35.5 to 36.7)"."""
    mean, low, high = (f"{f(values):.{digits}f}" for f in (np.mean, np.min, np.max))
    return f"{mean} ({low} to {high})"


def figures(cell):
    """Mean, least and largest as floats; NaN for a cell without figures."""
    parts = cell.replace("(", "").replace(")", "").replace(" to ", " ").split()
    try:
        mean, low, high = map(float, parts)
    except ValueError:
        return np.full(3, np.nan)
    return np.array([mean, low, high])


def panels(title, *named, height=3.8, width=4.2):
    """A figure with a pair of axes for each (title, x, y), of these inches each."""
    from matplotlib.figure import Figure

    drawn = Figure((max(width * len(named), 6.5), height), layout="constrained")
    drawn.suptitle(title)
    axes = drawn.subplots(1, len(named), squeeze=False)[0]
    for axis, (name, x, y) in zip(axes, named, strict=True):
        axis.set(title=name, xlabel=x, ylabel=y)
        axis.title.set_fontsize(10)
        axis.grid(color="#e5e5e5")
        axis.set_axisbelow(True)
    return drawn, axes


def line(axis, x, cells, name, color, marker="o"):
    """The means of the cells by x, with their ranges as bars."""
    mean, low, high = np.transpose([figures(cell) for cell in cells])
    axis.errorbar(
        x, mean, (mean - low, high - mean), color=color, marker=marker, capsize=3, label=name
    )


def dots(axis, places, cells, name, color, marker="o"):
    """The means of the cells, a row each, with their ranges as bars."""
    mean, low, high = np.transpose([figures(cell) for cell in cells])
    axis.errorbar(
        mean,
        places,
        xerr=(mean - low, high - mean),
        fmt=marker,
        color=color,
        capsize=3,
        label=name,
    )


def ticks(axis, values):
    """A logarithmic x axis with these values."""
    axis.set_xscale("log")
    axis.set_xticks(values, [f"{v:g}" for v in values])
    axis.xaxis.minorticks_off()


# --- the command


def run(main, picture, about, minutes, tiny):
    """The command line: main(images, seeds) → tables, picture(rows of each) → a figure."""
    name = Path(sys.argv[0]).name
    call = f"python examples/studies/{name}"
    parser = Parser(
        prog=name,
        description=f"{about} {minutes} on two CPU cores with CIFAR-10, seconds with --tiny.",
        examples=[
            f"{call} --tiny",
            f"{call} --data-dir DIR",
            f"{call} --seeds 5 --picture study.png",
        ],
    )
    parser.add_argument("--data-dir", type=Path, help="CIFAR-10's binary files (else: digits)")
    parser.add_argument("--tiny", action="store_true", help="short runs, to see that they run")
    parser.add_argument("--seeds", type=between(int, 1), default=3, metavar="N", help="(3)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the tables as a PNG")
    args = parser.parse_args()
    path = args.picture
    with one_line(parser):
        check_place("--picture", path)
        tables = main(images(args.data_dir), args.seeds, **(tiny if args.tiny else {}))
        print(*tables, sep="\n\n")
        if path:
            with new_file(path) as part:
                picture(*(table.rows for table in tables)).savefig(part, dpi=110, format="png")
            print(f"\n{path}")
