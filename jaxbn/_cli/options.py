"""The options of `python -m jaxbn`, and their help."""

import argparse
import math
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jaxbn
from jaxbn._text import printable

WIDTH = 80  # of a terminal; argparse fills what is not a description
THEIRS = """\
--model MODULE:FUNCTION names a function of your own, in a module that Python
can import from here. Called without arguments it returns what
jaxbn.recalibrate takes: (apply, model, batches).
"""
MODEL = f"""\
{THEIRS}apply(model, batch) runs the model in eval mode. model is linen's variables or
an nnx module (shapes will do), which get the checkpoint's arrays by name.
batches is an iterable of batches, of which `fold` and `export` take the first
as the example. A batch is an array, or a tuple or a dict of arrays if the model
has several inputs. This code runs; a checkpoint is data and never does.
"""
TRACED = f"""\
{THEIRS}apply(model, batch) runs the model in either mode; for the mode of training it
is functools.partial(net.apply, train=True, mutable=["batch_stats"], rngs=...).
Dropout is judged in that mode alone. model is linen's variables or an nnx
module (shapes will do). The first of batches is traced. The function itself
runs, and apply is traced.
"""
EXAMPLES = """\
examples:
  python -m jaxbn doctor runs/mine/checkpoints --plot health.png
  python -m jaxbn convert torch.safetensors net.msgpack --like flax.msgpack
  python -m jaxbn recalibrate net.msgpack ready.msgpack --model serve:model
  python -m jaxbn fold ready.msgpack --model serve:model
  python -m jaxbn lint --model train:model --train
  python -m jaxbn export ready.msgpack net.onnx --model serve:model --int8
  python -m jaxbn compare ready.msgpack net.msgpack --divergence 0.01
  python -m jaxbn verify net.onnx --against ready.msgpack --model serve:model
  python -m jaxbn serving ready.msgpack --model serve:model

COMMAND --help tells more.
"""
WRITTEN = """\
exit status: 0 written, 2 not written
"""
CHECKPOINTS = (
    "an orbax folder, a .safetensors file or a folder of them with an index, or a Flax msgpack file"
)
TOLERANCE = "largest error over the largest value (the default is by dtype)"
GATES = """\
exit status: 0 within all bounds, 1 findings, 2 could not be run
"""
DESTINATION = "NAME.safetensors, NAME.msgpack, or without a suffix a new orbax folder"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line; `command` is the name of the command.

    Args:
      argv: the words. None: the words this process was started with.

    Raises:
      SystemExit: 2 after one line that says what is wrong; 0 after help. No words mean help.

    >>> from jaxbn._cli import options
    >>> options.parse(["doctor", "net.msgpack", "--momentum", "0.9"]).momentum
    0.9
    """
    parser = _Parser(
        prog="python -m jaxbn",
        description="Batch norm in checkpoints: look for what is wrong, and put it right.",
        epilog=EXAMPLES,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"jaxbn {jaxbn.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, help: str, description: str, epilog: str) -> Any:
        line = next(line for line in EXAMPLES.splitlines() if f" jaxbn {name} " in line)
        sub = commands.add_parser(
            name,
            help=help,
            description=textwrap.fill(description, WIDTH),
            epilog=f"example:\n{line}\n\n{epilog}",
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--traceback", action="store_true", help="where an error came from")
        return sub

    sub = command(
        "doctor",
        "is this checkpoint in trouble?",
        "Prints a row for each batch norm layer, worst first, then what is wrong and what helps.",
        "exit status: 0 healthy, 1 findings, 2 could not be read",
    )
    sub.add_argument("checkpoint", metavar="CHECKPOINT", help=CHECKPOINTS)
    sub.add_argument("--json", action="store_true", help="the same for programs")
    sub.add_argument("--plot", metavar="FILE.png", help="a picture: every channel of every layer")
    sub.add_argument(
        "--momentum",
        type=_share,
        metavar="M",
        help="of the training, for layers that count updates: the share of the old value kept "
        "(Flax's meaning, 1 minus PyTorch's)",
    )
    _add_epsilon(sub, "of the layers (1e-05)")
    sub.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32", "float64"),
        default="float32",
        help="of what comes to the layers, in which large means cost digits (float32)",
    )

    sub = command(
        "convert",
        "another format, or another library's names",
        "Writes a checkpoint in another format: as it is, or by the names and layouts of "
        "another model, and says which array went where.",
        f"{MODEL}\n{WRITTEN}",
    )
    _add_source(sub, "source")
    sub.add_argument("dest", metavar="DEST", help=DESTINATION)
    target = sub.add_mutually_exclusive_group()
    target.add_argument("--torch", action="store_true", help="PyTorch's names and layouts")
    target.add_argument("--like", metavar="FILE", help="names and layouts of this checkpoint")
    target.add_argument("--model", metavar="MODULE:FUNCTION", help="those of this model")
    _add_matching(sub)

    sub = command(
        "recalibrate",
        "running statistics from data, the weights as they are",
        "Computes the running statistics again over all batches (precise batch norm) and "
        "writes parameters and statistics.",
        f"{MODEL}\n{WRITTEN}",
    )
    _add_source(sub, "source")
    sub.add_argument("dest", metavar="DEST", help=DESTINATION)
    _add_model(sub)
    sub.add_argument(
        "--where", action="append", metavar="GLOB", help="layers to recalibrate (all); may repeat"
    )

    sub = command(
        "fold",
        "which norms go into the kernels beside them",
        "Prints what export folds, what it does not and why, and the error of each.",
        f"{MODEL}\nexit status: 0 folded, 1 nothing folded or error too large, 2 could not be read",
    )
    _add_source(sub, "source")
    _add_model(sub)
    sub.add_argument("--tolerance", type=_positive, metavar="T", help=TOLERANCE)

    sub = command(
        "lint",
        "is this network put together well?",
        "Traces your model and says what is wrong with how it uses its batch norms. There "
        "is no checkpoint.",
        f"{TRACED}\nexit status: 0 healthy, 1 findings, 2 could not be traced",
    )
    sub.add_argument("--model", metavar="MODULE:FUNCTION", required=True, help="your model: below")
    mode = sub.add_mutually_exclusive_group()
    mode.add_argument(
        "--train",
        action="store_const",
        const=True,
        help="apply is for training: a layer in eval mode is a finding",
    )
    mode.add_argument(
        "--eval",
        dest="train",
        action="store_const",
        const=False,
        help="apply is for serving: a layer in train mode is a finding",
    )
    sub.add_argument("--json", action="store_true", help="the same for programs")

    sub = command(
        "export",
        "a file to serve: ONNX, StableHLO, TFLite, SavedModel; int8",
        "Folds the norms and writes a file for any batch size, which is run and compared "
        "first. TFLite has one batch size, that of the first batch. A SavedModel is a folder.",
        f"{MODEL}\n{WRITTEN}",
    )
    _add_source(sub, "source")
    sub.add_argument(
        "dest",
        metavar="DEST",
        help="NAME.onnx, .stablehlo or .tflite; without a suffix a SavedModel's new folder",
    )
    _add_model(sub)
    sub.add_argument("--int8", action="store_true", help="ONNX, TFLite: calibrated on the batches")
    sub.add_argument("--no-fold", dest="fold", action="store_false", help="leave the norms")
    sub.add_argument("--tolerance", type=_positive, metavar="T", help=TOLERANCE)

    sub = command(
        "compare",
        "are two checkpoints, or two exported files, the same?",
        "Compares statistics and weights layer by layer, and with a model or with two "
        "exported files the results on the inputs.",
        f"{MODEL}\n{GATES}",
    )
    sub.add_argument(
        "a",
        metavar="A",
        help=f"{CHECKPOINTS}; or .onnx, .stablehlo, .tflite, or a SavedModel's folder",
    )
    sub.add_argument("b", metavar="B", help="the reference, of the same kind")
    _add_part(sub)
    _add_gate(sub, model=False)
    _add_bounds(sub)
    sub.add_argument(
        "--weights",
        type=_epsilon,
        default=1e-4,
        metavar="W",
        help="largest error of an array of weights over the largest weight (0.0001)",
    )
    sub.add_argument(
        "--divergence",
        type=_epsilon,
        default=1e-4,
        metavar="D",
        help="largest symmetric KL divergence of a channel's statistics (0.0001, a mean shifted "
        "by 1 %% of an sd)",
    )

    sub = command(
        "verify",
        "does an exported file compute what its checkpoint does?",
        "Compares the file's results with the model's, also on one row alone, and the file "
        "with the manifest beside it.",
        f"{MODEL}\n{GATES}",
    )
    sub.add_argument(
        "artifact",
        metavar="ARTIFACT",
        help="NAME.onnx, .stablehlo, .tflite, or a SavedModel's folder",
    )
    sub.add_argument(
        "--against", dest="source", metavar="CHECKPOINT", required=True, help=CHECKPOINTS
    )
    _add_part(sub)
    _add_gate(sub)
    _add_bounds(sub)

    sub = command(
        "serving",
        "does the model answer each row by that row alone?",
        "Checks the mode, determinism, batch independence, the order of rows and a batch of one.",
        f"{MODEL}\n{GATES}",
    )
    sub.add_argument("source", metavar="CHECKPOINT", help=CHECKPOINTS)
    _add_part(sub)
    _add_gate(sub)
    sub.add_argument("--tolerance", type=_positive, metavar="T", help=TOLERANCE)
    words = sys.argv[1:] if argv is None else argv
    return parser.parse_args(words or ["--help"])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {printable(message)}; see {self.prog} --help\n")


def _add_source(sub: Any, name: str) -> None:
    sub.add_argument(name, metavar="SOURCE", help=CHECKPOINTS)
    _add_part(sub)


def _add_part(sub: Any) -> None:
    sub.add_argument(
        "--part",
        metavar="PATH",
        help="where in the checkpoint the model is (where params and batch_stats are, or all)",
    )


def _add_model(sub: Any) -> None:
    sub.add_argument("--model", metavar="MODULE:FUNCTION", required=True, help="your model: below")
    sub.add_argument("--batches", type=_count, metavar="N", help="at most so many batches (all)")
    _add_matching(sub)


def _add_gate(sub: Any, *, model: bool = True) -> None:
    """What the commands share that end with a status for a program."""
    sub.add_argument("--model", metavar="MODULE:FUNCTION", required=model, help="your model: below")
    sub.add_argument(
        "--inputs",
        metavar="FILE.npz",
        help="a batch of np.savez: one array, several in a row for a tuple, or several by name for "
        "a dict (the model's first batch)",
    )
    sub.add_argument("--json", action="store_true", help="the same for programs")
    _add_matching(sub)


def _add_bounds(sub: Any) -> None:
    sub.add_argument(
        "--bound",
        type=_epsilon,
        default=1e-4,
        metavar="E",
        help="largest error of a result over its largest value (0.0001)",
    )
    sub.add_argument(
        "--agree", type=_share, metavar="S", help="smallest share of equal top-1 answers (any)"
    )


def _add_matching(sub: Any) -> None:
    sub.add_argument(
        "--rename",
        action=_Rename,
        metavar="A=B",
        help="layer A of the source is B of the target; A= drops it; may repeat",
    )
    sub.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="LAYER",
        help="layer of the target that stays as it is; may repeat",
    )
    _add_epsilon(sub, "of a PyTorch model, whose file does not say (1e-05)")


def _add_epsilon(sub: Any, help: str) -> None:
    sub.add_argument("--epsilon", type=_epsilon, default=1e-5, metavar="E", help=help)


class _Rename(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, text: Any, option: Any = None) -> None:
        source, sign, target = text.partition("=")
        if not sign or not source:
            parser.error(f"argument {option}: {text!r}, expected A=B, or A= to drop A")
        setattr(namespace, self.dest, {**(self._so_far(namespace)), source: target or None})

    def _so_far(self, namespace: Any) -> dict[str, str | None]:
        return getattr(namespace, self.dest) or {}


def _share(text: str) -> float:
    return _number(text, "a number from 0 to 1", lambda v: 0 <= v <= 1)


def _epsilon(text: str) -> float:
    return _number(text, "a finite number of at least 0", lambda v: 0 <= v < math.inf)


def _positive(text: str) -> float:
    return _number(text, "a number above 0", lambda v: v > 0)


def _count(text: str) -> int:
    v = _number(text, "a whole number of at least 1", lambda v: v >= 1 and v == int(v))
    return int(v)


def _number(text: str, expected: str, good: Callable[[float], bool]) -> float:
    try:
        v = float(text)
    except ValueError:
        v = math.nan
    if not (math.isfinite(v) and good(v)):
        raise argparse.ArgumentTypeError(f"{text!r}, expected {expected}")
    return v
