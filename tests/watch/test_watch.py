"""Watching a training run: what the aux of a step holds, what it costs, and its figures."""

from collections.abc import Callable

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn import watch
from tests.support import hlo
from tests.support.messages import message
from tests.support.watching import record_of

rng = np.random.default_rng(0)
X = rng.normal(3, 2, (16, 5)).astype(np.float32)
DY = rng.normal(size=(16, 4)).astype(np.float32)


class Linen(linen.Module):
    norm: type

    @linen.compact
    def __call__(self, x):
        return self.norm(use_running_average=False, momentum=0.9)(linen.Dense(4)(x))


class Nnx(nnx.Module):
    def __init__(self, norm, rngs):
        self.dense = nnx.Linear(5, 4, rngs=rngs)
        self.norms = nnx.List([norm(4, momentum=0.9, rngs=rngs)])

    def __call__(self, x):
        return self.norms[0](self.dense(x))


def linen_step(norm, on, observe=watch.linen):
    """`step(variables, x)` → new variables, loss, records; written once, watched or not."""
    model = Linen(norm)

    def step(variables, x):
        def loss(params):
            out, seen = observe(model.apply, on)(
                {**variables, "params": params}, x, mutable=["batch_stats"]
            )
            y, updates = out
            return jnp.sum(y * DY), (updates, seen)

        (value, (new, seen)), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        records = watch.records(seen, {"params": variables["params"], **new}, grads)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], grads)
        return {"params": params, **new}, value, records

    return step, model.init(jax.random.key(0), X), "BatchNorm_0", "Dense_0"


def nnx_step(norm, on, observe=watch.nnx):
    graph, state = nnx.split(Nnx(norm, nnx.Rngs(0)))

    def step(state, x):
        model = nnx.merge(graph, state)
        with observe(model, on) as seen:
            value, grads = nnx.value_and_grad(lambda model: jnp.sum(model(x) * DY))(model)
        records = watch.records(seen, model, grads)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(model, nnx.Param), grads)
        nnx.update(model, params)
        return nnx.state(model), value, records

    return step, state, "norms/0", "dense"


STEPS = {"linen": linen_step, "nnx": nnx_step}
NORMS = {
    ("linen", "flax"): linen.BatchNorm,
    ("linen", "jaxbn"): jaxbn.linen.BatchNorm,
    ("nnx", "flax"): nnx.BatchNorm,
    ("nnx", "jaxbn"): jaxbn.nnx.BatchNorm,
}


def plain(tree):
    return nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree


def leaf(tree, path):
    """The arrays at a path: of linen's params and batch_stats put together, or of nnx."""
    tree = plain(tree)
    if "params" in tree:
        return {**tree["params"].get(path, {}), **tree["batch_stats"].get(path, {})}
    for key in path.split("/"):
        tree = tree[int(key) if key.isdigit() else key]
    return tree


@pytest.mark.parametrize("sharded", [False, True], ids=["one device", "eight devices"])
@pytest.mark.parametrize(("api", "library"), NORMS)
def test_a_record_holds_what_the_layer_saw_and_learned(api, library, sharded):
    step, variables, path, dense = STEPS[api](NORMS[api, library], True)
    x = X
    if sharded:
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        x = jax.device_put(X, jax.NamedSharding(mesh, P("data")))
    new, _, records = jax.jit(step)(variables, x)
    assert list(records) == [path]
    record = records[path]

    kernel = np.asarray(leaf(variables, dense)["kernel"], float)
    seen = X.astype(float) @ kernel  # the bias of Dense is 0
    mean, var = seen.mean(0), seen.var(0)
    xhat = (seen - mean) / np.sqrt(var + 1e-5)
    # Products of float32 matrices with inner dimension 5, sums over 16 rows: a few eps of 1.2e-7.
    close = {"rtol": 1e-4, "atol": 1e-5}
    assert float(record.batch.count) == 16
    np.testing.assert_allclose(record.batch.mean, mean, **close)
    np.testing.assert_allclose(record.batch.var, var, **close)
    np.testing.assert_allclose(record.state.mean, 0.1 * mean, **close)
    np.testing.assert_allclose(record.state.var, 0.9 + 0.1 * var, **close)
    np.testing.assert_array_equal(record.params.scale, np.ones(4))
    np.testing.assert_array_equal(record.params.bias, np.zeros(4))
    np.testing.assert_allclose(record.grads.scale, (DY * xhat).sum(0), **close)
    np.testing.assert_allclose(record.grads.bias, DY.sum(0), **close)
    # What the model returned and kept is what it returns and keeps when nobody looks.
    expected, _, none = jax.jit(STEPS[api](NORMS[api, library], False)[0])(variables, x)
    assert none == {}
    assert jax.tree.structure(new) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, **close)


