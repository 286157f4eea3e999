"""The one door: forward, eval, running state and the semantics of its keywords."""

import contextlib
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from tests.support import cases, oracle

pytestmark = pytest.mark.optimized
bn = jax.jit(
    jaxbn.batch_norm,
    static_argnames=(
        *("train", "axis", "momentum", "epsilon", "unbiased"),
        *("axis_name", "virtual_batch_size", "dtype"),
    ),
)
EPS = 2.0**-23  # of float32


def x64(case):
    return jax.enable_x64(True) if case.dtype == "float64" else contextlib.nullcontext()


def given(case, seed=0):
    """NumPy arrays of a case, and its Params and State."""
    a = cases.arrays(case, seed)
    mean = a.mean.astype(a.x.dtype) if a.x.dtype.kind == "c" else a.mean
    state = jaxbn.State(mean, a.var, np.int32(3))
    return a, jaxbn.Params(a.scale, a.bias), state


def normal(shape, mean=0.0, sd=1.0, seed=0):
    return np.random.default_rng(seed).normal(mean, sd, shape).astype(np.float32)


def types(tree):
    """Dtype and weak type of each leaf."""
    return jax.tree.map(lambda v: (jnp.asarray(v).dtype, jnp.asarray(v).weak_type), tree)


def assert_identical(actual, desired):
    jax.tree.map(np.testing.assert_array_equal, actual, desired)
    assert types(actual) == types(desired)


def rows(y, case):
    return oracle.rows(y, case.axis)


@pytest.mark.parametrize("case", cases.SMALL, ids=lambda case: case.name)
def test_training_equals_the_oracle(case):
    a, params, state = given(case)
    with x64(case):
        y, new = bn(a.x, params, state, train=True, axis=case.axis, momentum=0.9, mask=a.mask)
    _, mean, var = oracle.moments(a.x, case.axis, a.mask)
    scale, bias = a.scale.ravel(), a.bias.ravel()
    tolerance = oracle.tolerance(case.dtype, case.count)
    assert (y.dtype, y.shape) == (case.dtype, case.shape)
    desired = oracle.normalize(a.x, mean, var, scale, bias, case.axis)
    oracle.assert_close(rows(y, case), desired, tolerance, "y")
    assert (new.mean.dtype, new.var.dtype, int(new.count)) == (state.mean.dtype, a.var.dtype, 4)
    tolerance = oracle.tolerance(a.var.dtype, case.count)
    for name, batch in (("mean", mean), ("var", var)):
        old = getattr(state, name)
        desired = oracle.running(old.ravel(), batch, 0.9)
        assert getattr(new, name).shape == case.features
        oracle.assert_close(getattr(new, name), desired, tolerance, name)


@pytest.mark.parametrize("case", cases.SMALL, ids=lambda case: case.name)
def test_eval_equals_the_oracle_and_keeps_the_state(case):
    a, params, state = given(case)
    with x64(case):
        y, new = bn(a.x, params, state, train=False, axis=case.axis, mask=a.mask)
    assert (y.dtype, y.shape) == (case.dtype, case.shape)
    flat = (v.ravel() for v in (state.mean, a.var, a.scale, a.bias))
    desired = oracle.normalize(a.x, *flat, case.axis)
    # Nothing is summed, so count is 1.
    oracle.assert_close(rows(y, case), desired, oracle.tolerance(case.dtype, 1), "y")
    jax.tree.map(np.testing.assert_array_equal, new, state)


def test_rank_1_is_one_row_of_a_batch():
    x, (params, state) = normal((6, 4), 3), jaxbn.init(4)
    train = functools.partial(jaxbn.batch_norm, train=True, axis_name="rows")
    batched = jax.vmap(train, (0, None, None), (0, None), axis_name="rows")
    y, new = jax.jit(batched)(x, params, state)
    desired = bn(x, params, state, train=True)
    for got, want in zip(jax.tree.leaves((y, new)), jax.tree.leaves(desired), strict=True):
        np.testing.assert_allclose(got, want, rtol=8 * EPS, atol=8 * EPS)
    row, _ = bn(x[0], params, new, train=False)
    np.testing.assert_array_equal(row, bn(x, params, new, train=False)[0][0])


