"""`jaxbn.linen.BatchNorm` stands wherever `flax.linen.BatchNorm` stood, and back."""

import dataclasses

import chex
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn
from tests.support.networks import ResNet

# Both compute in float32 and differ in the order of sums only: a few eps (1.2e-7) a layer,
# through five layers and their gradients.
ATOL = 2e-5

X = jax.random.normal(jax.random.key(0), (8, 8, 8, 3)) * 2 + 1
LABELS = jax.nn.one_hot(jnp.arange(8), 10)


def loss_fn(model, variables, x=X):
    def loss(params):
        logits, updates = model.apply(
            {"params": params, "batch_stats": variables["batch_stats"]}, x, mutable=["batch_stats"]
        )
        return -(LABELS * jax.nn.log_softmax(logits)).sum(), (logits, updates["batch_stats"])

    return jax.value_and_grad(loss, has_aux=True)(variables["params"])


@pytest.fixture(scope="module")
def models():
    theirs, ours = ResNet(nn.BatchNorm), ResNet(jaxbn.linen.BatchNorm)
    variables = jax.jit(ours.init)(jax.random.key(1), X)
    # A last norm of scale 0 would hide the gradients before it.
    shaken = jax.tree.map(
        lambda v: v + 0.1 * np.sin(np.arange(v.size, dtype=np.float32)).reshape(v.shape), variables
    )
    return theirs, ours, {**shaken, "fresh": variables}


def test_every_argument_of_flax_is_there_with_its_default():
    theirs = {f.name: f.default for f in dataclasses.fields(nn.BatchNorm)}
    ours = {f.name: f.default for f in dataclasses.fields(jaxbn.linen.BatchNorm)}
    assert {name: ours[name] for name in theirs} == theirs
    new = {"virtual_batch_size", "unbiased", "activation", "renorm"}
    assert set(ours) - set(theirs) == new | {"domains", "affine_per_domain", "classes"}
    undocumented = [name for name in ours if f" {name}: " not in jaxbn.linen.BatchNorm.__doc__]
    assert undocumented == ["parent", "name"]  # every module of Flax has these


def test_init_gives_the_same_variables_bit_for_bit(models):
    theirs, _, variables = models
    chex.assert_trees_all_equal(jax.jit(theirs.init)(jax.random.key(1), X), variables["fresh"])


def test_random_initializers_draw_from_the_same_keys():
    options = {"scale_init": nn.initializers.normal(), "bias_init": nn.initializers.normal()}
    theirs = nn.BatchNorm(use_running_average=False, **options).init(jax.random.key(1), X)
    ours = jaxbn.linen.BatchNorm(use_running_average=False, **options).init(jax.random.key(1), X)
    chex.assert_trees_all_equal(theirs, ours)


def test_outputs_gradients_and_statistics_agree(models):
    theirs, ours, variables = models
    chex.assert_trees_all_close(
        jax.jit(lambda v: loss_fn(ours, v))(variables),
        jax.jit(lambda v: loss_fn(theirs, v))(variables),
        atol=ATOL,
        rtol=ATOL,
    )


def test_three_steps_with_either_norm_end_in_the_same_place(models):
    theirs, ours, start = models

    def train(model):
        @jax.jit
        def step(v):
            (_, (_, stats)), grads = loss_fn(model, v)
            params = jax.tree.map(lambda p, g: p - 0.01 * g, v["params"], grads)
            return {"params": params, "batch_stats": stats}

        v = start
        for _ in range(3):
            v = step(v)
        return v

    chex.assert_trees_all_close(train(ours), train(theirs), atol=10 * ATOL, rtol=10 * ATOL)


