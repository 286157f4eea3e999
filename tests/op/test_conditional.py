"""Scale and bias of each row: y and gradients equal the oracle's, on every road."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from benchmarks.subjects.roads import roads, training
from tests.support import cases, oracle
from tests.support.compiling import as_pasted

CASES = [case for case in cases.SMALL if case.name in ("features apart", "float64", "valid pixels")]
EXAMPLES = Path(__file__).parents[2] / "examples"
CLASSES = 5


def drawn(case, form):
    """Scale and bias in a form, and those of each row [rows, features]."""
    batch = min(set(range(len(case.shape))) - set(case.axes))
    rows = case.shape[batch]
    rng = np.random.default_rng(4)
    kind = np.float64 if case.dtype == "float64" else np.float32
    labels = rng.integers(0, CLASSES, rows)
    if form == "table":
        scale, bias = (rng.normal(size=(CLASSES, *case.features)).astype(kind) for _ in range(2))
        return batch, jaxbn.Params(scale, bias), labels, (scale[labels], bias[labels])
    shape = [n if a in (*case.axes, batch) else 1 for a, n in enumerate(case.shape)]
    scale = rng.normal(size=shape).astype(kind)
    bias = rng.normal(size=case.features).astype(kind)  # one for all rows
    each = np.moveaxis(scale, batch, 0).reshape(rows, *case.features)
    return batch, jaxbn.Params(scale, bias), None, (each, np.broadcast_to(bias, each.shape))


@pytest.mark.parametrize("form", ["table", "rows"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_y_and_gradients_equal_the_oracle(case, form):
    a = cases.arrays(case)
    batch, params, labels, (scale, bias) = drawn(case, form)

    def f(x, params):
        return jaxbn.batch_norm(
            x, params, None, train=True, axis=case.axis, mask=a.mask, labels=labels
        )[0]

    with jax.enable_x64(case.dtype == "float64"):
        y, vjp = jax.vjp(jax.jit(f), a.x, params)
        dx, dparams = vjp(a.dy)

    def as_rows(v):
        """[rows, features] beside x as rows [n, C]."""
        at = sorted((*case.axes, batch)).index(batch)
        v = np.moveaxis(np.float64(v), 0, at)
        shape = [n if a in (*case.axes, batch) else 1 for a, n in enumerate(case.shape)]
        return oracle.rows(v.reshape(shape), case.axis, case.shape)

    _, mean, var = oracle.moments(a.x, case.axis, a.mask)
    xhat = oracle.normalize(a.x, mean, var, 1, 0, case.axis)
    tolerance = oracle.tolerance(case.dtype, case.count)
    want = xhat * as_rows(scale) + as_rows(bias)
    oracle.assert_close(oracle.rows(y, case.axis), want, tolerance, "y")
    # The norm alone sees scale * dy.
    dy = oracle.rows(a.dy, case.axis)
    whole = np.moveaxis(np.zeros(case.shape), case.axes, range(-len(case.axes), 0)).shape
    scaled = np.moveaxis((dy * as_rows(scale)).reshape(whole), range(-len(case.axes), 0), case.axes)
    want, *_ = oracle.gradients(a.x, scaled, np.ones(xhat.shape[1]), case.axis, a.mask)
    oracle.assert_close(oracle.rows(dx, case.axis), want, 2 * tolerance, "dx")
    others = tuple(a for a in range(len(case.shape)) if a not in (*case.axes, batch))
    size = 8 * np.sqrt(case.count) * oracle.tolerance(a.scale.dtype, case.count)
    for got, each in zip(dparams, (dy * xhat, dy), strict=True):
        each = np.moveaxis(each.reshape(whole), range(-len(case.axes), 0), case.axes)
        each = np.moveaxis(each.sum(others, keepdims=True), batch, 0)
        each = each.reshape(len(scale), *case.features)
        if form == "table":
            want = np.stack([each[labels == k].sum(0) for k in range(CLASSES)])
        else:
            want = each if got.ndim == len(case.shape) else each.sum(0)
            got = np.moveaxis(got, batch, 0) if got.ndim == len(case.shape) else got
        assert np.abs(np.float64(got).reshape(want.shape) - want).max() <= size


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("label", [3, "traced"])
def test_one_label_for_all(train, label):
    x = jax.random.normal(jax.random.key(0), (6, 4))
    table = jaxbn.Params(*(jax.random.normal(jax.random.key(k), (CLASSES, 4)) for k in (1, 2)))
    _, state = jaxbn.init(4)

    def f(label):
        return jaxbn.batch_norm(x, table, state, train=train, labels=label)

    got = f(3) if label == 3 else jax.jit(f)(3)
    want = jaxbn.batch_norm(x, jax.tree.map(lambda v: v[3], table), state, train=train)
    chex.assert_trees_all_close(got, want, rtol=1e-6, atol=1e-6)


def test_statistics_by_domain_and_scale_by_label():
    """Which is affine per domain where they are the same."""
    x = jax.random.normal(jax.random.key(0), (8, 3, 4))
    table = jaxbn.Params(*(jax.random.normal(jax.random.key(k), (CLASSES, 4)) for k in (1, 2)))
    _, state = jaxbn.init(4, domains=2)
    domain, labels = jnp.array([0, 1] * 4), jnp.array([4, 0, 1, 2, 3, 4, 0, 4])
    for train in (True, False):
        y, new = jaxbn.batch_norm(
            x, table, state, train=train, domain=domain, labels=labels, renorm=(1.2, 0.3)
        )
        xhat, want = jaxbn.batch_norm(x, None, state, train=train, domain=domain, renorm=(1.2, 0.3))
        scale, bias = (v[labels][:, None] for v in table)
        chex.assert_trees_all_close((y, new), (xhat * scale + bias, want), rtol=1e-5, atol=1e-5)


def test_a_traced_label_out_of_range_gives_nan():
    x, params = jnp.eye(4), jaxbn.init(4, classes=2)[0]
    f = jax.jit(lambda labels: jaxbn.batch_norm(x, params, None, train=True, labels=labels)[0])
    np.testing.assert_array_equal(np.isnan(f(jnp.array([0, 2, 1, -1])))[:, 0], [0, 1, 0, 1])


@pytest.mark.parametrize("road", ["shard_map", "vmap", "jit, Explicit"])
def test_devices_equal_one_device(road):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    x, dy = normal(16, 4, 4, 6) + normal(1, 1, 1, 6), normal(16, 4, 4, 6)
    params, state = (normal(6), normal(6)), (normal(6), normal(6) ** 2)
    labels = jnp.asarray(rng.integers(0, CLASSES, (16, 1, 1, 1)))
    road = roads(4)[road]

    def bn(x, params, state, mask=None, **options):
        table = jaxbn.Params(*(jnp.stack([v * k for k in range(CLASSES)]) for v in params))
        y, new = jaxbn.batch_norm(
            x,
            table,
            jaxbn.State(*state, None),
            train=True,
            labels=mask[:, 0, 0, 0],
            activation=jax.nn.relu,
            **options,
        )
        return y, tuple(new[:2])

    arguments = x, params, state, labels, dy
    got = jax.jit(training(road.build(bn)))(*road.place(*arguments))
    want = jax.jit(training(road.reference(bn)))(*arguments)
    for u, v in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        oracle.assert_close(u, np.float64(v), 8 * oracle.tolerance("float32", 16 * 16))


@pytest.mark.parametrize("train", [True, False])
def test_kept_for_backward_is_x(train):
    x = jax.random.normal(jax.random.key(0), (64, 4, 4, 3), "bfloat16")
    scale = jnp.ones((64, 1, 1, 3))
    _, state = jaxbn.init(3)

    def f(x, scale):
        return jaxbn.batch_norm(x, jaxbn.Params(scale, None), state, train=train)[0]

    _, vjp = jax.vjp(f, x, scale)
    large = [leaf for leaf in jax.tree.leaves(vjp) if getattr(leaf, "size", 0) >= x.size]
    assert [leaf.dtype for leaf in large] == ["bfloat16"]


def test_the_example_runs(monkeypatch):
    """In its smallest form: a score of real digits, and of those of either generator."""
    monkeypatch.syspath_prepend(EXAMPLES / "domains")
    import generator

    with as_pasted():
        table = generator.main(width=2, steps=2, batch=4, seeds=1)
    scores = [float(cell.partition("%")[0]) for cell in list(table.columns)[1].cells]
    assert scores[0] > 90
    assert all(0 <= score <= 100 for score in scores)