@pytest.mark.parametrize("train", [True, False])
def test_dtype_is_that_of_y_and_x_is_not_rounded_first(train):
    x, state = normal((32, 4), 3), jaxbn.init(4)[1]
    full, _ = bn(x, None, state, train=train)
    half, _ = bn(x, None, state, train=train, dtype="bfloat16")
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, full.astype(jnp.bfloat16))
    low = x.astype(jnp.bfloat16)
    wide, _ = bn(low, None, state, train=train, dtype="float32")
    assert wide.dtype == jnp.float32
    np.testing.assert_array_equal(wide.astype(jnp.bfloat16), bn(low, None, state, train=train)[0])


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("left", ["nothing", "scale", "bias"])
def test_params_may_be_left_out(left, train):
    a, params, state = given(cases.SMALL[0])
    scale = params.scale if left == "scale" else np.ones_like(params.scale)
    bias = params.bias if left == "bias" else np.zeros_like(params.bias)
    some = {
        "nothing": None,
        "scale": jaxbn.Params(scale, None),
        "bias": jaxbn.Params(None, bias),
    }[left]
    desired = bn(a.x, jaxbn.Params(scale, bias), state, train=train)
    np.testing.assert_array_equal(bn(a.x, some, state, train=train)[0], desired[0])


def test_state_may_be_left_out():
    a, params, state = given(cases.SMALL[0])
    y, none = bn(a.x, params, None, train=True)
    assert none is None
    np.testing.assert_array_equal(y, bn(a.x, params, state, train=True)[0])


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("momentum", [0.99, 0.5, 0.0, 1.0, None])
def test_running_state_follows_its_equation(momentum, unbiased):
    """`momentum * old + (1 - momentum) * batch`; None is the average over all updates."""
    n, state = 10, jaxbn.init(3)[1]
    means, variances, of_batches = [np.zeros(3)], [np.ones(3)], []
    for k in range(4):
        x = normal((n, 3), k, k + 1, seed=k)
        _, state = bn(x, None, state, train=True, momentum=momentum, unbiased=unbiased)
        _, mean, var = oracle.moments(x)
        var = var * n / (n - 1) if unbiased else var
        keep = k / (k + 1) if momentum is None else momentum
        means.append(oracle.running(means[-1], mean, keep))
        variances.append(oracle.running(variances[-1], var, keep))
        of_batches.append(var)
    assert int(state.count) == 4
    if momentum is None:
        np.testing.assert_allclose(variances[-1], np.mean(of_batches, 0))
    oracle.assert_close(state.mean, means[-1], 4 * oracle.tolerance("float32", n), "mean")
    oracle.assert_close(state.var, variances[-1], 4 * oracle.tolerance("float32", n), "var")


def test_momentum_1_keeps_the_state_and_counts():
    _, params, state = given(cases.SMALL[0])
    x = normal((8, 10))
    _, new = bn(x, params, state, train=True, momentum=1.0)
    assert_identical(new._replace(count=0), state._replace(count=0))
    assert int(new.count) == int(state.count) + 1


def test_unbiased_counts_valid_cells():
    x, mask = normal((9, 2)), np.arange(9)[:, None] < 5
    _, state = bn(x, None, jaxbn.init(2)[1], train=True, mask=mask, momentum=0.0, unbiased=True)
    np.testing.assert_allclose(state.var, x[:5].var(0, ddof=1), rtol=16 * EPS)
    one = np.arange(9)[:, None] < 1  # n / (n - 1) has no value: the biased 0 stays
    _, state = bn(x, None, jaxbn.init(2)[1], train=True, mask=one, momentum=0.0, unbiased=True)
    np.testing.assert_array_equal(state.var, 0)


