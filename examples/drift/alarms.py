# Does health.drift see corrupted images, and is it silent on clean ones? Alarms against accuracy.
#
#   python examples/drift/alarms.py                                         on handwritten digits
#   python examples/drift/alarms.py --data-dir DIR --run runs/NAME     on CIFAR-10, with the network
#                                                                that examples/cifar10 trained
#   python examples/drift/alarms.py --data-dir DIR --clean --windows 500       false alarms alone

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "cifar10"))

import jax
import jax.numpy as jnp
import numpy as np
from augment import normalize
from checkpoint import last_state
from command import DataError, Parser, between, one_line, progress
from data import load
from model_linen import ResNet9
from optimizer import sgd, smooth_cross_entropy
from rich.console import Console
from rich.table import Table
from scipy.ndimage import gaussian_filter
from steps import Linen

from jaxbn import health

RNG = np.random.default_rng(0)
CORRUPTIONS = {  # of images [N, 32, 32, 3] in bytes: severities, and what they do
    "noise": ([5, 10, 15, 23, 33], lambda x, sd: x + RNG.normal(0, sd, x.shape)),
    "blur": ([0.4, 0.6, 0.8, 1, 1.5], lambda x, sd: gaussian_filter(x, (0, sd, sd, 0))),
    "contrast": (
        [0.15, 0.3, 0.45, 0.6, 0.75],
        lambda x, lost: (1 - lost) * x + lost * x.mean((1, 2), keepdims=True),
    ),
}


def main(argv=None):
    parser = Parser(
        prog="alarms.py",
        description="Alarms of health.drift on clean and on corrupted images, beside the accuracy.",
        examples=[
            "python examples/drift/alarms.py",
            "python examples/drift/alarms.py --data-dir DIR --run runs/mine",
            "python examples/drift/alarms.py --data-dir DIR --clean --windows 500",
        ],
    )
    add, positive = parser.add_argument, between(int, 1)
    add("--data-dir", type=Path, help="CIFAR-10's binary files (else: digits)")
    add("--run", type=Path, help="a run of examples/cifar10 (else: trained here)")
    add("--width", type=positive, default=16, help="of the network (16)")
    add("--steps", type=between(int, 0), default=300, help="of training without --run (300)")
    add("--images", type=positive, default=4000, help="corrupted at each severity")
    add("--window", type=positive, default=128, help="images behind a decision (128)")
    add("--windows", type=positive, default=200, help="decisions (200)")
    add("--clean", action="store_true", help="how often clean images alarm")
    args = parser.parse_args(argv)
    with one_line(parser):
        return measured(args)


def measured(args):
    """The table's lines: images, severity, accuracy, alarms, alarms with a reference."""
    data = load("cifar10" if args.data_dir else "digits", args.data_dir)
    tested = len(data.test_y)
    if args.window > (most := min(args.images, tested - tested // 2)):
        raise DataError(f"--window {args.window}: there are {most} images to draw it from")
    scale = partial(normalize, mean=data.mean, std=data.std)
    net = ResNet9(width=args.width)
    steps = Linen(net, sgd(lambda _: 0.05, 5e-4), partial(smooth_cross_entropy, smoothing=0.1))
    init = partial(jax.jit(steps.init), jax.random.key(0))
    state = last_state(args.run, init) if args.run else init()
    if not args.run:
        train = jax.jit(steps.train)
        for _ in progress(range(args.steps), "training"):
            rows = RNG.choice(len(data.train_y), 64, replace=False)
            state, *_ = train(state, scale(data.train_x[rows]), data.train_y[rows])
    variables = {"params": state.params, "batch_stats": state.batch_stats}

    # The model as it is served, which also says what came to its norm layers, image by image.
    watched = jax.jit(partial(health.incoming(net.apply), train=False))

    def serve(x, y):  # → which images were right, path → moments of each image [C, images]
        served = [watched(variables, scale(x[i : i + 250])) for i in range(0, len(x), 250)]
        logits, rows = zip(*served, strict=True)
        rows = jax.tree.map(lambda *v: np.concatenate(v, -1), *rows)
        return np.concatenate(logits).argmax(-1) == y, rows

    def alarms(rows, among, reference=None):  # share of windows that raise one
        decisions = []
        for _ in range(args.windows):
            some = RNG.choice(among, args.window, replace=False)
            window = jax.tree.map(lambda v, some=some: jnp.asarray(v[..., some]), rows)
            decisions.append(health.drift(variables, [window], reference=reference).alarm)
        return float(np.mean(decisions))

    # Half of the test images are the reference; clean and corrupted windows are of the others.
    order = np.arange(len(data.test_y))
    x, y, half = data.test_x[order].astype(np.float32), data.test_y, len(order) // 2
    right, rows = serve(x, y)
    clean = jax.tree.map(lambda v: jnp.asarray(v[..., :half]), rows)
    reference = health.drift(variables, [clean])
    others = order[half:][: args.images]
    if args.clean:
        return false_alarms(variables, rows, order[half:], reference, args.windows)
    line = ["clean", 0.0, right[others].mean(), alarms(rows, others)]
    lines = [(*line, alarms(rows, others, reference))]
    for name, (severities, corrupt) in CORRUPTIONS.items():
        for severity in progress(severities, name):
            bad = np.clip(np.rint(corrupt(x[others], severity)), 0, 255)
            right, rows = serve(bad, y[others])
            every = np.arange(len(others))
            line = [name, severity, right.mean(), alarms(rows, every)]
            lines.append((*line, alarms(rows, every, reference)))

    table = Table("images", "severity", "accuracy", "alarms", "alarms, with a reference")
    for name, severity, *shares in lines:
        table.add_row(name, f"{severity:g}", *(f"{share:.1%}" for share in shares))
    Console().print(table)
    return lines


def false_alarms(variables, rows, among, reference, windows):
    """Share of windows of clean images that raise an alarm, without tolerance and with it."""
    asked = (0.1, 0.01, 0.001)
    columns = (*(f"asked {a:g}" for a in asked), "0.001, tolerance", "0.001, running statistics")
    table, rates = Table("images", *columns), {}
    for size in (32, 128, 512):
        if size > len(among) // 2:
            continue
        alarms = np.zeros(len(columns))
        for _ in progress(range(windows), f"windows of {size}"):
            some = RNG.choice(among, size, replace=False)
            window = jax.tree.map(lambda v, some=some: jnp.asarray(v[..., some]), rows)
            seen = health.seen(variables, window)
            strict = [
                health.decide(seen, reference=reference, false_alarm=a, tolerance=0.0)
                for a in asked
            ]
            default = health.decide(seen, reference=reference), health.decide(seen)
            alarms += [d.alarm for d in (*strict, *default)]
        rates[size] = alarms / windows
        table.add_row(str(size), *(f"{rate:.3f}" for rate in rates[size]))
    Console().print(table)
    return rates


if __name__ == "__main__":
    main()
