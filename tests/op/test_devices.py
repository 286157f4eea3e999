"""One meaning everywhere: devices that pool equal one device on the pooled batch.

Eight CPU devices (conftest.py). Fewer is a failure, not a skip.
"""

import contextlib
import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from tests.support import oracle

DEVICES, ROWS, C = 8, 16, 6
EPS = 2.0**-23  # of float32
BATCH, ONE = P("d"), P()
bn = functools.partial(jaxbn.batch_norm, train=True)


def test_there_are_eight_devices():
    assert jax.device_count() == DEVICES


def mesh(*sizes, names=("d", "model"), kind=AxisType.Auto):
    return jax.make_mesh(sizes, names[: len(sizes)], axis_types=(kind,) * len(sizes))


def shards(f, out_axes=(0, None)):
    """F over 8 slices of the batch under pmap or vmap, as a function of the whole batch."""

    def split(v):
        return None if v is None else v.reshape(DEVICES, -1, *v.shape[1:])

    def of_batch(transform, x, params, state, mask):
        each = transform(f, axis_name="d", in_axes=(0, None, None, 0), out_axes=out_axes)
        y, new = each(split(x), params, state, split(mask))
        return y.reshape(x.shape), new

    return of_batch


def pooled(x, params, state, mask, **options):
    return bn(x, params, state, mask=mask, axis_name=options.pop("axis_name", "d"), **options)


def by_shard_map(f, check_vma=True, sizes=(8,), batch=BATCH, new=ONE):
    return jax.shard_map(
        f,
        mesh=mesh(*sizes),
        in_specs=(batch, P(), P(), batch),
        out_specs=(batch, new),
        check_vma=check_vma,
    )


def by_jit(x, params, state, mask, **options):
    """Plain jit, x sharded over a mesh of Auto axes."""
    x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh(8), P("d")))
    return bn(x, params, state, mask=mask, **options)


def by_feature_axis(x, params, state, mask):
    """Plain jit, batch over 4 devices and features over 2."""
    m = mesh(4, 2)
    put = lambda v, *spec: jax.lax.with_sharding_constraint(v, NamedSharding(m, P(*spec)))  # noqa: E731
    x = put(x, "d", *[None] * (x.ndim - 2), "model")
    params = jax.tree.map(lambda v: put(v, "model"), params)
    return bn(x, params, state, mask=mask)


def by_feature_axis_in_shard_map(x, params, state, mask):
    """shard_map over both axes: statistics pool over the batch axis alone."""
    batch = P("d", *[None] * (x.ndim - 2), "model")
    state_spec = jaxbn.State(P("model"), P("model"), None if state.count is None else P())
    rows = None if mask is None else P("d")
    return jax.shard_map(
        pooled,
        mesh=mesh(4, 2),
        in_specs=(batch, P("model"), state_spec, rows),
        out_specs=(batch, state_spec),
    )(x, params, state, mask)


def by_nested_vmap(x, params, state, mask):
    """Two mapped axes, both pooled: axis_name=("outer", "inner")."""
    split = lambda v: None if v is None else v.reshape(4, 2, -1, *v.shape[1:])  # noqa: E731
    f = functools.partial(pooled, axis_name=("outer", "inner"))
    inner = jax.vmap(f, (0, None, None, 0), (0, None), axis_name="inner")
    outer = jax.vmap(inner, (0, None, None, 0), (0, None), axis_name="outer")
    y, new = outer(split(x), params, state, split(mask))
    return y.reshape(x.shape), new


def roads():
    """Every road, as functions of the whole batch that no cache of JAX has seen."""
    one = functools.partial(pooled)
    two, batch = functools.partial(pooled, axis_name=("d", "model")), P(("d", "model"))
    return {
        "shard_map": by_shard_map(one),
        "shard_map, check_vma=False": by_shard_map(one, check_vma=False),
        "shard_map, two axes": by_shard_map(two, True, (4, 2), batch),
        "shard_map, two axes, check_vma=False": by_shard_map(two, False, (4, 2), batch),
        "shard_map, features sharded": by_feature_axis_in_shard_map,
        "pmap": functools.partial(shards(one), jax.pmap),
        "vmap": functools.partial(shards(one), jax.vmap),
        "vmap in vmap": by_nested_vmap,
        "jit": by_jit,
        "jit, features sharded": by_feature_axis,
    }


ROADS = roads()


