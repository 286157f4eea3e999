"""One network on handwritten digits: first step, training, test, a saved state.

python examples/first_steps.py
python examples/first_steps.py --epochs 20
python examples/first_steps.py --out mine.npz
"""

import argparse
import sys
from pathlib import Path

import jax
import numpy as np
import optax
from rich import print
from rich.table import Table
from sklearn.datasets import load_digits

import jaxbn

optimizer = optax.adam(1e-3)


def init(key):
    k1, k2 = jax.random.split(key)
    norm, state = jaxbn.init(128)  # Params(scale, bias), State(mean, var, count)
    w1, w2 = jax.random.normal(k1, (64, 128)) / 8, jax.random.normal(k2, (128, 10)) / 11
    return {"w1": w1, "norm": norm, "w2": w2}, state  # gradients change params; batches, state


def model(params, state, x, train):  # [B, 64] → [B, 10]
    h = x @ params["w1"]  # [B, 128], without a bias: the norm has one
    h, state = jaxbn.batch_norm(h, params["norm"], state, train=train, momentum=0.9)
    return jax.nn.relu(h) @ params["w2"], state


def loss(params, state, x, y):
    logits, state = model(params, state, x, train=True)  # by the batch's own statistics
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), state


@jax.jit
def step(params, state, opt_state, x, y):
    (value, state), grads = jax.value_and_grad(loss, has_aux=True)(params, state, x, y)
    updates, opt_state = optimizer.update(grads, opt_state)
    return optax.apply_updates(params, updates), state, opt_state, value


@jax.jit
def accuracy(params, state, x, y):
    logits, _ = model(params, state, x, train=False)  # by the running statistics, unchanged
    return (logits.argmax(-1) == y).mean()


def main(epochs=10, out=Path("first_steps.npz")):
    x, y = load_digits(return_X_y=True)
    x, rng, scores = (x / 16).astype(np.float32), np.random.default_rng(0), []
    train, test = np.split(rng.permutation(len(x)), [1437])
    params, state = init(jax.random.key(0))
    opt_state = optimizer.init(params)
    for epoch in range(1, epochs + 1):
        for rows in rng.permutation(train)[: 22 * 64].reshape(22, 64):
            params, state, opt_state, value = step(params, state, opt_state, x[rows], y[rows])
        scores.append(float(accuracy(params, state, x[test], y[test])))
        print(f"epoch {epoch:2}  loss {value:.3f}  test accuracy {scores[-1]:.2%}")

    leaves, tree = jax.tree.flatten((params, state))  # without the state, eval would be wrong
    part = out.with_name(f"{out.name}.part")
    try:
        with open(part, "wb") as file:
            np.savez(file, *leaves)
        part.replace(out)  # the old file or the new one, never a part
    except OSError as error:
        error.filename = f"--out {out}"  # a full disk names no file
        raise
    finally:
        part.unlink(missing_ok=True)
    with np.load(out) as file:  # arrays and nothing else: objects would be refused
        params, state = jax.tree.unflatten(tree, list(file.values()))
    again = float(accuracy(params, state, x[test], y[test]))
    table = Table("", "test accuracy", title="Handwritten digits")
    for name, score in (("trained", scores[-1]), ("saved and restored", again)):
        table.add_row(name, f"{score:.2%}")
    print(table)
    return scores, again


if __name__ == "__main__":
    p = argparse.ArgumentParser("first_steps.py", formatter_class=argparse.RawTextHelpFormatter)
    p.description, _, p.epilog = __doc__.partition("\n\n")  # --help ends with the three lines
    p.error = lambda text: p.exit(2, f"{p.prog}: error: {text}\n")
    p.add_argument("--epochs", type=int, default=10, help="(10)")
    p.add_argument("--out", type=Path, default="first_steps.npz", help="(first_steps.npz)")
    args = p.parse_args()
    if args.epochs < 1:
        p.error(f"--epochs {args.epochs}: expected 1 or more")
    other = args.out.exists() and not args.out.is_file()  # a folder, or a device
    if other or not args.out.parent.is_dir():
        p.error(f"--out {args.out}: expected a file in a folder that exists")
    try:
        main(**vars(args))
    except OSError as error:
        if not error.filename:  # what `print` raises
            sys.stdout = None  # Python would write the rest at its end, and fail again
        p.error(f"{error.filename or 'stdout'}: {error.strerror}")
    except KeyboardInterrupt:
        p.exit(130, "Stopped.\n")
