"""Frozen statistics, and what the optimizer is told: to the bit, after ten steps."""

import functools
from pathlib import Path

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxbn
from jaxbn import calls, layers
from tests.support.messages import message
from tests.support.networks import TinyNnx

EXAMPLES = Path(__file__).parents[2] / "examples"
RNG = np.random.default_rng(0)
X = RNG.normal(1, 2, (8, 4)).astype(np.float32)
TARGET = RNG.normal(size=(8, 2)).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def _optax_adds_ints_to_floats():
    with jax.numpy_dtype_promotion("standard"):
        yield


class Linen(linen.Module):
    norm: type

    @linen.compact
    def __call__(self, x, train=True):
        norm = functools.partial(self.norm, use_running_average=not train, momentum=0.5)
        x = linen.relu(norm(name="stem")(linen.Dense(4, name="in")(x)))
        return linen.Dense(2, name="out")(norm(name="top")(x))


class Nnx(nnx.Module):
    def __init__(self, norm, rngs):
        self.inner = nnx.Linear(4, 4, rngs=rngs)
        self.norms = nnx.List([norm(4, momentum=0.5, rngs=rngs) for _ in range(2)])
        self.out = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x, train=True):
        x = nnx.relu(self.norms[0](self.inner(x), use_running_average=not train))
        return self.out(self.norms[1](x, not train))


LINEN = {"flax": linen.BatchNorm, "jaxbn": jaxbn.linen.BatchNorm}
NNX = {"flax": nnx.BatchNorm, "jaxbn": jaxbn.nnx.BatchNorm}


def trained(kind, norm):
    """A model whose statistics know the data, and its paths."""
    if kind == "linen":
        net = Linen(LINEN[norm])
        variables = net.init(jax.random.key(0), X)
        _, new = net.apply(variables, X, mutable=["batch_stats"])
        return net, {**variables, **new}, ["stem", "top"]
    net = Nnx(NNX[norm], nnx.Rngs(0))
    net(X)
    return net, None, ["norms/0", "norms/1"]


def leaves_of(model, variables):
    tree = variables if variables is not None else nnx.to_pure_dict(nnx.state(model))
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): np.array(v) for p, v in pairs}


def ten_steps(model, variables, apply, tx):
    """Training by tx; returns the variables of after, or None where the model has them."""
    if variables is None:
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            grads = nnx.grad(lambda m: jnp.mean((m(X) - TARGET) ** 2))(model)
            optimizer.update(model, grads)

        for _ in range(10):
            step(model, optimizer)
        return None

    @jax.jit
    def step(variables, opt_state):
        def loss(params):
            y, new = apply({**variables, "params": params}, X, mutable=["batch_stats"])
            return jnp.mean((y - TARGET) ** 2), new

        grads, new = jax.grad(loss, has_aux=True)(variables["params"])
        updates, opt_state = tx.update(grads, opt_state, variables["params"])
        return {"params": optax.apply_updates(variables["params"], updates), **new}, opt_state

    opt_state = tx.init(variables["params"])
    for _ in range(10):
        variables, opt_state = step(variables, opt_state)
    return variables


def optimizer(frozen):
    """Momentum and weight decay on all that is not frozen."""
    kinds = dict.fromkeys(("scale", "bias", "rest"), optax.adamw(1e-2, weight_decay=0.1))
    kinds |= {"scale": optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9))}
    kinds["frozen"] = optax.set_to_zero()
    return optax.multi_transform(kinds, functools.partial(jaxbn.labels, frozen=frozen))