@functools.cache
def example(rows=ROWS, mean=30.0):
    """X whose shards differ, params, state, cotangent; float32."""
    rng = np.random.default_rng(0)
    shape = (rows, 3, 3, C) if rows == ROWS else (rows, C)
    x = rng.normal(size=shape) * 2 + mean * rng.normal(size=C)
    x = x + np.arange(rows).reshape(-1, *[1] * (len(shape) - 1))
    params = jaxbn.Params(*np.float32(rng.normal(size=(2, C))))
    state = jaxbn.State(np.float32(rng.normal(size=C)), np.ones(C, np.float32), np.int32(0))
    return np.float32(x), params, state, np.float32(rng.normal(size=shape))


def masks(split):
    """Valid rows or cells [16, 3, 3, 1]: two rows for each of the eight devices."""
    rows = np.full((ROWS, 3, 3, 1), split == "even")
    if split == "uneven":  # 2 rows, 1, 2, 1, ...
        rows[np.arange(ROWS) % 4 != 3] = True
    elif split == "cells":
        rows = np.random.default_rng(0).random(rows.shape) < 0.5
    elif split == "empty shards":
        rows[:6], rows[12:13] = True, True
    elif split == "one row in all":
        rows[5] = True
    return rows


def with_gradients(f):
    """y, state, dx, dparams; the gradient is taken outside of f, a road."""

    def run(x, params, state, dy, mask):
        y, vjp, new = jax.vjp(lambda x, params: f(x, params, state, mask), x, params, has_aux=True)
        return y, new, *vjp(dy)

    return run


@functools.cache
def program(road, rows=ROWS, masked=False):
    """One compiled program for each road, to run and to read."""
    x, params, state, dy = example(rows)
    mask = masks("even") if masked else None
    return jax.jit(with_gradients(ROADS[road])).lower(x, params, state, dy, mask).compile()


def run(road, x, params, state, dy, mask=None):
    return program(road, len(x), mask is not None)(x, params, state, dy, mask)


def of_one_device(x, params, state, dy, mask=None):
    """The same by the oracle, in float64."""
    _, mean, var = oracle.moments(x, mask=mask)
    y = oracle.normalize(x, mean, var, *params)
    running = (oracle.running(*pair, 0.99) for pair in ((state.mean, mean), (state.var, var)))
    dx, dscale, dbias = oracle.gradients(x, dy, params.scale, mask=mask)
    return y, (*running, state.count + 1), dx, (dscale, dbias)


