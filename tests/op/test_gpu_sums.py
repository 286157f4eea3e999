"""Moments as on GPUs: about the mean of a grid of positions, both sums by one operation.

Nothing here is a GPU's: the CPU is told to take that way, and where errors are measured to add in a
GPU's order. What a GPU's compiler makes of it is in `tests/accelerators`.
"""

import importlib
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn._op import primitives, sums
from jaxbn._op.axes import resolve
from tests.support import oracle
from tests.support.training import REAL, assert_training_equals_the_oracle

moments = importlib.import_module("jaxbn._op.moments")
EPS = 2.0**-24
SHAPE = (16, 28, 28, 8)
N = math.prod(SHAPE[:-1])


@pytest.fixture(autouse=True)
def gpu(switched):
    switched(primitives, "DEVICES", {"cpu": "gpu"})


def normal(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def of(x, **options):
    return jax.jit(lambda x: jaxbn.moments(x, **options))(jnp.asarray(x, jnp.float32))


@pytest.mark.parametrize("case", REAL, ids=lambda case: case.name)
def test_training_equals_the_oracle(case):
    assert_training_equals_the_oracle(case)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0, 3), (0, 4, 3)])
def test_no_values_have_the_moments_of_the_empty_set(shape):
    for leaf in jaxbn.moments(jnp.ones(shape)):
        np.testing.assert_array_equal(leaf, 0)


def halves(v):
    """Sums over axis 0, two by two."""
    while v.shape[0] > 1:
        half = (v.shape[0] + 1) // 2
        v = v[:half].at[: v.shape[0] - half].add(v[half:])
    return v[0]


def in_a_gpus_order(u, v, axes):
    """Both sums of N rows: 14 terms a thread one after another, 28 threads a block, the blocks."""

    def total(v):
        v = v.reshape(-1, 14, 28, v.shape[-1])
        rest = v[:, 0]
        for i in range(1, 14):
            rest = rest + v[:, i]
        return halves(halves(rest.swapaxes(0, 1)))

    return total(u), total(v)


def read(shape, axis=-1):
    """Which cells the pivot is made of."""
    axes = resolve("test", jnp.zeros(shape), axis)
    return np.asarray(jax.grad(lambda x: moments._grid(x, axes).sum())(jnp.zeros(shape))) != 0


def spiked(where, by, x=None):
    x = normal() if x is None else x
    x[where] += by
    return x


def image(ramp):
    return np.reshape(ramp, (-1, 1, 1, 1))


CASES = {
    **{
        f"mean/sd {ratio:g}": lambda r=ratio: normal() + r
        for ratio in (0, 1, 10, 1e2, 1e3, 1e4, 1e5)
    },
    "an outlier in the middle": lambda: spiked(np.s_[8, 14, 14], 1e6, normal() + 1e3),
    "an image far away": lambda: spiked(np.s_[3], 1e4),
    "sorted": lambda: np.sort((normal() + 100).reshape(N, -1), 0).reshape(SHAPE),
    "images' means from 0 to 1e4": lambda: normal() + image(np.linspace(0, 1e4, 16)),
    "half of the images at 1e4": lambda: normal() + image(1e4 * (np.arange(16) >= 8)),
    "padding": lambda: np.pad(normal((16, 20, 20, 8)) + 1e3, [(0, 0), (4, 4), (4, 4), (0, 0)]),
    "one spike": lambda: spiked(np.s_[3, 5, 7], 1, np.zeros(SHAPE)),
    "sparse": lambda: (np.random.default_rng(0).random(SHAPE) < 1e-3) * 1.0,
    "at 1e8": lambda: normal() * 100 + 1e8,
    "small": lambda: normal() * 1e-6,
    "log-normal": lambda: np.exp(3 * normal()),
    # Chosen against the grid: what it reads is far from all else, or is all else.
    "adversary": lambda: spiked(read(SHAPE), 1e4),
    "adversary at mean 1e3": lambda: spiked(read(SHAPE), 1e3, normal() + 1e3),
    "all but the grid": lambda: spiked(~read(SHAPE), 1e4),
}


@pytest.mark.parametrize("case", CASES)
def test_errors_in_a_gpus_order_of_summation(switched, case):
    """A factor of 1 + 2 SPARSE on the rounding of a sum of 14 terms and then of halves."""
    switched(sums, "_together", in_a_gpus_order)
    x = np.float32(CASES[case]())
    m, (_, mean, var) = of(x), oracle.moments(x)
    depth = 14 + math.log2(N / 14) + 3
    against = case.startswith(("adversary", "all but"))
    # Rounding errors of a sum add up as a random walk, unless most terms are one.
    allowed = (1 + 2 * moments.SPARSE) * depth * EPS if against else 32 * EPS
    np.testing.assert_allclose(m.var, var, rtol=allowed)
    np.testing.assert_allclose(
        m.mean, mean, rtol=2 * EPS, atol=np.sqrt(var.max()) * (allowed if against else 8 * EPS)
    )


@pytest.mark.parametrize("shape", [(16, 28, 28, 3), (12, 7, 5, 3), (3, 9, 3), (100, 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_constant_channels_are_exact(shape, masked):
    constants = np.float32([0.1, 12345.678, 1e8])
    x = np.broadcast_to(constants, shape)
    mask = np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)) != 1 if masked else None
    m = of(x, mask=mask)
    np.testing.assert_array_equal(m.mean, constants)
    np.testing.assert_array_equal(m.var, 0)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((64, 56, 56, 2), -1), ((64, 2, 7, 7), 1), ((8, 224, 4), -1), ((1000, 2), -1), ((2, 9), 0)],
)
def test_the_grid_is_one_in_at_most_64_and_its_mean_within_its_bound(shape, axis):
    """(pivot - mean)² <= SPARSE var, whatever the values: here those against it."""
    sample = read(shape, axis)
    n, k = sample.size, sample.sum()
    assert 1 <= n / k <= moments.SPARSE
    per_channel = k // math.prod(shape[a] for a in resolve("test", jnp.zeros(shape), axis).features)
    batch = shape[0] if len(shape) > 2 else 1
    assert per_channel % batch == 0  # each image has its part
    assert (per_channel // batch) & (per_channel // batch - 1) == 0


def test_a_batch_that_is_sharded_is_read_where_it_is():
    """Two collectives forward: the sum over the grid and that of the sums."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    x = jax.ShapeDtypeStruct(SHAPE, jnp.float32, sharding=NamedSharding(mesh, P("d")))
    text = jax.jit(jaxbn.moments).lower(x).compile().as_text()
    found = re.findall(r" (all-\w+|collective-\w+)(?:-start)?\(", text)
    assert len(found) <= 3  # a sum of two is gathered as two, where a GPU's compiler gathers once
    whole = jax.device_put(np.float32(normal() + 1e3), NamedSharding(mesh, P("d")))
    m = jax.jit(jaxbn.moments)(whole)
    np.testing.assert_allclose(m.var, oracle.moments(whole)[2], rtol=1e-5)
