# The command line: what can be asked for, what it defaults to, and what is wrong with it.

import argparse
import importlib.util
import json
import shlex
import shutil
import socket
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import hosts
import jax
import model
from data import Data, DataError
from report import write

from jaxbn import writers


def told(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the usage above it
        self.exit(2, f"{self.prog}: error: {message}\n")


@contextmanager
def one_line(p: Parser):
    """What cannot be read or written ends the program in one line, with status 2."""
    try:
        yield
    except (DataError, OSError) as error:
        p.error(told(error))


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
        parents=[hosts.options()],
    )
    positive = between(int, 1)
    add = p.add_argument_group("data").add_argument
    add("--data", choices=["auto", "cifar10", "digits"], default="auto", help="(auto)")
    add("--data-dir", type=Path, help="where the files of CIFAR-10's binary version lie")
    add("--cutout", type=between(int, 0, 32), default=0, help="side of the hole in pixels (0)")
    add = p.add_argument_group("model").add_argument
    add("--model", choices=model.NAMES, help="(resnet9 on CPU, resnet18 elsewhere)")
    add("--block", choices=["post", "pre"], default="post", help="activation of ResNets (post)")
    add("--width", type=positive, help="channels of the first layer (16; ResNets 64)")
    add("--api", choices=["linen", "nnx"], default="linen", help="(linen)")
    add(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of computing (float32)"
    )
    add = p.add_argument_group("training").add_argument
    add("--epochs", type=positive, help="(3 on CPU, 30 elsewhere; digits 15)")
    add("--batch", type=positive, help="(128 on CPU, 512 elsewhere; digits 64)")
    add("--eval-batch", type=positive, default=512, help="(512)")
    add("--lr", type=between(float, 0), help="peak learning rate (batch / 640)")
    add("--schedule", choices=["onecycle", "cosine"], default="onecycle", help="(onecycle)")
    add("--weight-decay", type=between(float, 0), default=5e-4, help="of kernels (0.0005)")
    add("--smoothing", type=between(float, 0, 1), default=0.1, help="of labels (0.1)")
    add("--scan-epoch", action="store_true", help="an epoch in one lax.scan, for GPU and TPU")
    add("--seed", type=between(int, 0, 2**32 - 1), default=0, help="(0)")
    add("--devices", type=positive, help="use only so many (all)")
    add = p.add_argument_group("run").add_argument
    add("--runs", type=Path, default=Path("runs"), help="folder of the runs (runs)")
    add("--name", help="of this run's folder in it (date and time)")
    add("--resume", action="store_true", help="go on with the run --name")
    add("--keep", type=positive, default=2, help="checkpoints that are kept (2)")
    add = p.add_argument_group("watching the norm layers").add_argument
    add("--watch", nargs="+", choices=writers.NAMES, default=[], help="where their figures go")
    add("--watch-every", type=positive, default=50, help="steps from figures to figures (50)")
    add("--watch-port", type=between(int, 0, 65535), default=9464, help="of prometheus (9464)")
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
    args.watch_every = args.watch_every if args.watch else 0


def check(args, data: Data) -> None:
    """What can be wrong with the arguments, found before anything is computed or written."""
    if args.devices > jax.device_count():
        raise ValueError(f"--devices {args.devices}: there are {jax.device_count()}")
    if args.devices < jax.device_count() and jax.process_count() > 1:
        raise ValueError(f"--devices {args.devices}: many processes use all {jax.device_count()}")
    if args.num_processes not in (None, jax.process_count()):
        raise ValueError(f"--num-processes {args.num_processes}: there are {jax.process_count()}")
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
    if args.watch and args.scan_epoch:
        raise ValueError("--watch: not with --scan-epoch, which shows nothing before its end")
    if "tensorboard" in args.watch and not importlib.util.find_spec("tensorboardX"):
        raise ValueError("--watch tensorboard: needs tensorboardX, pip install 'jaxbn[watch]'")
    if "prometheus" in args.watch and jax.process_index() == 0:
        try:
            socket.create_server(("127.0.0.1", args.watch_port)).close()
        except OSError:
            raise ValueError(
                f"--watch-port {args.watch_port}: not free here, 0 takes any that is"
            ) from None


def config(args) -> dict:
    """The arguments that the result depends on."""
    process = {"coordinator", "num_processes", "process_id", "cluster", "timeout", "heartbeat"}
    # Not watch_every: the watched step is a program of its own, and may round otherwise.
    not_the_result = {"data_dir", "runs", "name", "resume", "keep", "watch", "watch_port", *process}
    return {key: value for key, value in vars(args).items() if key not in not_the_result}


def stored(folder: Path) -> dict:
    """The config.json of a run; ValueError if it holds no such thing."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no run of train.py: it has no config.json")
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: no JSON, damaged") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: a {type(found).__name__}, expected the options of a run")
    return found


def run_options(folder: Path) -> argparse.Namespace:
    """Those of a run of train.py, checked as the command line's are; to compute in float32."""

    def refuse(message):
        raise ValueError(f"{folder / 'config.json'}: {message}")

    found, p = stored(folder), parser()
    p.error = refuse
    names = ("data", "batch", "model", "block", "width", "api", "epochs", "lr", "schedule")
    names += ("weight_decay", "smoothing")
    if missing := [name for name in names if name not in found]:
        refuse(f"does not say {', '.join(missing)}")
    return p.parse_args([f"--{name.replace('_', '-')}={found[name]}" for name in names])


def find_run(args) -> Path:
    """The run's folder, not there yet; or to resume it, there with the same arguments."""
    folder = args.runs / (args.name or time.strftime("%Y%m%d-%H%M%S"))
    if not args.resume:
        if folder.exists():
            raise ValueError(f"{folder} is there already: --resume it, or take another --name")
        return folder
    asked = config(args)
    try:
        found = stored(folder)
    except ValueError as error:
        raise ValueError(f"--resume: {error}") from None
    path = folder / "config.json"
    for key, value in found.items():
        option = "--" + key.replace("_", "-")
        if key not in asked:
            raise ValueError(f"--resume: {path}: {key!r} is no option of train.py")
        if asked[key] != value:
            shown = value if isinstance(value, str) and value.isprintable() else json.dumps(value)
            raise ValueError(f"--resume: {folder} has {option} {shown}, not {asked[key]}")
    if missing := sorted(asked.keys() - found.keys()):
        raise ValueError(f"--resume: {path}: does not say {', '.join(missing)}")
    return folder


def begin_run(args, folder: Path) -> None:
    """The folder of a new run, with its config.json."""
    folder.mkdir(parents=True)
    try:
        write(folder / "config.json", json.dumps(config(args), indent=1) + "\n")
    except OSError:  # a disk that is full
        shutil.rmtree(folder, ignore_errors=True)
        raise


def go_on(argv: list[str] | None, args, folder: Path) -> str:
    """The command line that goes on with this run."""
    given = sys.argv[1:] if argv is None else argv
    program = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv[1:])]
    asked, more = parser().parse_args(given), []
    if not asked.name:
        more += ["--name", folder.name]
    if asked.data == "auto" and not asked.data_dir:  # another day it may be other data
        more += ["--data", args.data]
    if not asked.resume:
        more += ["--resume"]
    return shlex.join([*program, *given, *more])
