"""How often sound shards are called skewed: `python -m benchmarks.studies.skewed [--tiny]`.

Batches of independent rows, of 4 pixels that agree with one another, are split into shards and
judged as `jaxbn.health.shards` judges a layer. The share of batches above the bound is the rate of
false alarms, beside the rate that was asked for.
"""

import numpy as np

from benchmarks.reporting import command, report
from jaxbn import Moments
from jaxbn.health import _shards

PIXELS = 4
ASKED = (1e-2, 1e-3, 1e-5)
DRAWS = {
    "Gaussian": lambda rng, shape: rng.standard_normal(shape, np.float32),
    "Laplace": lambda rng, shape: rng.laplace(0, 1, shape),
    "relu": lambda rng, shape: np.maximum(rng.standard_normal(shape, np.float32), 0),
}
SIZES = {  # batches of each kind, shards, rows of a shard
    "tiny": (2000, (8,), (4,)),
    "usual": (100_000, (2, 8), (4, 16)),
}
CHANNELS = 1, 8  # all alike, which is the worst case, and correlated


def batches(rng, draw, some, shards, rows, channels):
    """What layers see of `some` batches: `Shards` of [some · channels, shards]."""
    images = draw(rng, (some, 1, shards, rows, 1))
    own = draw(rng, (some, channels, shards, rows, 1))
    pixels = draw(rng, (some, channels, shards, rows, PIXELS))
    x = (images if channels > 1 else 0) + own + pixels
    mean = x.mean(-1)
    sd = np.sqrt(np.mean((x - mean.mean((-2, -1), keepdims=True)[..., None]) ** 2, -1))

    def moments(v):
        v = v.reshape(some * channels, shards, rows)
        return Moments(np.full(v.shape[:2], float(rows)), v.mean(-1), v.var(-1))

    return _shards.Shards(moments(mean), moments(sd))


def rates(name, number, shards, rows, channels):
    """The share of batches that are above each bound, and below each."""
    rng = np.random.default_rng([shards, rows, channels])
    above, below, done = np.zeros(len(ASKED)), np.zeros(len(ASKED)), 0
    while done < number:
        some = min(number - done, max(1, 2**20 // (shards * rows * channels)))
        of = batches(rng, DRAWS[name], some, shards, rows, channels)
        # As `_shards.spread`, of each batch.
        figures = [np.sqrt(_shards.ratios(v).reshape(some, channels).mean(1)) for v in of]
        for i, asked in enumerate(ASKED):
            low, high = _shards.bounds(of, asked)
            above[i] += (np.maximum(*figures) > high).sum()
            below[i] += (np.maximum(*figures) < low).sum()
        done += some
    return above / number, below / number


def run(size="usual") -> list[report.Table]:
    number, several, of_a_shard = SIZES[size]
    table = []
    for shards in several:
        for rows in of_a_shard:
            for name in DRAWS:
                for channels in CHANNELS:
                    above, below = rates(name, number, shards, rows, channels)
                    shown = [f"{v:.5f}".rstrip("0").rstrip(".") for v in (*above, *below[:2])]
                    table.append([shards, rows, name, channels, *shown])
    columns = [f"skewed, asked {asked:g}" for asked in ASKED]
    columns += [f"repeated, asked {asked:g}" for asked in ASKED[:2]]
    return [
        report.Table(
            f"False alarms of health.shards, share of {number} batches",
            ["shards", "rows of each", "distribution", "channels", *columns],
            table,
            [f"{PIXELS} pixels a row; pixels of a row and channels of a layer are correlated."],
        )
    ]


def main(arguments: list[str]) -> None:
    parser = command.parser("benchmarks.studies.skewed", __doc__.split("\n\n")[0])
    command.add_size(parser)
    for table in run(parser.parse_args(arguments).size):
        report.show(table)
    report.show_environment()


if __name__ == "__main__":
    command.end(main)