def test_training_and_eval_equal_torch():
    torch = pytest.importorskip("torch")
    layer = torch.nn.BatchNorm2d(3, momentum=0.1)
    params, state = jaxbn.init(3)
    for k in range(3):
        x = normal((4, 3, 5, 5), k, k + 1, seed=k)
        desired = layer(torch.tensor(x)).detach().numpy()
        y, state = bn(x, params, state, train=True, axis=1, momentum=0.9, unbiased=True)
        oracle.assert_close(y, desired, 2 * oracle.tolerance("float32", 100), "y")
    for got, want in ((state.mean, layer.running_mean), (state.var, layer.running_var)):
        oracle.assert_close(got, want.numpy(), 6 * oracle.tolerance("float32", 100), "state")
    desired = layer.eval()(torch.tensor(x)).detach().numpy()
    y, _ = bn(x, params, state, train=False, axis=1)
    oracle.assert_close(y, desired, 6 * oracle.tolerance("float32", 100), "eval")


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_training_equals_flax(dtype):
    nn = pytest.importorskip("flax.linen")
    x = normal((16, 5, 4), 2, 3).astype(dtype)
    x = x * (1 + 0.5j) + 1j * normal(x.shape, seed=1) if dtype == "complex64" else x
    x = x.astype(dtype)
    layer = nn.BatchNorm(use_running_average=False, momentum=0.9)
    variables = {"params": {"scale": normal(4), "bias": normal(4)}}
    variables["batch_stats"] = {"mean": np.zeros(4, np.float32), "var": np.ones(4, np.float32)}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        desired, update = layer.apply(variables, x, mutable=["batch_stats"])
    params, state = jaxbn.Params(normal(4), normal(4)), jaxbn.init(4, dtype)[1]
    y, state = bn(x, params, state, train=True, momentum=0.9)
    tolerance = 2 * oracle.tolerance(dtype, 80)  # both sides round
    oracle.assert_close(y, desired, tolerance, "y")
    oracle.assert_close(state.mean, update["batch_stats"]["mean"], tolerance, "mean")
    oracle.assert_close(state.var, update["batch_stats"]["var"], tolerance, "var")


@pytest.mark.parametrize("momentum", [0.9, 0.0, None])
@pytest.mark.parametrize(
    ("dtype", "bad"),
    [
        ("float32", np.nan),
        ("float32", np.inf),
        ("float32", -np.inf),
        ("float32", 3e38),  # finite, but its variance is not
        ("bfloat16", np.nan),
        ("float16", np.inf),
    ],
)
def test_a_channel_that_is_not_finite_keeps_its_statistics(dtype, bad, momentum):
    """To the bit, and the others learn; none of them where one count serves all."""
    _, params, state = given(cases.SMALL[0])
    state = jax.tree.map(jnp.asarray, state)
    x = jnp.asarray(normal((8, 10))).astype(dtype)
    _, sound = bn(x, params, state, train=True, momentum=momentum)
    _, new = bn(x.at[3, 5].set(bad), params, state, train=True, momentum=momentum)
    if momentum is None:
        assert_identical(new, state)
    else:
        channel = np.arange(10) == 5
        desired = jax.tree.map(lambda a, b: jnp.where(channel, a, b), state[:2], sound[:2])
        assert_identical((*new[:2], new.count), (*desired, state.count + 1))
    _, new = bn(jnp.full_like(x, bad), params, state, train=True, momentum=momentum)
    assert_identical(new, state)
    assert int(sound.count) == int(state.count) + 1
    assert (sound.mean != state.mean).all()


def test_what_the_state_cannot_hold_is_not_finite():
    """Statistics of float64 x, beyond the range of a float32 state: of mean alone, and of var."""
    _, state = jaxbn.init(3)
    with jax.enable_x64(True):
        x = np.array([[1e60, 1e30, 1.0], [1e60, -1e30, 3.0]])
        _, new = bn(x, None, state, train=True, momentum=0.5)
    np.testing.assert_array_equal(new.mean, np.float32([0, 0, 1]))
    np.testing.assert_array_equal(new.var, np.float32([1, 1, 1]))


def test_no_channel_asks_about_another():
    """Where nothing is counted: no reduction over channels, in the program as it is written."""
    params, state = jaxbn.init(4)
    step = functools.partial(jaxbn.batch_norm, train=True)

    def reductions(state):
        text = str(jax.make_jaxpr(step)(jnp.ones((8, 4)), params, state))
        return text.count("reduce_and"), text.count("reduce_or")

    alls, anys = reductions(None)
    assert reductions(state._replace(count=None)) == (alls, anys)
    assert reductions(state) == (alls, anys + 1)


