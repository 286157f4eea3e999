# From a run's checkpoint to files that others serve: fold → StableHLO, ONNX → int8.
#
#   python examples/cifar10/train.py --name mine
#   python examples/cifar10/ship.py runs/mine
#   python examples/cifar10/ship.py runs/mine --recalibrate    # statistics anew before folding
#
# One table at the end: what each stage costs in accuracy, and what it is worth in bytes and time,
# each beside the stage before. A file that differs too much from that stage is kept for a look, as
# NAME.failed.onnx or NAME.failed.stablehlo, and ends the stages. Beside each other file lies its
# manifest: the checkpoint, what was folded, the errors, the checksums. Exit status 1 if a file
# failed or a stage loses more accuracy than --bound allows, 2 if the run cannot be read.

import itertools
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from augment import normalize
from checkpoint import last_checkpoint
from command import DataError, Parser, between, one_line, told
from data import load
from flax import nnx
from options import run_options
from rich.console import Console
from rich.table import Table
from train import make_steps

import jaxbn

LATENCIES = (1, 64)  # batch sizes


class Stage(NamedTuple):
    name: str
    run: Callable  # images [B, H, W, 3] float32 → logits [B, classes]
    bytes: int  # of the file; of the weights where there is none
    failure: str = ""  # why the file is not what it should be
    done: Any = None  # what the export returned


def parser() -> Parser:
    p = Parser(
        prog="ship.py",
        description="Export a trained run; see what each stage costs.",
        examples=[
            "python examples/cifar10/ship.py runs/mine",
            "python examples/cifar10/ship.py runs/mine --recalibrate --bound 0.5",
            "python examples/cifar10/ship.py runs/mine --data-dir DIR --out served",
        ],
    )
    p.add_argument("run", type=Path, help="folder of a run of train.py")
    p.add_argument("--data-dir", type=Path, help="where the files of CIFAR's binary version lie")
    p.add_argument("--out", type=Path, help="folder of the files (RUN/export)")
    p.add_argument("--recalibrate", action="store_true", help="compute the statistics anew first")
    p.add_argument("--images", type=between(int, 64), default=4096, help="to recalibrate on (4096)")
    p.add_argument("--calibrate", type=between(int, 8), default=256, help="for int8's ranges (256)")
    p.add_argument("--test", type=between(int, 64), default=10_000, help="test images (10000)")
    p.add_argument("--repeats", type=between(int, 5), default=50, help="timed calls (50)")
    p.add_argument(
        "--bound", type=between(float, 0, 100), default=1.0, help="allowed loss in %% points (1)"
    )
    return p


def read_run(folder: Path, data_dir: Path | None):
    """The data set; the last checkpoint, with `apply` and linen's variables, or an nnx model."""
    args = run_options(folder)
    most = 224 if args.stem == "imagenet" else 32
    data = load(args.data, data_dir, size=args.image_size, most=most)
    steps = make_steps(args, data.about)
    place, state = last_checkpoint(folder, lambda: jax.jit(steps.init)(jax.random.key(0)))
    if args.api == "linen":
        variables = {"params": state.params, "batch_stats": state.batch_stats}

        def apply(variables, x, **options):
            return steps.model.apply(variables, x, train=False, **options)

        return data, place, apply, variables
    model, _ = nnx.merge(steps.graphdef, state)
    return data, place, lambda model, x: model(x, train=False), model


def images(data, rows, split="train") -> np.ndarray:
    """[B, H, W, 3] float32, as the network takes them."""
    x = data.train_x if split == "train" else data.test_x
    return np.asarray(normalize(x[np.asarray(rows)], data.mean, data.std))


def exported(name: str, path: Path, write: Callable, load: Callable, **made_of) -> Stage:
    """A stage with a file and its manifest. What is beyond tolerance stays beside their place."""
    failed, failure = path.with_suffix(f".failed{path.suffix}"), ""
    failed.unlink(missing_ok=True)
    try:
        done = write(path)
    except ValueError as error:
        done = write(failed, tolerance=math.inf)  # raises again if it is not the tolerance
        failure = f"{str(error).partition('; nothing was written')[0]}; see {failed}"
    else:
        jaxbn.export.manifest(done, **made_of)
    return Stage(name, load(done.path), done.bytes, failure, done)


