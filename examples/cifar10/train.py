# Train a ResNet with jaxbn: on CIFAR-10 or -100, on handwritten digits, or on images of your own.
#
#   python examples/cifar10/train.py                              whatever data can be had
#   python examples/cifar10/train.py --data cifar10 --epochs 15
#   python examples/cifar10/train.py --data DIR --target 90       a folder of images for each class
#   python examples/cifar10/train.py --api nnx --model resnet18 --block pre --dtype bfloat16

import hosts

if __name__ == "__main__":  # before the long imports: a parent needs none of them
    hosts.supervise()

import json
import os
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import model
import norms
import numpy as np
import options
import report
import stop
from checkpoint import CheckpointError, Checkpoints, SaveError
from command import DataError, one_line, told
from data import NAMES, About, Data, load
from loop import Loop, make_mesh, put_data
from optimizer import schedule, sgd, smooth_cross_entropy
from rich.console import Console
from steps import Linen, Nnx

from jaxbn import writers


def make_steps(args, about: About):
    """The model, the optimizer and the loss, as linen or as nnx."""
    count = about.train // args.batch  # steps an epoch
    tx = sgd(schedule(args.schedule, args.lr, args.epochs * count), args.weight_decay)
    loss = partial(smooth_cross_entropy, smoothing=args.smoothing)
    kind = {"name": args.model, "block": args.block, "stem": args.stem, "width": args.width}
    kind |= {"classes": len(about.classes), "dtype": args.dtype}
    if args.api == "linen":
        import model_linen

        network = model.build(model_linen, **kind, norm=norms.linen(args))
        return Linen(network, tx, loss, about.shape)
    import model_nnx

    make = partial(model.build, model_nnx, **kind, norm=norms.nnx(args))
    return Nnx(lambda rngs: make(rngs=rngs), tx, loss)


def train_one_epoch(loop, state, key, x, y, scan: bool, show, watch, asked, first: int, start=0):
    """
    Every image once, or until a SIGTERM: the steps from `start` on of an epoch whose first step
    is the run's step `first`. Loss and accuracy of each step come back as [2, steps done].
    `show(steps done, loss, accuracy)` as it goes on.
    """
    if scan:  # all or nothing
        if asked.now():
            return state, np.empty((2, 0))
        state, metrics = loop.train_epoch(state, key, x, y)  # [steps], [steps]
        return state, np.stack(jax.device_get(metrics))
    metrics, seen = [], {}
    for i in range(start, loop.count):
        if asked.now():
            break
        before = seen
        step = loop.watched_step if watch.due(first + i) else loop.train_step
        state, new, seen = step(state, key, x, y, i)
        if metrics:  # look at the step before: the device has this one to work on meanwhile
            metrics[-1] = jax.device_get(metrics[-1])
            show(i, *metrics[-1])
        if before:
            watch.write(first + i - 1, before)
        metrics.append(new)
    if seen:
        watch.write(first + start + len(metrics) - 1, seen)
    return state, np.reshape(jax.device_get(metrics), (-1, 2)).T


