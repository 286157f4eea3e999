# The command line: what can be asked for, what it defaults to, and what is wrong with it.

import argparse
import importlib.util
import json
import shlex
import shutil
import socket
import sys
import time
from pathlib import Path

import hosts
import jax
import model
import norms
from command import Parser, between, shown
from data import NAMES, About, Data
from report import write

from jaxbn import writers


def parser() -> Parser:
    p = Parser(
        prog="train.py",
        description="Train a ResNet with jaxbn: on CIFAR, handwritten digits, or your own images.",
        parents=[hosts.options()],
        examples=[
            "python examples/cifar10/train.py --data cifar100 --epochs 12 --name mine",
            "python examples/cifar10/train.py --data DIR --target 90",
            "python examples/cifar10/train.py --data DIR --stem imagenet --model resnet50",
        ],
    )
    positive = between(int, 1)
    add = p.add_argument_group("data").add_argument
    add(
        "--data",
        default="auto",
        metavar="WHAT",
        help="cifar10, cifar100, digits, synthetic, a folder with a folder of PNG or JPEG images "
        "for each class, or an .npz file of arrays x and y (auto: cifar10 where it can be had)",
    )
    add(
        "--data-dir", type=Path, metavar="DIR", help="where the files of CIFAR's binary version are"
    )
    add(
        "--image-size",
        type=between(int, 8, 1024),
        metavar="PIXELS",
        help="of a folder's images (at most 32; 224 with --stem imagenet), or of synthetic ones",
    )
    add(
        "--flip",
        action=argparse.BooleanOptionalAction,
        help="mirror half of the images (but not digits)",
    )
    add("--cutout", type=between(int, 0), default=0, help="side of the hole in pixels (0)")
    add = p.add_argument_group("model").add_argument
    add("--model", choices=model.NAMES, help="(resnet9 on CPU, resnet18 elsewhere)")
    add("--stem", choices=model.STEMS, default="cifar", help="imagenet: for 224 pixels (cifar)")
    add(
        "--norm",
        choices=norms.NAMES,
        default="sync",
        help="batch norm over all devices (sync), each device's rows (batch), --ghost-rows (ghost) "
        "or with renormalization (renorm); group or layer norm; scale and bias alone (none) (sync)",
    )
    add("--ghost-rows", type=positive, default=32, help="of a ghost batch (32)")
    add("--block", choices=["post", "pre"], default="post", help="activation of ResNets (post)")
    add("--width", type=positive, help="channels of the first layer (16; ResNets 64)")
    add("--api", choices=["linen", "nnx"], default="linen", help="(linen)")
    add(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of computing (float32)"
    )
    add = p.add_argument_group("training").add_argument
    add("--epochs", type=positive, help="(3 on CPU, 30 elsewhere; 15 of fewer than 10,000 images)")
    add("--batch", type=positive, help="(128 on CPU, 512 elsewhere; of few images 64 or less)")
    add(
        "--target",
        type=between(float, 0, 100),
        metavar="ACC",
        help="stop after the epoch that reaches this test accuracy in %%",
    )
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
    add(
        "--watch",
        nargs="+",
        choices=writers.NAMES,
        default=[],
        metavar="WHERE",
        help=f"where their figures go: {', '.join(writers.NAMES)}, or several",
    )
    add("--watch-every", type=positive, default=50, help="steps from figures to figures (50)")
    add("--watch-port", type=between(int, 0, 65535), default=9464, help="of prometheus (9464)")
    return p


def fill_in(args, data: Data) -> None:
    """Defaults that depend on the data set and the device: minutes on two CPU cores."""
    cpu = jax.default_backend() == "cpu"
    count = len(data.train_y)
    small = count < 10_000 and args.data != "synthetic"
    several = 2 ** max(1, (count // 4).bit_length() - 1)  # four batches an epoch or more
    args.data = data.name if args.data in NAMES else str(Path(args.data).resolve())
    args.about = json.loads(json.dumps(data.about._asdict()))  # as it is read again
    args.flip = data.flip if args.flip is None else args.flip
    args.model = args.model or ("resnet9" if cpu and args.stem == "cifar" else "resnet18")
    args.width = args.width or model.WIDTH[args.model]
    args.batch = args.batch or min(several, 64 if small else 128 if cpu else 512)
    args.epochs = args.epochs or (15 if small else 3 if cpu else 30)
    args.lr = args.batch / 640 if args.lr is None else args.lr
    args.devices = args.devices or jax.device_count()
    args.watch_every = args.watch_every if args.watch else 0


def check(args, data: Data) -> None:
    """What can be wrong with the arguments, found before anything is computed or written."""
    if args.devices > jax.device_count():
        more, n = "", args.devices
        if jax.default_backend() == "cpu" and jax.process_count() == 1:
            more = f"; JAX_NUM_CPU_DEVICES={n} before the command makes {n} of a CPU"
        raise ValueError(f"--devices {args.devices}: there are {jax.device_count()}{more}")
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
    if args.stem == "imagenet" and args.model == "resnet9":
        raise ValueError("--stem imagenet: resnet9 has no such form, --model resnet18 has")
    least = 32 if args.stem == "imagenet" else 8
    height, width, _ = data.about.shape
    if min(height, width) < least:
        raise ValueError(
            f"--data {args.data}: {height}x{width} pixels, expected {least} or more on each side"
        )
    cifar = args.data in ("cifar10", "cifar100")
    if args.data_dir and not cifar:
        raise ValueError(f"--data-dir: not with --data {args.data}, it is for CIFAR's files")
    if args.image_size and (cifar or args.data == "digits" or args.data.endswith(".npz")):
        raise ValueError(f"--image-size: not with --data {args.data}, which has {height}x{width}")
    if args.norm == "ghost" and args.batch % args.ghost_rows:
        raise ValueError(f"--ghost-rows {args.ghost_rows}: does not divide --batch {args.batch}")
    if args.resume and not args.name:
        raise ValueError("--resume: which run? Give its --name too")
    if args.watch and args.norm in norms.OTHERS:
        raise ValueError(f"--watch: shows batch norms, and --norm {args.norm} has none")
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
    not_the_result |= {"target"}
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
    # Runs of before these options did what their defaults do.
    names += tuple(n for n in ("image_size", "stem", "norm") if found.get(n) is not None)
    return p.parse_args([f"--{name.replace('_', '-')}={found[name]}" for name in names])


def run_about(folder: Path) -> About:
    """What a run of train.py was trained on."""
    try:
        about = About(**stored(folder)["about"])
        numbers = [*about.mean, *about.std, about.train, about.test]
        sides = [side in range(8, 2**14) for side in about.shape[:2]]
        sound = sides == [True] * 2 and about.shape[2:] == [3] and 1 < len(about.classes) < 10**6
        sound &= all(isinstance(name, str) for name in about.classes)
        sound &= len(numbers) == 8 and all(isinstance(number, int | float) for number in numbers)
    except (LookupError, TypeError, ValueError):
        sound = False
    if not sound:
        path = folder / "config.json"
        raise ValueError(f"{path}: does not say what the run was trained on")
    return about._replace(classes=tuple(map(shown, about.classes)))


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
        if key == "about" and asked[key] != value:
            raise ValueError(f"--resume: {folder} was trained on other images than {args.data} has")
        if asked[key] != value:
            had = shown(value) if isinstance(value, str) else json.dumps(value)
            raise ValueError(f"--resume: {folder} has {option} {had}, not {asked[key]}")
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