def never_watched(model_or_apply, on):
    """What `linen` and `nnx` do when off, written without them."""
    if isinstance(model_or_apply, nnx.Module):
        from contextlib import nullcontext

        return nullcontext({})
    return lambda *args, **kwargs: (model_or_apply(*args, **kwargs), {})


@pytest.mark.optimized
@pytest.mark.parametrize(("api", "library"), NORMS)
def test_off_is_the_same_program_as_no_watching_at_all(api, library):
    def programs(on, **observe):
        step, variables, *_ = STEPS[api](NORMS[api, library], on, **observe)
        lowered = jax.jit(step).lower(variables, X)
        return lowered.as_text(), hlo.text(lowered.compile())

    off, on = programs(False), programs(True)
    assert off == programs(False, observe=never_watched)
    assert off[0] != on[0]


def test_the_functional_core_is_watched_by_moments_of_its_own_taking():
    params, state = jaxbn.init(5)

    def loss(params, state):
        y, state = jaxbn.batch_norm(X, params, state, train=True)
        return jnp.sum(y), (state, {"bn": jaxbn.moments(X)})

    grads, (state, seen) = jax.jit(jax.grad(loss, has_aux=True))(params, state)
    variables = {"params": {"bn": params}, "batch_stats": {"bn": state}}
    record = watch.records(seen, variables, {"bn": grads})["bn"]
    np.testing.assert_allclose(record.batch.mean, X.mean(0), rtol=1e-5)
    np.testing.assert_array_equal(record.state.mean, state.mean)
    np.testing.assert_allclose(record.grads.bias, np.full(5, 16), rtol=1e-6)


class Block(linen.Module):
    """Norms after a convolution, a dense layer in bfloat16, a sum, a skip connection, and relu."""

    @linen.compact
    def __call__(self, x):
        def norm(name):
            return linen.BatchNorm(use_running_average=False, name=name)

        x = norm("of_conv")(linen.Conv(3, (2, 2), name="conv")(x))
        h = linen.Dense(3, dtype=jnp.bfloat16, name="dense")(x)
        h = norm("of_dense")(h.astype(jnp.float32))
        h = norm("of_skip")(h + linen.Dense(3, name="skip")(h))
        return norm("of_relu")(jax.nn.relu(norm("of_sum")(x + h)))


def test_kernels_are_those_whose_result_a_layer_gets():
    x = jnp.ones((2, 3, 3, 1))
    model = Block()
    variables = jax.jit(model.init)(jax.random.key(0), x)
    assert watch.kernels(model.apply, variables, x, mutable=["batch_stats"]) == {
        "of_conv": "conv/kernel",
        "of_dense": "dense/kernel",
    }
    of_nnx = Nnx(nnx.BatchNorm, nnx.Rngs(0))
    assert watch.kernels(of_nnx, X) == {"norms/0": "dense/kernel"}
    assert not hasattr(of_nnx.norms[0], "jaxbn_path")  # a copy was hooked
    assert message(TypeError, watch.kernels, model.apply) == (
        "watch.kernels: called with apply alone, expected the arguments of a call of the model; "
        "write watch.kernels(model.apply, variables, x)."
    )
    assert message(TypeError, watch.kernels, model, variables, x) == (
        "watch.kernels: called with Block, expected a linen model's apply; write "
        "watch.kernels(model.apply, variables, x)."
    )


class Turn(linen.Module):
    """A norm, and a dense layer with its norm."""

    @linen.compact
    def __call__(self, x, _):
        x = linen.BatchNorm(use_running_average=False, name="first")(x)
        y = linen.Dense(4, name="dense")(jax.nn.relu(x))
        return linen.BatchNorm(use_running_average=False, name="second")(y), None


class Turns(linen.Module):
    """A dense layer, then a scan or vmap of `Turn`, then a norm."""

    lift: Callable
    options: dict

    @linen.compact
    def __call__(self, x):
        axes = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
        turns = self.lift(Turn, **axes, **self.options)(name="turns")
        x, _ = turns(linen.Dense(4, name="before")(x), None)
        return linen.BatchNorm(use_running_average=False, name="after")(x)