def train(args, data: Data, folder: Path, console: Console, watch: writers.Log, asked) -> dict:
    mesh = make_mesh(args.devices)
    arrays = put_data(data, mesh, args.eval_batch)
    steps = make_steps(args, data.about)
    loop = Loop(steps, data, mesh, args.batch, jnp.dtype(args.dtype), args.cutout)

    init_key, data_key = jax.random.split(jax.random.key(args.seed))
    state = loop.init(init_key)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(steps.params(state)))
    checkpoints, done, totals = Checkpoints(folder / "checkpoints", args.keep), 0, np.zeros(2)
    checkpoints.clear()
    if args.resume:
        done, state, totals, damaged = checkpoints.newest(state)
        checkpoints.remove(damaged)
        watch.rewind(done)
        for other in damaged:
            console.print(f"{checkpoints.folder}/{other} was damaged, and is removed")
    epochs, start = divmod(done, loop.count)
    log = report.Log(folder / "metrics.jsonl", epochs, writes=jax.process_index() == 0)
    if log.missing:
        console.print(f"{log.path}: {log.missing} of {epochs} epochs not found, and left out")
    if done:
        part = f" and {start} of {loop.count} steps" if start else ""
        console.print(f"Resumed after epoch {epochs}{part}")

    console.print(report.HEADER)
    with report.progress(console) as bar:
        total = args.epochs * loop.count
        task = bar.add_task("", total=total, epoch=epochs + 1, status="compiling")
        for epoch in range(epochs + 1, args.epochs + 1):
            if reached(args, log.rows):
                break
            begun, first = time.perf_counter(), (epoch - 1) * loop.count

            def show(i, loss, accuracy, epoch=epoch, begun=begun, first=first, start=start):
                rate = (i - start) * args.batch / (time.perf_counter() - begun)
                status = f"loss {loss:.3f}  accuracy {accuracy:6.2%}  {rate:,.0f} images/s"
                bar.update(task, completed=first + i, epoch=epoch, status=status)

            # One key an epoch, one fold of it a step: an epoch is the same however it was reached.
            shuffle_key, augment_key = jax.random.split(jax.random.fold_in(data_key, epoch))
            x, y = loop.shuffle(shuffle_key, arrays.train_x, arrays.train_y)
            state, metrics = train_one_epoch(
                loop, state, augment_key, x, y, args.scan_epoch, show, watch, asked, first, start
            )
            for step in np.float64(metrics.T):  # one by one: the same sum however it was reached
                totals = totals + step
            done = first + start + len(metrics.T)
            if done < epoch * loop.count:
                if len(metrics.T):
                    checkpoints.save(done, state, totals)
                raise stop.Stopped(done)
            trained = time.perf_counter() - begun
            bar.update(task, completed=epoch * loop.count)
            test_loss, test_accuracy, test_count = loop.evaluate(state, arrays)
            seconds = time.perf_counter() - begun
            row = (
                epoch,
                *(totals / loop.count).tolist(),
                test_loss,
                test_accuracy,
                test_count,
                (loop.count - start) * args.batch / trained,
                seconds,
            )
            log.add(dict(zip(report.FIELDS, row, strict=True)))
            start, totals = 0, np.zeros(2)
            checkpoints.save(done, state, totals)
            console.print(report.line(log.rows[-1], seconds * (args.epochs - epoch)))
    if reached(args, log.rows):
        console.print(f"Target of {args.target:g} % reached in epoch {log.rows[-1]['epoch']}")
    if not log.rows:
        raise CheckpointError(f"{log.path}: no epoch in it, and none is left to train")
    return {"parameters": parameters, "state": state, "rows": log.rows, **log.rows[-1]}


def reached(args, rows: list[dict]) -> bool:
    """Whether the last epoch has the test accuracy that was asked for."""
    return args.target is not None and rows and 100 * rows[-1]["test_accuracy"] >= args.target


def begin(parser, args) -> tuple:
    """The data, the folder of the run, its writers and its console, agreed in all processes."""
    try:
        hosts.connect(args)
    except ValueError as error:
        parser.error(str(error))
    first = jax.process_index() == 0  # the one process that prints and writes
    console = Console(highlight=False, markup=False, soft_wrap=True, quiet=not first)
    problem, folder = None, args.runs
    try:
        most = 224 if args.stem == "imagenet" else 32
        data = load(args.data, args.data_dir, console.print, args.image_size, most)
        options.fill_in(args, data)
        data = data._replace(flip=args.flip)
        options.check(args, data)
        folder = options.find_run(args) if first else args.runs / args.name
    except (DataError, ValueError, OSError) as error:
        problem = told(error)
    terms = json.dumps([args.name, args.resume, options.config(args)])
    if problem := hosts.agree(problem, terms):
        parser.error(problem)
    try:  # all are agreed: from here on there is something written
        if first and not args.resume:
            options.begin_run(args, folder)
        watch = writers.open(args.watch, folder, every=args.watch_every, port=args.watch_port)
    except (ValueError, OSError) as error:
        problem = told(error)
    if problem := hosts.agree(problem, terms):
        parser.error(problem)
    return data, folder, watch, console


def main(argv: list[str] | None = None) -> dict:
    parser = options.parser()
    args = parser.parse_args(argv)
    with one_line(parser):  # a download goes on next time from where it stopped
        return run(parser, args, argv, *begin(parser, args))