@pytest.mark.parametrize("direction", ["from Flax", "to Flax"])
def test_checkpoints_load_in_either_direction(models, direction, tmp_path):
    theirs, ours, variables = models
    source, target = (theirs, ours) if direction == "from Flax" else (ours, theirs)
    (_, (_, stats)), _ = jax.jit(lambda v: loss_fn(source, v))(variables)
    saved = {"params": variables["params"], "batch_stats": stats}

    shapes = jax.eval_shape(target.init, jax.random.key(9), X)
    empty = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    msgpack = flax.serialization.from_bytes(empty, flax.serialization.to_bytes(saved))
    chex.assert_trees_all_equal(msgpack, saved)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "checkpoint", empty)
    chex.assert_trees_all_equal(restored, saved)

    chex.assert_trees_all_close(
        jax.jit(lambda v: target.apply(v, X, train=False))(restored),
        jax.jit(lambda v: source.apply(v, X, train=False))(saved),
        atol=ATOL,
        rtol=ATOL,
    )


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("x_dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("param_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("train", [True, False])
def test_output_dtype_rule_is_flax_s(dtype, x_dtype, param_dtype, train):
    def dtypes(bn):
        layer = bn(use_running_average=not train, dtype=dtype, param_dtype=param_dtype)
        shapes = jax.eval_shape(layer.init_with_output, jax.random.key(0), X.astype(x_dtype))
        return jax.tree.map(lambda s: s.dtype, shapes)

    with jax.numpy_dtype_promotion("standard"):  # Flax needs it
        theirs = dtypes(nn.BatchNorm)
    assert dtypes(jaxbn.linen.BatchNorm) == theirs


OPTIONS = {
    "channels first": {"axis": 1},
    "two feature axes": {"axis": (1, -1)},
    "neither scale nor bias": {"use_scale": False, "use_bias": False},
    "bias alone": {"use_scale": False},
    "slow variance": {"use_fast_variance": False},
    "epsilon and momentum": {"epsilon": 0.1, "momentum": 0.5},
    "low-precision statistics": {"force_float32_reductions": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_every_option_means_what_it_means_in_flax(options, masked):
    mask = (jnp.arange(8) < 5).reshape(8, 1, 1, 1) if masked else None

    def run(bn):
        layer = bn(**options)
        variables = layer.init(jax.random.key(0), X, False)
        y, updates = layer.apply(variables, X, False, mask=mask, mutable=["batch_stats"])
        return variables, y, updates, layer.apply({**variables, **updates}, X, True)

    with jax.numpy_rank_promotion("allow"):  # Flax needs it for several feature axes
        theirs = run(nn.BatchNorm)
    chex.assert_trees_all_close(run(jaxbn.linen.BatchNorm), theirs, atol=ATOL, rtol=ATOL)


def test_eval_may_be_chosen_in_the_call_and_leaves_the_statistics():
    layer = jaxbn.linen.BatchNorm()
    variables = layer.init(jax.random.key(0), X, use_running_average=True)
    y, updates = layer.apply(variables, X, use_running_average=True, mutable=["batch_stats"])
    chex.assert_trees_all_equal(updates["batch_stats"], variables["batch_stats"])
    # Fresh statistics are mean 0 and var 1.
    np.testing.assert_allclose(y, X / np.sqrt(1 + 1e-5), rtol=1e-6)


def test_init_takes_one_row_and_an_axis_that_is_not_bound_yet():
    layer = jaxbn.linen.BatchNorm(
        use_running_average=False,
        axis_name="devices",
        axis_index_groups=[[0, 1]],
        virtual_batch_size=2,
    )
    y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((1, 3)))
    assert jax.tree.map(jnp.shape, variables["batch_stats"]) == {"mean": (3,), "var": (3,)}
    np.testing.assert_array_equal(y, 0)


def test_axis_name_pools_uneven_shards_under_shard_map():
    layer = jaxbn.linen.BatchNorm(use_running_average=False, axis_name="d")
    variables = layer.init(jax.random.key(0), X)
    mask = (jnp.arange(8) < 5).reshape(8, 1, 1, 1)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))

    def step(x, mask):
        return layer.apply(variables, x, mask=mask, mutable=["batch_stats"])

    sharded = jax.shard_map(step, mesh=mesh, in_specs=(P("d"), P("d")), out_specs=(P("d"), P()))
    alone = jaxbn.linen.BatchNorm(use_running_average=False)
    chex.assert_trees_all_close(
        jax.jit(sharded)(X, mask),
        alone.apply(variables, X, mask=mask, mutable=["batch_stats"]),
        atol=1e-5,
        rtol=1e-5,
    )


