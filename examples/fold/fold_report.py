# One ResNet as Flax, Haiku, Equinox and jaxbn write it, folded: no norm is left, whoever wrote it.
#   python examples/fold/fold_report.py        (needs dm-haiku and equinox)

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "cifar10"))

import jax
import resnets
from command import Parser, between, one_line, progress

import jaxbn


def norm_operations(fn, x):  # in the program that XLA gets
    text = jax.jit(fn).lower(x).as_text()
    return sum(text.count(f"stablehlo.{op} ") for op in ("rsqrt", "sqrt", "subtract", "multiply"))


def main(images=4, pixels=16):
    x = jax.random.normal(jax.random.key(2), (images, pixels, pixels, 3))
    networks = resnets.networks(x)
    folded, reports = {}, {}
    for name, fn in progress(networks.items(), "folding"):
        folded[name], reports[name] = jaxbn.fold(fn, x)

    print("jaxbn linen", reports["jaxbn linen"], sep="\n", end="\n\n")

    def row(label, cells):
        print(f"{label:<26}" + "".join(f"{cell:>13}" for cell in cells))

    row("relative error", reports)
    for sites in zip(*(report.sites for report in reports.values()), strict=True):
        row(sites[1].name, [f"{s.relative:.1e}" if s.folded else "bias alone" for s in sites])
    row("result", [f"{report.relative:.1e}" for report in reports.values()])
    row("norm operations, before", [norm_operations(fn, x) for fn in networks.values()])
    row("norm operations, after", [norm_operations(fn, x) for fn in folded.values()])


if __name__ == "__main__":
    parser = Parser(
        prog="fold_report.py",
        description="One ResNet as Flax, Haiku, Equinox and jaxbn write it, folded.",
        examples=[
            "python examples/fold/fold_report.py",
            "python examples/fold/fold_report.py --images 1",
            "python examples/fold/fold_report.py --pixels 32",
        ],
    )
    parser.add_argument("--images", type=between(int, 1), default=4, help="to fold by (4)")
    parser.add_argument("--pixels", type=between(int, 4), default=16, help="of their sides (16)")
    args = parser.parse_args()
    with one_line(parser):
        main(**vars(args))
