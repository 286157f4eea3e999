"""`python -m jaxbn lint`: what is wrong with how the user's network is put together."""

import functools
from argparse import Namespace
from typing import Any

from jaxbn._cli import models, options

HELP = "is this network put together well?"
DESCRIPTION = (
    "Traces your model and says what is wrong with how it uses its batch norms. The model does "
    "not\nrun, and there is no checkpoint."
)
EPILOG = (
    f"{options.MODEL}\n"
    "Here apply may run the model in train mode: functools.partial(net.apply, train=True,\n"
    'mutable=["batch_stats"], rngs=...). Dropout is judged in that mode alone.\n\n'
    "exit status: 0 healthy, 1 findings, 2 could not be traced"
)


def add(sub: Any) -> None:
    """Adds the command's options."""
    sub.add_argument("--model", metavar="MODULE:FUNCTION", required=True, help="your model: below")
    mode = sub.add_mutually_exclusive_group()
    mode.add_argument(
        "--train",
        action="store_const",
        const=True,
        help="apply is for training: a layer in eval mode is a finding",
    )
    mode.add_argument(
        "--eval",
        dest="train",
        action="store_const",
        const=False,
        help="apply is for serving: a layer in train mode is a finding",
    )
    sub.add_argument("--json", action="store_true", help="the same for programs")


def run(args: Namespace) -> int:
    """Prints what is wrong with how a network is put together. Status 1 if there are findings."""
    import jax
    import jax.numpy as jnp

    from jaxbn import health
    from jaxbn._cli import terminal, users_model
    from jaxbn._inspection.layers import is_nnx

    models.on_the_cpu()
    apply, model, batches = users_model.network(args.model)
    x = models.first(batches, args)
    if not is_nnx(model):
        # Shapes will do. Ones and not zeros: a factor that is 0 is a finding.
        shapes = jax.tree.map(
            lambda v: jnp.ones(v.shape, v.dtype) if isinstance(v, jax.ShapeDtypeStruct) else v,
            model,
        )
        findings = health.lint(functools.partial(apply, shapes), x, train=args.train)
    else:
        findings = health.lint(apply, model, x, train=args.train)
    if args.json:
        print(terminal.findings_as_json(args.model, findings))
    else:
        terminal.show_findings(args.model, findings)
    return int(bool(findings))