def value_and_gradients(x, dy, params, state, mask=None):
    def f(x, params):
        return jaxbn.batch_norm(x, params, state, train=True, mask=mask)

    @jax.jit
    def run(x, params, dy):
        y, vjp, new = jax.vjp(f, x, params, has_aux=True)
        return y, new, *vjp(dy)

    return run(x, params, dy)


@pytest.mark.parametrize("empty", ["no rows", "mask all False", "mask without a feature"])
def test_a_batch_with_no_valid_cell(empty):
    """Y is bias, the state stays to the bit, gradients are finite."""
    params = jaxbn.Params(normal(4, 1), normal(4, seed=1))
    _, state = jaxbn.init(4)
    rows = 0 if empty == "no rows" else 6
    x, dy = normal((rows, 4), 3), normal((rows, 4), seed=2)
    mask = None if rows == 0 else np.zeros((6, 4), bool)
    c = 0  # the first channel without a valid cell
    if empty == "mask without a feature":
        mask[:, :2], c = True, 2
    y, new, dx, (dscale, dbias) = value_and_gradients(x, dy, params, state, mask)
    np.testing.assert_array_equal(y[:, c:], np.broadcast_to(params.bias, y.shape)[:, c:])
    np.testing.assert_array_equal(dx[:, c:], 0)
    np.testing.assert_array_equal(dscale[c:], 0)
    np.testing.assert_allclose(dbias, dy.sum(0), rtol=16 * EPS)
    if c:
        assert_identical((new.mean[c:], new.var[c:]), (state.mean[c:], state.var[c:]))
        assert (new.mean[:c] != state.mean[:c]).all()
        assert int(new.count) == 1
    else:
        assert_identical(new, state)


@pytest.mark.parametrize("filler", [0.0, 1e30, np.inf, -np.inf, np.nan])
def test_masked_out_cells_never_reach_the_statistics_or_a_gradient(filler):
    """Rows outside the mask, whatever they hold, equal rows that are not there."""
    params, (_, state) = jaxbn.Params(normal(4, 1), normal(4, seed=1)), jaxbn.init(4)
    x, dy = normal((12, 4), 3), normal((12, 4), seed=2)
    valid = np.arange(12) % 3 != 1
    x[~valid], dy[~valid] = filler, 0
    y, new, dx, dparams = value_and_gradients(x, dy, params, state, valid[:, None])
    y_, new_, dx_, dparams_ = value_and_gradients(x[valid], dy[valid], params, state)
    tolerance = 2 * oracle.tolerance("float32", 8)
    for got, want in zip(
        jax.tree.leaves((y[valid], new, dx[valid], dparams)),
        jax.tree.leaves((y_, new_, dx_, dparams_)),
        strict=True,
    ):
        oracle.assert_close(got, np.asarray(want, np.float64), tolerance, "masked")
    np.testing.assert_array_equal(dx[~valid], 0)
    if not np.isfinite(filler):  # as if it were the mean
        np.testing.assert_array_equal(y[~valid], np.broadcast_to(params.bias, y[~valid].shape))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("filler", [np.inf, np.nan])