@pytest.mark.parametrize("affine", ["trainable", "frozen"])
@pytest.mark.parametrize("some", [False, True], ids=["all", "by path"])
@pytest.mark.parametrize("norm", ["flax", "jaxbn"])
@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_what_is_frozen_is_so_to_the_bit_and_the_rest_moves(kind, norm, some, affine):
    model, variables, paths = trained(kind, norm)
    where = paths[:1] if some else "*"
    before = leaves_of(model, variables)
    frozen = jaxbn.freeze(model.apply if kind == "linen" else model, variables, where)
    if kind == "nnx":
        assert frozen is model
    tx = optimizer(where if affine == "frozen" else ())
    after = leaves_of(model, ten_steps(model, variables, frozen, tx))
    assert after.keys() == before.keys()
    chosen = paths[:1] if some else paths
    for name, leaf in before.items():
        parts = name.split("/")
        its = any(path in name for path in chosen)
        still = its and (parts[-1] in ("mean", "var") or affine == "frozen")
        assert (leaf.tobytes() == after[name].tobytes()) == still, name


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_a_frozen_layer_is_an_affine_map_of_its_statistics(kind):
    """Train mode equals eval mode, in y and in the gradient of x; and no row sees another."""
    model, variables, _ = trained(kind, "jaxbn")
    if kind == "linen":
        frozen, plain = jaxbn.freeze(model.apply, variables), model.apply

        def train(x):
            return frozen(variables, x, train=True)

        def evaluate(x):
            return plain(variables, x, train=False)
    else:
        evaluate = functools.partial(nnx.clone(model), train=False)
        train = functools.partial(jaxbn.freeze(model), train=True)
    dy = RNG.normal(size=(8, 2)).astype(np.float32)
    y, pull = jax.vjp(train, X)
    expected, pull_eval = jax.vjp(evaluate, X)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(pull(dy)[0], pull_eval(dy)[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(train(X[:1]), y[:1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mutable", [False, ["batch_stats"], True, "batch_stats", []])
def test_linen_returns_what_apply_returns(mutable):
    net, variables, _ = trained("linen", "flax")
    frozen = jaxbn.freeze(net.apply, variables)
    got = frozen(variables, X, mutable=mutable)
    expected = net.apply(variables, X, train=False, mutable=mutable)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_scanned_linen_layers_freeze_together():
    class Block(linen.Module):
        @linen.compact
        def __call__(self, x, _=None):
            return linen.BatchNorm(use_running_average=False, name="bn")(x), None

    axes = {"params": 0, "batch_stats": 0}
    net = linen.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=2)()
    variables = net.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"^freeze: the statistics of \['bn'\] were never"):
        jaxbn.freeze(net.apply, variables)
    stats = {"bn": {"mean": jnp.ones((2, 4)), "var": jnp.full((2, 4), 4.0)}}
    variables = {**variables, "batch_stats": stats}
    (y, _), new = jaxbn.freeze(net.apply, variables)(variables, X, mutable=["batch_stats"])
    np.testing.assert_allclose(y, ((X - 1) / 2 - 1) / 2, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(new["batch_stats"]["bn"]["var"], stats["bn"]["var"])
    # One layer of the stack without an update is one too many.
    stats["bn"]["mean"], stats["bn"]["var"] = jnp.eye(2, 4), jnp.ones((2, 4)).at[1].set(3.0)
    jaxbn.freeze(net.apply, variables)
    stats["bn"]["mean"] = jnp.zeros((2, 4))
    with pytest.raises(ValueError, match=r"^freeze: the statistics of \['bn'\] were never"):
        jaxbn.freeze(net.apply, variables)


def test_nnx_frozen_layers_survive_what_modules_go_through():
    model, _, _ = trained("nnx", "jaxbn")
    expected = model(X, train=False)
    jaxbn.freeze(model)
    jaxbn.freeze(model)  # again is the same
    before = leaves_of(model, None)
    assert all(isinstance(layer, jaxbn.nnx.BatchNorm) for _, layer in layers.nnx_layers(model))
    model.train()
    for other in (nnx.clone(model), nnx.merge(*nnx.split(model)), nnx.jit(lambda m: m)(model)):
        np.testing.assert_allclose(other(X), expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(other.norms[0].mean[...], model.norms[0].mean[...])
    np.testing.assert_allclose(
        nnx.remat(lambda m, x: m(x))(model, X), expected, rtol=1e-6, atol=1e-6
    )
    with calls.hooked_nnx(model) as seen:
        np.testing.assert_allclose(model(X), expected, rtol=1e-6, atol=1e-6)
    assert list(seen) == ["norms/0", "norms/1"]
    after = leaves_of(model, None)
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    jaxbn.unfreeze(model, where="norms/1")
    jaxbn.unfreeze(model, where="norms/1")
    model(X)
    after = leaves_of(model, None)
    moved = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert moved == {"norms/1/mean", "norms/1/var"}
    assert type(model.norms[1]) is jaxbn.nnx.BatchNorm


def test_a_frozen_layer_accepts_a_mask():
    norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    norm(X)
    frozen = jaxbn.freeze(nnx.clone(norm))
    mask = np.ones((8, 1), bool)
    np.testing.assert_array_equal(frozen(X, mask=mask), norm(X, use_running_average=True))


# Labels

V = jnp.ones(2)
PARAMS = {
    "conv": {"kernel": V, "bias": V},
    "stem": {"bn": {"scale": V, "bias": V}},
    "top": {"scale": V},
    "shift": {"bias": V},
}


def test_labels_of_linen_nnx_and_functional_parameters():
    bn = {"scale": "scale", "bias": "bias"}
    expected = {
        "conv": {"kernel": "rest", "bias": "rest"},
        "stem": {"bn": bn},
        "top": {"scale": "scale"},
        "shift": {"bias": "bias"},
    }
    assert jaxbn.labels(PARAMS) == expected
    frozen = jaxbn.labels(PARAMS, frozen=["stem/*", "shift"])
    still = {"scale": "frozen", "bias": "frozen"}
    assert frozen == {**expected, "stem": {"bn": still}, "shift": {"bias": "frozen"}}
    assert jaxbn.labels(PARAMS, frozen=lambda path: path == "top")["top"] == {"scale": "frozen"}
    tree = {"w": V, "norms": [jaxbn.Params(V, None), jaxbn.Params(V, V)]}
    norms = [jaxbn.Params("scale", None), jaxbn.Params("scale", "frozen")]
    norms[1] = jaxbn.Params("frozen", "frozen")
    assert jaxbn.labels(tree, frozen="norms/1") == {"w": "rest", "norms": norms}
    assert jaxbn.labels(linen.FrozenDict(PARAMS)) == linen.FrozenDict(expected)
    model, _, _ = trained("nnx", "flax")
    state = nnx.state(model, nnx.Param)
    for tree in (state, nnx.as_pure(state), nnx.to_pure_dict(state)):
        got = jaxbn.labels(tree, frozen="norms/1")
        assert jax.tree.structure(got) == jax.tree.structure(tree)
        inner, norms, out = ["rest"] * 2, ["bias", "scale", "frozen", "frozen"], ["rest"] * 2
        assert jax.tree.leaves(got) == inner + norms + out


def test_every_norm_of_flax_is_labelled_as_a_norm():
    norms = (nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm, nnx.InstanceNorm)
    for norm in (*norms, functools.partial(nnx.GroupNorm, num_groups=1)):
        labels = jaxbn.labels(nnx.to_pure_dict(nnx.state(norm(4, rngs=nnx.Rngs(0)), nnx.Param)))
        assert set(labels.values()) <= {"scale", "bias"}


@pytest.mark.parametrize("masked", ["adamw", "masked"])
def test_no_weight_decay_on_norms(masked):
    """With a gradient of zero only decay moves anything."""
    if masked == "adamw":
        tx = optax.adamw(0.1, weight_decay=0.1, mask=jaxbn.decay_mask)
    else:
        tx = optax.chain(
            optax.masked(optax.add_decayed_weights(0.1), jaxbn.decay_mask), optax.sgd(0.1)
        )
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, PARAMS), tx.init(PARAMS), PARAMS)
    moved = jax.tree.map(lambda u: bool(jnp.any(u != 0)), updates)
    assert moved == jaxbn.decay_mask(PARAMS)
    assert moved["conv"] == {"kernel": True, "bias": True}
    assert moved["stem"]["bn"] == {"scale": False, "bias": False}


def test_the_decay_mask_of_a_part_of_the_tree_is_that_part_of_the_mask():
    """`multi_transform` shows each transform its own leaves alone: here no norm's."""
    rest = optax.adamw(0.1, weight_decay=0.1, mask=jaxbn.decay_mask)
    kinds = {"rest": rest, "scale": optax.set_to_zero(), "bias": optax.set_to_zero()}
    tx = optax.multi_transform(kinds, jaxbn.labels)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, PARAMS), tx.init(PARAMS), PARAMS)
    assert jax.tree.map(lambda u: bool(jnp.any(u != 0)), updates) == jaxbn.decay_mask(PARAMS)


