# A network learns new classes from few images: batch norm frozen, and not.
#
#   python examples/finetune/finetune.py                       on handwritten digits
#   python examples/finetune/finetune.py --data-dir DIR        on CIFAR-10
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "cifar10"))

import numpy as np
import optax
from augment import normalize
from command import Parser, between, one_line, progress
from data import load
from flax import nnx
from model_nnx import ResNet9
from rich import print
from rich.table import Table

import jaxbn


def apply(model, x):  # recalibrate normalizes by the batch in any mode
    return model(x, train=False)


# Weight decay is for kernels, not for the scales and biases of norms.
adam = partial(optax.adamw, mask=jaxbn.decay_mask)


def kernels_alone(lr):
    labels = partial(jaxbn.labels, frozen="*")
    return optax.multi_transform({"rest": adam(lr), "frozen": optax.set_to_zero()}, labels)


def freeze(model, x):
    jaxbn.freeze(model)  # refuses statistics that no batch has updated


def again(model, x):
    jaxbn.recalibrate(apply, model, [x])


WAYS = {  # what is done to the model before and after it learns from few images x; its optimizer
    "trained on, batches of 4": ([], [], adam),
    "trained on, then recalibrated": ([], [again], adam),
    "frozen": ([freeze], [], adam),
    "frozen, scale and bias too": ([freeze], [], kernels_alone),
    "recalibrated, then frozen": ([again, freeze], [], adam),
}


@nnx.jit(static_argnames="first")
def step(model, optimizer, x, y, first):
    def loss(model):  # among the classes from `first` on
        logits = model(x, train=True)[:, first:]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y - first).mean()

    optimizer.update(model, nnx.grad(loss)(model))


def train(rng, model, tx, x, y, steps, batch):
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(steps):
        rows = rng.choice(len(y), batch, replace=False)
        step(model, optimizer, x[rows], y[rows], first=6 if y.min() == 6 else 0)


def main(data_dir=None, width=16, steps=400, shots=20, seeds=3):
    data = load("cifar10" if data_dir else "digits", data_dir)

    def images(x, y, rows):  # the rows as the network takes them, and their labels
        return np.asarray(normalize(x[rows], data.mean, data.std)), y[rows]

    new = [np.flatnonzero(data.train_y == c) for c in range(6, 10)]
    test_x, test_y = images(data.test_x, data.test_y, np.flatnonzero(data.test_y >= 6))
    predict = nnx.jit(lambda model: apply(model, test_x)[:, 6:].argmax(-1) + 6)
    pretrained, rng = ResNet9(width=width, rngs=nnx.Rngs(0)), np.random.default_rng(0)
    x, y = images(data.train_x, data.train_y, np.flatnonzero(data.train_y < 6))
    train(rng, pretrained, adam(3e-3), x, y, steps, batch=128)

    table = Table("batch norm", "accuracy, new classes", "least", "most", title=data.name)
    for name, (before, after, optimizer) in WAYS.items():
        scores, tx = [], optimizer(1e-3)  # one, or the step compiles for each
        for seed in progress(range(seeds), name):
            rng = np.random.default_rng(seed)
            few = np.concatenate([rng.choice(rows, shots, replace=False) for rows in new])
            x, y = images(data.train_x, data.train_y, few)
            model = nnx.clone(pretrained)
            for change in before:
                change(model, x)
            train(rng, model, tx, x, y, steps // 2, batch=4)
            for change in after:
                change(model, x)
            scores.append(np.mean(predict(model) == test_y))
        table.add_row(name, *(f"{v:.2%}" for v in (np.mean(scores), min(scores), max(scores))))
    print(table)
    return table


if __name__ == "__main__":
    parser = Parser(
        prog="finetune.py",
        description="A network learns new classes from few images: batch norm frozen, and not.",
        examples=[
            "python examples/finetune/finetune.py",
            "python examples/finetune/finetune.py --seeds 5 --shots 50",
            "python examples/finetune/finetune.py --data-dir DIR",
        ],
    )
    parser.add_argument("--data-dir", type=Path, help="CIFAR-10's binary files (else: digits)")
    parser.add_argument("--shots", type=between(int, 4), default=20, help="images a class (20)")
    parser.add_argument("--seeds", type=between(int, 1), default=3, help="draws of them (3)")
    with one_line(parser):
        main(**vars(parser.parse_args()))
