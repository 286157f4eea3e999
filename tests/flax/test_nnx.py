"""`jaxbn.nnx.BatchNorm` stands wherever `flax.nnx.BatchNorm` stood, under every transform."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxbn
from tests.support.networks import NnxNet

# As in test_linen: float32 sums in another order, through a few layers.
ATOL = 2e-5

X = jax.random.normal(jax.random.key(0), (8, 6, 6, 3)) * 2 + 1
LABELS = jax.nn.one_hot(jnp.arange(8), 10)
NORMS = {"flax": nnx.BatchNorm, "jaxbn": jaxbn.nnx.BatchNorm}


def loss_fn(model, x):
    return -(LABELS * jax.nn.log_softmax(model(x))).sum()


def both(run):
    """`run(norm)` must give the same for Flax's norm and for ours."""
    chex.assert_trees_all_close(
        run(jaxbn.nnx.BatchNorm), run(nnx.BatchNorm), atol=ATOL, rtol=10 * ATOL
    )


def pure(module, *filters):
    return nnx.to_pure_dict(nnx.state(module, *filters))


def test_the_signature_is_flaxs_and_seven_arguments_more():
    """Also an argument that a later Flax has."""
    theirs, ours = (
        {name: (p.kind, p.default) for name, p in signature.parameters.items()}
        for signature in map(inspect.signature, (nnx.BatchNorm.__init__, NORMS["jaxbn"].__init__))
    )
    new = {"virtual_batch_size", "unbiased", "activation", "renorm"}
    assert set(ours) - set(theirs) == new | {"domains", "affine_per_domain", "classes"}
    assert {name: ours.get(name) for name in theirs} == theirs
    assert [name for name in ours if f" {name}: " not in NORMS["jaxbn"].__doc__] == ["self"]


def test_every_argument_of_flax_is_accepted_with_its_default():
    theirs = inspect.signature(nnx.BatchNorm.__init__).parameters
    layer, reference = jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    for name in set(theirs) - {"self", "rngs", "bias_init", "scale_init"}:
        if hasattr(reference, name):
            assert getattr(layer, name) == getattr(reference, name), name
    given = {
        "use_running_average": True, "axis": 1, "momentum": 0.5, "epsilon": 0.1,
        "dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "use_bias": False, "use_scale": False,
        "bias_init": nnx.initializers.ones_init(), "scale_init": nnx.initializers.zeros_init(),
        "axis_name": "d", "axis_index_groups": [[0], [1]], "use_fast_variance": False,
        "promote_dtype": lambda arrays, dtype: arrays, "bias_metadata": {}, "scale_metadata": {},
    }  # fmt: skip
    assert set(given) == set(theirs) - {"self", "num_features", "rngs"}
    jaxbn.nnx.BatchNorm(3, **given, rngs=nnx.Rngs(0))


def test_variables_kinds_and_random_keys_are_flax_s():
    def state(norm):
        layer = norm(3, scale_init=nnx.initializers.normal(), rngs=nnx.Rngs(5))
        return pure(layer, nnx.Param), pure(layer, nnx.BatchStat)

    chex.assert_trees_all_equal(state(jaxbn.nnx.BatchNorm), state(nnx.BatchNorm))


def test_training_steps_agree():
    def run(norm):
        model = NnxNet(norm, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.sgd(0.01), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, x):
            loss, grads = nnx.value_and_grad(loss_fn)(model, x)
            optimizer.update(model, grads)
            return loss

        losses = [step(model, optimizer, X) for _ in range(3)]
        model.eval()
        return losses, pure(model), model(X)

    both(run)


@pytest.mark.parametrize("direction", ["from Flax", "to Flax"])
def test_state_moves_over_in_either_direction(direction):
    norms = list(NORMS.values())
    source, target = (NnxNet(norm, rngs=nnx.Rngs(k)) for k, norm in enumerate(norms))
    if direction == "to Flax":
        source, target = target, source
    source(X)
    nnx.update(target, nnx.state(source))
    source.eval()
    target.eval()
    np.testing.assert_allclose(source(X), target(X), atol=ATOL, rtol=ATOL)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("x_dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("param_dtype", [jnp.bfloat16, jnp.float32])
def test_output_dtype_rule_is_flax_s(dtype, x_dtype, param_dtype):
    def run(norm):
        def forward(x):
            return norm(3, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))(x)

        return jax.eval_shape(forward, X.astype(x_dtype)).dtype

    with jax.numpy_dtype_promotion("standard"):  # Flax needs it
        theirs = run(nnx.BatchNorm)
    assert run(jaxbn.nnx.BatchNorm) == theirs


def test_bfloat16_eval_with_a_large_running_mean_rounds_once():
    layer = jaxbn.nnx.BatchNorm(1, dtype=jnp.bfloat16, use_running_average=True, rngs=nnx.Rngs(0))
    layer.mean[...] = jnp.array([100.3])
    x = jnp.linspace(98, 103, 64, dtype=jnp.bfloat16)[:, None]
    exact = (np.asarray(x, np.float64) - np.float64(np.float32(100.3))) / np.sqrt(1 + 1e-5)
    # y is the exact result rounded once to bfloat16, whose eps is 2**-8.
    np.testing.assert_allclose(np.asarray(layer(x), np.float64), exact, rtol=2.0**-8, atol=1e-6)


