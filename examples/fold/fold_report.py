# One ResNet as Flax, Haiku, Equinox and jaxbn write it, folded: no norm is left, whoever wrote it.
#   python examples/fold/fold_report.py        (needs dm-haiku and equinox)

import jax
import resnets

import jaxbn


def norm_operations(fn, x):  # in the program that XLA gets
    text = jax.jit(fn).lower(x).as_text()
    return sum(text.count(f"stablehlo.{op} ") for op in ("rsqrt", "sqrt", "subtract", "multiply"))


def main():
    x = jax.random.normal(jax.random.key(2), (4, 16, 16, 3))
    networks = resnets.networks(x)
    folded, reports = {}, {}
    for name, fn in networks.items():
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
    main()
