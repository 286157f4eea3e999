"""The user's model with a checkpoint's arrays in it, and batches for it."""

import functools
import itertools
import os
from argparse import Namespace
from collections.abc import Iterable
from typing import Any


def network(args: Namespace) -> tuple[Any, Any, Any]:
    """The user's (apply, model, batches), with the checkpoint's arrays in the model."""
    from jaxbn._checkpoints.contents import read_model
    from jaxbn._cli import users_model

    source = read_model(args.source, args.part)
    apply, model, batches = users_model.network(args.model)
    return apply, loaded(source, model, args)[0], batches


def function(args: Namespace) -> tuple[Any, Any, Any]:
    """The user's model as a function of x; the first batch; all batches, the first included."""
    apply, model, batches = network(args)
    some = itertools.islice(batches, args.batches)
    x = first(some, args)
    return functools.partial(apply, model), x, itertools.chain([x], some)


def first(batches: Iterable[Any], args: Namespace) -> Any:
    """The first batch of the user's model."""
    x = next(iter(batches), None)
    if x is None:
        raise ValueError(f"{args.model} gives no batches, expected at least one as the example.")
    return x


def results(apply: Any, model: Any, x: Any) -> Any:
    """What the user's model makes of x."""
    from jaxbn._cli.users_model import called

    try:
        return apply(model, x)
    except Exception as error:
        raise ValueError(
            f"the model fails on the inputs: {called(error)}; expected inputs as the model takes "
            f"them, one array, a tuple or a dict by name"
        ) from error


def inputs(args: Namespace, batches: Iterable[Any] | None = None) -> Any:
    """The batch in the file that --inputs names, or else the first batch of the user's model."""
    from jaxbn._checkpoints.inputs import read_inputs

    if args.inputs:
        return read_inputs(args.inputs)
    if batches is None:
        raise ValueError(
            "no inputs for two exported files to run on; write --inputs FILE.npz, or --model "
            "MODULE:FUNCTION for its first batch"
        )
    return first(batches, args)


def loaded(source: Any, like: Any, args: Namespace) -> tuple[Any, Any]:
    """`users_model.load` with the options of the command line; a refusal names these options."""
    from jaxbn._cli import users_model
    from jaxbn.convert._matching import MisfitError

    given = {"rename": args.rename, "keep": args.keep, "epsilon": args.epsilon}
    try:
        return users_model.load(source, like, **given)
    except MisfitError as error:
        raise MisfitError(
            f"{error}\nHere: --rename A=B, --keep LAYER, --part PATH if the model is a part of the "
            f"checkpoint."
        ) from error


def on_the_cpu() -> None:
    """Keeps JAX on the CPU: an accelerator's memory may belong to a run that trains there."""
    import jax

    jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")