def test_norms_have_a_learning_rate_of_their_own():
    rates = {"scale": 2.0, "bias": 64.0, "rest": 1.0}
    tx = optax.multi_transform({k: optax.sgd(v) for k, v in rates.items()}, jaxbn.labels)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    got = jax.tree.map(lambda u: -float(u[0]), updates)
    assert got == jax.tree.map(rates.get, jaxbn.labels(PARAMS))


# Bad input

FRESH = (
    "freeze: the statistics of {} were never updated (mean 0 and var 1, or count 0), so the frozen "
    "layers would not normalize at all. Restore a checkpoint with its statistics, train, or call "
    "jaxbn.recalibrate first; or write allow_untrained=True."
)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_never_updated_layers_are_refused_all_at_once(kind):
    model, variables, paths = trained(kind, "flax")
    tree = model if variables is None else variables
    for where, fresh in (("*", paths), (paths[1], paths[1:])):
        tree = jaxbn.reset(tree, where)
        variables = tree if kind == "linen" else None
        before = leaves_of(model, variables)
        with pytest.raises(ValueError) as error:
            jaxbn.freeze(model.apply if kind == "linen" else model, variables, where)
        assert str(error.value) == FRESH.format(fresh)
        after = leaves_of(model, variables)
        assert all(before[name].tobytes() == after[name].tobytes() for name in before)
        if kind == "nnx":
            assert type(model.norms[0]) is nnx.BatchNorm
    # Of layers that were updated, or when asked to, it is done.
    jaxbn.freeze(model.apply if kind == "linen" else model, variables, where, allow_untrained=True)


