"""Training steps of whole networks with Flax's norm and ours.

`python -m benchmarks.studies.networks`

ResNet-50, DenseNet-121, EfficientNet-B0 and MobileNetV2, one step of gradient descent: as they
are, with activation and residual in the norm, with every block recomputed (`nn.remat`), with
`jaxbn.checkpoint_policy` on each block or around the whole network, and with `jax.checkpoint`
around every activation alone.

Bytes come from shapes and from the compiler, nothing runs for them; with `--target` from the
compiler for that accelerator, which need not be here (`targets.py`), and then with its kernels, the
bytes that they move and, for a TPU, the cycles that they are expected to take. Time is this
process's CPU time, the variants taking turns.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import jaxbn
from benchmarks.reporting import command, report
from benchmarks.reporting.report import Table, track
from benchmarks.studies import targets
from benchmarks.subjects.families import FAMILIES, Variant, model
from benchmarks.subjects.network import forward, step

FLAX, OURS = nn.BatchNorm, jaxbn.linen.BatchNorm
POLICY = {"policy": jaxbn.checkpoint_policy}
STATISTICS = {"policy": jax.checkpoint_policies.save_only_these_names("batch_norm_moments")}
VARIANTS = {
    "Flax": Variant(FLAX),
    "Flax, nn.remat on blocks": Variant(FLAX, block={}),
    "Flax, policy on blocks": Variant(FLAX, block=POLICY),
    "jaxbn": Variant(OURS),
    "jaxbn, activation and residual": Variant(OURS, inside=True),
    "jaxbn, nn.remat on blocks": Variant(OURS, block={}),
    "jaxbn, policy on blocks": Variant(OURS, block=POLICY),
    "jaxbn, statistics kept on blocks": Variant(OURS, block=STATISTICS),
    "jaxbn, activation and residual, policy on blocks": Variant(OURS, inside=True, block=POLICY),
    "jaxbn, policy on the network": Variant(OURS, network=POLICY),
    "jaxbn, checkpoint on activations": Variant(OURS, activation={}),
}
ACTIVATIONS = ("relu", "relu6", "leaky_relu", "silu", "gelu", "elu", "softplus", "tanh", "sigmoid")
USUAL = ["jaxbn", "jaxbn, activation and residual", "jaxbn, policy on blocks"]


def arguments(model, batch, pixels, dtype):
    x = jnp.ones((batch, pixels, pixels, 3), dtype)
    variables = model.init(jax.random.key(0), x)
    return variables["params"], variables["batch_stats"], x, jnp.zeros((batch,), jnp.int32)


def kept(model, shapes) -> int:
    """Bytes that forward hands to backward, weights among them; nothing is compiled."""
    residuals = jax.tree.leaves(jax.eval_shape(functools.partial(forward, model), *shapes)[1])
    return sum(leaf.size * leaf.dtype.itemsize for leaf in residuals)


def compiled(model, shapes, device):
    """The compiled step, for this machine or for a device that is not here."""
    f = functools.partial(step, model)
    if device is None:
        return jax.jit(f).lower(*shapes).compile()
    return targets.compiled(f, shapes, device)


def seconds(programs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """CPU time of each call, in turns that start elsewhere every round; one call untimed."""
    names = list(programs)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for program in programs.values():
        jax.block_until_ready(program())
    for turn in range(repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.process_time()
            jax.block_until_ready(programs[name]())
            taken[name].append(time.process_time() - start)
    return taken


def measure(
    variants, layout, activation, width, batch, pixels, dtype, device=None, repeats=0
) -> Table:
    """One network, a row a variant; times where `repeats` is not 0."""
    sizes, counts, programs = {}, {}, {}
    for name in track(variants, f"{layout}, {dtype}, batch {batch}"):
        network = model(layout, VARIANTS[name], width, dtype, activation)
        make = functools.partial(arguments, network, batch, pixels, dtype)
        shapes = jax.eval_shape(make)
        program = compiled(network, shapes, device)
        listed = targets.kernels(program) if device else []
        temporaries = program.memory_analysis().temp_size_in_bytes
        sizes[name] = kept(network, shapes), temporaries, targets.moved(listed)
        counts[name] = len(listed), targets.cycles(program)
        if repeats:
            programs[name] = functools.partial(program, *jax.jit(make)())
    times = seconds(programs, repeats)
    base, rows = sizes["Flax"], []
    cycles = counts["Flax"][1]
    for name, of in sizes.items():
        row: list[str | float] = [name]
        for mine, flax in zip(of, base, strict=True):
            row += [mine / 1e6, mine / flax] if flax else []
        if device:
            row += [counts[name][0], counts[name][0] / counts["Flax"][0]]
        if cycles:
            row += [counts[name][1] / cycles]
        if repeats:
            ratios = [t / f for t, f in zip(times[name], times["Flax"], strict=True)]
            row += [statistics.median(ratios), f"{min(ratios):.2f} to {max(ratios):.2f}"]
        rows.append(row)
    columns = ["variant", "kept, MB", "of Flax's", "temporaries, MB", "of Flax's"]
    columns += ["moved, MB", "of Flax's", "kernels", "of Flax's"] if device else []
    columns += ["cycles, of Flax's"] if cycles else []
    if repeats:
        columns += ["CPU time, of Flax's", f"least and most of {repeats}"]
    where = "this machine" if device is None else device.device_kind
    return Table(
        f"{layout}, {activation or 'its activation'}, width {width}, {batch} x {pixels}² {dtype}, "
        f"for {where}",
        columns,
        rows,
        [
            "Kept: what forward hands to backward. Temporaries: temp_size_in_bytes of the step.",
            *(["Moved: bytes of the operands and results of all kernels."] if device else []),
        ],
    )


def main(arguments: list[str]) -> None:
    parser = command.parser("benchmarks.studies.networks", __doc__.split("\n\n")[0])
    parser.add_argument(
        "--network",
        nargs="+",
        choices=FAMILIES,
        default=list(FAMILIES),
        metavar="NAME",
        help=f"of {', '.join(FAMILIES)}; all of them by default",
    )
    parser.add_argument(
        "--variant",
        nargs="+",
        choices=VARIANTS,
        default=USUAL,
        metavar="NAME",
        help=f"beside Flax, of {'; '.join(name for name in VARIANTS if name != 'Flax')}",
    )
    parser.add_argument("--dtype", type=command.dtype, nargs="+", default=["float32", "bfloat16"])
    parser.add_argument(
        "--activation",
        choices=ACTIVATIONS,
        metavar="NAME",
        help=f"in place of the network's own, of {', '.join(ACTIVATIONS)}",
    )
    parser.add_argument("--width", type=command.positive, default=64)
    parser.add_argument("--batch", type=command.positive, nargs="+", default=[64])
    parser.add_argument("--pixels", type=command.positive, default=224)
    parser.add_argument("--repeats", type=int, default=0, help="timed calls of each variant")
    parser.add_argument("--target", choices=targets.NAMES, help="compile for it, times aside")
    parser.add_argument("--json", metavar="FILE", help="write the tables there too, unrounded")
    options = parser.parse_args(arguments)
    if options.target and options.repeats:
        parser.error("--repeats times this machine, --target compiles for another: give one")
    device, tables = targets.device(options.target) if options.target else None, []
    variants = list(dict.fromkeys(["Flax", *options.variant]))
    for layout in options.network:
        for dtype, batch in [(jnp.dtype(d), b) for d in options.dtype for b in options.batch]:
            size = options.width, batch, options.pixels
            table = measure(
                variants, layout, options.activation, *size, dtype, device, options.repeats
            )
            report.show(table)
            tables.append(table)
            if options.json:
                report.write(options.json, tables)  # after each, so that a run cut short tells
    report.show_environment()


if __name__ == "__main__":
    command.end(main)
