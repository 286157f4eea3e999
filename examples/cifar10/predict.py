# The top classes of images, by a trained run.
#
#   python examples/cifar10/train.py --data DIR --name mine
#   python examples/cifar10/predict.py runs/mine one.png another.jpg

from pathlib import Path

import jax
import numpy as np
from augment import normalize
from checkpoint import last_state
from command import Parser, between, check_place, new_file, one_line, shown, told
from images import decode
from options import run_about, run_options
from rich.console import Console
from rich.table import Table
from train import make_steps


def parser() -> Parser:
    p = Parser(
        prog="predict.py",
        description="The top classes of images, by a trained run.",
        examples=[
            "python examples/cifar10/predict.py runs/mine one.png another.jpg",
            "python examples/cifar10/predict.py runs/mine --top 1 DIR/*.png",
            "python examples/cifar10/predict.py runs/mine one.png --picture top.png",
        ],
    )
    p.add_argument("run", type=Path, help="folder of a run of train.py")
    p.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="a PNG or JPEG file")
    p.add_argument("--top", type=between(int, 1), default=5, help="classes to show (5)")
    p.add_argument("--picture", type=Path, help="a PNG file of the first images and their classes")
    return p


def predictions(run: Path, paths: list[Path]):
    """The images as the network sees them [N, H, W, 3] uint8, and probabilities [N, classes]."""
    args, about = run_options(run), run_about(run)
    height, width, _ = about.shape
    images = np.stack([decode(path, height, width) for path in paths])
    steps = make_steps(args, about)
    state = last_state(run, lambda: jax.jit(steps.init)(jax.random.key(0)))
    logits = jax.jit(steps.logits)
    batches = [images[i : i + 64] for i in range(0, len(images), 64)]
    scores = [logits(state, normalize(x, about.mean, about.std)) for x in batches]
    return images, np.concatenate([jax.nn.softmax(row) for row in scores]), about.classes


def drawn(images, probabilities, classes, top: int):
    """A figure of up to eight images, each beside the bars of its top classes."""
    from matplotlib.figure import Figure

    rows = min(len(images), 8)
    figure = Figure((6, 0.8 + 1.4 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False, width_ratios=[1, 3])
    for (left, right), image, p in zip(axes, images, probabilities, strict=False):
        left.imshow(image)
        left.axis("off")
        best = np.argsort(-p)[:top]
        bars = right.barh(range(len(best)), 100 * p[best], color="#1f77b4")
        right.bar_label(bars, fmt="%.1f", padding=3)
        right.set_yticks(range(len(best)), [classes[i].replace("$", r"\$") for i in best])
        right.set(xlim=(0, 115), ylim=(len(best) - 0.5, -0.5))
    axes[-1, 1].set_xlabel("probability, %")
    figure.suptitle("Top classes")
    return figure


def answer(args) -> None:
    """Prints a table, and draws the picture if there is to be one."""
    check_place("--picture", args.picture)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    with console.status("decoding and predicting"):
        images, probabilities, classes = predictions(args.run, args.images)
    table = Table(title=f"Top classes, by {shown(args.run)}", title_justify="left")
    for name in ("image", "class"):
        table.add_column(name, overflow="fold")  # whole, however long
    table.add_column("probability", justify="right", no_wrap=True)
    for path, row in zip(args.images, probabilities, strict=True):
        for place, i in enumerate(np.argsort(-row)[: args.top]):
            table.add_row("" if place else shown(path), classes[i], f"{row[i]:.2%}")
        table.add_section()
    console.print(table)
    if args.picture:
        figure = drawn(images, probabilities, classes, args.top)
        with new_file(args.picture) as part:
            figure.savefig(part, format="png", dpi=110)
        console.print(f"Picture: {shown(args.picture)}")


def main(argv: list[str] | None = None) -> None:
    p = parser()
    args = p.parse_args(argv)
    try:
        with one_line(p):
            answer(args)
    except ValueError as error:
        p.error(told(error))


if __name__ == "__main__":
    main()