def assert_same(got, want, x, what):
    """Each leaf to rounding: x is off by EPS of itself, which counts against its sd."""
    allowed = 4 * oracle.tolerance("float32", x.size // C)
    allowed *= np.abs(oracle.moments(x)[1] / np.sqrt(oracle.moments(x)[2])).max()
    names = ("y", "mean", "var", "count", "dx", "dscale", "dbias")
    for name, u, v in zip(names, jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        oracle.assert_close(u, v, allowed, f"{what}: {name}")


@pytest.mark.parametrize("split", ["even", "uneven", "cells", "empty shards", "one row in all"])
@pytest.mark.parametrize("road", ROADS)
def test_devices_equal_one_device_on_the_pooled_batch(road, split):
    x, params, state, dy = example()
    mask = None if split == "even" else masks(split)
    got = run(road, x, params, state, dy, mask)
    assert_same(got, of_one_device(x, params, state, dy, mask), x, road)


@pytest.mark.parametrize("road", ["shard_map", "pmap", "vmap", "jit"])
def test_one_row_per_device(road):
    x, params, state, dy = example(DEVICES)
    got = run(road, x, params, state, dy)
    assert_same(got, of_one_device(x, params, state, dy), x, road)


@pytest.mark.parametrize("road", ["shard_map", "shard_map, check_vma=False", "pmap", "vmap"])
def test_no_valid_cell_on_any_device(road):
    x, params, state, dy = example()
    y, new, dx, grads = run(road, x, params, state, dy, np.zeros_like(masks("cells")))
    np.testing.assert_array_equal(y, np.broadcast_to(params.bias, x.shape))
    jax.tree.map(np.testing.assert_array_equal, new, state)
    np.testing.assert_array_equal(dx, 0)
    np.testing.assert_array_equal(grads.scale, 0)


@pytest.mark.parametrize(("rows", "features"), [(ROWS, None), (ROWS, "model"), (DEVICES, None)])
def test_explicit_mesh_axes(rows, features):
    """Y is typed as x is sharded, and equals one device."""
    x, params, state, dy = example(rows)
    m = mesh(4, 2, kind=AxisType.Explicit)
    with jax.set_mesh(m):
        spec = P("d", *[None] * (x.ndim - 2), features)
        x_, dy_ = (jax.device_put(v, NamedSharding(m, spec)) for v in (x, dy))
        params_, state_ = (
            jax.tree.map(lambda v: jax.device_put(v, P(features) if v.ndim else P()), tree)
            for tree in (params, state)
        )

        @jax.jit
        def run(x, params, state, dy):
            y, vjp, new = jax.vjp(lambda *p: bn(*p, state), x, params, has_aux=True)
            assert jax.typeof(y).sharding.spec == jax.typeof(x).sharding.spec
            return y, new, *vjp(dy)

        got = run(x_, params_, state_, dy_)
        assert got[2].sharding == x_.sharding
    assert_same(got, of_one_device(x, params, state, dy), x, "explicit")


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        (P(), {}),
        (P("model"), {}),
        (P(), {"virtual_batch_size": 2, "mask": np.arange(3)[:, None, None] < 2}),
    ],
    ids=["whole", "otherwise", "ghosts"],
)
def test_a_residual_on_explicit_mesh_axes_is_sharded_as_x_is(spec, options):
    """And so is a mask for ghost batches that is the same for all rows."""
    x, params, state, dy = example()
    residual = np.sin(x)

    def run(x, params, residual, state, dy):
        def f(x, params, residual):
            return bn(x, params, state, residual=residual, activation=jax.nn.relu, **options)

        y, vjp, new = jax.vjp(f, x, params, residual, has_aux=True)
        return y, new, *vjp(dy)

    want = jax.jit(run)(x, params, residual, state, dy)
    m = mesh(4, 2, kind=AxisType.Explicit)
    with jax.set_mesh(m):
        put = lambda v, spec: jax.device_put(v, NamedSharding(m, spec))  # noqa: E731
        x, residual = put(x, P("d")), put(residual, spec)
        got = jax.jit(run)(x, params, residual, state, put(dy, P("d")))
        for v, like in ((got[0], x), (got[2], x), (got[4], residual)):
            assert v.sharding.is_equivalent_to(like.sharding, x.ndim)
    for u, v in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        oracle.assert_close(u, np.float64(v), 64 * EPS)


OTHERWISE = {  # what is sharded otherwise than x: its shape, how the call takes it
    "scale and bias": ((8,), {}),
    "tables": ((4, 8), {"labels": np.int32(1)}),
    "a row for each of x's": ((16, 8), {}),
    "moments": ((8,), {}),
    "moments of domains": ((4, 8), {"domain": np.int32(1)}),
}


@pytest.mark.parametrize("name", ["d", None])
@pytest.mark.parametrize("what", OTHERWISE)
def test_what_is_sharded_otherwise_than_x_on_explicit_mesh_axes(what, name):
    """As where each device of the batch holds a part of the parameters; and where all hold all."""
    shape, options = OTHERWISE[what]
    rng = np.random.default_rng(0)
    normal = lambda *shape: np.float32(rng.normal(size=shape))  # noqa: E731
    x, dy, params, state = normal(16, 8), normal(16, 8), None, None
    if "moments" in what:
        state = jaxbn.Moments(np.float32(5), normal(*shape), normal(*shape) ** 2)
    else:
        params = jaxbn.Params(normal(*shape), normal(*shape))

    def run(x, dy, params, state, options):
        y, vjp, new = jax.vjp(lambda *p: bn(*p, state, **options), x, params, has_aux=True)
        return y, new, *vjp(dy)

    want = jax.jit(run)(x, dy, params, state, options)
    m = mesh(4, 2, kind=AxisType.Explicit)
    put = lambda v, spec: jax.device_put(v, NamedSharding(m, spec))  # noqa: E731
    place = lambda v: put(v, P(*[None] * (v.ndim - 1), name) if v.ndim else P())  # noqa: E731
    x_, dy_ = put((x, dy), P("d", "model"))
    params_, state_ = jax.tree.map(place, (params, state))
    got = jax.jit(run)(x_, dy_, params_, state_, options)
    for u, v in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        oracle.assert_close(u, np.float64(v), 64 * EPS)
    for u, v in zip(jax.tree.leaves(got[3]), jax.tree.leaves(params_), strict=True):
        assert u.sharding.is_equivalent_to(v.sharding, u.ndim)


