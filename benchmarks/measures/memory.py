"""What is kept for backward, and what the compiled program takes; nothing is run.

Of one batch norm, in N, the bytes of x: kept between forward and backward, temporaries, and the
bytes that XLA counts as read and written; and kept of one whose statistics are frozen. Of the
training step of a small ResNet: megabytes.
"""

import functools

import jax
import jax.numpy as jnp

from benchmarks.reporting.report import Chart, Table, track
from benchmarks.subjects import network, peers
from benchmarks.subjects.roads import training

DTYPES = (jnp.float32, jnp.bfloat16)
SHAPES = ((64, 28, 28, 128), (8192, 1024))
SMALL = network.Task("small ResNet", (2, 2, 2), False, 32, 64, 32)
EVAL = {"jaxbn": peers.ours, "Flax linen": peers.linen}
STEP = EVAL | {peers.FUSED: peers.fused}


def compiled(f, *arguments):
    """(temporaries, bytes accessed)."""
    program = jax.jit(f).lower(*arguments).compile()
    return program.memory_analysis().temp_size_in_bytes, program.cost_analysis()["bytes accessed"]


def kept(vjp) -> int:
    """Bytes of the arrays that a function's `jax.vjp` holds."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(vjp))


def of_op(batch_norm, shape, dtype) -> list[float]:
    """In N: kept, temporaries of forward + backward, bytes accessed by forward and by both."""
    x = jax.ShapeDtypeStruct(shape, dtype)
    vector = jax.ShapeDtypeStruct(shape[-1:], jnp.float32)
    pair = (vector, vector)

    def train(x, params, state, mask):
        return batch_norm(x, params, state, train=True, mask=mask)

    def forward(x, params, state):
        return jax.vjp(lambda x, params: train(x, params, state, None), x, params, has_aux=True)[1]

    residuals = kept(jax.eval_shape(forward, x, pair, pair))
    _, read = compiled(train, x, pair, pair, None)
    temporaries, moved = compiled(training(train), x, pair, pair, None, x)
    n = x.size * x.dtype.itemsize
    return [residuals / n, temporaries / n, read / n, moved / n]


def op(size) -> Table:
    rows: list[list[str | float]] = []
    libraries = {n: f for n, f in peers.installed().items() if n != "torch"}
    shapes = SHAPES[1:] if size == "tiny" else SHAPES
    steps = [(d, s, n) for d in DTYPES for s in shapes for n in libraries]
    charts = {
        d: Chart(f"One batch norm, {d.__name__} x of {shapes[-1]}", "bytes, over those of x", {})
        for d in DTYPES
    }
    for dtype, shape, name in track(steps, "memory"):
        start = [dtype.__name__, "x".join(map(str, shape)), name]
        if libraries[name] is None:
            rows.append([*start, "not installed", "", "", ""])
            continue
        try:
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                cells = of_op(libraries[name], shape, dtype)
        except Exception as error:
            rows.append([*start, peers.failure(name, error), "", "", ""])
            continue
        rows.append([*start, *cells])
        titles = ("kept for backward", "temporaries", "accessed, forward", "accessed, both")
        for title, value in zip(titles, cells, strict=True):
            charts[dtype].points.setdefault(name, {})[title] = value
    return Table(
        "Bytes of one batch norm in training, in N, those of x",
        [
            *("dtype", "shape", "library", "kept for\nbackward", "temporaries\nforward + backward"),
            *("accessed\nforward", "accessed\nforward + backward"),
        ],
        rows,
        [
            "Kept: by jax.vjp, shapes and dtypes alone. Temporaries: temp_size_in_bytes of the "
            "compiled program. Accessed: XLA's own count, which knows no caches. Equinox's "
            "channels are moved to the front and back. At the least 1, 0, 3 and 8.",
        ],
        list(charts.values()),
        "memory-op",
    )


def of_eval(batch_norm, shape, dtype) -> list[float]:
    """In N, kept in eval mode: for dx and dparams, and for dx alone."""
    x = jax.ShapeDtypeStruct(shape, dtype)
    vector = jax.ShapeDtypeStruct(shape[-1:], jnp.float32)
    pair = (vector, vector)

    def forward(x, params, state, trained):
        def f(x, weights):
            return batch_norm(x, weights if trained else params, state, train=False)[0]

        return jax.vjp(f, x, params)[1] if trained else jax.vjp(lambda x: f(x, None), x)[1]

    n = x.size * x.dtype.itemsize
    both = (functools.partial(forward, trained=trained) for trained in (True, False))
    return [kept(jax.eval_shape(f, x, pair, pair)) / n for f in both]


def eval_mode() -> Table:
    rows: list[list[str | float]] = []
    shape = SHAPES[1]
    for dtype in DTYPES:
        for name, batch_norm in EVAL.items():
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                cells = of_eval(batch_norm, shape, dtype)
            rows.append([dtype.__name__, "x".join(map(str, shape)), name, *cells])
    return Table(
        "Bytes kept for backward by one batch norm in eval mode, in N, those of x",
        ["dtype", "shape", "library", "scale and bias\ntrained", "scale and bias\nfrozen"],
        rows,
        [
            "Fine-tuning with frozen statistics: by jax.vjp, shapes and dtypes alone. At the least "
            "1 and 0.",
        ],
        key="memory-eval",
    )


def of_step(batch_norm, dtype, task) -> tuple[int, int]:
    """(bytes kept for backward, bytes of temporaries) of one step."""
    model = task.model(batch_norm, dtype)
    arguments = task.shapes(model)
    _, vjp, _ = jax.eval_shape(functools.partial(network.forward, model), *arguments)
    temporaries, _ = compiled(functools.partial(network.step, model), *arguments)
    return kept(vjp), temporaries


def step(task=SMALL) -> Table:
    rows: list[list[str | float]] = []
    for dtype in DTYPES:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            measured = {name: of_step(f, dtype, task) for name, f in STEP.items()}
        flax_kept, flax_temp = measured["Flax linen"]
        for name, (residuals, temporaries) in measured.items():
            cells = (residuals / 1e6, residuals / flax_kept, temporaries / 1e6)
            rows.append([f"{dtype.__name__}, {name}", *cells, temporaries / flax_temp])
    return Table(
        f"Memory of a training step: {task}",
        ["norm", "kept for backward, MB", "of Flax's", "compiled temporaries, MB", "of Flax's"],
        rows,
        [
            f"Stages {task.stages}. Kept: all that forward hands to backward, weights and "
            "convolutions included. Temporaries: temp_size_in_bytes of the compiled step.",
        ],
        key="memory-step",
    )


def run(size="usual") -> list[Table]:
    task = SMALL._replace(stages=(1,)) if size == "tiny" else SMALL
    return [op(size), eval_mode(), step(task)]
