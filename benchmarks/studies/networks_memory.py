"""What a checkpoint policy saves in whole networks: `python -m benchmarks.studies.networks_memory`.

ResNet-50 (He et al. 2016) and DenseNet-121 (Huang et al. 2017), one step of gradient descent,
with Flax's norm and ours; as they are, with every block recomputed (`nn.remat`), with
`jaxbn.checkpoint_policy` on each block or around the whole network, and with `jax.checkpoint`
around every activation alone.

Bytes come from shapes and from the compiler, nothing runs for them; with `--target` from the
compiler for that accelerator, which need not be here (`targets.py`), and then with the bytes that
its kernels move. Time is this process's CPU time, the variants taking turns.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

import jaxbn
from benchmarks.reporting import report
from benchmarks.reporting.report import Table
from benchmarks.studies import targets
from benchmarks.subjects.network import forward, step


class Variant(NamedTuple):
    """A norm, and the options of the checkpoint around each part; None where there is none."""

    norm: Any
    block: dict[str, Any] | None = None
    network: dict[str, Any] | None = None
    activation: dict[str, Any] | None = None


FLAX, OURS = nn.BatchNorm, jaxbn.linen.BatchNorm
POLICY = {"policy": jaxbn.checkpoint_policy}
VARIANTS = {
    "Flax": Variant(FLAX),
    "Flax, nn.remat on blocks": Variant(FLAX, block={}),
    "Flax, policy on blocks": Variant(FLAX, block=POLICY),
    "jaxbn": Variant(OURS),
    "jaxbn, nn.remat on blocks": Variant(OURS, block={}),
    "jaxbn, policy on blocks": Variant(OURS, block=POLICY),
    "jaxbn, policy on the network": Variant(OURS, network=POLICY),
    "jaxbn, checkpoint on activations": Variant(OURS, activation={}),
}


class Bottleneck(nn.Module):
    channels: int
    stride: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    act: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x):
        c, strides = self.channels, (self.stride, self.stride)
        y = self.act(self.norm()(self.conv(c, (1, 1))(x)))
        y = self.act(self.norm()(self.conv(c, (3, 3), strides)(y)))
        y = self.norm()(self.conv(4 * c, (1, 1))(y))
        if x.shape != y.shape:
            x = self.norm()(self.conv(4 * c, (1, 1), strides)(x))
        return self.act(x + y)


class DenseLayer(nn.Module):
    growth: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    act: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x):
        y = self.conv(4 * self.growth, (1, 1))(self.act(self.norm()(x)))
        y = self.conv(self.growth, (3, 3))(self.act(self.norm()(y)))
        return jnp.concatenate([x, y], -1)


class Transition(nn.Module):
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    act: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x):
        x = self.conv(x.shape[-1] // 2, (1, 1))(self.act(self.norm()(x)))
        return nn.avg_pool(x, (2, 2), (2, 2))


def around(f: Any, checkpoint: Callable[..., Any], options: dict[str, Any] | None) -> Any:
    return f if options is None else checkpoint(f, **options)


class Network(nn.Module):
    """Stem, blocks, mean over space, logits."""

    layout: str  # ResNet-50 or DenseNet-121
    variant: Variant
    activation: str
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(
            self.variant.norm, use_running_average=False, momentum=0.9, dtype=self.dtype
        )
        act = around(getattr(jax.nn, self.activation), jax.checkpoint, self.variant.activation)
        remat = functools.partial(around, checkpoint=nn.remat, options=self.variant.block)
        x = act(norm()(conv(self.width, (7, 7), (2, 2))(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        if self.layout == "ResNet-50":
            block = remat(Bottleneck)
            for i, blocks in enumerate((3, 4, 6, 3)):
                for j in range(blocks):
                    stride = 2 if i > 0 and j == 0 else 1
                    x = block(self.width * 2**i, stride, conv, norm, act)(x)
        else:
            layer, transition = remat(DenseLayer), remat(Transition)
            for i, layers in enumerate((6, 12, 24, 16)):
                for _ in range(layers):
                    x = layer(self.width // 2, conv, norm, act)(x)
                x = transition(conv, norm, act)(x) if i < 3 else act(norm()(x))
        return nn.Dense(1000, dtype=self.dtype)(x.mean((1, 2))).astype(jnp.float32)


def network(layout: str, variant: Variant, *options: Any) -> nn.Module:
    return around(Network, nn.remat, variant.network)(layout, variant, *options)


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
    bytes_, programs = {}, {}
    for name in variants:
        print(f"compiling {layout}, {name} ...", file=sys.stderr)
        model = network(layout, VARIANTS[name], activation, width, dtype)
        make = functools.partial(arguments, model, batch, pixels, dtype)
        shapes = jax.eval_shape(make)
        program = compiled(model, shapes, device)
        moved = targets.moved(targets.kernels(program)) if device else 0
        temporaries = program.memory_analysis().temp_size_in_bytes
        bytes_[name] = kept(model, shapes), temporaries, moved
        if repeats:
            programs[name] = functools.partial(program, *jax.jit(make)())
    times = seconds(programs, repeats)
    base, rows = bytes_["Flax"], []
    for name, of in bytes_.items():
        row = [name]
        for mine, flax in zip(of, base, strict=True):
            row += [mine / 1e6, mine / flax] if flax else []
        if repeats:
            ratios = [t / f for t, f in zip(times[name], times["Flax"], strict=True)]
            row += [statistics.median(ratios), f"{min(ratios):.2f} to {max(ratios):.2f}"]
        rows.append(row)
    columns = ["variant", "kept, MB", "of Flax's", "temporaries, MB", "of Flax's"]
    columns += ["moved, MB", "of Flax's"] if device else []
    if repeats:
        columns += ["CPU time, of Flax's", f"least and most of {repeats}"]
    where = "this machine" if device is None else device.device_kind
    return Table(
        f"{layout}, {activation}, width {width}, {batch} x {pixels}² {dtype}, for {where}",
        columns,
        rows,
        [
            "Kept: what forward hands to backward. Temporaries: temp_size_in_bytes of the step.",
            *(["Moved: bytes of the operands and results of all kernels."] if device else []),
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.networks_memory", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--network", nargs="*", default=["ResNet-50", "DenseNet-121"])
    parser.add_argument("--variant", nargs="*", default=list(VARIANTS), help="beside Flax")
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--activation", default="relu", help="a name in jax.nn")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=0, help="timed calls of each variant")
    parser.add_argument("--target", choices=targets.NAMES, help="compile for it, times aside")
    parser.add_argument("--json", metavar="FILE", help="write the tables there too, unrounded")
    options = parser.parse_args()
    if options.target and options.repeats:
        parser.error("--repeats times this machine, --target compiles for another: give one")
    device, tables = targets.device(options.target) if options.target else None, []
    variants = list(dict.fromkeys(["Flax", *options.variant]))
    size = options.width, options.batch, options.pixels
    for layout in options.network:
        for dtype in map(jnp.dtype, options.dtype):
            table = measure(
                variants, layout, options.activation, *size, dtype, device, options.repeats
            )
            report.show(table)
            tables.append(table)
    report.show_environment()
    if options.json:
        report.write(options.json, tables)


if __name__ == "__main__":
    main()