def run(parser, args, argv, data: Data, folder: Path, watch: writers.Log, console: Console) -> dict:
    """The run, from its first line of text to its curves."""
    first = jax.process_index() == 0
    device = f"{args.devices} x {jax.devices()[0].device_kind}"
    if jax.process_count() > 1:
        device += f" in {jax.process_count()} processes"
    if jax.default_backend() == "cpu":
        device += f", {os.cpu_count()} cores"
    about = data.about
    norm = "" if args.norm == "sync" else f", norm {args.norm}"
    what = f"{args.model} width {args.width} ({args.api}, {args.dtype}{norm})"
    console.print(
        f"{data.name}: {about.train:,} training and {about.test:,} test images of "
        f"{len(about.classes)} classes, {about.shape[0]}x{about.shape[1]} pixels, "
        f"{args.epochs} epoch{'s' * (args.epochs > 1)} of batch {args.batch}\n{what} on {device}, "
        f"jax {jax.__version__}, flax {flax.__version__}, in {folder}"
    )
    for writer in watch.writers:
        console.print(f"Norm layers, every {args.watch_every} steps: {writer}")
    if args.scan_epoch and jax.default_backend() == "cpu":
        console.print("--scan-epoch is for GPU and TPU: XLA's CPU convolutions are slow in a loop")
    resume = f"Go on with: {options.go_on(argv, args, folder)}"
    try:
        with watch, stop.Asked() as asked:
            result = train(args, data, folder, console, watch, asked)
        if first:
            finish(args, data, folder, console, result, f"{what} on {data.name}", device)
    except stop.Stopped as stopped:
        parser.exit(143, f"Stopped by SIGTERM after {stopped.steps} steps. {resume}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"Stopped. {resume}\n")
    except CheckpointError as error:
        parser.error(f"--resume: {error}")
    except Exception as error:
        ours = isinstance(error, (SaveError, DataError, OSError))
        if jax.process_count() > 1:
            why = f"train.py: error: {told(error)}" if ours else traceback.format_exc()
            hosts.give_up(args.heartbeat, why)
        if ours:
            parser.error(f"{told(error)}. {resume}")
        raise
    return result


def finish(args, data: Data, folder: Path, console: Console, result: dict, what: str, device: str):
    """The table, and the curves."""
    rows = result["rows"]
    rates = [row["images_per_s"] for row in rows]
    target = []
    if args.target is not None:
        said = "reached" if reached(args, rows) else "not reached"
        target = [("target", f"{args.target:.2f}", f"% {said}")]
    console.print(
        report.table(
            f"{what}, {device}",
            [
                ("test accuracy", f"{result['test_accuracy'] * 100:.2f}", "%"),
                *target,
                ("test loss", f"{result['test_loss']:.4f}", "nats"),
                ("test images", f"{result['test_images']:,}", "each once"),
                ("epochs", f"{len(rows)}", f"of {len(data.train_y):,} images"),
                ("time, training and test", f"{sum(r['seconds'] for r in rows) / 60:.1f}", "min"),
                ("speed, median epoch", f"{np.median(rates):,.0f}", "images/s"),
                ("parameters", f"{result['parameters']:,}", ""),
                ("seed", f"{args.seed}", ""),
            ],
        )
    )
    report.curves(folder / "curves.png", rows, f"{what}, seed {args.seed}")
    console.print(f"Curves: {folder}/curves.png   Metrics: {folder}/metrics.jsonl")
    python = sys.orig_argv[0]  # `make demo` runs .venv's, which alone has the packages
    here = os.path.dirname(os.path.abspath(__file__))
    here = here.removeprefix(os.path.join(os.getcwd(), ""))
    if args.data in NAMES:
        more = f"train on images of your own: {python} {here}/train.py --data FOLDER"
    else:
        more = f"fold and export: {python} {here}/ship.py {folder}"
    console.print(f"Try next: {python} {here}/predict.py {folder} IMAGE, or {more}")


if __name__ == "__main__":
    # The same seed gives the same bits on a GPU too; CPU and TPU need no telling.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"
    main()