def test_count_is_stored_for_the_cumulative_average_and_nowhere_else():
    plain = jaxbn.linen.BatchNorm(use_running_average=False).init(jax.random.key(0), X)
    assert set(plain["batch_stats"]) == {"mean", "var"}
    layer = jaxbn.linen.BatchNorm(use_running_average=False, momentum=None)
    variables = layer.init(jax.random.key(0), X)
    for k in range(2):
        _, variables = layer.apply(
            {"params": {"scale": jnp.ones(3), "bias": jnp.zeros(3)}, **variables},
            X + k,
            mutable=["batch_stats"],
        )
    assert int(variables["batch_stats"]["count"]) == 2
    np.testing.assert_allclose(variables["batch_stats"]["mean"], X.mean((0, 1, 2)) + 0.5, rtol=1e-5)


@pytest.mark.parametrize("lift", ["remat", "vmap", "scan"])
def test_lifted_transforms_update_the_statistics_once_a_layer(lift):
    class Layer(nn.Module):
        norm: type

        @nn.compact
        def __call__(self, x, _):
            return self.norm(use_running_average=False)(x), None

    axes = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}

    def run(norm):
        match lift:
            case "remat":
                layer, x = nn.remat(Layer)(norm), X
            case "vmap":
                layer, x = (
                    nn.vmap(Layer, in_axes=(0, None), out_axes=0, **axes)(norm),
                    jnp.stack([X, X + 1]),
                )
            case "scan":
                layer, x = nn.scan(Layer, length=3, **axes)(norm), X
        variables = layer.init(jax.random.key(0), x, None)

        def loss(params):
            (y, _), updates = layer.apply(
                {**variables, "params": params}, x, None, mutable=["batch_stats"]
            )
            return (y * jnp.sin(jnp.arange(y.size).reshape(y.shape))).sum(), updates

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])

    chex.assert_trees_all_close(run(jaxbn.linen.BatchNorm), run(nn.BatchNorm), atol=1e-3, rtol=1e-4)


def test_bfloat16_keeps_x_alone_for_backward():
    layer = jaxbn.linen.BatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), X)
    x = X.astype(jnp.bfloat16)

    def f(params, x):
        return layer.apply({**variables, "params": params}, x, mutable=["batch_stats"])[0]

    y, backward = jax.vjp(f, variables["params"], x)
    assert y.dtype == jnp.float32  # Flax's rule: parameters are float32
    kept = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(backward) if leaf.size >= x.size]
    assert kept == [(x.shape, jnp.bfloat16)]


def test_statistics_stored_narrow_become_float32_in_training_alone():
    layer = jaxbn.linen.BatchNorm()
    variables = layer.init(jax.random.key(0), X, use_running_average=True)
    narrow = {**variables, "batch_stats": jax.tree.map(jnp.float16, variables["batch_stats"])}
    x = 300 * X  # whose variance is beyond float16
    mutable = {"mutable": ["batch_stats"]}
    _, after = layer.apply(narrow, x, use_running_average=True, **mutable)
    assert {v.dtype for v in jax.tree.leaves(after)} == {jnp.dtype("float16")}
    got, want = (layer.apply(v, x, False, **mutable)[1] for v in (narrow, variables))
    chex.assert_trees_all_equal(got, want)
    assert {v.dtype for v in jax.tree.leaves(got)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("param_dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_statistics_begin_in_float32_or_wider(param_dtype):
    with jax.enable_x64(True):
        layer = jaxbn.linen.BatchNorm(force_float32_reductions=False, param_dtype=param_dtype)
        variables = layer.init(jax.random.key(0), X, use_running_average=True)
    wide = jnp.float64 if param_dtype == jnp.float64 else jnp.float32
    assert {v.dtype for v in jax.tree.leaves(variables["batch_stats"])} == {jnp.dtype(wide)}
    assert {v.dtype for v in jax.tree.leaves(variables["params"])} == {jnp.dtype(param_dtype)}
