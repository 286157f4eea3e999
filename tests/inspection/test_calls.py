"""What is seen of a model's batch norm layers, without changing the model."""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
from jaxbn import calls, layers

X = np.random.default_rng(0).normal(3, 2, (8, 4)).astype(np.float32)
LINEN = {"flax": linen.BatchNorm, "jaxbn": jaxbn.linen.BatchNorm}
NNX = {"flax": nnx.BatchNorm, "jaxbn": jaxbn.nnx.BatchNorm}


def close(got, x):
    """Count, mean and var of a record equal those of x [rows, C], to float32's rounding."""
    np.testing.assert_allclose(got.count, len(x))
    np.testing.assert_allclose(got.mean, x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(got.var, x.var(0), rtol=1e-5)


class Block(linen.Module):
    norm: type
    train: bool = True

    @linen.compact
    def __call__(self, x, _=None):
        return linen.relu(self.norm(use_running_average=not self.train)(x)), None


class Linen(linen.Module):
    norm: type
    kind: str
    train: bool = True

    @linen.compact
    def __call__(self, x):
        block = Block
        if self.kind == "remat":
            block = linen.remat(Block)
        if self.kind == "scan":
            axes = {"params": 0, "batch_stats": 0}
            block = linen.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=2)
        return block(self.norm, self.train, name="block")(x)[0]


@pytest.mark.parametrize("kind", ["plain", "remat", "scan"])
@pytest.mark.parametrize("norm", LINEN)
@pytest.mark.parametrize("train", [True, False])
def test_linen_moments_are_those_of_the_layers_input(kind, norm, train):
    model = Linen(LINEN[norm], kind, train)
    variables = model.init(jax.random.key(0), X)
    apply = jax.jit(calls.hooked_apply(model.apply))
    y, seen = apply(variables, X)
    assert list(seen) == list(layers.find(variables)) == ["block/BatchNorm_0"]
    record = seen["block/BatchNorm_0"]
    if kind == "scan":
        assert record.mean.shape == (2, 4)
        record = jax.tree.map(lambda leaf: leaf[0], record)
    close(record, X)
    expected = model.apply(variables, X, mutable=["batch_stats"])[0]
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mutable", [False, ["batch_stats"], True, [], "batch_stats"])
def test_linen_returns_what_apply_returns(mutable):
    model = linen.Sequential(
        [linen.Dense(4), linen.BatchNorm(use_running_average=mutable is False)]
    )
    variables = model.init(jax.random.key(0), X)
    if mutable == []:
        model = linen.Sequential([linen.Dense(4), linen.BatchNorm(use_running_average=True)])
    got, seen = calls.hooked_apply(model.apply)(variables, X, mutable=mutable)
    expected = model.apply(variables, X, mutable=mutable)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    assert list(seen) == ["layers_1"]


@pytest.mark.parametrize(
    ("apply", "what"),
    [
        (lambda v, x, **_: LAYER.apply(v, x), "apply runs the model with batch_stats immutable"),
        (lambda v, x, **kwargs: LAYER.apply(v, x, **kwargs) and None, "apply returned None"),
        (lambda v, x, **kwargs: LAYER.apply(v, x, **kwargs)[0], "apply returned ArrayImpl"),
    ],
    ids=["mutable dropped", "nothing", "y alone"],
)
def test_an_apply_that_keeps_the_updates_is_refused(apply, what):
    """Two rows of y alone could be unpacked as a pair."""
    variables = LAYER.init(jax.random.key(0), X)
    with pytest.raises(TypeError) as error:
        calls.hooked_apply(apply)(variables, X[:2])
    assert str(error.value) == (
        f"hooked_apply: {what}, expected a function that passes mutable= on to linen and returns "
        f"(y, updates); write functools.partial(net.apply, train=False), or "
        f"lambda variables, batch, **kwargs: net.apply(variables, batch[0], **kwargs)."
    )


LAYER = linen.BatchNorm(use_running_average=True)


def test_a_linen_layer_called_twice_gives_the_moments_of_both_inputs():
    class Twice(linen.Module):
        @linen.compact
        def __call__(self, x):
            norm = linen.BatchNorm(use_running_average=False)
            return norm(x), norm(2 * x)

    variables = Twice().init(jax.random.key(0), X)
    _, seen = calls.hooked_apply(Twice().apply)(variables, X)
    close(seen["BatchNorm_0"], np.concatenate([X, 2 * X]))


def other_mode(call, run):
    return run(not call.train), call.train


