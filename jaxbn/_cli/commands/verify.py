"""`python -m jaxbn verify`: an exported file beside the model that the file was made of."""

from argparse import Namespace
from typing import Any

from jaxbn._cli import artifacts, models, options
from jaxbn._text import printable

HELP = "does an exported file compute what its checkpoint does?"
DESCRIPTION = (
    "Compares the file's results with the model's, also on one row alone, and the file with\n"
    "the manifest beside it."
)
EPILOG = f"{options.MODEL}\n{options.GATES}"


def add(sub: Any) -> None:
    """Adds the command's options."""
    sub.add_argument(
        "artifact",
        metavar="ARTIFACT",
        help="NAME.onnx, .stablehlo, .tflite, or a SavedModel's folder",
    )
    sub.add_argument(
        "--against", dest="source", metavar="CHECKPOINT", required=True, help=options.CHECKPOINTS
    )
    options.add_part(sub)
    options.add_gate(sub)
    options.add_bounds(sub)


def run(args: Namespace) -> int:
    """Compares an exported file with the model it was made of. Status 1 if it is another."""
    from jaxbn._cli import comparison
    from jaxbn.export._beside import checksum

    if not artifacts.is_artifact(args.artifact):
        raise ValueError(
            f"{printable(args.artifact)} is no exported file by its name, expected "
            f"{artifacts.ARTIFACT}, or the folder of a SavedModel"
        )
    served, manifest = artifacts.load(args.artifact)
    apply, model, batches = models.network(args)
    x = models.inputs(args, batches)
    reference = models.results(apply, model, x)
    bounds = {"bound": args.bound, "agree": args.agree}
    outputs, beyond = comparison.results(served(x), reference, **bounds)
    row = _first_row(x)
    # Not the first row of the reference: a result may have no rows.
    expected = models.results(apply, model, row)
    alone, more = comparison.results(served(row), expected, **bounds, what="a row alone")
    beyond += more
    made_of = manifest and manifest["checkpoint"]
    if made_of and made_of["sha256"] != checksum(args.source):
        beyond.append(comparison.Beyond("the manifest names another checkpoint"))
    if args.json:
        names = {"artifact": printable(args.artifact), "against": printable(args.source)}
        print(comparison.as_json(beyond, **names, manifest=manifest, outputs=[*outputs, *alone]))
    else:
        title = f"{args.artifact} against {args.source}"
        comparison.show(title, [], [*outputs, *alone], beyond)
        if manifest is None:
            print("no manifest beside the file: what it was made of is not checked")
    return 1 if beyond else 0


def _first_row(x: Any) -> Any:
    """The first row of a batch; an input without rows, a scalar or a table, stays as it is."""
    import jax
    import numpy as np

    rows = next((np.shape(v)[:1] for v in jax.tree.leaves(x)), ())
    return jax.tree.map(lambda v: v[:1] if rows and np.shape(v)[:1] == rows else v, x)
