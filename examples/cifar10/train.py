# Train a ResNet with jaxbn, on CIFAR-10 or on handwritten digits.
#
#   python examples/cifar10/train.py                              whatever data can be had
#   python examples/cifar10/train.py --data cifar10 --epochs 15
#   python examples/cifar10/train.py --api nnx --model resnet18 --block pre --dtype bfloat16

import argparse
import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import model
import numpy as np
import report
from checkpoint import Checkpoints
from data import Data, DataError, load
from loop import Loop, make_mesh, put_data
from optimizer import schedule, sgd, smooth_cross_entropy
from rich.console import Console
from steps import Linen, Nnx


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the usage above it
        self.exit(2, f"{self.prog}: error: {message}\n")


def between(kind, low, high=float("inf")):
    def convert(text):
        value = kind(text)
        if not low <= value <= high:
            limit = f"at least {low}" if high == float("inf") else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range, must be {limit}")
        return value

    convert.__name__ = kind.__name__  # "invalid int value: 'x'"
    return convert


def parser() -> Parser:
    p = Parser(
        prog="train.py",
        description="Train a ResNet with jaxbn, on CIFAR-10 or on handwritten digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        argument_default=None,
    )
    positive = between(int, 1)
    g = p.add_argument_group("data")
    g.add_argument("--data", choices=["auto", "cifar10", "digits"], default="auto")
    g.add_argument("--data-dir", type=Path, help="where CIFAR-10's binary version lies")
    g.add_argument("--cutout", type=between(int, 0, 32), default=0, help="side of the hole, pixels")
    g = p.add_argument_group("model")
    g.add_argument("--model", choices=model.NAMES, help="resnet9 on CPU, else resnet18")
    g.add_argument("--block", choices=["post", "pre"], default="post", help="activation (ResNets)")
    g.add_argument("--width", type=positive, help="channels of the first layer: 16 or 64")
    g.add_argument("--api", choices=["linen", "nnx"], default="linen")
    g.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="compute")
    g = p.add_argument_group("training")
    g.add_argument("--epochs", type=positive, help="by data set and device")
    g.add_argument("--batch", type=positive, help="by data set and device")
    g.add_argument("--eval-batch", type=positive, default=512)
    g.add_argument("--lr", type=between(float, 0), help="peak learning rate: batch / 640")
    g.add_argument("--schedule", choices=["onecycle", "cosine"], default="onecycle")
    g.add_argument("--weight-decay", type=between(float, 0), default=5e-4)
    g.add_argument("--smoothing", type=between(float, 0, 1), default=0.1, help="of the labels")
    g.add_argument("--scan-epoch", action="store_true", help="an epoch in one lax.scan")
    g.add_argument("--seed", type=between(int, 0, 2**32 - 1), default=0)
    g.add_argument("--devices", type=positive, help="use this many (all)")
    g = p.add_argument_group("run")
    g.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    g.add_argument("--name", help="of the folder in it (date and time)")
    g.add_argument("--resume", action="store_true", help="go on with the run --name")
    g.add_argument("--keep", type=positive, default=2, help="checkpoints")
    return p


def fill_in(args, data: Data) -> None:
    """Defaults that depend on the data set and the device: minutes on two CPU cores."""
    cpu = jax.default_backend() == "cpu"
    small = data.name == "digits"
    args.data = data.name
    args.model = args.model or ("resnet9" if cpu else "resnet18")
    args.width = args.width or model.WIDTH[args.model]
    args.batch = args.batch or (64 if small else 128 if cpu else 512)
    args.epochs = args.epochs or (15 if small else 3 if cpu else 30)
    args.lr = args.batch / 640 if args.lr is None else args.lr
    args.devices = args.devices or jax.device_count()


def check(args, data: Data) -> None:
    """What can be wrong with the arguments, found before anything is computed or written."""
    if args.devices > jax.device_count():
        raise ValueError(f"--devices {args.devices}: there are {jax.device_count()}")
    for option, batch in (("--batch", args.batch), ("--eval-batch", args.eval_batch)):
        if batch % args.devices:
            raise ValueError(f"{option} {batch} does not divide over {args.devices} devices")
    if args.batch > len(data.train_y):
        raise ValueError(f"--batch {args.batch}: there are {len(data.train_y)} training images")
    if args.block == "pre" and args.model == "resnet9":
        raise ValueError("--block pre: resnet9 has no such form, --model resnet18 has")
    if args.resume and not args.name:
        raise ValueError("--resume: which run? Give its --name too")


