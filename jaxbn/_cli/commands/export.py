"""`python -m jaxbn export`: the user's model as a file, or a folder, to serve."""

import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from jaxbn._cli import artifacts, models, options
from jaxbn._text import printable

HELP = "a file to serve: ONNX, StableHLO, TFLite, SavedModel; int8"
DESCRIPTION = (
    "Folds the norms and writes a file for any batch size, which is run and compared first.\n"
    "TFLite has one batch size, that of the first batch. A SavedModel is a folder."
)
EPILOG = options.MODEL


def add(sub: Any) -> None:
    """Adds the command's options."""
    options.add_source(sub, "source")
    sub.add_argument(
        "dest",
        metavar="DEST",
        help="NAME.onnx, .stablehlo or .tflite; without a suffix a SavedModel's new folder",
    )
    options.add_model(sub)
    sub.add_argument("--int8", action="store_true", help="ONNX, TFLite: calibrated on the batches")
    sub.add_argument("--no-fold", dest="fold", action="store_false", help="leave the norms")
    sub.add_argument(
        "--tolerance", type=options.positive, metavar="T", help="largest relative error"
    )


def run(args: Namespace) -> int:
    """Folds the norms of the user's model and writes a file, or a folder, to serve."""
    import jaxbn
    from jaxbn import export as tool

    dest = Path(args.dest)
    form = artifacts.format_of(dest, args.int8)
    fn, x, batches = models.function(args)
    report = source = None
    if args.fold:
        fn, report = jaxbn.fold(fn, x)
        print(report)
    own = {} if args.tolerance is None else {"tolerance": args.tolerance}
    done: tool.Exported | tool.Quantized
    fn, example = artifacts.of_arguments(fn, x), artifacts.arguments(x)
    write: Any = getattr(tool, form.write)
    if args.int8 and form.int8:
        quantize: Any = getattr(tool, form.int8)
        with tempfile.TemporaryDirectory() as folder:
            source = write(fn, example, Path(folder, f"float{dest.suffix}"))
            done = quantize(source.path, map(artifacts.arguments, batches), dest, **own)
    else:
        done = write(fn, example, dest, **own)
    tool.manifest(done, folded=report, source=source, checkpoint=args.source)
    print(
        f"wrote {printable(dest)}: {done.bytes} bytes, largest error {done.relative:.1e} of the "
        f"largest value"
    )
    return 0