def stages(data, place, apply, model, args, out: Path, say) -> Iterator[Stage]:
    """The network in its forms, each made from the one before."""
    frozen = jax.tree.map(lambda leaf: leaf, model)  # nnx models are updated in place
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model))

    def closed(model):
        return lambda x: apply(model, x)

    yield Stage("checkpoint", jax.jit(closed(frozen)), weights)
    rows = np.random.default_rng(0).permutation(len(data.train_y))[: args.images]
    batches = [images(data, rows[i : i + 256]) for i in range(0, len(rows) - 1, 256)]
    if args.recalibrate:
        model = jaxbn.recalibrate(apply, model, batches)
        yield Stage("recalibrated", jax.jit(closed(model)), weights)
    x = batches[0][:64]
    folded, report = jaxbn.fold(closed(model), x)
    say(str(report))
    yield Stage("folded", folded, weights)

    def stablehlo(path, **options):
        return jaxbn.export.stablehlo(folded, x, path, **options)

    def onnx(path, **options):
        return jaxbn.export.onnx(folded, x, path, **options)

    def int8(path, **options):
        starts = range(0, min(args.calibrate, len(rows)), 64)
        some = [images(data, rows[i : i + 64]) for i in starts]
        done = jaxbn.export.int8(out / "model.onnx", some, path, **options)
        say(str(done))
        return done

    def loaded(path):
        return jax.jit(jaxbn.export.load_stablehlo(path))

    session, made_of = jaxbn.export.session, {"folded": report, "checkpoint": place}
    yield exported("StableHLO", out / "model.stablehlo", stablehlo, loaded, **made_of)
    yield (source := exported("ONNX", out / "model.onnx", onnx, session, **made_of))
    made_of["source"] = source.done
    yield exported("ONNX int8", out / "model.int8.onnx", int8, session, **made_of)


def measure(stage: Stage, data, args, reference) -> dict:
    """Accuracy, largest error over the reference's largest logit, and latencies in ms."""
    count, size, right, error, largest, logits = min(args.test, len(data.test_y)), 500, 0, 0, 0, []
    for at in range(0, count, size):
        rows = np.arange(at, min(at + size, count))
        y = np.asarray(stage.run(images(data, rows, "test")))
        right += int((y.argmax(1) == data.test_y[rows]).sum())
        if reference is not None:
            error = max(error, np.abs(y - reference[at // size]).max())
            largest = max(largest, np.abs(reference[at // size]).max())
        logits.append(y)
    row = {"accuracy": right / count, "error": error / largest if largest else 0.0}
    for batch in LATENCIES:
        x = images(data, np.arange(batch) % count, "test")
        times = []
        for i in range(args.repeats + 3):
            start = time.perf_counter()
            np.asarray(stage.run(x))
            if i >= 3:  # the first calls compile and warm up
                times.append(1000 * (time.perf_counter() - start))
        row[f"p50_{batch}"], row[f"p95_{batch}"] = np.percentile(times, [50, 95])
    return {"stage": stage.name, "bytes": stage.bytes, "logits": logits, **row}


def table(rows: list[dict], args, tested: int) -> Table:
    device = jax.devices()[0].device_kind
    title = (
        f"{args.run}, {tested:,} test images. Change and error: from the stage before, the error\n"
        f"over its largest logit. Latency: p50 / p95 of {args.repeats} calls, {device}."
    )
    out = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    out.add_column("stage")
    for name in ("accuracy", "change", "error", "kB", *(f"batch {b}, ms" for b in LATENCIES)):
        out.add_column(name, justify="right", no_wrap=True)
    for before, row in itertools.pairwise([rows[0], *rows]):
        change = 100 * (row["accuracy"] - before["accuracy"])
        out.add_row(
            row["stage"],
            f"{row['accuracy']:.2%}",
            f"{change:+.2f}",
            "" if row["error"] is None else f"{row['error']:.1e}",
            f"{row['bytes'] / 1000:,.0f}",
            *(f"{row[f'p50_{b}']:.2f} / {row[f'p95_{b}']:.2f}" for b in LATENCIES),
        )
    return out


def main(argv: list[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    with one_line(p):
        return shipped(args)


def shipped(args) -> int:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    try:
        data, *network = read_run(args.run, args.data_dir)
    except ValueError as error:
        raise DataError(told(error)) from None
    out = args.out or args.run / "export"
    out.mkdir(exist_ok=True)
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # it warns of types it then infers
    rows: list[dict] = []
    failure, made = "", stages(data, *network, args, out, console.print)
    while not failure:
        with console.status("recalibrating, folding, exporting"):
            stage = next(made, None)
        if stage is None:
            break
        with console.status(f"measuring: {stage.name}"):
            rows.append(measure(stage, data, args, rows[-1]["logits"] if rows else None))
        if stage.name in ("checkpoint", "recalibrated"):
            rows[-1]["error"] = None  # nothing before, or changed on purpose
        failure = stage.failure
    tested = min(args.test, len(data.test_y))
    console.print(table(rows, args, tested))
    files = sorted(path.name for path in out.glob("model.*") if path.suffix != ".json")
    console.print(f"Files: {', '.join(files)} in {out}, with a manifest beside each")
    problems = [failure] if failure else []
    for before, row in itertools.pairwise(rows):
        lost = 100 * (before["accuracy"] - row["accuracy"])
        if lost > args.bound:
            problems.append(
                f"{row['stage']} loses {lost:.2f} points of accuracy, more than --bound "
                f"{args.bound:g}"
            )
    for problem in problems:
        print(f"ship.py: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
