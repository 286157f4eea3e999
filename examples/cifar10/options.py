# The command line: what can be asked for, what it defaults to, and what is wrong with it.

import argparse
import json
import time
from pathlib import Path

import jax
import model
from data import Data
from report import write


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
    g.add_argument("--scan-epoch", action="store_true", help="an epoch in one lax.scan: GPU, TPU")
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
    if args.data == "digits" and args.data_dir:
        raise ValueError("--data digits: they come with scikit-learn, without --data-dir")
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
        write(path, json.dumps(config, indent=1) + "\n")
    elif not path.exists():
        raise ValueError(f"--resume: there is no run in {folder}")
    for key, value in json.loads(path.read_text()).items():
        if config[key] != value:
            option = "--" + key.replace("_", "-")
            raise ValueError(f"--resume: {folder} has {option} {value}, not {config[key]}")
    return folder