@pytest.mark.parametrize("is_set", [False, True])
def test_one_of_several_domains_on_an_explicit_mesh_without_jit(is_set):
    """The state was made before there was a mesh."""
    x, params, _, _ = example()
    state = jaxbn.init(C, domains=2)[1]
    m = mesh(4, 2, kind=AxisType.Explicit)
    with jax.set_mesh(m) if is_set else contextlib.nullcontext():
        sharded = jax.device_put(x, NamedSharding(m, P("d", None, None, "model")))
        got = bn(sharded, params, state, domain=1)
    want = bn(x, params, state, domain=1)
    for u, v in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        oracle.assert_close(u, np.float64(v), 64 * EPS)


GROUPS = {
    "contiguous": [[0, 1], [2, 3], [4, 5], [6, 7]],
    "scattered": [[7, 0, 3, 1], [2, 6, 5, 4]],
}


@pytest.mark.parametrize("transform", ["shard_map", "shard_map, check_vma=False", "pmap", "vmap"])
@pytest.mark.parametrize("groups", GROUPS)
def test_groups_equal_one_device_on_each_group(groups, transform):
    x, params, state, dy = example()
    mask = masks("cells")
    f = functools.partial(pooled, axis_index_groups=GROUPS[groups])

    def stacked(*args):
        y, new = f(*args)
        return y, jax.tree.map(lambda v: v[None], new)

    if "shard_map" in transform:
        over = by_shard_map(stacked, "False" not in transform, new=P("d"))
    else:
        over = functools.partial(shards(f, (0, 0)), getattr(jax, transform))

    y, new, dx, dparams = jax.jit(with_gradients(over))(x, params, state, dy, mask)
    total = 0
    for group in GROUPS[groups]:
        rows = np.concatenate([np.arange(ROWS).reshape(DEVICES, 2)[i] for i in group])
        want = of_one_device(x[rows], params, state, dy[rows], mask[rows])
        for device in group:
            mine = jax.tree.map(lambda v, i=device: v[i], new)
            got = (y[rows], mine, dx[rows], want[3])
            assert_same(got, want, x[rows], f"{groups}, device {device}")
        total = total + np.asarray(want[3])
    assert_same((y, state, dx, dparams), (y, state, dx, tuple(total)), x, "sum over groups")


@pytest.mark.parametrize("axis", ["mapped", "mapped, with weights", "batch", "features"])
def test_groups_of_a_vmap_on_an_explicit_mesh(axis):
    """Each group is one batch, whichever axis of x is sharded by type."""
    x = np.float32(np.random.default_rng(0).normal(size=(4, 8, 4)) * [1, 2, 3, 4])
    params, state = jaxbn.init(4)
    groups = [[0, 2], [1, 3]]

    weights = (lambda x: jnp.square(x[:, :1])) if "weights" in axis else lambda x: None

    def f(x, state):
        options = {"axis_name": "v", "axis_index_groups": groups}
        return bn(x, params, state, weights=weights(x), **options)

    m = mesh(4, kind=AxisType.Explicit)
    at = {"mapped": P("d"), "batch": P(None, "d"), "features": P(None, None, "d")}
    at = at[axis.partition(",")[0]]
    with jax.set_mesh(m):
        x_, state_ = jax.device_put(x, NamedSharding(m, at)), jaxbn.init(4)[1]
        y, new = jax.device_get(jax.vmap(lambda x: f(x, state_), axis_name="v")(x_))
    for group in groups:
        rows = x[group].reshape(16, 4)
        want, after = bn(rows, params, state, weights=weights(rows))
        oracle.assert_close(y[group].reshape(16, 4), want, 64 * EPS)
        for row in group:
            oracle.assert_close(new.mean[row], after.mean, 16 * EPS)
            oracle.assert_close(new.var[row], after.var, 16 * EPS)


def ghost_oracle(x, params, state, dy, size, mask=None):
    """Groups of rows, each by itself; the running state of the whole."""
    parts = [np.s_[i : i + size] for i in range(0, ROWS, size)]
    each = [
        of_one_device(x[p], params, state, dy[p], None if mask is None else mask[p]) for p in parts
    ]
    y, dx = (np.concatenate([part[i] for part in each]) for i in (0, 2))
    dparams = np.sum([part[3] for part in each], 0)
    return y, of_one_device(x, params, state, dy, mask)[1], dx, tuple(dparams)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("road", ["jit", "shard_map", "pmap"])
