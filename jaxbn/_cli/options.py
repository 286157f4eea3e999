"""Options that several commands of `python -m jaxbn` share, and the values that options take."""

import argparse
import math
from collections.abc import Callable
from typing import Any, NoReturn

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


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {printable(message)}; see {self.prog} --help\n")


def add_source(sub: Any, name: str) -> None:
    """The checkpoint that a command reads, and where the model is in it."""
    sub.add_argument(name, metavar="SOURCE", help=CHECKPOINTS)
    add_part(sub)


def add_part(sub: Any) -> None:
    """`--part`: where the model is in a checkpoint."""
    sub.add_argument(
        "--part",
        metavar="PATH",
        help="where in the checkpoint the model is (where params and batch_stats are, or all)",
    )


def add_model(sub: Any) -> None:
    """The user's model, how many of its batches, and how the checkpoint fits the model."""
    sub.add_argument("--model", metavar="MODULE:FUNCTION", required=True, help="your model: below")
    sub.add_argument("--batches", type=count, metavar="N", help="at most so many batches (all)")
    add_matching(sub)


def add_gate(sub: Any, *, model: bool = True) -> None:
    """What the commands share that end with a status for a program."""
    sub.add_argument("--model", metavar="MODULE:FUNCTION", required=model, help="your model: below")
    sub.add_argument(
        "--inputs",
        metavar="FILE.npz",
        help="a batch of np.savez: one array, several in a row for a tuple, or several by name for "
        "a dict (the model's first batch)",
    )
    sub.add_argument("--json", action="store_true", help="the same for programs")
    add_matching(sub)


def add_bounds(sub: Any) -> None:
    """Bounds of the errors of results."""
    sub.add_argument(
        "--bound",
        type=epsilon,
        default=1e-4,
        metavar="E",
        help="largest error of a result over its largest value (0.0001)",
    )
    sub.add_argument(
        "--agree", type=share, metavar="S", help="smallest share of equal top-1 answers (any)"
    )


def add_matching(sub: Any) -> None:
    """How the layers of a checkpoint fit those of a model."""
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
    add_epsilon(sub, "of a PyTorch model, whose file does not say (1e-05)")


def refuse_matching(args: argparse.Namespace, *names: str, where: str, write: str) -> None:
    """Refuses options that say how layers fit a target, where there is no such target."""
    if given := [f"--{name}" for name in names if getattr(args, name)]:
        verb = "has" if len(given) == 1 else "have"
        raise ValueError(f"{' and '.join(given)} {verb} no effect {where}; {write}")


def add_epsilon(sub: Any, help: str) -> None:
    """`--epsilon`, with its help."""
    sub.add_argument("--epsilon", type=epsilon, default=1e-5, metavar="E", help=help)


class _Rename(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, text: Any, option: Any = None) -> None:
        source, sign, target = text.partition("=")
        if not sign or not source:
            parser.error(f"argument {option}: {text!r}, expected A=B, or A= to drop A")
        setattr(namespace, self.dest, {**(self._so_far(namespace)), source: target or None})

    def _so_far(self, namespace: Any) -> dict[str, str | None]:
        return getattr(namespace, self.dest) or {}


def share(text: str) -> float:
    """A number from 0 to 1."""
    return _number(text, "a number from 0 to 1", lambda v: 0 <= v <= 1)


def epsilon(text: str) -> float:
    """A finite number of at least 0."""
    return _number(text, "a finite number of at least 0", lambda v: 0 <= v < math.inf)


def positive(text: str) -> float:
    """A number above 0."""
    return _number(text, "a number above 0", lambda v: v > 0)


def count(text: str) -> int:
    """A whole number of at least 1."""
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