def test_a_promotion_of_the_user_s_own_is_obeyed():
    def low(arrays, dtype):
        return tuple(None if a is None else a.astype(jnp.bfloat16) for a in arrays)

    assert jaxbn.nnx.BatchNorm(3, promote_dtype=low, rngs=nnx.Rngs(0))(X).dtype == jnp.bfloat16


def test_train_eval_and_the_call_choose_the_mode():
    layer = jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    layer.eval()
    before = pure(layer, nnx.BatchStat)
    layer(X)
    chex.assert_trees_all_equal(pure(layer, nnx.BatchStat), before)
    layer(X, use_running_average=False)
    assert not np.allclose(layer.mean[...], before["mean"])
    layer = jaxbn.nnx.BatchNorm(3, use_running_average=None, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError) as error:
        layer(X)
    assert str(error.value) == (
        "BatchNorm: use_running_average was given neither in the call nor in the constructor; "
        "expected True or False: model.train(), model.eval(), or bn(x, use_running_average=False)."
    )


def test_count_is_stored_for_the_cumulative_average_and_nowhere_else():
    assert set(pure(jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.BatchStat)) == {"mean", "var"}
    layer = jaxbn.nnx.BatchNorm(3, momentum=None, rngs=nnx.Rngs(0))
    layer(X)
    layer(X + 1)
    assert int(layer.count[...]) == 2
    np.testing.assert_allclose(layer.mean[...], X.mean((0, 1, 2)) + 0.5, rtol=1e-5)


# Every transform below: train mode, so that the state must find its way out.


def test_jit_and_grad():
    def run(norm):
        model = NnxNet(norm, rngs=nnx.Rngs(0))
        grads = nnx.jit(nnx.grad(loss_fn))(model, X)
        return nnx.to_pure_dict(grads), pure(model)

    both(run)


def test_plain_jax_jit_and_grad_by_split_and_merge():
    def run(norm):
        graphdef, params, rest = nnx.split(NnxNet(norm, rngs=nnx.Rngs(0)), nnx.Param, ...)

        @jax.jit
        def step(params, rest):
            def loss(params):
                model = nnx.merge(graphdef, params, rest, copy=True)
                return loss_fn(model, X), nnx.state(model, nnx.BatchStat)

            return jax.grad(loss, has_aux=True)(params)

        return jax.tree.map(jnp.asarray, nnx.to_pure_dict(nnx.merge_state(*step(params, rest))))

    both(run)


def test_vmap_over_models():
    def run(norm):
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(key):
            return norm(3, scale_init=nnx.initializers.normal(), rngs=nnx.Rngs(key))

        models = make(jax.random.split(jax.random.key(0), 2))
        y = nnx.vmap(lambda model, x: model(x), in_axes=(0, 0))(models, jnp.stack([X, X + 1]))
        return y, pure(models)

    both(run)


def test_scan_over_layers():
    def run(norm):
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(key):
            return norm(3, rngs=nnx.Rngs(key))

        layers = make(jax.random.split(jax.random.key(0), 4))

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, layer):
            return layer(x) * 2 + 1

        return forward(X, layers), pure(layers)

    both(run)


def test_remat_updates_the_statistics_once():
    def run(norm):
        model = NnxNet(norm, rngs=nnx.Rngs(0))
        remat = nnx.remat(lambda model, x: model(x))
        grads = nnx.grad(lambda model: loss_fn(lambda x: remat(model, x), X))(model)
        return nnx.to_pure_dict(grads), pure(model)

    both(run)


def test_cond_updates_in_the_branch_taken_alone():
    def run(norm, flag):
        layer = norm(3, rngs=nnx.Rngs(0))

        def train(layer, x):
            return layer(x, use_running_average=False)

        def evaluate(layer, x):
            return layer(x, use_running_average=True)

        y = nnx.cond(flag, train, evaluate, layer, X)
        return y, pure(layer)

    both(lambda norm: run(norm, jnp.bool(True)))
    both(lambda norm: run(norm, jnp.bool(False)))


def test_eval_shape_and_clone():
    abstract = nnx.eval_shape(lambda: jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    assert jax.tree.map(lambda s: s.shape, pure(abstract)) == dict.fromkeys(
        ["bias", "mean", "scale", "var"], (3,)
    )
    layer = jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    copy = nnx.clone(layer)
    copy(X)
    np.testing.assert_array_equal(layer.mean[...], 0)
    assert not np.allclose(copy.mean[...], 0)


@pytest.mark.optimized
@pytest.mark.parametrize("jit", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_statistics_stored_narrow_become_float32_in_training_alone(jit):
    layer = jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    want = jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    for v in (layer.mean, layer.var):
        v.set_value(v.get_value().astype(jnp.float16))
    x = 300 * X  # whose variance is beyond float16
    jit(lambda layer, x: layer(x, use_running_average=True))(layer, x)
    assert layer.mean.dtype == layer.var.dtype == jnp.float16
    for model in (layer, want):
        jit(lambda layer, x: layer(x))(model, x)
    chex.assert_trees_all_equal(pure(layer), pure(want))
    assert layer.mean.dtype == layer.var.dtype == jnp.float32
