"""`python -m jaxbn doctor`: what is wrong with the norm layers of a checkpoint."""

from argparse import Namespace
from typing import Any

from jaxbn._cli import models, options
from jaxbn._cli.arrays import check_arrays
from jaxbn._text import distinct, printable

HELP = "is this checkpoint in trouble?"
DESCRIPTION = "A row for each batch norm layer, worst first, then what is wrong and what helps."
EPILOG = "exit status: 0 healthy, 1 findings, 2 could not be read"


def add(sub: Any) -> None:
    """Adds the command's options."""
    sub.add_argument("checkpoint", metavar="CHECKPOINT", help=options.CHECKPOINTS)
    sub.add_argument("--json", action="store_true", help="the same for programs")
    sub.add_argument("--plot", metavar="FILE.png", help="a picture: every channel of every layer")
    sub.add_argument(
        "--momentum",
        type=options.share,
        metavar="M",
        help="of the training, for layers that count updates: the share of the old value kept "
        "(Flax's meaning, 1 minus PyTorch's)",
    )
    options.add_epsilon(sub, "of the layers (1e-05)")
    sub.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32", "float64"),
        default="float32",
        help="of what comes to the layers, in which large means cost digits (float32)",
    )


def run(args: Namespace) -> int:
    """Prints what is wrong with the norm layers of a checkpoint. Status 1 if there are findings."""
    from jaxbn import health
    from jaxbn._checkpoints import norm_layers
    from jaxbn._checkpoints.read import read
    from jaxbn._cli import picture, terminal

    models.on_the_cpu()
    found = norm_layers.norms_in(read(args.checkpoint))
    if not found:
        raise ValueError(
            f"{printable(args.checkpoint)} holds no batch norm layer, expected arrays mean and "
            f"var, or PyTorch's running_mean and running_var, beside each other."
        )
    check_arrays(found)
    found = dict(zip(distinct(map(printable, found)), found.values(), strict=True))
    given = {"momentum": args.momentum, "epsilon": args.epsilon, "dtype": args.dtype}
    findings = health.check(found, **given)
    rows = health.summary(found, findings, epsilon=args.epsilon)
    source = printable(args.checkpoint)
    if args.plot:
        title = f"{source}: {terminal.verdict(findings)}"
        picture.plot(args.plot, title, found, findings)
    if args.json:
        print(terminal.as_json(source, rows, findings, momentum=args.momentum))
    else:
        terminal.show(source, rows, findings, momentum=args.momentum)
    return 1 if findings else 0