def test_ghost_batches_equal_each_group_alone(road, masked):
    x, params, state, dy = example()
    mask = masks("cells") if masked else None
    f = functools.partial(pooled, virtual_batch_size=2)
    over = {
        "jit": functools.partial(by_jit, virtual_batch_size=2),
        "shard_map": by_shard_map(f),
        "pmap": functools.partial(shards(f), jax.pmap),
    }[road]

    got = jax.jit(with_gradients(over))(x, params, state, dy, mask)
    assert_same(got, ghost_oracle(x, params, state, dy, 2, mask), x, road)


@pytest.mark.parametrize("road", ["shard_map", "shard_map, check_vma=False", "pmap"])
def test_gradients_taken_inside(road):
    """Each device differentiates its own loss. With check_vma JAX sums the parameters'
    gradients itself; without, each device holds its part and the sum is the user's to take.
    """
    check_vma = road == "shard_map"
    x, params, state, dy = example()
    mask = masks("uneven")

    def inside(x, params, state, mask, dy):
        def loss(x, params):
            return (pooled(x, params, state, mask)[0] * dy).sum()

        dx, dparams = jax.grad(loss, (0, 1))(x, params)
        return dx, dparams if check_vma else jax.lax.psum(dparams, "d")

    if road == "pmap":
        split = lambda v: v.reshape(DEVICES, -1, *v.shape[1:])  # noqa: E731
        run = jax.pmap(inside, "d", in_axes=(0, None, None, 0, 0), out_axes=(0, None))
        got = run(split(x), params, state, split(mask), split(dy))
    else:
        run = jax.shard_map(
            inside,
            mesh=mesh(8),
            in_specs=(P("d"), P(), P(), P("d"), P("d")),
            out_specs=(P("d"), P()),
            check_vma=check_vma,
        )
        got = jax.jit(run)(x, params, state, mask, dy)
    y, new, *want = of_one_device(x, params, state, dy, mask)
    assert_same((y, new, *got), (y, new, *want), x, "inside")


@pytest.mark.parametrize("check_vma", [True, False])
def test_forward_mode_and_second_order_equal_one_device(check_vma):
    x, dy = (jnp.asarray(v) for v in (example(DEVICES, 1.0)[0], example(DEVICES)[3]))
    params, directions = jaxbn.Params(dy[0], dy[1]), (dy[::-1], jaxbn.Params(dy[2], dy[3]))

    def derivatives(f):
        def grad(x, params):
            return jax.grad(lambda *p: (jnp.sin(f(*p)) * dy).sum(), (0, 1))(x, params)

        def along(x, params):
            parts = jax.tree.map(lambda g, v: (g * v).sum(), grad(x, params), directions)
            return sum(jax.tree.leaves(parts))

        forward = jax.jvp(f, (x, params), directions)[1]
        over = jax.jvp(grad, (x, params), directions)[1]
        return forward, over, jax.grad(along, (0, 1))(x, params)

    devices = jax.shard_map(
        lambda x, params: bn(x, params, None, axis_name="d")[0],
        mesh=mesh(8),
        in_specs=(P("d"), P()),
        out_specs=P("d"),
        check_vma=check_vma,
    )
    got = jax.jit(lambda: derivatives(devices))()
    want = jax.jit(lambda: derivatives(lambda x, params: bn(x, params, None)[0]))()
    for u, v in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        oracle.assert_close(u, np.float64(v), 1e-4)  # as the contract of second order has it


@pytest.mark.parametrize("road", ROADS)
def test_variance_does_not_cancel_on_the_first_step(road):
    """At mean/sd = 1e4 and a fresh state, where no running mean can serve as a pivot."""
    rng = np.random.default_rng(0)
    x = np.float32(rng.normal(1e4, 1, (ROWS, 3, 3, C)))
    dy, params = np.float32(rng.normal(size=x.shape)), jaxbn.init(C)[0]
    fresh = jaxbn.State(np.zeros(C, np.float32), np.zeros(C, np.float32), np.int32(0))
    _, new, dx, _ = run(road, x, params, fresh, dy)
    _, _, var = oracle.moments(x)
    np.testing.assert_allclose(np.float64(new.var) / 0.01, var, rtol=1e-3)
    oracle.assert_close(dx, oracle.gradients(x, dy, np.ones(C))[0], 4 * EPS * 1e4, "dx")