def test_masked_out_cells_never_reach_the_layers_after(filler, train):
    """Whose sums over cells meet 0 · y there; so y is bias, as of a cell that holds the mean."""
    params, state = jaxbn.Params(normal(4, 1), normal(4, seed=1)), given(cases.SMALL[0])[2]
    state = jaxbn.State(state.mean[:4], state.var[:4], None)
    x, w, dy = normal((12, 4), 3), normal((4, 2), seed=2), normal((12, 2), seed=3)
    valid = np.arange(12)[:, None] % 3 != 1
    dy *= valid

    @jax.jit
    def gradients(x):
        def loss(params, w):
            y, _ = jaxbn.batch_norm(x, params, state, train=train, mask=valid)
            return (jax.nn.gelu(y) @ w * dy).sum()

        return jax.grad(loss, (0, 1))(params, w)

    mean = x[valid[:, 0]].mean(0) if train else state.mean
    got, want = gradients(np.where(valid, x, filler)), gradients(np.where(valid, x, mean))
    for g, v in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        oracle.assert_close(g, np.float64(v), oracle.tolerance("float32", 12))


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("train", [True, False])
def test_epsilon_0_gives_bias_where_nothing_varies(train, traced):
    """The limit of epsilon to 0, where the formula has 0 / 0; gradients are finite."""
    params, x, dy = jaxbn.Params(normal(3, 1), normal(3, seed=1)), normal((8, 3), 2), normal((8, 3))
    x[:, 1] = 7.1
    _, mean, var = oracle.moments(x)
    state = jaxbn.State(np.float32(mean), np.float32(var), None)

    @functools.partial(jax.jit, static_argnums=None if traced else 0)
    def run(epsilon):
        def f(x, params):
            return jaxbn.batch_norm(x, params, state, train=train, epsilon=epsilon)[0]

        y, vjp = jax.vjp(f, x, params)
        return y, *vjp(dy)

    y, dx, (dscale, dbias) = run(0.0)
    np.testing.assert_array_equal(y[:, 1], params.bias[1])
    np.testing.assert_array_equal((*dx[:, 1], dscale[1]), 0)
    desired = oracle.normalize(x, mean, np.where(var, var, 1), *params, epsilon=0)
    oracle.assert_close(y, desired, oracle.tolerance("float32", 8), "y")
    assert np.isfinite(dx).all()
    oracle.assert_close(dbias, dy.sum(0, dtype=float), oracle.tolerance("float32", 8), "dbias")


@pytest.mark.parametrize("size", [1e18, 1e20, 1e30, 1e38, 3e38])
def test_y_is_right_or_bias_or_nan_at_the_end_of_the_range(size):
    """A variance beyond float32, from |x - mean| of about 1e19: no other number, and no state."""
    x = np.stack([[size, -size, size, 0, 1, 2], np.arange(6)], -1).astype(np.float32)
    bias = np.float32([0.5, 0.25])
    y, state = bn(x, jaxbn.Params(None, bias), jaxbn.init(2)[1], train=True, momentum=0.5)
    _, mean, var = oracle.moments(x)
    desired = oracle.normalize(x, mean, var, 1, bias)
    oracle.assert_close(y[:, 1], desired[:, 1], oracle.tolerance("float32", 6))
    if size < 1e19:
        oracle.assert_close(y, desired, oracle.tolerance("float32", 6))
    else:
        assert (np.isnan(y[:, 0]) | (y[:, 0] == bias[0])).all()
        assert (state.mean[0], state.var[0]) == (0, 1)


def test_y_is_normalized_outside_the_mask_too():
    x, valid = normal((12, 4), 3), np.arange(12)[:, None] < 7
    y, _ = bn(x, None, None, train=True, mask=valid)
    _, mean, var = oracle.moments(x, mask=valid)
    desired = oracle.normalize(x, mean, var, 1, 0)
    oracle.assert_close(y, desired, oracle.tolerance("float32", 12), "y")


def test_one_valid_row_is_bias_and_no_error():
    x, bias = normal((5, 3), 3), normal(3)
    mask = np.arange(5)[:, None] == 2
    y, state = bn(x, jaxbn.Params(None, bias), jaxbn.init(3)[1], train=True, mask=mask)
    np.testing.assert_array_equal(y[2], bias)
    assert np.isfinite(np.concatenate(jax.tree.leaves(jax.tree.map(np.ravel, state)))).all()


def test_one_image_is_a_batch():
    x = normal((1, 4, 4, 3), 3)
    y, _ = bn(x, None, None, train=True)
    np.testing.assert_allclose(np.std(y, (0, 1, 2)), 1, rtol=1e-4)