@pytest.mark.parametrize("lift", ["scan", "vmap"])
def test_kernels_of_layers_in_scan_and_vmap_are_stacks(lift):
    """What a turn gets from the turn before, and what comes after all turns, is of no kernel."""
    options = {"scan": {"length": 3}, "vmap": {"in_axes": (0, None)}}[lift]
    model, x = Turns(getattr(linen, lift), options), jnp.ones((3, 4, 4))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    kernel = variables["params"]["turns"]["dense"]["kernel"]
    assert kernel.shape == (3, 4, 4)
    kernels = watch.kernels(model.apply, variables, x, mutable=["batch_stats"])
    of_vmap = {"turns/first": "before/kernel"} if lift == "vmap" else {}
    assert kernels == {"turns/second": "turns/dense/kernel", **of_vmap}
    seen = {"turns/second": jaxbn.moments(x)}
    of = {"turns/second": "turns/dense/kernel"}
    record = watch.records(seen, variables, variables["params"], kernels=of)["turns/second"]
    norm = np.linalg.norm(np.asarray(kernel, float).ravel())
    np.testing.assert_allclose(record.kernel, (norm, norm), rtol=1e-6)


class Shared(linen.Module):
    """One norm after two dense layers, after the first of them again, and after their sum."""

    @linen.compact
    def __call__(self, x):
        norm = linen.BatchNorm(use_running_average=False, name="norm")
        a, b = linen.Dense(4, name="a"), linen.Dense(4, name="b")
        return norm(a(x)) + norm(b(x)) + norm(a(2 * x)) + norm(a(x) + b(x))


