"""`python -m jaxbn fold`: what of the user's model can be folded, and the error of each."""

from argparse import Namespace
from typing import Any

from jaxbn._cli import models, options

HELP = "which norms go into the kernels beside them"
DESCRIPTION = "Prints what export folds, what it does not and why, and the error of each."
EPILOG = (
    f"{options.MODEL}\n"
    f"exit status: 0 folded, 1 nothing folded or the error too large, 2 could not be read"
)


def add(sub: Any) -> None:
    """Adds the command's options."""
    options.add_source(sub, "source")
    options.add_model(sub)
    sub.add_argument(
        "--tolerance", type=options.positive, metavar="T", help="largest relative error"
    )


def run(args: Namespace) -> int:
    """Prints what can be folded and the error of each. Status 1 if nothing can, or not exactly."""
    from jaxbn._folding.fold import FoldError
    from jaxbn._folding.fold import fold as tool

    fn, x, _ = models.function(args)
    try:
        report = tool(fn, x, tolerance=args.tolerance)[1]
    except FoldError as error:
        print(error.report, str(error).removeprefix("fold: "), sep="\n")
        return 1
    print(report)
    return 0 if report.folded else 1
