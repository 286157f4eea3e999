"""`update_stats=False`: y and gradients are those of training, and the statistics stay."""

import chex
import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn
from tests.support.messages import message

X = jax.random.normal(jax.random.key(0), (8, 3)) * 2 + 1
DY = jax.random.normal(jax.random.key(1), (8, 3))
OPTIONS = {
    "plain": {},
    "cumulative": {"momentum": None},
    "ghosts, relu": {"virtual_batch_size": 4, "activation": nn.relu},
    "pooled": {"axis_name": "d"},
}


def linen_layer(**options):
    """`f(x, **keywords)` gives y and the statistics; and those that it starts from."""
    layer = jaxbn.linen.BatchNorm(**options)
    variables = layer.init(jax.random.key(0), X, False)

    def f(x, use_running_average=False, **keywords):
        y, updates = layer.apply(
            variables, x, use_running_average, mutable=["batch_stats"], **keywords
        )
        return y, updates["batch_stats"]

    return f, variables["batch_stats"]


def nnx_layer(**options):
    graph, state = nnx.split(jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0), **options))

    def f(x, **keywords):
        layer = nnx.merge(graph, state, copy=True)
        y = layer(x, **keywords)
        return y, nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))

    return f, nnx.to_pure_dict(nnx.filter_state(state, nnx.BatchStat))


LAYERS = {"linen": linen_layer, "nnx": nnx_layer}


def on_two_devices(f):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    return jax.shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=(P("d"), P()))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("library", LAYERS)
def test_y_and_dx_are_those_of_training_and_the_statistics_stay(library, options):
    f, start = LAYERS[library](**OPTIONS[options])

    def run(update_stats):
        def g(x):
            return f(x, update_stats=update_stats)

        y, vjp, stats = jax.vjp(on_two_devices(g) if options == "pooled" else g, X, has_aux=True)
        return y, vjp(DY), stats

    y, dx, kept = jax.jit(run, static_argnums=0)(False)
    *trained, moved = jax.jit(run, static_argnums=0)(True)
    chex.assert_trees_all_equal((y, dx), tuple(trained))
    chex.assert_trees_all_equal(kept, start)
    assert all((a != b).any() for a, b in zip(*map(jax.tree.leaves, (moved, start)), strict=True))


def test_linens_batch_stats_need_not_be_mutable():
    layer = jaxbn.linen.BatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), X, update_stats=False)
    y = layer.apply(variables, X, update_stats=False)
    np.testing.assert_array_equal(y, layer.apply(variables, X, mutable=["batch_stats"])[0])


@pytest.mark.parametrize("library", LAYERS)
def test_in_eval_mode_it_changes_nothing(library):
    f, start = LAYERS[library]()
    runs = [f(X, use_running_average=True, update_stats=v) for v in (True, np.bool_(False))]
    chex.assert_trees_all_equal(*runs)
    chex.assert_trees_all_equal(runs[0][1], start)


@pytest.mark.parametrize("library", LAYERS)
@pytest.mark.parametrize("wrong", ["None", "0", "JitTracer(bool[])"])
def test_what_is_no_bool_is_refused(library, wrong):
    f, _ = LAYERS[library]()

    def call(v):
        return f(X, update_stats=v)

    given = {"None": (call, None), "0": (call, 0)}.get(wrong, (jax.jit(call), True))
    assert message(TypeError, *given) == (
        f"BatchNorm: update_stats={wrong}, expected True or False, known when tracing. A traced "
        f"flag can choose afterwards: jax.tree.map(lambda old, new: jnp.where(flag, new, old), "
        f"old_stats, new_stats)."
    )


class Linen(nn.Module):
    """A discriminator, which learns the statistics of its first batch alone."""

    @nn.compact
    def __call__(self, real, fake, train=False):
        norm = jaxbn.linen.BatchNorm(use_running_average=not train, name="norm")
        return norm(real), norm(fake, update_stats=False)


class Nnx(nnx.Module):
    def __init__(self):
        self.norm = jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))

    def __call__(self, real, fake):
        return self.norm(real), self.norm(fake, update_stats=False)


@pytest.mark.parametrize("library", LAYERS)
def test_recalibration_takes_what_the_layer_learns_from(library):
    """The other calls normalize by their batch there, as in training."""
    if library == "linen":
        model = Linen()
        variables = model.init(jax.random.key(0), X, X)

        def apply(variables, batch, **keywords):
            return model.apply(variables, *batch, **keywords)

        new = jaxbn.recalibrate(apply, variables, [(X, X + 100)])
        mean, var = (new["batch_stats"]["norm"][name] for name in ("mean", "var"))
    else:
        model = jaxbn.recalibrate(lambda model, batch: model(*batch), Nnx(), [(X, X + 100)])
        mean, var = model.norm.mean[...], model.norm.var[...]
    np.testing.assert_allclose(mean, X.mean(0), rtol=1e-6)
    np.testing.assert_allclose(var, X.var(0), rtol=1e-5)


@pytest.mark.parametrize("tool", ["freeze", "swap", "hooks"])
@pytest.mark.parametrize("library", LAYERS)
def test_tools_take_the_keyword(library, tool):
    """Both calls give one y, whoever runs the layer."""
    if library == "linen":
        model = Linen()
        variables = model.init(jax.random.key(0), X, X)
        apply = model.apply
        if tool == "freeze":
            apply = jaxbn.freeze(apply, variables, allow_untrained=True)
        if tool == "swap":
            apply, variables, _ = jaxbn.swap(apply, variables, "layer")
        if tool == "hooks":
            apply = jaxbn.calls.hooked_apply(apply)
        out = apply(variables, X, X)
        real, fake = out[0] if tool == "hooks" else out
    else:
        model = Nnx()
        model.eval()
        if tool == "hooks":
            with jaxbn.calls.hooked_nnx(model):
                real, fake = model(X, X)
        else:
            keywords = {"to": "layer"} if tool == "swap" else {"allow_untrained": True}
            getattr(jaxbn, tool)(model, **keywords)
            real, fake = model(X, X)
    np.testing.assert_array_equal(real, fake)
