# Train a ResNet with jaxbn, on CIFAR-10 or on handwritten digits.
#
#   python examples/cifar10/train.py                              whatever data can be had
#   python examples/cifar10/train.py --data cifar10 --epochs 15
#   python examples/cifar10/train.py --api nnx --model resnet18 --block pre --dtype bfloat16

import hosts

if __name__ == "__main__":  # before the long imports: a parent needs none of them
    hosts.supervise()

import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import model
import numpy as np
import options
import report
from checkpoint import Checkpoints
from data import Data, DataError, load
from loop import Loop, make_mesh, put_data
from optimizer import schedule, sgd, smooth_cross_entropy
from rich.console import Console
from steps import Linen, Nnx

from jaxbn import writers


def make_steps(args, count: int):
    """The model, the optimizer and the loss, as linen or as nnx."""
    tx = sgd(schedule(args.schedule, args.lr, args.epochs * count), args.weight_decay)
    loss = partial(smooth_cross_entropy, smoothing=args.smoothing)
    kind = {"name": args.model, "block": args.block, "width": args.width}
    if args.api == "linen":
        import model_linen

        return Linen(model.build(model_linen, **kind, dtype=args.dtype), tx, loss)
    import model_nnx

    make = partial(model.build, model_nnx, **kind, dtype=args.dtype)
    return Nnx(lambda rngs: make(rngs=rngs), tx, loss)


def train_one_epoch(loop: Loop, state, key, x, y, scan: bool, show, watch: writers.Log, first: int):
    """Every image once, from step `first`; `show(steps done, loss, accuracy)` as it goes on."""
    if scan:
        state, metrics = loop.train_epoch(state, key, x, y)  # [steps], [steps]
        return state, jax.device_get(metrics)
    metrics, seen = [], {}
    for i in range(loop.count):
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
        watch.write(first + loop.count - 1, seen)
    return state, np.transpose(jax.device_get(metrics))


def train(args, data: Data, folder: Path, console: Console, watch: writers.Log) -> dict:
    mesh = make_mesh(args.devices)
    arrays = put_data(data, mesh, args.eval_batch)
    steps = make_steps(args, len(data.train_y) // args.batch)
    loop = Loop(steps, data, mesh, args.batch, jnp.dtype(args.dtype), args.cutout)

    init_key, data_key = jax.random.split(jax.random.key(args.seed))
    state = loop.init(init_key)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(steps.params(state)))
    checkpoints = Checkpoints(folder / "checkpoints", args.keep)
    done = checkpoints.latest() if args.resume else 0
    if done:
        state = checkpoints.restore(done, state)
        watch.rewind(done * loop.count)
        console.print(f"Resumed after epoch {done}")
    log = report.Log(folder / "metrics.jsonl", done, writes=jax.process_index() == 0)

    console.print(report.HEADER)
    with report.progress(console) as bar:
        task = bar.add_task("", total=args.epochs * loop.count, epoch=done + 1, status="compiling")
        for epoch in range(done + 1, args.epochs + 1):
            begun, first = time.perf_counter(), (epoch - 1) * loop.count

            def show(i, loss, accuracy, epoch=epoch, begun=begun, first=first):
                rate = i * args.batch / (time.perf_counter() - begun)
                status = f"loss {loss:.3f}  accuracy {accuracy:6.2%}  {rate:,.0f} images/s"
                bar.update(task, completed=first + i, epoch=epoch, status=status)

            # One key an epoch, one fold of it a step: an epoch is the same however it was reached.
            shuffle_key, augment_key = jax.random.split(jax.random.fold_in(data_key, epoch))
            x, y = loop.shuffle(shuffle_key, arrays.train_x, arrays.train_y)
            state, (losses, accuracies) = train_one_epoch(
                loop, state, augment_key, x, y, args.scan_epoch, show, watch, first
            )
            trained = time.perf_counter() - begun
            bar.update(task, completed=epoch * loop.count)
            test_loss, test_accuracy, test_count = loop.evaluate(state, arrays)
            seconds = time.perf_counter() - begun
            log.add(
                {
                    "epoch": epoch,
                    "train_loss": float(np.mean(losses)),
                    "train_accuracy": float(np.mean(accuracies)),
                    "test_loss": test_loss,
                    "test_accuracy": test_accuracy,
                    "test_images": test_count,
                    "images_per_s": loop.count * args.batch / trained,
                    "seconds": seconds,
                }
            )
            checkpoints.save(epoch, state)
            console.print(report.line(log.rows[-1], seconds * (args.epochs - epoch)))
    checkpoints.close()
    last = log.rows[-1]
    return {"parameters": parameters, "state": state, "rows": log.rows, **last}


def main(argv: list[str] | None = None) -> dict:
    parser = options.parser()
    args = parser.parse_args(argv)
    try:
        hosts.connect(args)
    except ValueError as error:
        parser.error(str(error))
    first = jax.process_index() == 0  # the one process that prints and writes
    console = Console(highlight=False, markup=False, soft_wrap=True, quiet=not first)
    problem = None
    try:
        data = load(args.data, args.data_dir, console.print)
        options.fill_in(args, data)
        options.check(args, data)
        folder = options.open_run(args) if first else args.runs / args.name
        watch = writers.open(args.watch, folder, every=args.watch_every, port=args.watch_port)
    except (DataError, ValueError) as error:
        problem = str(error)
    except OSError as error:
        problem = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if problem := hosts.agree(problem, json.dumps([args.name, args.resume, options.config(args)])):
        parser.error(problem)

    device = f"{args.devices} x {jax.devices()[0].device_kind}"
    if jax.process_count() > 1:
        device += f" in {jax.process_count()} processes"
    if jax.default_backend() == "cpu":
        device += f", {os.cpu_count()} cores"
    what = f"{args.model} width {args.width} ({args.api}, {args.dtype})"
    console.print(
        f"{data.name}: {len(data.train_y):,} training and {len(data.test_y):,} test images, "
        f"{args.epochs} epochs of batch {args.batch}\n{what} on {device}, "
        f"jax {jax.__version__}, flax {flax.__version__}, in {folder}"
    )
    for writer in watch.writers:
        console.print(f"Norm layers, every {args.watch_every} steps: {writer}")
    if args.scan_epoch and jax.default_backend() == "cpu":
        console.print("--scan-epoch is for GPU and TPU: XLA's CPU convolutions are slow in a loop")
    try:
        with watch:
            result = train(args, data, folder, console, watch)
    except KeyboardInterrupt:
        console.print(f"Stopped. The same command goes on with --name {folder.name} --resume")
        sys.exit(130)
    except Exception:
        if jax.process_count() > 1:
            hosts.give_up(args.heartbeat)
        raise
    if not first:
        return result

    rows = result["rows"]
    rates = [row["images_per_s"] for row in rows]
    console.print(
        report.table(
            f"{what} on {data.name}, {device}",
            [
                ("test accuracy", f"{result['test_accuracy'] * 100:.2f}", "%"),
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
    report.curves(folder / "curves.png", rows, f"{what} on {data.name}, seed {args.seed}")
    console.print(f"Curves: {folder}/curves.png   Metrics: {folder}/metrics.jsonl")
    return result


if __name__ == "__main__":
    # The same seed gives the same bits on a GPU too; CPU and TPU need no telling.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"
    main()