@pytest.mark.parametrize("in_call", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_a_hook_may_run_the_linen_layer_in_the_other_mode(in_call, train):
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            if in_call:
                return linen.BatchNorm()(x, use_running_average=not train)
            return linen.BatchNorm(use_running_average=not train)(x)

    variables = Model().init(jax.random.key(0), X)
    y, seen = calls.hooked_apply(Model().apply, other_mode)(variables, X)
    normalized = (X - X.mean(0)) / np.sqrt(X.var(0) + 1e-5)
    np.testing.assert_allclose(y, X if train else normalized, rtol=1e-4, atol=1e-5)
    assert seen == {"BatchNorm_0": train}


def paths(call, run):
    seen_paths.append(call.path)
    return run(call.train), None


seen_paths = []


@pytest.mark.parametrize("kind", ["plain", "remat", "scan"])
def test_a_call_knows_its_path(kind):
    model = Linen(linen.BatchNorm, kind)
    variables = model.init(jax.random.key(0), X)
    seen_paths.clear()
    calls.hooked_apply(model.apply, paths)(variables, X)
    assert set(seen_paths) == set(layers.find(variables))
    model = Nnx(nnx.BatchNorm, nnx.Rngs(0))
    before = jax.tree.structure(nnx.state(model)), set(vars(model.norms[0]))
    with calls.hooked_nnx(model):
        for _ in range(2):
            with calls.hooked_nnx(model, paths):
                (nnx.remat(Nnx.__call__) if kind == "remat" else Nnx.__call__)(model, X)
    assert seen_paths[-1] == "norms/0"
    assert (jax.tree.structure(nnx.state(model)), set(vars(model.norms[0]))) == before


def test_masks_reach_the_record():
    model = jaxbn.linen.BatchNorm(use_running_average=False)
    mask = (np.arange(8) < 5)[:, None]
    variables = model.init(jax.random.key(0), X)
    _, seen = calls.hooked_apply(model.apply)(variables, X, mask=mask)
    close(seen[""], X[:5])
    norm = jaxbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    with calls.hooked_nnx(norm) as seen:
        norm(X, mask=mask)
    close(seen[""], X[:5])


def test_moments_are_over_the_devices_that_the_layer_pools_over():
    model = jaxbn.linen.BatchNorm(use_running_average=False, axis_name="d")
    variables = model.init(jax.random.key(0), X)
    run = jax.vmap(calls.hooked_apply(model.apply), (None, 0), axis_name="d")
    seen = run(variables, X.reshape(4, 2, 4))[1][""]
    close(jax.tree.map(lambda leaf: leaf[3], seen), X)


class Nnx(nnx.Module):
    def __init__(self, norm, rngs):
        self.norms = nnx.List([norm(4, rngs=rngs)])

    def __call__(self, x):
        return nnx.relu(self.norms[0](x))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("norm", NNX)
def test_nnx_moments_are_those_of_the_layers_input(norm, train):
    model = Nnx(NNX[norm], nnx.Rngs(0))
    model.train() if train else model.eval()
    kind, before = type(model.norms[0]), jax.tree.structure(nnx.state(model))
    expected = nnx.clone(model)(X)
    with calls.hooked_nnx(model) as seen:
        y = model(X)
    close(seen["norms/0"], X)
    assert list(layers.find(model)) == ["norms/0"]
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
    assert type(model.norms[0]) is kind
    assert jax.tree.structure(nnx.state(model)) == before


def test_nnx_records_pass_jit_grad_and_remat():
    @nnx.jit
    def step(model, x):
        with calls.hooked_nnx(model) as seen:
            loss, grads = nnx.value_and_grad(lambda m: nnx.remat(Nnx.__call__)(m, x).sum())(model)
        return loss, grads, seen

    model = Nnx(nnx.BatchNorm, nnx.Rngs(0))
    for _ in range(2):
        _, grads, seen = step(model, X)
        close(seen["norms/0"], X)
    assert set(nnx.to_pure_dict(grads)["norms"][0]) == {"scale", "bias"}
    np.testing.assert_allclose(model.norms[0].mean[...], (1 - 0.99**2) * X.mean(0), rtol=1e-5)

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(None, 0))
    def stack(norm, rngs):
        return Nnx(norm, rngs)

    model = stack(nnx.BatchNorm, nnx.Rngs(0))
    with calls.hooked_nnx(model) as seen:
        nnx.scan(Nnx.__call__, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(model, X)
    assert seen["norms/0"].mean.shape == (3, 4)
    close(jax.tree.map(lambda leaf: leaf[0], seen["norms/0"]), X)


def test_a_hooked_nnx_step_compiles_once():
    traces = []

    @nnx.jit
    def step(model, x):
        traces.append(1)
        return model(x)

    model = Nnx(nnx.BatchNorm, nnx.Rngs(0))
    for _ in range(3):
        with calls.hooked_nnx(model):
            step(model, X)
    assert len(traces) == 1


def test_an_error_within_leaves_the_nnx_model_as_it_was():
    model = Nnx(nnx.BatchNorm, nnx.Rngs(0))
    with pytest.raises(RuntimeError), calls.hooked_nnx(model):
        raise RuntimeError
    assert type(model.norms[0]) is nnx.BatchNorm


@pytest.mark.parametrize("form", ["linen", "frozen", "nnx", "state", "functional"])
def test_what_is_replaced_is_found(form):
    new = jaxbn.State(np.full(4, 2.0), np.full(4, 3.0), None)
    if form in ("linen", "frozen"):
        model = linen.Sequential([linen.Dense(4), linen.BatchNorm(use_running_average=True)])
        tree = model.init(jax.random.key(0), X)
        tree, path = (linen.FrozenDict(tree) if form == "frozen" else tree), "layers_1"
    elif form == "functional":
        params, state = jaxbn.init(4)
        tree, path = {"params": {"a": [params]}, "batch_stats": {"a": [state]}}, "a/0"
    else:
        tree, path = Nnx(nnx.BatchNorm, nnx.Rngs(0)), "norms/0"
        if form == "state":
            tree = nnx.to_pure_dict(nnx.state(tree))
    found = layers.find(tree)
    assert list(found) == [path]
    np.testing.assert_array_equal(found[path].params.scale, np.ones(4))
    np.testing.assert_array_equal(found[path].state.var, np.ones(4))
    changed = layers.replace(tree, {path: new})
    assert type(changed) is type(tree)
    after = layers.find(changed)[path]
    np.testing.assert_array_equal(after.state.mean, np.full(4, 2.0))
    np.testing.assert_array_equal(after.state.var, np.full(4, 3.0))
    assert after.state.mean.dtype == jnp.float32
    np.testing.assert_array_equal(after.params.scale, np.ones(4))
    if form != "nnx":
        np.testing.assert_array_equal(layers.find(tree)[path].state.mean, np.zeros(4))
    with pytest.raises(KeyError) as error:
        layers.replace(tree, {"nowhere": new})
    assert error.value.args == (
        f"replace: no batch norm layer at ['nowhere']; there are ['{path}']",
    )


# Hooks around hooks


class Twice(linen.Module):
    @linen.compact
    def __call__(self, x):
        norm = linen.BatchNorm(use_running_average=True)
        return norm(x), norm(2 * x)


def largest(call, run):
    return run(call.train), jnp.abs(call.x).max()


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_each_of_two_hooks_has_its_own_records(kind):
    """Each combines its own, for a layer that is called twice."""
    if kind == "linen":
        inner = {}

        def apply(*args, **keywords):
            out, seen = calls.hooked_apply(Twice().apply, largest, jnp.maximum)(*args, **keywords)
            inner.update(seen)
            return out

        variables = Twice().init(jax.random.key(0), X)
        path, (_, outer) = "BatchNorm_0", calls.hooked_apply(apply)(variables, X)
    else:
        path, model = "", nnx.BatchNorm(4, use_running_average=True, rngs=nnx.Rngs(0))
        with (
            calls.hooked_nnx(model) as outer,
            calls.hooked_nnx(model, largest, jnp.maximum) as inner,
        ):
            model(X), model(2 * X)
        assert not any(name.startswith("jaxbn") for name in vars(model))
    np.testing.assert_allclose(inner[path], 2 * np.abs(X).max(), rtol=1e-6)
    close(outer[path], np.concatenate([X, 2 * X]))


@pytest.mark.parametrize("change", ["freeze", "swap"])
def test_tools_look_into_a_linen_model_that_was_changed(change):
    """Hooks of a change stand inside of those of the tools, and leave them their records."""
    net = linen.Sequential([linen.BatchNorm(use_running_average=False) for _ in range(2)])
    variables = net.init(jax.random.key(0), X)
    if change == "freeze":
        apply = jaxbn.freeze(net.apply, variables, "layers_0", allow_untrained=True)
        second = X
    else:
        apply, variables, _ = jaxbn.swap(net.apply, variables, "layer", "layers_0")
        second = (X - X.mean(1, keepdims=True)) / X.std(1, keepdims=True)
    seen = calls.hooked_apply(apply)(variables, X)[1]
    np.testing.assert_allclose(seen["layers_1"].mean, second.mean(0), rtol=1e-4, atol=1e-5)
    stats = jaxbn.recalibrate(apply, variables, [X], where="layers_1")["batch_stats"]["layers_1"]
    np.testing.assert_allclose(stats["var"], second.var(0), rtol=1e-4)
