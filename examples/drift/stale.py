# How often health.check calls statistics stale that are right: batches of independent rows, held
# against the true mean and variance of what they are drawn from.
#
#   python examples/drift/stale.py

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "cifar10"))

import numpy as np
from command import Parser, between, one_line

import jaxbn
from jaxbn import health

RELU = np.sqrt(1 / (2 * np.pi)), 0.5 - 1 / (2 * np.pi)  # mean and variance of relu(N(0, 1))
DRAWS = {  # mean, variance, and batches of them
    "Gaussian": (0.0, 1.0, lambda rng, shape: rng.standard_normal(shape, np.float32)),
    "Laplace": (0.0, 2.0, lambda rng, shape: rng.laplace(0, 1, shape)),
    "relu": (*RELU, lambda rng, shape: np.maximum(rng.standard_normal(shape, np.float32), 0)),
}


def rate(name, rows, channels, batches):
    """How many of the batches are called stale."""
    mean, var, draw = DRAWS[name]
    state = jaxbn.State(np.full(channels, mean), np.full(channels, var), None)
    limit = health.divergence(state, jaxbn.Moments(rows, state.mean, state.var))[1]
    rng = np.random.default_rng([rows, channels])
    alarms, left = 0, batches
    while left:
        some = min(left, max(1, 2**22 // (rows * channels)))  # 4 million values at a time
        x = draw(rng, (some, rows, channels))
        seen = jaxbn.Moments(rows, x.mean(1), x.var(1))  # [batches, channels]
        apart = np.quantile(health.distance(state, seen).divergence, 0.75, axis=1)
        alarms += int((apart > limit).sum())
        left -= some
    return alarms


def main(argv=None):
    parser = Parser(
        prog="stale.py",
        description="How often health.check calls statistics stale that are right.",
        examples=[
            "python examples/drift/stale.py",
            "python examples/drift/stale.py --batches 1000",
            "python examples/drift/stale.py --rows 8 --channels 1 512",
        ],
    )
    positive, rows = between(int, 1), between(int, 2)
    parser.add_argument("--batches", type=positive, default=100_000, help="of each kind (100000)")
    parser.add_argument("--rows", type=rows, nargs="+", default=[16, 64], help="of a batch (16 64)")
    parser.add_argument(
        "--channels", type=positive, nargs="+", default=[1, 8, 64], help="of a layer (1 8 64)"
    )
    args = parser.parse_args(argv)
    with one_line(parser):
        return measured(args)


def measured(args):
    """Alarms, by rows, distribution and channels."""
    columns = [f"{c} channels" if c > 1 else "1 channel" for c in args.channels]
    print(f"| rows | distribution | {' | '.join(columns)} |")
    print("|---" * (2 + len(columns)) + "|")
    table = {}
    for rows in args.rows:
        for name in DRAWS:
            found = [rate(name, rows, channels, args.batches) for channels in args.channels]
            table |= {(name, rows, c): n for c, n in zip(args.channels, found, strict=True)}
            print(f"| {rows} | {name} | {' | '.join(map(str, found))} |", flush=True)
    return table


if __name__ == "__main__":
    main()
