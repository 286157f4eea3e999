"""A first hour with the package alone, jax and flax: train, judge, repair, fold, the command line.

A script without pytest, for an environment that holds nothing but the wheel. Prints the versions.
"""

import contextlib
import functools
import io
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxbn
from jaxbn import health


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        x = nn.relu(jaxbn.linen.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(4)(x.mean((1, 2)))


class Twin(nnx.Module):
    def __init__(self, rngs):
        self.Conv_0 = nnx.Conv(3, 8, (3, 3), use_bias=False, rngs=rngs)
        self.BatchNorm_0 = jaxbn.nnx.BatchNorm(8, rngs=rngs)
        self.Dense_0 = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.Dense_0(nnx.relu(self.BatchNorm_0(self.Conv_0(x))).mean((1, 2)))


@functools.partial(jax.jit, static_argnums=0)
def step(net, variables, x, target):
    def loss(params):
        y, new = net.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
        return jnp.square(y - target).mean(), new

    (value, new), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], grads)
    return {"params": params, **new}, value


def main() -> None:
    y, _ = jaxbn.batch_norm(
        jax.random.normal(jax.random.key(0), (256, 1)) + 1e4, *jaxbn.init(1), train=True
    )
    assert abs(float(y.std()) - 1) < 1e-3

    net, x = Net(), jax.random.normal(jax.random.key(0), (32, 8, 8, 3)) + 3
    variables, losses = net.init(jax.random.key(1), x, train=False), []
    assert {f.kind for f in health.check(variables)} == {"never_updated"}
    for _ in range(20):
        variables, loss = step(net, variables, x, x.mean((1, 2)) @ jnp.ones((3, 4)))
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 4, losses

    apply = functools.partial(net.apply, train=False)
    ready = jaxbn.recalibrate(apply, variables, [x], progress=False)
    folded, report = jaxbn.fold(lambda x: apply(ready, x), x)
    assert len(report.folded) == 1
    np.testing.assert_allclose(folded(x), apply(ready, x), rtol=1e-4, atol=1e-4)

    model = nnx.eval_shape(lambda: Twin(nnx.Rngs(0)))
    twin, _ = jaxbn.convert.linen_to_nnx(ready, model)
    twin.eval()
    np.testing.assert_allclose(twin(x), apply(ready, x), rtol=1e-4, atol=1e-4)

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/net.msgpack"
        with open(path, "wb") as file:
            file.write(flax.serialization.to_bytes(ready))
        command = [sys.executable, "-I", "-m", "jaxbn", "doctor", path]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    with contextlib.redirect_stdout(io.StringIO()) as map_of_names:
        help(jaxbn)
    assert "A map of the package" in map_of_names.getvalue()
    versions = ", ".join(f"{name} {version(name)}" for name in ("jaxbn", "jax", "flax", "numpy"))
    print(f"ok  python {platform.python_version()}, {versions}")


if __name__ == "__main__":
    main()
