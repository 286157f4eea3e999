"""`python -m jaxbn serving`: what is wrong with the user's model as a server runs it."""

import functools
from argparse import Namespace
from typing import Any

from jaxbn._cli import models, options
from jaxbn._text import printable

HELP = "does the model answer each row by that row alone?"
DESCRIPTION = (
    "Checks the mode, determinism, batch independence, the order of rows and a batch of one."
)
EPILOG = f"{options.MODEL}\n{options.GATES}"


def add(sub: Any) -> None:
    """Adds the command's options."""
    sub.add_argument("source", metavar="CHECKPOINT", help=options.CHECKPOINTS)
    options.add_part(sub)
    options.add_gate(sub)
    sub.add_argument(
        "--tolerance", type=options.positive, metavar="T", help="largest relative error"
    )


def run(args: Namespace) -> int:
    """Prints what is wrong with a model as a server runs it. Status 1 if there are findings."""
    from jaxbn import health
    from jaxbn._cli import comparison, terminal

    apply, model, batches = models.network(args)
    x = models.inputs(args, batches)
    answer = functools.partial(models.results, apply, model)
    found = health.serving(answer, x, tolerance=args.tolerance)
    source = printable(args.source)
    if args.json:
        print(comparison.as_json(found, checkpoint=source))
    else:
        print(f"{source}: {comparison.verdict(found)}", *terminal.plain(found), sep="\n")
    return 1 if found else 0
