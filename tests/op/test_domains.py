"""`domain=`: each set of statistics is that of the rows of its domain, on every road."""

import functools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxbn
from benchmarks.subjects.roads import roads, training
from tests.support import cases, oracle
from tests.support.compiling import as_pasted

CASES = [
    case
    for case in cases.SMALL
    if case.name in ("dense", "features apart", "float64", "valid pixels", "mask per feature")
]
EXAMPLES = Path(__file__).parents[2] / "examples"
DOMAINS = 4
ABSENT = 1  # of this one there is never a row


def train(x, params, state, **options):
    return jaxbn.batch_norm(x, params, state, train=True, **options)


def evaluate(x, params, state, **options):
    return jaxbn.batch_norm(x, params, state, train=False, **options)


def step(x, params, state, dy, domain, **options):
    """y, the new state, dx and dparams."""
    f = functools.partial(train, state=state, domain=domain, **options)
    y, vjp, state = jax.vjp(f, x, params, has_aux=True)
    return y, state, *vjp(dy)


def states(mean, var, number=DOMAINS):
    """A state of several domains, each with its own mean, var and count."""
    k = np.arange(number).reshape(-1, *[1] * np.ndim(mean))
    return jaxbn.State(
        mean + k.astype(mean.dtype),
        var * (1 + k).astype(var.dtype),
        np.arange(number, dtype=np.int32),
    )


def domains_of(rows, seed=3):
    """A domain for each row, without the absent one."""
    some = [k for k in range(DOMAINS) if k != ABSENT]
    return np.random.default_rng(seed).permutation(np.resize(some, rows))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_row_by_its_domain_equals_the_oracle(case):
    a, batch = cases.arrays(case), min(set(range(len(case.shape))) - set(case.axes))
    domain = domains_of(case.shape[batch])
    options = {"axis": case.axis, "mask": a.mask, "momentum": 0.9, "unbiased": True}
    with jax.enable_x64(case.dtype == "float64"):
        params, state = jaxbn.Params(a.scale, a.bias), states(a.mean, a.var)
        got = jax.jit(functools.partial(step, **options))(a.x, params, state, a.dy, domain)
    y, new, dx, dparams = got
    assert (y.dtype, new.mean.dtype, new.count.dtype) == (a.x.dtype, a.mean.dtype, np.int32)
    scale, bias = (np.float64(v).ravel() for v in (a.scale, a.bias))
    tolerance = oracle.tolerance(case.dtype, case.count)
    narrow = oracle.tolerance(a.scale.dtype, case.count)
    by_params = 0
    for k in range(DOMAINS):
        old_mean, old_var = (np.float64(v[k]).ravel() for v in state[:2])
        if k == ABSENT:
            chex.assert_trees_all_equal(row_of(new, k), row_of(state, k))
            continue
        own = functools.partial(np.compress, domain == k, axis=batch)
        x, dy = own(a.x), own(a.dy)
        whole = np.ones(case.shape, bool) if a.mask is None else np.broadcast_to(a.mask, case.shape)
        mask = own(whole)
        n, mean, var = oracle.moments(x, case.axis, mask)
        want = oracle.normalize(x, mean, var, scale, bias, case.axis)
        want[:, n == 0] = bias[n == 0]
        oracle.assert_close(oracle.rows(own(y), case.axis), want, tolerance, "y")
        unbiased = var * n / np.maximum(n - 1, 1)
        for was, batch_value, value in ((old_mean, mean, new.mean), (old_var, unbiased, new.var)):
            want = np.where(n > 0, oracle.running(was, batch_value, 0.9), was)
            oracle.assert_close(np.ravel(value[k]), want, narrow, "state")
        assert new.count[k] == k + 1
        want, *sums = oracle.gradients(x, dy, scale, case.axis, mask)
        oracle.assert_close(oracle.rows(own(dx), case.axis), want, 2 * tolerance, "dx")
        by_params = by_params + np.stack(sums)
    size = 4 * np.sqrt(case.count) * narrow
    for value, want in zip(dparams, by_params, strict=True):
        assert np.abs(np.float64(value).ravel() - want).max() <= size