def open_run(args) -> Path:
    """The run's folder, with its config.json; to resume it the arguments must be the same."""
    folder = args.runs / (args.name or time.strftime("%Y%m%d-%H%M%S"))
    not_the_result = {"data_dir", "runs", "name", "resume", "keep"}
    config = {key: value for key, value in vars(args).items() if key not in not_the_result}
    path = folder / "config.json"
    if not args.resume:
        if folder.exists():
            raise ValueError(f"{folder} is there already: --resume it, or take another --name")
        folder.mkdir(parents=True)
        report.write(path, json.dumps(config, indent=1) + "\n")
    elif not path.exists():
        raise ValueError(f"--resume: there is no run in {folder}")
    for key, value in json.loads(path.read_text()).items():
        if config[key] != value:
            option = "--" + key.replace("_", "-")
            raise ValueError(f"--resume: {folder} has {option} {value}, not {config[key]}")
    return folder


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


def train_one_epoch(loop: Loop, state, key, x, y, scan: bool, show):
    """Every image once; `show(steps done, loss, accuracy)` as it goes on."""
    if scan:
        state, metrics = loop.train_epoch(state, key, x, y)  # [steps], [steps]
        return state, jax.device_get(metrics)
    metrics = []
    for i in range(loop.count):
        state, new = loop.train_step(state, key, x, y, i)
        if metrics:  # look at the step before: the device has this one to work on meanwhile
            metrics[-1] = jax.device_get(metrics[-1])
            show(i, *metrics[-1])
        metrics.append(new)
    return state, np.transpose(jax.device_get(metrics))


def train(args, data: Data, folder: Path, console: Console) -> dict:
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
        console.print(f"Resumed after epoch {done}")
    log = report.Log(folder / "metrics.jsonl", done)

    console.print(report.HEADER)
    with report.progress(console) as bar:
        task = bar.add_task(
            "", total=args.epochs * loop.count, epoch=done + 1, loss=0.0, accuracy=0.0, rate=0.0
        )
        for epoch in range(done + 1, args.epochs + 1):
            begun = time.perf_counter()

            def show(i, loss, accuracy, epoch=epoch, begun=begun):
                rate = i * args.batch / (time.perf_counter() - begun)
                at = (epoch - 1) * loop.count + i
                bar.update(task, completed=at, epoch=epoch, loss=loss, accuracy=accuracy, rate=rate)

            # One key an epoch, one fold of it a step: an epoch is the same however it was reached.
            shuffle_key, augment_key = jax.random.split(jax.random.fold_in(data_key, epoch))
            x, y = loop.shuffle(shuffle_key, arrays.train_x, arrays.train_y)
            state, (losses, accuracies) = train_one_epoch(
                loop, state, augment_key, x, y, args.scan_epoch, show
            )
            trained = time.perf_counter() - begun
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
    p = parser()
    args = p.parse_args(argv)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    try:
        data = load(args.data, args.data_dir, console.print)
        fill_in(args, data)
        check(args, data)
        folder = open_run(args)
    except (DataError, ValueError) as error:
        p.error(str(error))

    device = f"{args.devices} x {jax.devices()[0].device_kind}"
    what = f"{args.model} width {args.width} ({args.api}, {args.dtype})"
    console.print(
        f"{data.name}: {len(data.train_y):,} training and {len(data.test_y):,} test images, "
        f"{args.epochs} epochs of batch {args.batch}\n{what} on {device}, in {folder}"
    )
    try:
        result = train(args, data, folder, console)
    except KeyboardInterrupt:
        console.print(f"Stopped. The same command goes on with --name {folder.name} --resume")
        sys.exit(130)

    rows = result["rows"]
    rates = [row["images_per_s"] for row in rows]
    console.print(
        report.table(
            f"{what} on {data.name}, {device}",
            [
                ("test accuracy", f"{result['test_accuracy']:.2%}", ""),
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
