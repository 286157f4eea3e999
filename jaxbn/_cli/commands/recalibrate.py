"""`python -m jaxbn recalibrate`: running statistics again from data, by the user's model."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from jaxbn._cli import models, options
from jaxbn._text import printable

HELP = "running statistics from data, the weights as they are"
DESCRIPTION = (
    "Computes the running statistics again over all batches (precise batch norm) and writes\n"
    "parameters and statistics."
)
EPILOG = options.MODEL


def add(sub: Any) -> None:
    """Adds the command's options."""
    options.add_source(sub, "source")
    sub.add_argument("dest", metavar="DEST", help=options.DESTINATION)
    options.add_model(sub)
    sub.add_argument(
        "--where", action="append", metavar="GLOB", help="layers to recalibrate (all); may repeat"
    )


def run(args: Namespace) -> int:
    """Computes running statistics again by the user's model, over the user's data."""
    import jaxbn
    from jaxbn._checkpoints import contents, write

    write.check_destination(Path(args.dest))
    apply, model, batches = models.network(args)
    where = args.where or "*"
    model = jaxbn.recalibrate(apply, model, batches, where=where, limit=args.batches)
    write.save(args.dest, contents.arrays(model))
    print(f"wrote {printable(args.dest)}")
    return 0