def example(rows=8, channels=4, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    c = channels
    params = jaxbn.Params(normal(c), normal(c))
    state = jax.tree.map(jnp.asarray, states(np.float32(normal(c)), np.float32(normal(c) ** 2)))
    domain = jnp.asarray(domains_of(rows))
    return 2 * normal(rows, 3, c) + 1, params, state, normal(rows, 3, c), domain


@pytest.mark.parametrize("dtype", ["int8", "int64"])
@pytest.mark.parametrize("each", [False, True])
def test_integers_of_every_width_choose(each, dtype):
    """Also where JAX refuses implicit promotion."""
    x, params, state, _, domain = example()
    index = domain if each else domain[0]
    with jax.enable_x64(dtype == "int64"):
        found = [
            (train(x, params, state, domain=d), jaxbn.moments(x, domain=d, domains=DOMAINS))
            for d in (index, jnp.asarray(np.asarray(index), dtype))
        ]
    chex.assert_trees_all_equal(*found)


def row_of(state, k):
    return jax.tree.map(lambda v: v[k], state)


OPTIONS = {
    "plain": {},
    "cumulative": {"momentum": None, "unbiased": True},
    "weighted": {"weights": np.float32(np.arange(8))[:, None, None]},
    "ghosts, relu": {"virtual_batch_size": 4, "activation": jax.nn.relu},
    "renorm": {"renorm": (1.3, 0.4)},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_one_domain_for_all_is_batch_norm_by_its_row(options):
    """Whether its number is known or traced; the other domains stay, bit for bit."""
    x, params, state, dy, _ = example()
    options = OPTIONS[options]

    @jax.jit
    def each(k):
        want = step(x, params, row_of(state, 2), dy, None, **options)
        return want, *(step(x, params, state, dy, k, **options) for k in (2, k))

    want, known, traced = each(2)
    for got in (known, traced):
        own = (got[0], row_of(got[1], 2), *got[2:])
        for u, v in zip(jax.tree.leaves(own), jax.tree.leaves(want), strict=True):
            # The same operations, which XLA orders as it likes.
            oracle.assert_close(u, np.float64(v), 8 * oracle.tolerance("float32", 24))
        others = np.array([0, 1, 3])
        chex.assert_trees_all_equal(row_of(got[1], others), row_of(state, others))


@pytest.mark.parametrize("options", ["cumulative", "weighted", "renorm"])
def test_one_for_each_row_is_one_call_for_each_domain(options):
    """With options too: they see the rows of the domain alone."""
    x, params, state, dy, domain = example()
    options = OPTIONS[options]
    own = {k: np.flatnonzero(domain == k) for k in range(DOMAINS) if k != ABSENT}

    def cut(rows):
        return {n: v[rows] if n in ("mask", "weights") else v for n, v in options.items()}

    def by_calls(x, params):
        """In the order of the rows; and the states."""
        y, new = jnp.zeros_like(x), state
        for k, rows in own.items():
            y_k, new = train(x[rows], params, new, domain=k, **cut(rows))
            y = y.at[rows].set(y_k)
        return y, new

    def both(x, params):
        want, pull, new = jax.vjp(by_calls, x, params, has_aux=True)
        return (want, new, *pull(dy)), step(x, params, state, dy, domain, **options)

    want, got = jax.jit(both)(x, params)
    for u, v in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        oracle.assert_close(u, np.float64(v), 8 * oracle.tolerance("float32", 24))


def test_eval_takes_the_statistics_of_each_row():
    x, params, state, dy, domain = example()
    mask = jnp.arange(8)[:, None, None] > 2
    x = x.at[0, 0, 0].set(jnp.nan)  # outside the mask
    (y, new), vjp = jax.vjp(lambda x: evaluate(x, params, state, domain=domain, mask=mask), x)
    chex.assert_trees_all_equal(new, state._replace(count=jnp.asarray(state.count, jnp.int32)))
    for i, k in enumerate(domain):
        want, _ = evaluate(x[i : i + 1], params, row_of(state, int(k)), mask=mask[i : i + 1])
        np.testing.assert_array_equal(y[i : i + 1], want)
    sd = np.sqrt(np.float64(state.var)[domain] + 1e-5)
    (dx,) = vjp((dy, jax.tree.map(jnp.zeros_like, new._replace(count=None))._replace(
        count=np.zeros(DOMAINS, jax.dtypes.float0)
    )))  # fmt: skip
    want = np.float64(dy) * (np.float64(params.scale) / sd)[:, None]
    oracle.assert_close(np.delete(dx, 0, 0), np.delete(want, 0, 0), 1e-5)


def test_no_domain_reaches_another():
    """NaN in the rows of one: the others learn, and have finite y and gradients."""
    x, params, state, dy, domain = example()
    x = x.at[np.flatnonzero(domain == 2)[0], 0, 0].set(jnp.nan)
    want = step(jnp.nan_to_num(x), params, state, dy, domain)
    y, new, dx, _ = step(x, params, state, dy, domain)
    others = np.flatnonzero(domain != 2)
    chex.assert_trees_all_equal((y[others], dx[others]), (want[0][others], want[2][others]))
    for k in (0, ABSENT, 3):
        chex.assert_trees_all_equal(row_of(new, k), row_of(want[1], k))
    assert new.mean[2, 0] == state.mean[2, 0]
    assert new.count[2] == 3
    np.testing.assert_array_equal(new.mean[2, 1:], want[1].mean[2, 1:])


@pytest.mark.parametrize("k", [-1, DOMAINS])
def test_a_traced_domain_out_of_range_changes_nothing_and_reads_nan(k):
    x, params, state, _, domain = example()
    _, new = jax.jit(lambda k: train(x, params, state, domain=k))(k)
    chex.assert_trees_all_equal(new, state._replace(count=jnp.asarray(state.count, jnp.int32)))
    assert np.isnan(jax.jit(lambda k: evaluate(x, params, state, domain=k)[0])(k)).all()
    wrong = domain.at[:2].set(k)
    for f in (train, evaluate):
        y, new = jax.jit(lambda d, f=f: f(x, params, state, domain=d))(wrong)
        np.testing.assert_array_equal(np.isnan(y).all((1, 2)), np.arange(8) < 2)
    own = np.arange(8) >= 2
    _, want = train(x[own], params, state, domain=domain[own])
    _, new = jax.jit(lambda d: train(x, params, state, domain=d))(wrong)
    chex.assert_trees_all_close(new, want, rtol=1e-6)


@pytest.mark.parametrize(
    ("road", "each"),
    [
        ("pmap", True),
        ("shard_map, data x model", True),
        ("vmap", True),
        ("jit, Explicit", True),
        ("jit, data x model", True),
        ("shard_map", False),
        ("jit, Explicit", False),
    ],
    ids=lambda v: v if isinstance(v, str) else "each row" if v else "all rows",
)
def test_devices_equal_one_device(road, each):
    """Some devices have no row of some domain."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    x, dy = normal(16, 4, 4, 6) + normal(1, 1, 1, 6), normal(16, 4, 4, 6)
    params, state = (normal(6), normal(6)), (normal(6), normal(6) ** 2)
    domain = jnp.asarray(np.sort(domains_of(16)))[:, None, None, None]
    road = roads(4)[road]

    def bn(x, params, state, mask=None, **options):
        """The states with their features first, as the road splits them."""
        mean, var = (jnp.stack([v * (1 + k) for k in range(DOMAINS)]) for v in state)
        which = mask[:, 0, 0, 0] if each else 2
        y, new = train(x, params, jaxbn.State(mean, var, None), domain=which, **options)
        return y, (new.mean.T, new.var.T)

    arguments = x, params, state, domain, dy
    got = jax.jit(training(road.build(bn)))(*road.place(*arguments))
    want = jax.jit(training(road.reference(bn)))(*arguments)
    for u, v in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        oracle.assert_close(u, np.float64(v), 8 * oracle.tolerance("float32", 16 * 16))


OTHER_AXES = {  # where x lies; the transform, the axes that are pooled, what each row chooses
    "columns of the image": (P("d", "m"), "shard_map", ("d", "m"), "domain"),
    "features, in parts of a vmap": (P("d", None, None, "m"), "vmap", "v", "domain"),
    "features, by labels": (P("d", None, None, "m"), "shard_map, one axis", "d", "labels"),
    "rows, by labels": (P(("d", "m")), "shard_map, one axis", "d", "labels"),
    "rows, by labels out of range": (P(("d", "m")), "shard_map, one axis", "d", "labels"),
    "none, by labels": (P("d"), "shard_map, one axis", "d", "labels"),
    "none, by domain": (P("d"), "shard_map, one axis", "d", "domain"),
}


@pytest.mark.parametrize("split", OTHER_AXES)
def test_another_mesh_axis_beside_the_rows(split):
    """On Explicit axes, which are JAX's default; the derivative is taken outside."""
    spec, transform, pooled, choice = OTHER_AXES[split]
    rng = np.random.default_rng(0)
    normal = lambda *shape: np.float32(rng.normal(size=shape))  # noqa: E731
    x, dy, index = (
        normal(16, 2, 2, 4),
        normal(16, 2, 2, 4),
        np.arange(16) % 3 + split.endswith("out of range"),
    )
    params = jaxbn.Params(*normal(*((2, 3, 4) if choice == "labels" else (2, 4))))
    state = None if choice == "labels" else states(normal(4), normal(4) ** 2, 3)

    def f(x, params, index, **options):
        y, new = train(x, params, state, **{choice: index}, **options)
        return y, None if new is None else new[:2]

    def over(x, params, index):
        pool = functools.partial(f, axis_name=pooled)
        if transform == "vmap":
            x, index = x.reshape(2, 8, *x.shape[1:]), index.reshape(2, 8)
            run = jax.vmap(pool, (0, None, 0), (0, None), axis_name="v")
            y, new = run(x, params, index)
            return y.reshape(16, *y.shape[2:]), new
        manual = {"d"} if transform.endswith("one axis") else {"d", "m"}
        split = P(*spec[:2]) if len(manual) > 1 else P("d")
        return jax.shard_map(
            pool,
            mesh=mesh,
            in_specs=(split, P(), P(*split[:1])),
            out_specs=(split, P()),
            axis_names=manual,
        )(x, params, index)

    def step(f):
        def run(x, params, index, dy):
            y, vjp, new = jax.vjp(lambda *v: f(*v, index), x, params, has_aux=True)
            return y, new, vjp(dy)

        return jax.jit(run)

    want = step(f)(x, params, index, dy)
    mesh = jax.make_mesh((2, 2), ("d", "m"))
    put = lambda v, *spec: jax.device_put(v, jax.NamedSharding(mesh, P(*spec)))  # noqa: E731
    got = step(over)(put(x, *spec), put(params), put(index, *spec[:1]), put(dy, *spec))
    for u, v in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.isnan(u), np.isnan(v))
        u, v = (np.nan_to_num(np.float64(w)) for w in (u, v))
        oracle.assert_close(u, v, 8 * oracle.tolerance("float32", 16 * 4))


def test_devices_with_a_domain_each():
    """The statistics of all sites, in one program: FedBN, split batch norm."""
    x, params, state, _, _ = example()
    mesh = jax.make_mesh((4,), ("site",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("site")

    def f(x, each):
        domain = jax.lax.axis_index("site")
        domain = jnp.full(len(x), domain) if each else domain
        return train(x, params, state, domain=domain, axis_name="site")

    def run(each):
        local = functools.partial(f, each=each)
        return jax.shard_map(
            local, mesh=mesh, in_specs=spec, out_specs=(spec, jax.sharding.PartitionSpec())
        )(x)

    got, want = run(True), train(x, params, state, domain=jnp.repeat(jnp.arange(4), 2))
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError) as error:
        run(False)
    assert str(error.value) == (
        "batch_norm: domain differs over mapped axis 'site', over which the statistics are pooled; "
        "write domain=jnp.full(len(x), domain), one for each row."
    )


def test_under_vmap_and_scan_the_domain_may_be_traced():
    """Per-step statistics: one step after another, and several tasks side by side."""
    x, params, state, _, _ = example()
    ks = jnp.array([2, 0, 2])
    many = jnp.stack([x, x + 1, 2 * x])
    one = [train(v, params, state, domain=int(k)) for v, k in zip(many, ks, strict=True)]
    y, new = jax.vmap(lambda v, k: train(v, params, state, domain=k))(many, ks)
    chex.assert_trees_all_close(
        (y, new), jax.tree.map(lambda *v: jnp.stack(v), *one), rtol=1e-5, atol=1e-5
    )
    want = state
    for v, k in zip(many, ks, strict=True):
        _, want = train(v, params, want, domain=int(k))

    def body(state, step):
        y, state = train(step[0], params, state, domain=step[1])
        return state, y

    start = state._replace(count=jnp.asarray(state.count, jnp.int32))
    new, _ = jax.lax.scan(body, start, (many, ks))
    chex.assert_trees_all_close(new, want, rtol=1e-5, atol=1e-5)


def test_the_op_itself_knows_of_no_domain():
    """The program that normalizes x is that of a call without domains, character by character."""
    x, params, state, _, _ = example()

    def op(domain):
        start = row_of(state, 0) if domain is None else state
        program = jax.make_jaxpr(lambda x: train(x, params, start, domain=domain))(x)
        (call,) = (e for e in program.eqns if e.params.get("name") == "normalize_by_batch")
        return str(call.params["jaxpr"])

    assert op(1) == op(None)


@pytest.mark.parametrize("f", [train, evaluate])
def test_kept_for_backward_is_x(f):
    x, params, state, _, domain = example(64)
    x = x.astype("bfloat16")
    _, vjp = jax.vjp(lambda x, p: f(x, p, state, domain=domain)[0], x, params)
    large = [leaf for leaf in jax.tree.leaves(vjp) if getattr(leaf, "size", 0) >= x.size]
    assert [leaf.dtype for leaf in large] == ["bfloat16"]


@pytest.mark.parametrize("given", [2, "each"])
def test_moments_of_domains(given):
    x, _, _, _, domain = example()
    index = domain if given == "each" else given
    m = jax.jit(functools.partial(jaxbn.moments, domains=DOMAINS))(x, domain=index)
    for k in range(DOMAINS):
        rows = domain == k if given == "each" else np.full(8, k == given)
        count, mean, var = oracle.moments(x[rows], -1)
        np.testing.assert_array_equal(m.count[k], count)
        oracle.assert_close(m.mean[k], mean, 1e-6)
        oracle.assert_close(m.var[k], var, 1e-6)


def test_the_example_runs(monkeypatch):
    """On digits, in its smallest form: a score of each network by day and by night."""
    monkeypatch.syspath_prepend(EXAMPLES / "domains")
    import domains

    with as_pasted():
        table = domains.main(width=1, images=16, batch=8, seeds=1, kinds=("of both",))
    columns = [list(column.cells) for column in table.columns]
    assert columns[1] == ["by day", "by night"]
    assert all(0 <= float(cells[0].partition("%")[0]) <= 100 for cells in columns[2:])
