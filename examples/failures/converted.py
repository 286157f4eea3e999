"""A conversion by hand copies what PyTorch calls parameters. Its running statistics are buffers."""

import jax
import numpy as np
from failure import Net, Result, accuracy, batches, digits, evaluate, show, start, train

import jaxbn
from jaxbn import convert, health

NAMES = {  # layer here → its name in the PyTorch model
    "Dense_0": "fc1",
    "norm0": "bn1",
    "Dense_1": "fc2",
}


def saved(variables):
    """The state_dict of the same network in PyTorch, trained."""
    out = {}
    for layer, name in NAMES.items():
        own = variables["params"][layer]
        weight = own["kernel"].T if "kernel" in own else own["scale"]
        out |= {f"{name}.weight": np.asarray(weight), f"{name}.bias": np.asarray(own["bias"])}
    stats = variables["batch_stats"]["norm0"]
    return out | {f"bn1.running_{name}": np.asarray(stats[name]) for name in ("mean", "var")}


def by_hand(state_dict, fresh):
    """Kernels are transposed, names are right, and batch_stats are those of a new network."""
    params = {}
    for layer, name in NAMES.items():
        weight = state_dict[f"{name}.weight"]
        own = {"scale": weight} if weight.ndim == 1 else {"kernel": weight.T}
        params[layer] = {**own, "bias": state_dict[f"{name}.bias"]}
    return {**fresh, "params": params}


def converted(seed=0):
    """The network converted by hand, and by this library."""
    (x, y), _ = digits()
    net = Net()
    fresh = start(net, x[:2], seed=seed)
    state_dict = saved(train(net.apply, fresh, batches(x, y, 400, 64, seed)))
    rename = {name: layer for layer, name in NAMES.items()}
    return net, by_hand(state_dict, fresh), convert.from_torch(state_dict, fresh, rename=rename)[0]


def main(seed=0):
    net, sick, cured = converted(seed)
    _, test = digits()
    return Result(
        "accuracy lost in conversion",
        evaluate(net, sick, *test),
        health.check(sick),
        "health.check(variables)",
        "convert.from_torch(state_dict, variables)",
        evaluate(net, cured, *test),
        health.check(cured),
    )


def folded(seed=0):
    """Test accuracy once it is folded: a fold keeps what is there, right or wrong."""
    net, sick, _ = converted(seed)
    x, y = digits()[1]
    fold, report = jaxbn.fold(lambda x: net.apply(sick, x), x)
    return accuracy(jax.jit(fold)(x), y), report.relative


if __name__ == "__main__":
    text = "folded: test accuracy {:.2f}, off by {:.1e} of the largest value"
    show(main, lambda: text.format(*folded()))
