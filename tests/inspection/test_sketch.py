"""Quantiles of a layer's x, from a sample: which cells, on which devices, and how exact."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn import watch
from jaxbn._inspection import sketch

Q = sketch.QUANTILES
RNG = np.random.default_rng(0)
X = RNG.gamma(1.0, 1.0, (16, 6, 5)).astype(np.float32)  # fewer cells than a sample has
MASK = RNG.random((16, 6, 1)) < 0.7


def look(x, mask=None, axis_name=None):
    model = jaxbn.linen.BatchNorm(use_running_average=False, axis_name=axis_name)
    c = x.shape[-1]
    variables = {
        "params": {"scale": jnp.ones(c), "bias": jnp.zeros(c)},
        "batch_stats": {"mean": jnp.zeros(c), "var": jnp.ones(c)},
    }
    looked = watch.linen(model.apply, histogram=True)
    seen = looked(variables, x, mutable=["batch_stats"], mask=mask)[1]
    return watch.records(seen, variables)[""].quantiles


def of_nnx(x, mask=None):
    model = nnx.BatchNorm(x.shape[-1], rngs=nnx.Rngs(0))
    with watch.nnx(model, histogram=True) as seen:
        model(x, mask=mask)
    return watch.records(seen, model)[""].quantiles


def on_mesh(kind, f, spec, x, mask):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        arguments = jax.device_put((x, mask), jax.NamedSharding(mesh, P("data")))
        if spec is not None:
            f = jax.shard_map(f, in_specs=(P("data"), P("data")), out_specs=spec)
        return jax.jit(f)(*arguments)


ROADS = {
    "linen": lambda x, mask: jax.jit(look)(x, mask),
    "nnx": lambda x, mask: nnx.jit(of_nnx)(x, mask),
    "mesh": functools.partial(on_mesh, AxisType.Auto, look, None),
    "Explicit mesh": functools.partial(on_mesh, AxisType.Explicit, look, None),
    "shard_map": functools.partial(
        on_mesh, AxisType.Auto, functools.partial(look, axis_name="data"), P()
    ),
}


@pytest.mark.parametrize("road", ROADS)
def test_quantiles_of_few_cells_are_those_of_all_valid_ones(road):
    cells = np.sort(X[np.broadcast_to(MASK, X.shape)])
    places = (2 * np.arange(Q) + 1) * len(cells) // (2 * Q)
    np.testing.assert_array_equal(ROADS[road](X, MASK), cells[places])


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_calls_of_one_layer_are_mixed_by_their_values(api):
    """Three calls of other sizes, one of them without a valid cell: each value counts once."""
    rng = np.random.default_rng(1)
    calls = [rng.normal(k, 1 + k, (n, 5)).astype(np.float32) for k, n in enumerate((60, 20, 10))]
    masks = [np.ones((n, 1), bool) for n in (60, 20, 10)]
    masks[1][:] = False
    if api == "linen":
        net = jaxbn.linen.BatchNorm(use_running_average=True)
        variables = net.init(jax.random.key(0), calls[0])

        def several(variables, calls, **options):
            def run(norm):
                return [norm(x, mask=mask) for x, mask in zip(calls, masks, strict=True)]

            return nn.apply(run, net, **options)(variables)

        seen = jax.jit(watch.linen(several, histogram=True))(variables, calls)[1]
    else:
        net = jaxbn.nnx.BatchNorm(5, use_running_average=True, rngs=nnx.Rngs(0))

        @nnx.jit
        def looked(net, calls):
            with watch.nnx(net, histogram=True) as seen:
                for x, mask in zip(calls, masks, strict=True):
                    net(x, mask=mask)
            return dict(seen)

        seen = looked(net, calls)
    every = np.concatenate([calls[0], calls[2]]).ravel()
    shares = [(every <= q).mean() for q in seen[""].quantiles]
    # Each of two sketches and of two mixtures is right to one of its values.
    np.testing.assert_allclose(shares, (np.arange(Q) + 0.5) / Q, atol=2 / Q)
    assert float(seen[""].batch.count) == every.size / 5


@pytest.mark.parametrize("shape", [(64, 32, 32, 8), (5000, 3), (2, 1, 70_000)])
def test_a_sample_is_spread_over_rows_positions_and_channels(shape):
    """Each channel and each row is drawn from another range, so a sample of some would show it."""
    size = np.prod(shape)
    x = np.random.default_rng(1).random(shape, np.float32)
    for axis in (0, -1):
        range_of = [1] * len(shape)
        range_of[axis] = shape[axis]
        ranked = x + np.arange(shape[axis]).reshape(range_of)
        got = np.asarray(look(jnp.asarray(ranked)))
        below = np.searchsorted(np.sort(ranked, axis=None), got) / size
        # 5 sd of a share of at least SAMPLE independent cells, 0.5 / sqrt(4096) each.
        np.testing.assert_allclose(below, (np.arange(Q) + 0.5) / Q, atol=0.04)


def test_odd_values():
    assert np.isnan(look(jnp.asarray(X), jnp.zeros((16, 1, 1), bool))).all()
    holes = np.where(RNG.random(X.shape) < 0.5, np.nan, X)
    expected = look(jnp.asarray(X), jnp.asarray(~np.isnan(holes)))
    np.testing.assert_array_equal(look(jnp.asarray(holes)), expected)
    half = look(jnp.asarray(X, jnp.bfloat16))
    assert half.dtype == jnp.float32
