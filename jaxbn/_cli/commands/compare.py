"""`python -m jaxbn compare`: two checkpoints, or two exported files, side by side."""

import functools
from argparse import Namespace
from typing import Any

from jaxbn._cli import artifacts, models, options
from jaxbn._cli.arrays import check_arrays
from jaxbn._text import printable

HELP = "are two checkpoints, or two exported files, the same?"
DESCRIPTION = (
    "Compares statistics and weights layer by layer, and with a model or with two exported "
    "files the results on the inputs."
)
EPILOG = f"{options.MODEL}\n{options.GATES}"


def add(sub: Any) -> None:
    """Adds the command's options."""
    sub.add_argument(
        "a",
        metavar="A",
        help=f"{options.CHECKPOINTS}; or .onnx, .stablehlo, .tflite, or a SavedModel's folder",
    )
    sub.add_argument("b", metavar="B", help="the reference, of the same kind")
    options.add_part(sub)
    options.add_gate(sub, model=False)
    options.add_bounds(sub)
    sub.add_argument(
        "--weights",
        type=options.epsilon,
        default=1e-4,
        metavar="W",
        help="largest error of an array of weights over the largest weight (0.0001)",
    )
    sub.add_argument(
        "--divergence",
        type=options.epsilon,
        default=1e-4,
        metavar="D",
        help="largest symmetric KL divergence of a channel's statistics (0.0001, a mean shifted "
        "by 1 %% of an sd)",
    )


def run(args: Namespace) -> int:
    """Compares two checkpoints or two exported files. Status 1 if a figure is beyond its bound."""
    from jaxbn._cli import comparison, users_model

    files = [artifacts.is_artifact(path) for path in (args.a, args.b)]
    if any(files) and not all(files):
        raise ValueError(
            "one of the two is an exported file and the other a checkpoint, expected two of a "
            "kind; write python -m jaxbn verify ARTIFACT --against CHECKPOINT "
            "--model MODULE:FUNCTION"
        )
    rows: list[Any] = []
    outputs: list[Any] = []
    beyond: list[Any] = []
    if all(files):
        batches = None
        if args.model and not args.inputs:  # the files need no model; its first batch is at hand
            batches = users_model.network(args.model)[2]
        x: Any = models.inputs(args, batches)
        fns: Any = [artifacts.load(path)[0] for path in (args.a, args.b)]
    else:
        fns, x, parts = _two_models(args)
        bounds = {"divergence": args.divergence, "weights": args.weights, "epsilon": args.epsilon}
        rows, beyond = comparison.layer_rows(*parts, **bounds)
    if fns:
        results = [fn(x) for fn in fns]
        outputs, more = comparison.results(*results, bound=args.bound, agree=args.agree)
        beyond += more
    if args.json:
        names = {"a": printable(args.a), "b": printable(args.b)}
        print(comparison.as_json(beyond, **names, layers=rows, outputs=outputs))
    else:
        comparison.show(f"{args.a} and {args.b}", rows, outputs, beyond)
    return 1 if beyond else 0


def _two_models(args: Namespace) -> tuple[Any, Any, Any]:
    """Two checkpoints: their functions and x, if the user's model is named; norms and weights."""
    from jaxbn._checkpoints.contents import Contents, arrays, read_model
    from jaxbn._cli import comparison, users_model
    from jaxbn._inspection.layers import is_nnx

    sources = [read_model(path, args.part) for path in (args.a, args.b)]
    fns, x = [], None
    if args.model:
        apply, like, batches = users_model.network(args.model)
        loaded = [models.loaded(source, like, args)[0] for source in sources]
        fns = [functools.partial(models.results, apply, model) for model in loaded]
        x = models.inputs(args, batches)
        kind: Any = "nnx" if is_nnx(like) else "linen"
        sources = [Contents(kind, arrays(model)) for model in loaded]
    elif args.inputs or args.agree is not None:
        raise ValueError(
            "--inputs and --agree are for results, which two checkpoints have by a model alone; "
            "write --model MODULE:FUNCTION"
        )
    else:
        models.on_the_cpu()
    if sources[0].kind != sources[1].kind:
        raise ValueError(
            f"A has the names of {sources[0].kind} and B those of {sources[1].kind}, expected one "
            f"kind; write --model MODULE:FUNCTION, into which both are read"
        )
    parts = [comparison.parts(source) for source in sources]
    for norms, _ in parts:
        check_arrays(norms)
    return fns, x, parts