@pytest.mark.parametrize("road", ["shard_map", "shard_map, check_vma=False", "pmap", "vmap"])
def test_constant_channels_stay_exact_across_devices(road):
    constants = np.float32([99.9, 1 / 3, -7e5, 1e-20, 0, 12345.678])
    _, params, state, dy = example()
    x = np.broadcast_to(constants, (ROWS, 3, 3, C))
    for mask in (None, masks("empty shards")):
        y, new, _, _ = run(road, x, params, state, dy, mask)
        np.testing.assert_array_equal(y, np.broadcast_to(params.bias, x.shape))
        np.testing.assert_allclose(new.var, 0.99, rtol=2 * EPS)


@pytest.mark.parametrize("road", ["shard_map", "shard_map, check_vma=False", "pmap", "vmap"])
def test_beyond_sixteen_devices_two_sums_say_the_same(road, switched):
    """The road of large pools, taken by 8 devices."""
    # The attribute jaxbn.moments is the function; here its module is meant.
    switched(sys.modules["jaxbn._op.pooling"], "GATHERED", 4)
    x, params, state, dy = example()
    mask = masks("empty shards")
    f = jax.jit(with_gradients(roads()[road])).lower(x, params, state, dy, mask).compile()
    assert_same(f(x, params, state, dy, mask), of_one_device(x, params, state, dy, mask), x, road)
    assert len(collectives(f)) == (0 if road == "vmap" else 3)
    x = np.float32(np.random.default_rng(0).normal(1e4, 1, x.shape))
    _, new, _, _ = f(x, params, state._replace(var=np.zeros(C, np.float32)), dy, mask)
    _, _, var = oracle.moments(x, mask=mask)
    np.testing.assert_allclose(np.float64(new.var) / 0.01, var, rtol=1e-3)


