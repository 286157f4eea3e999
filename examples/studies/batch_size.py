# Batch norm, group norm and no norm by the images in a batch, each at the best of three rates.
#
#   python examples/studies/batch_size.py --tiny              handwritten digits, seconds
#   python examples/studies/batch_size.py --data-dir DIR      CIFAR-10, four minutes
import itertools

import study
from command import progress
from study import COLORS, NORMS, Table, spread

SIZES = (2, 4, 8, 16, 64, 256)
FACTORS = (1 / 3, 1, 3)  # of the rate for the size, which is proportional to the square root

# The arguments of main for --tiny.
TINY = {"images": 640, "width": 4, "sizes": (2, 64)}


def main(data, seeds=3, images=12_800, width=8, depth=1, sizes=SIZES, rate=0.3):
    """Test accuracy by size and norm; a seed of its own chooses the rate."""
    nets = {name: study.Net(norm, width, depth) for name, norm in NORMS.items()}

    def score(net, size, rate, seed):
        rows = study.drawn(seed, len(data.y), images // size, size)
        after, _ = study.fit(net.apply, study.start(net, seed), data.x, data.y, rows, rate)
        return study.accuracy(net.apply, after, data.test_x, data.test_y)

    rows = {size: [str(size)] for size in sizes}
    for size, name in progress([*itertools.product(sizes, nets)], "batch sizes"):
        tried = {f * rate * (size / 64) ** 0.5: 0.0 for f in FACTORS}
        for each in tried:
            tried[each] = score(nets[name], size, each, seed=1000)
        best = max(tried, key=tried.get)
        scores = [score(nets[name], size, best, seed) for seed in range(seeds)]
        rows[size] += [spread(scores), f"{best:.2g}"]
    headers = [column for name in nets for column in (name, f"rate, {name}")]
    return (Table(["images in a batch", *headers], list(rows.values())),)


def picture(rows):
    figure, (axis,) = study.panels(
        "Batch size, each norm at the best of three learning rates",
        ("", "images in a batch", "test accuracy, %: mean and range of the seeds"),
        height=4.2,
    )
    sizes = [int(row[0]) for row in rows]
    for i, name in enumerate(NORMS):
        cells = [row[1 + 2 * i] for row in rows]
        study.line(axis, sizes, cells, name, COLORS[name], "osD"[i])
    study.ticks(axis, sizes)
    axis.legend(frameon=False)
    return figure


if __name__ == "__main__":
    study.run(
        main,
        picture,
        "Batch norm, group norm and no norm by the images in a batch, 2 to 256.",
        "Four minutes",
        TINY,
    )
