# Batch norm on eight devices with few images each: statistics of one device, or of all.
#
#   python examples/studies/synchronized.py --tiny              handwritten digits, seconds
#   python examples/studies/synchronized.py --data-dir DIR      CIFAR-10, two minutes
#
# The devices are the rows of a vmap with an axis name: the numbers are those of eight devices.
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import study
from command import progress
from study import Table, spread

import jaxbn

DEVICES = 8
KINDS = {  # images on a device, and whether the images of a class lie together
    "2": (2, False),
    "4": (4, False),
    "16": (16, False),
    "4, sorted by class": (4, True),
}


def pooled_norm(train):
    axis_name = "devices" if train else None
    return jaxbn.linen.BatchNorm(use_running_average=not train, momentum=0.9, axis_name=axis_name)


def of_device_0(stats):
    return jax.tree.map(lambda v: v[0], stats)


@jax.jit
def of_all_devices(stats):
    sync = partial(jaxbn.sync_state, axis_name="devices")
    return of_device_0(jax.vmap(sync, axis_name="devices")(stats))


WAYS = {  # the norm in training, and the statistics that eval takes of those of the devices
    "its own images; eval by device 0": (study.batch_norm, of_device_0),
    "its own images; eval by all": (study.batch_norm, of_all_devices),
    "the images of all devices": (pooled_norm, of_device_0),
    "each image alone: group norm": (study.group_norm, of_device_0),
}


def on_devices(apply, variables, x, **options):
    """The results of apply for x in DEVICES parts; batch_stats have an axis of devices first."""

    def one(stats, x):
        return apply({**variables, "batch_stats": stats}, x, **options)

    parts = x.reshape(DEVICES, -1, *x.shape[1:])
    logits, new = jax.vmap(one, axis_name="devices")(variables["batch_stats"], parts)
    return logits.reshape(len(x), -1), new


# The arguments of main for --tiny.
TINY = {
    "images": 640,
    "width": 4,
    "kinds": {"2": (2, False), "4": (4, False)},
}


def main(data, seeds=3, images=12_800, width=8, depth=1, kinds=KINDS, rate=0.3):
    """Test accuracy by what a device normalizes by, and by the images on a device."""
    nets = {norm: study.Net(norm, width, depth) for norm, _ in WAYS.values()}
    train = {norm: partial(on_devices, net.apply) for norm, net in nets.items()}
    scores = {}
    for kind, norm, seed in progress([*itertools.product(kinds, nets, range(seeds))], "devices"):
        each, by_class = kinds[kind]
        rows = study.drawn(seed, len(data.y), images // (DEVICES * each), DEVICES * each)
        if by_class:
            rows = np.take_along_axis(rows, np.asarray(data.y)[rows].argsort(1), 1)
        before = study.start(nets[norm], seed)
        stats = before.get("batch_stats", {})  # group norm has none
        stats = jax.tree.map(lambda v: jnp.broadcast_to(v, (DEVICES, *v.shape)), stats)
        before = {**before, "batch_stats": stats}
        its_rate = rate * (DEVICES * each / 64) ** 0.5
        after, _ = study.fit(train[norm], before, data.x, data.y, rows, its_rate)
        for way, (its_norm, chosen) in WAYS.items():
            if its_norm is norm:
                held = {**after, "batch_stats": chosen(after["batch_stats"])}
                score = study.accuracy(nets[norm].apply, held, data.test_x, data.test_y)
                scores.setdefault((way, kind), []).append(score)
    rows = [[way, *(spread(scores[way, kind]) for kind in kinds)] for way in WAYS]
    return (Table(["a device normalizes by", *kinds], rows),)


def picture(rows):
    figure, (axis,) = study.panels(
        "Eight devices with few images each",
        ("", "test accuracy, %: mean and range of the seeds", "images on a device"),
        height=4.6,
    )
    kinds = list(KINDS)[: len(rows[0]) - 1]
    styles = (("#ff7f0e", "v"), ("#2ca02c", "^"), ("#d62728", "o"), ("#1f77b4", "s"))
    for i, ((way, *cells), (color, marker)) in enumerate(zip(rows, styles, strict=True)):
        study.dots(axis, np.arange(len(kinds)) + 0.15 * (i - 1.5), cells, way, color, marker)
    axis.set_yticks(range(len(kinds)), [kind.replace(", ", ",\n") for kind in kinds])
    axis.invert_yaxis()
    figure.legend(
        loc="outside lower center", frameon=False, ncols=2, title="a device normalizes by"
    )
    return figure


if __name__ == "__main__":
    study.run(
        main,
        picture,
        "Batch norm on eight devices with few images each: statistics of one device, or of all.",
        "Two minutes",
        TINY,
    )
