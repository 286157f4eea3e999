"""Trees of models as people have them: arrays in boxes, odd names, and through pickle."""

import functools
import pickle

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
from jaxbn import calls, convert, health, layers, watch
from jaxbn._adapt.freeze import frozen_class
from jaxbn._inspection import nnx_classes
from tests.support.networks import NnxNet

X = np.random.default_rng(0).normal(1, 2, (8, 4)).astype(np.float32)


def net(norm, box=lambda init, names: init, train=True):
    ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
    boxed = {"scale_init": box(ones, ("model",)), "bias_init": box(zeros, ("model",))}
    return nn.Sequential([nn.Dense(16), norm(use_running_average=not train, **boxed)])


@functools.cache
def trained(norm, box):
    """A net's apply and variables, boxed everywhere, and the same without boxes."""
    model = net(norm, box)
    variables = model.init(jax.random.key(0), X)
    _, updates = model.apply(variables, X, mutable=["batch_stats"])
    stats = jax.tree.map(lambda v: nn.Partitioned(v, ("model",)), updates["batch_stats"])
    return model.apply, {**variables, "batch_stats": stats}, nn.unbox({**variables, **updates})


# Boxes


def watched(apply, v):
    def loss(params):
        (y, _), seen = watch.linen(apply)({**v, "params": params}, X, mutable=["batch_stats"])
        return (y**3).sum(), seen

    grads, seen = jax.grad(loss, has_aux=True)(v["params"])
    return watch.metrics(watch.records(seen, v, grads))


def stacked(v):
    return jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), v["batch_stats"])


def swapped(apply, v):
    new = jaxbn.swap(apply, v)
    return new.model(new.variables, X), new.variables, new.report


TOOLS = {
    "train": lambda apply, v: apply(v, X, mutable=["batch_stats"]),
    "find": lambda apply, v: layers.find(v),
    "check": lambda apply, v: health.check(v, calls.hooked_apply(apply)(v, X)[1]),
    "summary": lambda apply, v: health.summary(v),
    "gap": lambda apply, v: health.gap(apply, v, X)[:3],
    "drift": lambda apply, v: health.drift(v, [health.incoming(apply)(v, X)[1]]).layers,
    "watch": watched,
    "recalibrate": lambda apply, v: jaxbn.recalibrate(apply, v, [X]),
    "reset": lambda apply, v: jaxbn.reset(v),
    "freeze": lambda apply, v: jaxbn.freeze(apply, v)(v, X),
    "swap": swapped,
    "labels": lambda apply, v: jaxbn.labels(v["params"]),
    "decay_mask": lambda apply, v: jaxbn.decay_mask(v["params"]),
    "sync_state": lambda apply, v: jax.vmap(
        lambda stats: jaxbn.sync_state(stats, "d"), axis_name="d"
    )(stacked(v)),
    "merge_updates": lambda apply, v: jaxbn.merge_updates(stacked(v)),
    "assert_replicated": lambda apply, v: jaxbn.assert_replicated(v),
    "to_torch": lambda apply, v: convert.to_torch(v)[0],
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    ("norm", "box"),
    [
        (nn.BatchNorm, nn.with_partitioning),
        (jaxbn.linen.BatchNorm, nn.with_logical_partitioning),
    ],
    ids=["flax-partitioned", "jaxbn-logical"],
)
def test_boxes_are_looked_through(norm, box, tool):
    apply, boxed, plain = trained(norm, box)
    out, expected = TOOLS[tool](apply, boxed), TOOLS[tool](apply, plain)
    if tool in ("train", "recalibrate", "reset", "swap", "labels", "decay_mask"):
        as_boxed = jax.tree.structure(out, is_leaf=lambda v: isinstance(v, nn.Partitioned))
        assert as_boxed == jax.tree.structure(expected)  # a box for a box
    chex.assert_trees_all_equal(nn.unbox(out), expected)


@pytest.mark.parametrize("norm", [nnx.BatchNorm, jaxbn.nnx.BatchNorm])
def test_metadata_of_nnx_variables_are_looked_through(norm):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    options = {"rngs": nnx.Rngs(0), "bias_metadata": {"out_sharding": ("model",)}}
    init = nnx.with_partitioning(nnx.initializers.ones_init(), ("model",))
    with jax.set_mesh(mesh):
        model = norm(4, scale_init=init, **options)
        model(X)
    plain = norm(4, rngs=nnx.Rngs(0))
    plain(X)
    assert health.summary(model) == health.summary(plain)
    assert health.summary(nnx.state(model)) == health.summary(plain)
    gap, expected = health.gap(model, X), health.gap(plain, X)
    np.testing.assert_allclose(gap.layers[0].own, expected.layers[0].own, rtol=1e-5)
    assert set(jax.tree.leaves(jaxbn.decay_mask(nnx.state(model, nnx.Param)))) == {False}
    # In linen's variables of an nnx layer, boxes of a third kind.
    linen = nnx.bridge.ToLinen(norm, (4,), {"scale_init": init})
    with jax.set_mesh(mesh):
        variables = linen.init(jax.random.key(0), X)
    assert isinstance(variables["params"]["scale"], nn.meta.AxisMetadata)
    (row,) = health.summary(variables)
    assert (row.figures["scale_min"], row.figures["scale_max"]) == (1, 1)


# Names


