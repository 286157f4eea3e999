"""What watching a ResNet-18's training costs: `python -m benchmarks.studies.watching [--tiny]`.

The CIFAR example's own step, plain and watched, two programs of which a loop calls the second at
every 50th step; and the record of the second written by all three writers; without and with the
options of `watch`. CPU time of this process, all of its threads, so that what else the machine does
counts little; the plain and the watched step take turns. On an accelerator, where that is not what
a step takes, wall time.
"""

import functools
import itertools
import pathlib
import sys
import tempfile
import time

import jax
import numpy as np
import optax
from flax import nnx

from benchmarks.reporting import command, report
from jaxbn import watch, writers

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "cifar10"
EVERY = 50
OPTIONS = {
    "": {},
    ", shards and histogram": {"shards": 4, "histogram": True},
    ", kernels": {"kernels": True},
}
SIZES = {"tiny": (4, 4, 2), "usual": (64, 16, 9), "full": (64, 128, 15)}  # width, batch, rounds


def make(api: str, width: int):
    """The example's steps: ResNet-18 in CIFAR form, SGD with Nesterov momentum."""
    sys.path.insert(0, str(EXAMPLE))
    import model
    import steps
    from optimizer import smooth_cross_entropy

    tx = optax.sgd(0.05, momentum=0.9, nesterov=True)

    def loss(logits, labels):
        return smooth_cross_entropy(logits, labels, 0.1)

    options = {"name": "resnet18", "block": "post", "width": width}
    if api == "linen":
        import model_linen

        return steps.Linen(model.build(model_linen, **options), tx, loss)
    import model_nnx

    return steps.Nnx(lambda rngs: model.build(model_nnx, **options, rngs=rngs), tx, loss)


def kernels_of(made, api: str, state, images) -> dict[str, str]:
    """The kernel before each norm layer."""
    if api == "nnx":
        model, _ = nnx.merge(made.graphdef, state)
        return watch.kernels(model, images, train=True)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return watch.kernels(made.model.apply, variables, images, train=True, mutable=["batch_stats"])


def seconds(call, *arguments):
    """(seconds, what the call returns) once it is there."""
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    begun = clock()
    out = jax.block_until_ready(call(*arguments))
    return clock() - begun, out


def measure(api: str, size: str, folder: str, **options) -> dict[str, np.ndarray]:
    """Seconds [rounds] of the plain step, of the watched one, and of writing its record."""
    width, batch, rounds = SIZES[size]
    made = make(api, width)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(batch, 32, 32, 3)).astype(np.float32)
    labels = rng.integers(0, 10, batch, np.int32)
    state = jax.jit(made.init)(jax.random.key(0))
    if options.get("kernels"):
        options["kernels"] = kernels_of(made, api, state, images)
    plain = jax.jit(made.train).lower(state, images, labels).compile()
    watched = jax.jit(functools.partial(made.train, watched=True, **options))
    watched = watched.lower(state, images, labels).compile()
    times = {"plain": [], "watched": [], "written": []}
    with writers.open(writers.NAMES, folder, every=EVERY, port=0) as log:
        for i in range(-1, rounds):  # one to warm up
            taken = {}
            taken["plain"], _ = seconds(plain, state, images, labels)
            taken["watched"], (*_, seen) = seconds(watched, state, images, labels)
            taken["written"], _ = seconds(log.write, i, seen)
            for name, value in taken.items() if i >= 0 else ():
                times[name].append(value)
    return {name: np.array(values) for name, values in times.items()}


def run(size="usual") -> list[report.Table]:
    rows = []
    for api, (named, options) in itertools.product(("linen", "nnx"), OPTIONS.items()):
        with tempfile.TemporaryDirectory() as folder:
            t = measure(api, size, folder, **options)
        plain = np.median(t["plain"])
        extra = (t["watched"] - t["plain"] + t["written"]) / plain  # [rounds], steps a record
        low, middle, high = np.percentile(100 * extra / EVERY, [25, 50, 75])
        ratio = np.median(t["watched"] / t["plain"])
        spread = f"{low:.2f} to {high:.2f}"
        rows.append(
            [api + named, 1e3 * plain, ratio, 1e3 * np.median(t["written"]), middle, spread]
        )
    width, batch, rounds = SIZES[size]
    clock = "CPU time of the process" if jax.default_backend() == "cpu" else "wall time"
    return [
        report.Table(
            f"Watching a ResNet-18 of width {width}, batch {batch}, every {EVERY} steps",
            ["step", "plain ms", "watched / plain", "write ms", "overhead %", "quartiles"],
            rows,
            [
                f"{clock}; medians of {rounds} rounds in which both steps take turns. Write: the "
                "record to the host, its figures to JSON lines, Prometheus and TensorBoard.",
                f"Overhead: (watched - plain + write) / ({EVERY} plain), what a loop pays that "
                "watches every so many steps. When off it pays nothing: the program is the same.",
            ],
        )
    ]


def main(arguments: list[str]) -> None:
    parser = command.parser("benchmarks.studies.watching", __doc__.split("\n\n")[0])
    command.add_size(parser, full=True)
    for table in run(parser.parse_args(arguments).size):
        report.show(table)
    report.show_environment()


if __name__ == "__main__":
    command.end(main)