@pytest.mark.parametrize(
    ("mean", "count"),
    [(1.0, 0), (0.0, 3)],  # values of no batch; batches that momentum 1 counted and did not learn
    ids=["count-0", "initial-values"],
)
def test_a_count_and_initial_values_both_say_untrained(mean, count):
    norm = jaxbn.nnx.BatchNorm(2, momentum=None, rngs=nnx.Rngs(0))
    norm.mean[...] = jnp.full(2, mean)
    norm.count[...] = jnp.asarray(count)
    with pytest.raises(ValueError) as error:
        jaxbn.freeze(norm)
    assert str(error.value) == FRESH.format("['' (the model itself)]")
    norm.mean[...], norm.count[...] = jnp.ones(2), jnp.asarray(3)
    jaxbn.freeze(norm)


def test_traced_statistics_are_refused():
    expected = (
        "freeze: the statistics of ['norms/0', 'norms/1'] have no values while they are traced, so "
        "freeze cannot see whether they were ever updated; freeze outside of jit and eval_shape, "
        "or write allow_untrained=True."
    )
    model, _, _ = trained("nnx", "flax")
    frozen = nnx.jit(lambda m: jaxbn.freeze(m)(X))
    assert message(ValueError, frozen, model).startswith(expected)
    model = nnx.eval_shape(lambda: Nnx(nnx.BatchNorm, nnx.Rngs(0)))
    assert message(ValueError, jaxbn.freeze, model) == expected


def test_bad_calls_are_told_what_to_write():
    net, variables, _ = trained("linen", "flax")
    bad = [
        (
            lambda: jaxbn.freeze(net.apply),
            TypeError,
            "freeze: method without variables, expected an nnx model, or linen's apply and its "
            "variables; write freeze(net.apply, variables).",
        ),
        (
            lambda: jaxbn.freeze(net.apply, variables, "head*"),
            ValueError,
            "freeze: where='head*' selects none of the batch norm layers ['stem', 'top']; expected "
            'a glob such as "stem", several of them, or a function of the path.',
        ),
        (
            lambda: jaxbn.freeze(nnx.Linear(2, 2, rngs=nnx.Rngs(0))),
            ValueError,
            "freeze: no batch norm layer in this Linear; expected variables with "
            '"batch_stats", an nnx model that holds a BatchNorm, or a tree of jaxbn.State.',
        ),
        (
            lambda: jaxbn.unfreeze(net.apply),
            TypeError,
            "unfreeze: method is no nnx model; for linen call net.apply, which "
            "freeze(net.apply, variables) did not change.",
        ),
        (
            lambda: jaxbn.labels({"dense": {"kernel": V, "bias": V}}),
            ValueError,
            "labels: no norm among 2 parameters; expected linen's params, nnx.state(model, "
            "nnx.Param) or a tree of jaxbn.Params, with a layer that holds a scale, or a bias and "
            "nothing else.",
        ),
        (
            lambda: jaxbn.labels(PARAMS, frozen="head*"),
            ValueError,
            "labels: frozen='head*' selects none of the norms ['shift', 'stem/bn', 'top']; "
            'expected a glob such as "shift", several of them, or a function of the path.',
        ),
    ]
    for call, kind, expected in bad:
        assert message(kind, call) == expected


# The example


def test_each_way_of_the_example_gives_a_score(monkeypatch):
    """On digits, in its smallest form: each way gives a score."""
    monkeypatch.syspath_prepend(EXAMPLES / "finetune")
    import finetune

    monkeypatch.setattr(finetune, "ResNet9", TinyNnx)
    monkeypatch.setattr(finetune, "WAYS", dict(list(finetune.WAYS.items())[-3:]))
    with jax.numpy_rank_promotion("allow"):
        table = finetune.main(width=2, steps=4, shots=4, seeds=1)
    columns = [list(column.cells) for column in table.columns]
    assert columns[0] == list(finetune.WAYS)
    assert columns[1] == columns[2] == columns[3]  # of one seed
    assert all(0 <= float(cell.rstrip("%")) <= 100 for cell in columns[1])