class Head(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        return nn.Dense(4)(jaxbn.linen.BatchNorm(use_running_average=not train, name="bn")(x))


class Vae(nn.Module):
    """Heads called mean and var, with a norm in each."""

    @nn.compact
    def __call__(self, x, train=True):
        x = jaxbn.linen.BatchNorm(use_running_average=not train, name="trunk")(x)
        return Head(name="mean")(x, train), Head(name="var")(x, train)


def heads(kind):
    """Statistics of a trunk and two heads, by which the paths are trunk, mean…, var…"""
    stats = {"mean": jnp.arange(4.0), "var": jnp.ones(4)}
    if kind == "linen":
        return jax.tree.map(lambda v: v + 1, Vae().init(jax.random.key(0), X)["batch_stats"])
    if kind == "functional":
        state = jaxbn.State(**stats, count=None)
        return {"trunk": state, "mean": state, "var": [state]}
    model = nnx.Dict(
        trunk=nnx.BatchNorm(4, rngs=nnx.Rngs(0)),
        mean=nnx.BatchNorm(4, rngs=nnx.Rngs(0)),
        var=nnx.List([nnx.BatchNorm(4, rngs=nnx.Rngs(0))]),
    )
    return nnx.state(model, nnx.BatchStat)


@pytest.mark.parametrize("kind", ["linen", "functional", "nnx"])
def test_modules_may_be_called_mean_and_var(kind):
    tree = heads(kind)
    found = layers.find(tree)
    assert sorted(path.partition("/")[0] for path in found) == ["mean", "trunk", "var"]
    assert not layers.holds_statistics(tree)
    two = jax.tree.map(lambda leaf: jnp.stack([leaf, 3 * leaf]), tree)
    synced = jax.vmap(lambda s: jaxbn.sync_state(s, "d"), axis_name="d")(two)
    merged = jaxbn.merge_updates(two, 0.5)
    assert jax.tree.structure(synced) == jax.tree.structure(merged) == jax.tree.structure(tree)
    for path, layer in layers.find(merged).items():
        first = found[path].state
        mean, var = 2 * first.mean, 2 * first.var
        np.testing.assert_allclose(layer.state.mean, mean, rtol=1e-6)
        np.testing.assert_allclose(layer.state.var, var + first.mean**2 / 0.5, rtol=1e-6)
        state = layers.find(synced)[path].state
        np.testing.assert_allclose(state.mean[0], mean, rtol=1e-6)
        np.testing.assert_allclose(state.var[0], var + first.mean**2, rtol=1e-6)
    new = layers.replace(
        tree, {path: jaxbn.State(v.mean, v.var + 1, None) for path, (_, v) in found.items()}
    )
    for path, layer in layers.find(new).items():
        np.testing.assert_array_equal(layer.state.var, found[path].state.var + 1)


# Pickle


def reloaded(thing):
    """As another process loads it, which has made no classes yet."""
    text = pickle.dumps(thing)
    nnx_classes.subclass.cache_clear()
    return pickle.loads(text)


@pytest.mark.parametrize("norm", [nnx.BatchNorm, jaxbn.nnx.BatchNorm])
@pytest.mark.parametrize("change", ["freeze", "swap"])
def test_frozen_and_swapped_nnx_models_pickle(norm, change):
    x = np.random.default_rng(1).normal(size=(2, 4, 4, 3)).astype(np.float32)
    model = NnxNet(norm, rngs=nnx.Rngs(0))
    if change == "freeze":
        jaxbn.freeze(model, where="norm1", allow_untrained=True)
    else:
        jaxbn.swap(model, where="norm1")
    expected = model(x)
    loaded = reloaded(model)
    assert type(loaded.norm1).__name__ == type(model.norm1).__name__
    np.testing.assert_array_equal(loaded(x), expected)
    graph, state = reloaded(nnx.split(model))
    np.testing.assert_array_equal(nnx.merge(graph, state)(x), expected)
    if change == "freeze":
        assert type(jaxbn.unfreeze(loaded, "norm1").norm1) is norm


def test_a_subclass_of_a_frozen_class_is_itself_to_pickle():
    assert pickle.loads(pickle.dumps(Subclass)) is Subclass


class Subclass(frozen_class(jaxbn.nnx.BatchNorm)):
    pass


@functools.cache
def vae():
    """Whose apply pickles, as that of any net does but for initializers that are lambdas."""
    variables = jax.jit(Vae().init)(jax.random.key(0), X)
    stats = jax.tree.map(lambda v: v + 1, variables["batch_stats"])
    return Vae().apply, {**variables, "batch_stats": stats}


@pytest.mark.parametrize("change", ["freeze", "swap", "both"])
def test_frozen_and_swapped_linen_applies_pickle(change):
    apply, variables = vae()
    new = apply if change == "swap" else jaxbn.freeze(apply, variables, "trunk")
    if change != "freeze":
        new, variables, _ = jaxbn.swap(new, variables, groups=2, where="*/bn")
    loaded = reloaded(new)
    out, expected, plain = (
        f(v, X, mutable=["batch_stats"]) for f, v in ((loaded, variables), (new, variables), vae())
    )
    chex.assert_trees_all_equal(out, expected)
    assert (out[0][0] != plain[0][0]).any()


def test_a_folded_function_pickles_where_its_own_does():
    apply, variables = vae()
    fn = functools.partial(apply, variables, train=False)
    folded, report = jaxbn.fold(fn, X)
    assert len(report.folded) == 2
    loaded = reloaded(folded)
    chex.assert_trees_all_equal(loaded(X), folded(X))
    assert "rsqrt" not in str(jax.make_jaxpr(loaded)(X))
    assert loaded.lower(X[:1]).as_text() == folded.lower(X[:1]).as_text()
    assert jax.export.export(loaded)(X).out_avals == loaded.trace(X).out_avals
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(jaxbn.fold(lambda x: fn(x), X)[0])