STATES = {
    "of init": lambda: jaxbn.init(4, jnp.bfloat16)[1],
    "bfloat16": lambda: jaxbn.State(jnp.zeros(4, "bfloat16"), jnp.ones(4, "bfloat16"), 0),
    "float16": lambda: jaxbn.State(jnp.zeros(4, "float16"), jnp.ones(4, "float16"), np.int8(0)),
    "float8": lambda: jaxbn.State(jnp.zeros(4, "float8_e5m2"), jnp.ones(4, "float16"), True),
    "averaged": lambda: jaxbn.State(jnp.zeros(4), jnp.ones(4), 2.9),
    "weak": lambda: jaxbn.State(jnp.full(4, 0.5), jnp.full(4, 1.5), jnp.asarray(0)),
    "numpy": lambda: jaxbn.State(np.zeros(4, np.float32), np.ones(4, np.float32), np.int32(0)),
}


@pytest.mark.parametrize("stored", STATES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_train_and_eval_return_the_same_types(stored, dtype):
    """So that a flag may choose between them, and a loop never compiles twice."""
    x, (params, _), state = jnp.ones((8, 4), dtype), jaxbn.init(4), STATES[stored]()
    outputs = [bn(x, params, state, train=train) for train in (True, False)]
    assert types(outputs[0]) == types(outputs[1])
    assert not any(jnp.asarray(leaf).weak_type for leaf in jax.tree.leaves(outputs))
    assert [v.dtype for v in outputs[0][1]] == [jnp.float32, jnp.float32, jnp.int32]


def test_a_traced_flag_chooses_by_cond():
    x, (params, state) = jnp.asarray(normal((8, 4), 3)), jaxbn.init(4)

    @jax.jit
    def either(flag, x, state):
        train, evaluate = (
            lambda x, state, mode=mode: jaxbn.batch_norm(x, params, state, train=mode)
            for mode in (True, False)
        )
        return jax.lax.cond(flag, train, evaluate, x, state)

    for flag in (True, False):
        desired = bn(x, params, state, train=flag)
        for got, want in zip(
            jax.tree.leaves(either(flag, x, state)), jax.tree.leaves(desired), strict=True
        ):
            np.testing.assert_allclose(got, want, rtol=4 * EPS, atol=4 * EPS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_training_loop_compiles_once(dtype):
    params, state = jaxbn.init(4, dtype)

    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(x, state):
        return jaxbn.batch_norm(x, params, state, train=True)

    for k in range(3):
        _, state = step(jnp.asarray(normal((8, 4), seed=k)), state)
    assert int(state.count) == 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("momentum", [0.999, None])
def test_a_state_stored_narrow_arrives_at_the_truth(dtype, momentum):
    """Its steps, 0.001 of what is to go, are below half a unit in bfloat16 and float16."""
    x = (20 * normal((64, 3), 5)).astype(np.float32)  # the second's var is beyond float16
    state = jaxbn.State(jnp.zeros(3, dtype), jnp.ones(3, dtype), 0)

    @jax.jit
    def steps(state):
        step = functools.partial(jaxbn.batch_norm, x, None, train=True, momentum=momentum)
        _, state = step(state=state)
        return jax.lax.fori_loop(1, 2000, lambda _, s: step(state=s)[1], state)

    _, mean, var = oracle.moments(x)
    state, left = steps(state), 0 if momentum is None else momentum**2000
    # A rounding a step, half a unit of what is there, of which momentum forgets.
    tolerance = oracle.tolerance("float32", 64) + 1000 * EPS / 2
    oracle.assert_close(state.mean, oracle.running(0, mean, left), tolerance, "mean")
    oracle.assert_close(state.var, oracle.running(1, var, left), tolerance, "var")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("count", [0, 10**6, 2 * 10**7, 2**31 - 1])
def test_the_cumulative_average_weighs_each_update_alike(count, dtype):
    """By 1 / (count + 1), in the state's dtype, however many there were."""
    with jax.enable_x64(dtype == "float64"):
        x = normal((16, 3), [5, 1e3, 0], [1, 1, 1e-6]).astype(dtype)
        state = jaxbn.State(jnp.zeros(3, dtype), jnp.ones(3, dtype), jnp.int32(count))
        _, new = bn(x, None, state, train=True, momentum=None)
    _, mean, var = oracle.moments(x)
    eps = float(jnp.finfo(dtype).eps)
    for got, old, batch in ((new.mean, 0, mean), (new.var, 1, var)):
        assert got.dtype == dtype
        desired = old + (batch - old) / (count + 1)
        # The batch's rounding, of what it adds; and one of the sum, of what is there.
        allowed = 32 * eps * np.abs(batch - old) / (count + 1) + (count > 0) * eps * np.abs(desired)
        assert (np.abs(np.float64(got) - desired) <= allowed).all()
    assert int(new.count) == min(count + 1, 2**31 - 1)


@pytest.mark.parametrize("count", [2**31 - 1, 3e9, np.uint32(3e9)])
@pytest.mark.parametrize("momentum", [0.9, None])
def test_a_count_does_not_wrap(count, momentum):
    state = jaxbn.State(np.zeros(3, np.float32), np.ones(3, np.float32), count)
    for train in (True, False):
        _, new = bn(normal((8, 3)), None, state, train=train, momentum=momentum)
        assert (int(new.count), new.count.dtype) == (2**31 - 1, jnp.int32)


def test_eval_of_bfloat16_is_rounded_once():
    """Large running means: x - mean in bfloat16 would be off by twenty times as much."""
    x = (normal((256, 4)) + 100.3).astype(jnp.bfloat16)
    mean = np.full(4, 100.3, np.float32)
    state = jaxbn.State(mean, np.ones(4, np.float32), np.int32(1))
    y, _ = bn(x, None, state, train=False)
    desired = oracle.normalize(x, mean, 1, 1, 0)
    np.testing.assert_allclose(np.float64(y), desired, rtol=2.0**-8, atol=100 * EPS)


def test_bfloat16_of_small_spread_comes_out_with_sd_1():
    x = jnp.asarray(normal((512, 8), 5, 0.1)).astype(jnp.bfloat16)
    y, _ = bn(x, None, None, train=True)
    _, mean, var = oracle.moments(y)
    np.testing.assert_allclose(np.sqrt(var), 1, rtol=0.02)
    np.testing.assert_allclose(mean, 0, atol=0.02)


@pytest.mark.parametrize("shape", [(16, 7), (16, 3, 3, 5)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eval_of_a_row_does_not_depend_on_the_batch(shape, dtype):
    """To the bit beside any other rows, NaN among them; at any other batch size to one rounding.

    Compiled for another size, the product and the sum may be one instruction that were two, and
    then the product is not rounded: half a unit in its last place, and one in y's.
    """
    c = shape[-1]
    x = jnp.asarray(normal(shape, 3)).astype(dtype)
    params = jaxbn.Params(normal(c, 1), normal(c, seed=1))
    state = jaxbn.State(normal(c, 3, seed=2), np.abs(normal(c, seed=3)), np.int32(9))
    whole, _ = bn(x, params, state, train=False)
    beside, _ = bn(x.at[1:].set(jnp.nan), params, state, train=False)
    np.testing.assert_array_equal(beside[0], whole[0])
    wide = np.asarray(whole, np.float32)
    product = np.finfo(np.float32).eps / 2 * np.abs(wide - params.bias)
    tolerance = product + float(jnp.finfo(dtype).eps) * np.abs(wide)
    for size in (1, 2, 3, 7):
        part, _ = bn(x[:size], params, state, train=False)
        assert (np.abs(np.asarray(part, np.float32) - wide[:size]) <= tolerance[:size]).all()


def test_eval_has_no_collective_and_needs_no_axis():
    x, (params, state) = normal((4, 3)), jaxbn.init(3)
    y, _ = bn(x, params, state, train=False, axis_name="not bound")
    np.testing.assert_array_equal(y, bn(x, params, state, train=False)[0])


GHOSTS = {
    "rows": ((12, 4), -1, None),
    "images": ((8, 3, 3, 4), -1, None),
    "masked images": ((8, 3, 3, 4), -1, (8, 3, 3, 1)),
    "features first": ((4, 12), 0, None),
    "features first, masked": ((4, 12), 0, (1, 12)),
    "one group": ((4, 3, 4), -1, None),
}


@pytest.mark.parametrize("name", GHOSTS)
def test_ghost_batches_equal_a_loop_over_groups(name):
    """Y and its gradients of each group alone; the running state of the whole batch."""
    shape, axis, mask_shape = GHOSTS[name]
    params, (_, state) = jaxbn.Params(normal(4, 1), normal(4, seed=1)), jaxbn.init(4)
    x, dy = normal(shape, 3), normal(shape, seed=2)
    x = x * np.linspace(1, 3, shape[1 if axis == 0 else 0]).reshape(
        [n if a == (axis == 0) else 1 for a, n in enumerate(shape)]
    ).astype(np.float32)  # another sd in each group
    mask = None if mask_shape is None else np.random.default_rng(0).random(mask_shape) < 0.6

    def ghosts(x, params):
        return jaxbn.batch_norm(
            x, params, state, train=True, axis=axis, mask=mask, virtual_batch_size=4
        )

    def loop(x, params):
        batch_axis = 1 if axis == 0 else 0
        cut = lambda v: jnp.split(v, v.shape[batch_axis] // 4, batch_axis)  # noqa: E731
        masks = [None] * len(cut(x)) if mask is None else cut(jnp.asarray(mask))
        parts = [
            jaxbn.batch_norm(part, params, None, train=True, axis=axis, mask=m)[0]
            for part, m in zip(cut(x), masks, strict=True)
        ]
        whole = jaxbn.batch_norm(x, params, state, train=True, axis=axis, mask=mask)[1]
        return jnp.concatenate(parts, batch_axis), whole

    @functools.partial(jax.jit, static_argnums=0)
    def run(f):
        y, vjp, new = jax.vjp(f, x, params, has_aux=True)
        return jax.tree.leaves((y, new, vjp(dy)))

    for got, want in zip(run(ghosts), run(loop), strict=True):
        tolerance = 2 * oracle.tolerance("float32", x.size // 4)
        oracle.assert_close(got, np.asarray(want, np.float64), tolerance, name)


def test_ghost_batches_do_not_apply_in_eval():
    x, (params, state) = normal((6, 3)), jaxbn.init(3)
    y, _ = bn(x, params, state, train=False, virtual_batch_size=4)  # 4 does not divide 6
    np.testing.assert_array_equal(y, bn(x, params, state, train=False)[0])


def test_no_gradient_flows_through_the_state():
    x, (params, state) = normal((8, 3)), jaxbn.init(3)

    def loss(x, params, state):
        _, new = jaxbn.batch_norm(x, params, state, train=True)
        return (new.mean**2).sum() + new.var.sum()

    for g in jax.tree.leaves(jax.grad(loss, (0, 1))(x, params, state)):
        np.testing.assert_array_equal(g, 0)


def test_init_has_the_shapes_and_dtypes_asked_for():
    params, state = jaxbn.init((3, 4), jnp.complex64)
    assert [v.shape for v in (*params, *state)] == [(3, 4)] * 4 + [()]
    assert (state.mean.dtype, state.var.dtype) == (jnp.complex64, jnp.float32)
    params, state = jaxbn.init(2, jnp.float16)
    assert [v.dtype for v in (*params, *state[:2])] == ["float16"] * 2 + ["float32"] * 2
    params, state = jaxbn.init((3, 4), jnp.complex64)
    np.testing.assert_array_equal(params.scale, 1)
    np.testing.assert_array_equal(state.var, 1)


def test_a_state_without_a_count_learns_alike_and_momentum_may_be_traced():
    x = jnp.arange(12.0).reshape(6, 2)
    _, state = jaxbn.init(2)

    @jax.jit
    def update(momentum, state):
        return jaxbn.batch_norm(x, None, state, train=True, momentum=momentum)[1]

    counted, uncounted = update(0.9, state), update(0.9, state._replace(count=None))
    assert uncounted.count is None
    np.testing.assert_array_equal(counted.mean, uncounted.mean)
    np.testing.assert_array_equal(counted.var, uncounted.var)
    np.testing.assert_allclose(counted.mean, 0.1 * x.mean(0), rtol=1e-6)
