"""The commands of `python -m jaxbn`: each calls a tool of the package and prints the result.

The exit status is 0; 1 if there are findings, nothing was folded, or the fold is not exact enough;
2 if a file cannot be read or written, or the user's code fails.
"""

import argparse
import contextlib
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jaxbn
from jaxbn._cli.commands import (
    compare,
    convert,
    doctor,
    export,
    fold,
    lint,
    recalibrate,
    serving,
    verify,
)
from jaxbn._cli.options import Parser
from jaxbn._text import printable

EXAMPLES = """\
examples:
  python -m jaxbn doctor runs/mine/checkpoints --plot health.png
  python -m jaxbn convert torch.safetensors net.msgpack --like flax.msgpack
  python -m jaxbn recalibrate net.msgpack ready.msgpack --model serve:model
  python -m jaxbn fold ready.msgpack --model serve:model
  python -m jaxbn export ready.msgpack net.onnx --model serve:model --int8
  python -m jaxbn serving ready.msgpack --model serve:model

COMMAND --help tells more.
"""
COMMANDS: dict[str, Any] = {
    "doctor": doctor,
    "convert": convert,
    "recalibrate": recalibrate,
    "fold": fold,
    "lint": lint,
    "export": export,
    "compare": compare,
    "verify": verify,
    "serving": serving,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status. Wrong options raise SystemExit(2).

    Args:
      argv: the words after `python -m jaxbn`. None: the words this process was started with.

    >>> from jaxbn._cli import commands
    >>> try:
    ...     commands.main(["--version"])
    ... except SystemExit as end:
    ...     end.code
    jaxbn 0.2.0
    0
    """
    args = parse(argv)
    try:
        with _quiet():
            return COMMANDS[args.command].run(args)
    except BrokenPipeError:
        raise
    except (Exception, SystemExit) as error:
        if args.traceback:
            traceback.print_exc()
        from jaxbn.convert._matching import MisfitError

        if isinstance(error, SystemExit):
            error = ValueError(f"the model's code ended the program: SystemExit: {error}")
        # The error begins with the name of a function; the line printed begins with the command's.
        text = re.sub(r"^[a-z]\w*: ", "", str(error).strip()) or type(error).__name__
        lines = text.split("\n")
        if not isinstance(error, MisfitError):  # a MisfitError has a line for each array
            lines = lines[:1]
        print(f"{args.command}: " + "\n".join(map(printable, lines)), file=sys.stderr)
        return 2


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line; `command` is the name of the command.

    Args:
      argv: the words. None: the words this process was started with.

    Raises:
      SystemExit: 2 after one line that says what is wrong; 0 after help. No words mean help.

    >>> from jaxbn._cli import commands
    >>> commands.parse(["doctor", "net.msgpack", "--momentum", "0.9"]).momentum
    0.9
    """
    parser = Parser(
        prog="python -m jaxbn",
        description="Batch norm in checkpoints: look for what is wrong, and put it right.",
        epilog=EXAMPLES,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"jaxbn {jaxbn.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.HELP,
            description=command.DESCRIPTION,
            epilog=command.EPILOG,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--traceback", action="store_true", help="where an error came from")
        command.add(sub)
    words = sys.argv[1:] if argv is None else argv
    return parser.parse_args(words or ["--help"])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences logs and warnings of other libraries: they may quote the bytes of a file."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