class NnxShared(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.a, self.b = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        a, b, norm = self.a, self.b, self.norm
        return norm(a(x)) + norm(b(x)) + norm(a(2 * x)) + norm(a(x) + b(x))


@pytest.mark.parametrize("api", STEPS)
def test_a_norm_that_is_called_several_times_has_all_kernels_before_it(api):
    x = X[:, :4]
    if api == "linen":
        variables = Shared().init(jax.random.key(0), x)
        kernels = watch.kernels(Shared().apply, variables, x, mutable=["batch_stats"])
        weights = variables["params"]
    else:
        variables = NnxShared()
        kernels, weights = watch.kernels(variables, x), nnx.state(variables, nnx.Param)
    assert kernels == {"norm": ("a/kernel", "b/kernel")}
    both = np.concatenate([np.asarray(weights[name]["kernel"], float).ravel() for name in "ab"])
    grads = jax.tree.map(lambda v: 3 * v, weights)
    record = watch.records({"norm": jaxbn.moments(x)}, variables, grads, kernels=kernels)["norm"]
    norm = np.linalg.norm(both)
    np.testing.assert_allclose(record.kernel, (norm, 3 * norm), rtol=1e-6)


@pytest.mark.parametrize("api", STEPS)
def test_a_record_has_the_norms_of_the_kernel_before(api):
    if api == "linen":
        model = Linen(linen.BatchNorm)
        variables = model.init(jax.random.key(0), X)
        kernels = watch.kernels(model.apply, variables, X, mutable=["batch_stats"])
        params, grads = variables["params"], jax.tree.map(lambda v: 2 * v, variables["params"])
        kernel = params["Dense_0"]["kernel"]
    else:
        variables = Nnx(nnx.BatchNorm, nnx.Rngs(0))
        kernels = watch.kernels(variables, X)
        grads = jax.tree.map(lambda v: 2 * v, nnx.state(variables, nnx.Param))
        kernel = variables.dense.kernel[...]
    ((path, _),) = kernels.items()
    seen = {path: jaxbn.moments(jnp.asarray(X[:, :4]))}
    record = watch.records(seen, variables, grads, kernels=kernels)[path]
    norm = np.linalg.norm(np.asarray(kernel, float))
    np.testing.assert_allclose(record.kernel, (norm, 2 * norm), rtol=1e-6)
    assert watch.metrics({path: record})[path]["effective_rate"] == pytest.approx(2)
    for wrong, missing in (({path: "no"}, ["no"]), (kernels, list(kernels.values()))):
        of = grads if missing == ["no"] else None
        assert message(ValueError, watch.records, seen, variables, of, kernels=wrong) == (
            f"watch.records: variables or grads have no {missing}, expected the parameters of the "
            f"model that watch.kernels was called for, and their gradients; write "
            f"watch.records(seen, variables, grads, kernels=kernels)."
        )


# --- figures ----------------------------------------------------------------------------------


def kl(m, v, n, w):
    """KL divergence of two Gaussians by quadrature, nats."""
    x = np.linspace(m - 12 * np.sqrt(v), m + 12 * np.sqrt(v), 20_001)
    log_p = -((x - m) ** 2) / (2 * v) - np.log(v) / 2
    log_q = -((x - n) ** 2) / (2 * w) - np.log(w) / 2
    p = np.exp(log_p) / np.sqrt(2 * np.pi)
    return np.sum(p * (log_p - log_q)) * (x[1] - x[0])


def rms_ratio(of_rows):
    """RMS over channels of the distance between 4 shards over that expected of 8 rows each."""
    between = 8 * of_rows.mean.var(1, ddof=1)
    within = (8 * of_rows.var).sum(1) / 28
    return np.mean(between / within) ** 0.5


def test_metrics_are_what_their_help_says():
    record = record_of(3)
    got = watch.metrics({"a": record})["a"]
    v = {
        **{f"batch_{k}": x for k, x in record.batch._asdict().items()},
        **{f"running_{k}": x for k, x in record.state._asdict().items()},
        **record.params._asdict(),
        **{f"d{k}": x for k, x in record.grads._asdict().items()},
    }
    v = {k: np.asarray(x, float) for k, x in v.items() if x is not None}
    arrays = watch.channels(record)
    assert set(arrays) == set(v) - {"batch_count"}
    for name, x in arrays.items():
        np.testing.assert_array_equal(x, v[name])
    eps = 1e-5
    divergence = [
        kl(m, b + eps, n, r + eps) + kl(n, r + eps, m, b + eps)
        for m, b, n, r in zip(
            v["batch_mean"], v["batch_var"], v["running_mean"], v["running_var"], strict=True
        )
    ]
    expected = {
        "batch_count": 640,
        "mean_over_sd_max": max(abs(v["batch_mean"]) / np.sqrt(v["batch_var"] + eps)),
        "batch_var_min": min(v["batch_var"]),
        "batch_var_max": max(v["batch_var"]),
        "running_var_min": min(v["running_var"]),
        "running_var_max": max(v["running_var"]),
        "symmetric_kl_max": max(divergence),
        "symmetric_kl_mean": np.mean(divergence),
        "scale_abs_min": min(abs(v["scale"])),
        "scale_abs_max": max(abs(v["scale"])),
        "bias_abs_max": max(abs(v["bias"])),
        "dscale_norm": sum(v["dscale"] ** 2) ** 0.5,
        "dbias_norm": sum(v["dbias"] ** 2) ** 0.5,
        "nonfinite": 0,
        "shard_mean_spread": rms_ratio(record.shards.mean),
        "shard_sd_spread": rms_ratio(record.shards.sd),
        # Of 4 shards with 8 rows each; half of the chance for the means, half for the sds.
        "shard_spread_limit": scipy.stats.f.isf(1e-5 / 2, 3, 28) ** 0.5,
        "kernel_grad_norm": 3,
        "effective_rate": 3 / 4,
    }
    assert list(got) == list(watch.METRICS) == list(expected)
    assert got == pytest.approx(expected, rel=1e-6)


def test_metrics_of_odd_layers_show_what_is_odd():
    """Without parameters, dead, NaN, complex, bfloat16, stacked by a scan."""
    zeros, nan = np.zeros(3, np.float32), np.array([0, np.nan, np.inf], np.float32)
    none = jaxbn.Params(None, None)
    odd = {
        "bare": record_of(3)._replace(params=none, grads=none, shards=None, kernel=None),
        "dead": record_of(3, bm=zeros, bv=zeros, rm=zeros, rv=zeros),
        "nan": record_of(3, bm=nan),
        "complex": record_of(3, bm=np.array([3 + 4j] * 3, np.complex64), bv=zeros + 1),
        "bfloat16": record_of(3, scale=jnp.full(3, -0.5, jnp.bfloat16)),
        "stacked": record_of((2, 3), n=np.float32([640, 10])),
    }
    got = watch.metrics(odd)
    assert set(watch.METRICS) - set(got["bare"]) == {
        *("scale_abs_min", "scale_abs_max", "bias_abs_max", "dscale_norm", "dbias_norm"),
        *("shard_mean_spread", "shard_sd_spread", "shard_spread_limit"),
        *("kernel_grad_norm", "effective_rate"),
    }
    assert (got["dead"]["mean_over_sd_max"], got["dead"]["symmetric_kl_max"]) == (0, 0)
    assert got["nan"]["nonfinite"] == 2
    assert np.isnan(got["nan"]["symmetric_kl_max"])
    assert got["complex"]["mean_over_sd_max"] == pytest.approx(5, rel=1e-4)
    assert got["bfloat16"]["scale_abs_min"] == 0.5
    assert got["stacked"]["batch_count"] == 10
    assert got["stacked"]["batch_var_max"] == pytest.approx(odd["stacked"].batch.var.max())


# --- bad input --------------------------------------------------------------------------------


def test_models_without_batch_norm_and_models_not_called_are_refused():
    dense = linen.Dense(3)
    variables = dense.init(jax.random.key(0), X)
    assert message(ValueError, watch.linen(dense.apply), variables, X) == (
        "watch.linen: apply passed through no batch norm layer, expected flax.linen.BatchNorm or "
        "jaxbn.linen.BatchNorm in the model; write watch.linen(model.apply, on=False) for a model "
        "without them."
    )
    watch.linen(dense.apply, on=False)(variables, X)

    def within(model, call):
        with watch.nnx(model):
            if call:
                model(X)

    assert message(ValueError, within, nnx.Linear(5, 3, rngs=nnx.Rngs(0)), True) == (
        "watch.nnx: Linear has no batch norm layer, expected flax.nnx.BatchNorm or "
        "jaxbn.nnx.BatchNorm in the model; write watch.nnx(model, on=False) for a model without "
        "them."
    )
    model = nnx.BatchNorm(5, rngs=nnx.Rngs(0))
    assert message(ValueError, within, model, False) == (
        "watch.nnx: no batch norm layer of BatchNorm was called, expected a call of the model; "
        "write with watch.nnx(model) as seen: y = model(x)."
    )
    with pytest.raises(ZeroDivisionError), watch.nnx(model):
        raise ZeroDivisionError  # and not that nothing was called


def test_records_of_other_variables_are_refused():
    assert message(ValueError, watch.records, {"bn": jaxbn.moments(X)}, {"params": {}}) == (
        "watch.records: no running statistics in variables for the layers ['bn'] that saw the "
        "batch; expected the variables of the model that was called; write watch.records(seen, "
        '{"params": params, "batch_stats": batch_stats}, grads), or the nnx model in place of the '
        "variables."
    )


APPLY = linen.BatchNorm(use_running_average=True).apply
MOMENTS = {"": jaxbn.moments(X)}
HELD = {"batch_stats": {"mean": jnp.zeros(5), "var": jnp.ones(5)}}
KERNELS = (
    "expected a dict, path → str of each layer, as watch.kernels gives; write watch.records(seen, "
    "variables, grads, kernels=kernels)."
)
WRONG = {
    "kernels of swapped arguments": (
        lambda: watch.kernels(APPLY, X, HELD),
        f"watch.kernels: called with (method, {type(X).__name__}, dict), expected a linen model's "
        "apply, its variables and a batch; write watch.kernels(model.apply, variables, x).",
    ),
    "kernels of an nnx model alone": (
        lambda: watch.kernels(nnx.BatchNorm(5, rngs=nnx.Rngs(0))),
        "watch.kernels: called with (BatchNorm), expected a model and a batch; write "
        "watch.kernels(model, x).",
    ),
    "a list of kernels": (
        lambda: watch.records(MOMENTS, HELD, {}, kernels=["dense/kernel"]),
        f"watch.records: called with list, {KERNELS}",
    ),
    "a kernel that is no path": (
        lambda: watch.records(MOMENTS, HELD, {}, kernels={"": 3}),
        f"watch.records: called with dict of ['int'], {KERNELS}",
    ),
    "channels of all layers": (
        lambda: watch.channels(watch.records(MOMENTS, HELD)),
        "watch.channels: called with (dict), expected the Record of one layer; write "
        "watch.channels(records[path]).",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_bad_calls_are_told_what_to_write(what):
    call, expected = WRONG[what]
    assert message(TypeError, call) == expected


@pytest.mark.parametrize("own", [False, True])  # a module of the model is called params
def test_gradients_of_linens_variables_are_those_of_the_parameters(own):
    seen = {"params/bn" if own else "bn": jaxbn.moments(X)}
    scale, state = {"scale": jnp.full(5, 2.0)}, {"mean": jnp.zeros(5), "var": jnp.ones(5)}
    variables = {"params": {"bn": scale}, "batch_stats": {"bn": state}}
    if own:
        variables = {name: {"params": of} for name, of in variables.items()}
    for grads in [variables["params"]] + [variables] * (not own):
        (record,) = watch.records(seen, variables, grads).values()
        np.testing.assert_array_equal(record.grads.scale, scale["scale"])