def test_moments_pool_over_devices():
    x, *_ = example()
    mask = masks("uneven")
    run = jax.shard_map(
        lambda x, mask: jaxbn.moments(x, mask=mask, axis_name="d"),
        mesh=mesh(8),
        in_specs=P("d"),
        out_specs=P(),
    )
    count, mean, var = oracle.moments(x, mask=mask)
    m = jax.jit(run)(x, mask)
    assert float(m.count) == count[0]
    oracle.assert_close(m.mean, mean, oracle.tolerance("float32", x.size // C), "mean")
    oracle.assert_close(m.var, var, 64 * oracle.tolerance("float32", x.size // C), "var")


@pytest.mark.parametrize("options", [{}, {"domain": 1, "domains": 2}], ids=["alone", "of a domain"])
def test_devices_with_parts_of_the_features_have_one_count(options):
    """A type that differs over the devices could not leave the shard_map."""
    x = example(DEVICES)[0]
    mask = np.arange(DEVICES)[:, None] % 3 > 0
    count, stats = (P(None, "model"),) * 2 if options else (P(), P("model"))
    run = jax.shard_map(
        lambda x, mask: jaxbn.moments(x, mask=mask, axis_name="d", **options),
        mesh=mesh(4, 2),
        in_specs=(P("d", "model"), P("d")),
        out_specs=jaxbn.Moments(count, stats, stats),
    )
    want = jaxbn.moments(x, mask=mask, **options)
    for u, v in zip(jax.jit(run)(x, mask), want, strict=True):
        oracle.assert_close(u, np.float64(v), 64 * EPS)


def test_complex_x_pools_over_devices():
    rng = np.random.default_rng(0)
    x = np.complex64(rng.normal(size=(ROWS, C)) + 1j * rng.normal(2, 3, (ROWS, C)))
    state = jaxbn.init(C, jnp.complex64)[1]
    run = jax.shard_map(
        lambda x: bn(x, None, state, axis_name="d", momentum=0.0),
        mesh=mesh(8),
        in_specs=P("d"),
        out_specs=(P("d"), P()),
    )
    y, new = jax.jit(run)(x)
    _, mean, var = oracle.moments(x)
    tolerance = oracle.tolerance("complex64", ROWS)
    oracle.assert_close(new.mean, mean, tolerance, "mean")
    oracle.assert_close(new.var, var, tolerance, "var")
    oracle.assert_close(y, oracle.normalize(x, mean, var, 1, 0), tolerance, "y")


COLLECTIVE = re.compile(
    r" = (\S+|\(.*?\)) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)"
    r"(?:-start)?\("
)


def collectives(compiled):
    """Elements of each collective in a compiled program."""
    sizes = []
    for shapes, _ in COLLECTIVE.findall(compiled.as_text()):
        dims = re.findall(r"\w+\[([\d,]*)\]", shapes)
        sizes.append(sum(int(np.prod([int(n) for n in d.split(",") if n])) for d in dims))
    return sizes


# Forward gathers 2C + 1 numbers a device; backward sums 2C.
PAYLOAD = DEVICES * (2 * C + 1)
COUNTS = {  # road: (forward alone, forward and backward)
    "shard_map": (1, 2),
    "shard_map, check_vma=False": (1, 2),
    "shard_map, two axes": (1, 2),
    "pmap": (1, 2),
    "vmap": (0, 0),
    "jit": (2, 3),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("road", COUNTS)
def test_collectives_of_one_layer(road, masked):
    """Counted in the compiled programs: forward alone, and with the gradient of x and params."""
    x, params, state, _ = example()
    mask = masks("uneven") if masked else None
    forward = collectives(jax.jit(ROADS[road]).lower(x, params, state, mask).compile())
    both = collectives(program(road, masked=masked))
    assert (len(forward), len(both)) == COUNTS[road]
    assert all(size <= PAYLOAD for size in forward + both)


def test_collectives_are_one_and_one_as_written():
    """Under check_vma, before XLA combines any: not every backend does."""
    lowered = jax.jit(with_gradients(ROADS["shard_map"])).lower(*example(), None)
    assert lowered.as_text().count('"stablehlo.all_reduce"') == 2


@pytest.mark.parametrize("road", ["shard_map", "pmap", "jit"])
def test_eval_has_no_collective(road):
    x, params, state, _ = example()

    def evaluate(x, params, state, mask, **options):
        return jaxbn.batch_norm(x, params, state, train=False, **options)

    def sharded(x, params, state, mask):
        return evaluate(jax.lax.with_sharding_constraint(x, NamedSharding(mesh(8), P("d"))), *rest)

    rest = (params, state, None)
    over = {
        "shard_map": by_shard_map(functools.partial(evaluate, axis_name="d")),
        "pmap": functools.partial(shards(functools.partial(evaluate, axis_name="d")), jax.pmap),
        "jit": sharded,
    }[road]
    assert collectives(jax.jit(over).lower(x, params, state, None).compile()) == []


@pytest.mark.parametrize("masked", [False, True])
def test_ghost_batches_within_shards_need_no_collective_for_y_and_dx(masked):
    x, params, _, dy = example()
    sharded = NamedSharding(mesh(8), P("d"))
    x, dy = jax.device_put(x, sharded), jax.device_put(dy, sharded)
    mask = jax.device_put(masks("cells"), sharded) if masked else None

    def y_and_dx(x, dy, mask):
        y, vjp = jax.vjp(lambda x: bn(x, params, None, mask=mask, virtual_batch_size=2)[0], x)
        return y, *vjp(dy)

    assert collectives(jax.jit(y_and_dx).lower(x, dy, mask).compile()) == []


def test_parts_of_the_features_agree_on_one_count():
    """Where one part holds nothing finite, the other learns and both count the batch."""
    x = jnp.asarray(np.random.default_rng(3).normal(size=(DEVICES, 4, C)), jnp.float32)
    (params, state), bad = jaxbn.init(C), np.arange(C) < C // 2
    over = jax.jit(by_feature_axis_in_shard_map)
    y, new = over(x.at[0, 0, bad].set(jnp.nan), params, state, None)
    np.testing.assert_array_equal(new.mean == state.mean, bad)
    np.testing.assert_array_equal(new.var == state.var, bad)
    assert [int(part.data) for part in new.count.addressable_shards] == [1] * DEVICES
    np.testing.assert_array_equal(np.isnan(y).any((0, 1)), bad)
    sizes = [
        collectives(over.lower(x, params, state._replace(count=count), None).compile())
        for count in (None, state.count)
    ]
    assert sizes[0] == [4 * (2 * C // 2 + 1)]  # the moments of 4 devices
    assert sorted(sizes[1]) == [1, *sizes[0]]  # and one flag
