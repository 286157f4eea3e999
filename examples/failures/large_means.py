"""Temperatures, 290 ± 5 kelvin, in bfloat16: their E[x²] - E[x]² is rounding."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from failure import Result, evaluate, show, start, train

import jaxbn
from jaxbn import health


class Sensors(nn.Module):
    norm: partial
    dtype: type

    @nn.compact
    def __call__(self, x, train=False):
        norm = self.norm(use_running_average=not train, momentum=0.9, name="norm")
        return nn.Dense(4)(norm(x.astype(self.dtype)).astype(jnp.float32))


def run(norm, dtype, seed):
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 1, (300, 64, 16))
    y = (z @ rng.normal(0, 1, (16, 4))).argmax(-1).astype(np.int32)
    x = (290 + 5 * z).astype(np.float32)
    net = Sensors(norm, dtype)
    fresh = start(net, x[0], seed=seed)
    variables = train(net.apply, fresh, (x[:280], y[:280]))
    # Before the first step, and after the last.
    exact = jaxbn.recalibrate(net.apply, fresh, x[:8])
    findings = health.check(exact, dtype=dtype) + health.check(variables, dtype=dtype)
    return evaluate(net, variables, x[280:].reshape(-1, 16), y[280:].reshape(-1)), findings


def main(seed=0):
    in_bfloat16 = partial(nn.BatchNorm, force_float32_reductions=False)
    before, findings = run(in_bfloat16, jnp.bfloat16, seed)
    after, left = run(partial(jaxbn.linen.BatchNorm), jnp.float32, seed)
    call = "health.check(..., dtype=bfloat16)"
    cure = "jaxbn.linen.BatchNorm on x in float32"
    return Result("large means in bfloat16", before, findings, call, cure, after, left)


if __name__ == "__main__":
    show(main)
