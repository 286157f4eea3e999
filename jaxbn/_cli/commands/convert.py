"""`python -m jaxbn convert`: a checkpoint in another format, or by another library's names."""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxbn._cli import models, options
from jaxbn._text import printable

HELP = "another format, or another library's names"
DESCRIPTION = (
    "Writes a checkpoint in another format: as it is, or by the names and layouts of another "
    "model, and says which array went where."
)
EPILOG = f"{options.MODEL}\n{options.WRITTEN}"


def add(sub: Any) -> None:
    """Adds the command's options."""
    options.add_source(sub, "source")
    sub.add_argument("dest", metavar="DEST", help=options.DESTINATION)
    target = sub.add_mutually_exclusive_group()
    target.add_argument("--torch", action="store_true", help="PyTorch's names and layouts")
    target.add_argument("--like", metavar="FILE", help="names and layouts of this checkpoint")
    target.add_argument("--model", metavar="MODULE:FUNCTION", help="those of this model")
    options.add_matching(sub)


def run(args: Namespace) -> int:
    """Writes a checkpoint in another format, or by another library's names."""
    from jaxbn import convert as tool
    from jaxbn._checkpoints import contents, write
    from jaxbn._cli import users_model

    if not (args.model or args.like):
        without = ["keep"] if args.torch else ["rename", "keep"]  # --torch may rename
        remedy = "write --like FILE or --model MODULE:FUNCTION"
        options.refuse_matching(args, *without, where="without a target", write=remedy)
    write.check_destination(Path(args.dest))
    if not args.model:
        models.on_the_cpu()
    source = contents.read_model(args.source, args.part)
    report: Any = None
    new: Mapping[str, Any]
    if args.model:
        model, report = models.loaded(source, users_model.network(args.model).model, args)
        new = contents.arrays(model)
    elif args.torch:
        new, report = tool.to_torch(source.variables(), rename=args.rename)
    elif args.like:
        like = contents.read_model(args.like)
        if like.kind == "torch":
            names = like.state_dict()
            new, report = tool.to_torch(
                source.variables(), names, rename=args.rename, keep=args.keep
            )
        else:
            new, report = models.loaded(source, like.variables(), args)
            new = new if like.kind == "linen" else new["params"]
    else:
        new = source.tree
    write.save(args.dest, new)
    print(*[report] * (report is not None), f"wrote {printable(args.dest)}", sep="\n")
    return 0
