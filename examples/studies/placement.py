# Where the norm of a residual block goes, by depth: after the convolution (post), before it (pre),
# or after the activation; and no norm.
#
#   python examples/studies/placement.py --tiny              handwritten digits, seconds
#   python examples/studies/placement.py --data-dir DIR      CIFAR-10, seven minutes
import itertools

import flax.linen as nn
import study
from command import progress
from study import Table, spread

PLACES = {
    "post": "relu(x + norm(conv(x)))",
    "pre": "x + conv(relu(norm(x)))",
    "after": "x + norm(relu(conv(x)))",
    "none": "relu(x + conv(x))",
}
COLORS = dict(zip(PLACES, ("#1f77b4", "#d62728", "#2ca02c", "#555555"), strict=True))
DEPTHS = (1, 3, 9)  # blocks a stage
RATES = (0.1, 1.0)


def norm_of(place, train):
    """The norm of a network, or what does nothing in its place."""
    return study.batch_norm(train) if place != "none" else lambda x: x


class Block(nn.Module):
    """A convolution and a norm beside the identity."""

    place: str
    train: bool

    @nn.compact
    def __call__(self, x):  # [B, H, W, C] → [B, H, W, C]
        norm = norm_of(self.place, self.train)
        conv = study.Conv(x.shape[-1], use_bias=self.place == "none")
        if self.place == "pre":
            return x + conv(nn.relu(norm(x)))
        if self.place == "after":
            return x + norm(nn.relu(conv(x)))
        return nn.relu(x + norm(conv(x)))


class Net(nn.Module):
    """Three stages of blocks; a convolution and its norm lead into each."""

    place: str
    width: int
    depth: int  # blocks a stage

    @nn.compact
    def __call__(self, x, train):  # [B, 16, 16, 3] → [B, 10]
        for stage in range(3):
            x = study.Conv(self.width * 2**stage, 2, use_bias=self.place == "none")(x)
            x = nn.relu(norm_of(self.place, train)(x))
            blocks = nn.scan(  # compiled once, whatever the depth
                lambda block, x, _: (block(x), None),
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True},
                length=self.depth,
            )
            x, _ = blocks(Block(self.place, train), x, None)
        if self.place == "pre":  # its last block ends in a sum
            x = nn.relu(norm_of(self.place, train)(x))
        return nn.Dense(10)(x.mean((1, 2)))


# The arguments of main for --tiny.
TINY = {"steps": 20, "width": 4, "depths": (2,), "rates": (0.1,)}


def main(data, seeds=3, steps=300, batch=64, width=8, depths=DEPTHS, rates=RATES):
    """Test accuracy by depth and place, a table for each rate."""
    scores = {}
    for depth, place in progress([*itertools.product(depths, PLACES)], "placement"):
        net = Net(place, width, depth)
        for rate, seed in itertools.product(rates, range(seeds)):
            rows = study.drawn(seed, len(data.y), steps, batch)
            after, _ = study.fit(net.apply, study.start(net, seed), data.x, data.y, rows, rate)
            score = study.accuracy(net.apply, after, data.test_x, data.test_y)
            scores.setdefault((depth, rate, place), []).append(score)
    return tuple(
        Table(
            [f"convolutions, rate {rate:g}", *PLACES],
            [[f"{3 + 3 * d}", *(spread(scores[d, rate, p]) for p in PLACES)] for d in depths],
        )
        for rate in rates
    )


def picture(*tables):
    rates = RATES[: len(tables)]
    figure, axes = study.panels(
        "Where the norm of a residual block goes: mean and range of the seeds",
        *((f"learning rate {rate:g}", "convolutions", "test accuracy, %") for rate in rates),
        height=4.2,
    )
    for axis in axes[1:]:
        axis.sharey(axes[0])
    for rows, axis in zip(tables, axes, strict=True):
        depths = [int(row[0]) for row in rows]
        for i, (place, block) in enumerate(PLACES.items()):
            cells = [row[1 + i] for row in rows]
            study.line(axis, depths, cells, f"{place}: {block}", COLORS[place], "osD^"[i])
        study.ticks(axis, depths)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False, ncols=2)
    return figure


if __name__ == "__main__":
    study.run(
        main,
        picture,
        "Where the norm of a residual block goes, by depth and learning rate.",
        "Seven minutes",
        TINY,
    )
