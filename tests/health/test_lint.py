"""What lint finds in a network, what it does not find in sound ones, and in whose networks."""

import functools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
from jaxbn import health
from tests.support.compiling import as_pasted
from tests.support.messages import message
from tests.support.networks import NnxNet, ResNet

ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(0)
X = RNG.normal(1, 2, (4, 6, 6, 3)).astype(np.float32)


NORMS = {"flax": nn.BatchNorm, "jaxbn": jaxbn.linen.BatchNorm}


def net(body, train, norm):
    """A network that runs `body(norm, x)`."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return body(functools.partial(norm, use_running_average=not train), x)

    return Net()


@functools.cache
def variables_of(body, shape):
    """The same for both classes of norms."""
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
    with as_pasted():
        # Under jit the network itself is not compiled: no parameter needs it.
        return jax.jit(net(body, True, nn.BatchNorm).init)(keys, jnp.ones(shape))


def linen(body, x=X, train=True, norm=nn.BatchNorm):
    """A function of x that runs `body(norm, x)`, with its variables closed over."""
    variables = variables_of(body, x.shape)

    def fn(x):
        rngs = {"dropout": jax.random.key(1)}
        return net(body, train, norm).apply(variables, x, mutable=["batch_stats"], rngs=rngs)

    return fn


def kinds(fn, x=X, train=True):
    """Layer → kinds of findings; layers without are left out."""
    found = {}
    with as_pasted():
        for finding in health.lint(fn, x, train=train):
            found.setdefault(finding.layer, set()).add(finding.kind)
    return found


def conv(x, features=4, **options):
    return nn.Conv(features, (3, 3), **options)(x)


def dropout(x, rate=0.25, **options):
    return nn.Dropout(rate, deterministic=False, **options)(x)


# Body of a network → what is wrong with its layer BatchNorm_0, in training and in eval.
BROKEN = {
    "bias": (lambda norm, x: norm()(conv(x)), {"lost_bias"}, {"lost_bias"}),
    "bias of a dense layer": (
        lambda norm, x: norm()(nn.Dense(4)(x.mean((1, 2)))),
        {"lost_bias"},
        {"lost_bias"},
    ),
    "relu": (
        lambda norm, x: norm()(nn.relu(conv(x))),
        {"relu_before_norm"},
        {"relu_before_norm"},
    ),
    "relu and pool": (
        lambda norm, x: norm()(nn.max_pool(nn.relu(conv(x)), (2, 2), (2, 2))),
        {"relu_before_norm"},
        {"relu_before_norm"},
    ),
    "dropout": (
        lambda norm, x: norm()(conv(nn.tanh(dropout(x)), use_bias=False)),
        {"dropout_before_norm"},
        set(),
    ),
    "dropout, then two norms": (
        lambda norm, x: norm(name="BatchNorm_1")(norm(name="BatchNorm_0")(dropout(x))),
        {"dropout_before_norm"},
        set(),
    ),
    "integers": (
        lambda norm, x: norm()((x.astype(jnp.int8) * 3 - 7).astype(jnp.float32) / 255),
        {"late_cast"},
        {"late_cast"},
    ),
    "a factor 0": (
        lambda norm, x: x + 0.0 * norm()(conv(x, 3, use_bias=False)),
        {"multiplied_by_zero"},
        {"multiplied_by_zero"},
    ),
    "two parameters that are 0": (
        lambda norm, x: (
            x
            + nn.Conv(3, (1, 1), kernel_init=nn.initializers.zeros)(
                norm(scale_init=nn.initializers.zeros)(conv(x, use_bias=False))
            )
        ),
        {"multiplied_by_zero"},
        {"multiplied_by_zero"},
    ),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_network_has_its_finding_and_no_other(what, norm):
    body, train, evaluate = BROKEN[what]
    for mode, expected in ((True, train), (False, evaluate)):
        if "dropout" in what and not mode:
            continue  # in eval there is none
        found = kinds(linen(body, train=mode, norm=NORMS[norm]), train=mode)
        assert found == ({"BatchNorm_0": expected} if expected else {})


SOUND = {
    "conv, norm, relu": lambda norm, x: nn.relu(norm()(conv(x, use_bias=False))),
    "dropout after the norms": lambda norm, x: nn.Dense(3)(
        dropout(norm()(conv(x, use_bias=False)).mean((1, 2)))
    ),
    "dropout that another norm hides": lambda norm, x: nn.relu(
        dropout(norm()(conv(x, use_bias=False)))
    ),
    "whole rows dropped": lambda norm, x: norm()(
        x + dropout(conv(x, 3, use_bias=False), broadcast_dims=(1, 2, 3))
    ),
    "an embedding of positions": lambda norm, x: norm()(
        conv(x, use_bias=False) + jnp.asarray(RNG.normal(size=(6, 6, 4)).astype(np.float32))
    ),
    "a bias after the norm": lambda norm, x: conv(norm()(conv(x, use_bias=False))),
    "a bias and then relu": lambda norm, x: nn.relu(conv(norm()(x))),
    "a residual": lambda norm, x: norm()(x + conv(nn.relu(x), 3)),
    "a scale that starts at 0": lambda norm, x: (
        x + norm(scale_init=nn.initializers.zeros)(conv(x, 3, use_bias=False))
    ),
    "a head that starts at 0": lambda norm, x: nn.Dense(3, kernel_init=nn.initializers.zeros)(
        norm()(conv(x, use_bias=False))
    ),
    "integers that are cast at once": lambda norm, x: norm()(
        x.astype(jnp.int8).astype(jnp.float32) / 255
    ),
    "two norms in a row": lambda norm, x: norm()(norm()(x)),
    "a layer norm": lambda norm, x: norm()(nn.LayerNorm()(x) @ jnp.ones((3, 4))),
    "an input that is standardized": lambda norm, x: norm()(
        conv((x - jnp.array([1.0, 2, 3])) / jnp.array([2.0, 3, 4]), use_bias=False)
    ),
    "batches centered by hand": lambda norm, x: norm()(
        conv(x, use_bias=False) - conv(x, use_bias=False).mean(0)
    ),
}


@pytest.mark.parametrize("what", SOUND)
@pytest.mark.parametrize("norm", NORMS)
def test_a_sound_network_has_none(what, norm):
    for train in (True, False):
        if what == "batches centered by hand" or train or "drop" not in what:
            fn = linen(SOUND[what], train=train, norm=NORMS[norm])
            assert kinds(fn, train=train) == {}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("train", [True, False])
def test_flax_resnets_have_none(norm, train):
    """Those of the tests as those of the CIFAR example, which start some scales and heads at 0."""
    resnet = ResNet(NORMS[norm], width=4)
    variables = jax.jit(resnet.init)(jax.random.key(0), X)
    fn = functools.partial(resnet.apply, variables, train=train, mutable=["batch_stats"])
    assert kinds(fn, train=train) == {}

    def step(x):
        def loss(params):
            held = {**variables, "params": params}
            y, new = resnet.apply(held, x, train, mutable=["batch_stats"])
            return (y**2).sum(), new

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    assert kinds(step, train=train) == {}
    model = NnxNet({"flax": nnx, "jaxbn": jaxbn.nnx}[norm].BatchNorm, rngs=nnx.Rngs(0))
    (model.train if train else model.eval)()
    before = jax.tree.leaves(nnx.state(model))
    assert kinds(model, train=train) == {}
    assert all(a is b for a, b in zip(jax.tree.leaves(nnx.state(model)), before, strict=True))
    other = health.lint(model, X, train=not train)
    wrong = "train_in_inference" if train else "eval_in_training"
    assert [(f.layer, f.kind) for f in other] == [("norm1", wrong), ("norm2", wrong)]


@pytest.mark.parametrize("train", [True, False])
def test_cifar_models_have_none(monkeypatch, train):
    monkeypatch.syspath_prepend(ROOT / "examples" / "cifar10")
    import model_linen
    import model_nnx

    x = np.zeros((2, 8, 8, 3), np.float32)
    for resnet in (
        model_linen.ResNet9(width=4),
        model_linen.ResNet(blocks=(1, 1), width=4, pre=True),
    ):
        variables = jax.jit(functools.partial(resnet.init, train=False))(jax.random.key(0), x)
        fn = functools.partial(resnet.apply, variables, train=train, mutable=["batch_stats"])
        assert kinds(fn, x, train) == {}
    model = model_nnx.ResNet9(width=4, rngs=nnx.Rngs(0))
    with as_pasted():
        assert health.lint(lambda model, x: model(x, train), model, x, train=train) == []


@pytest.mark.parametrize("train", [True, False])
def test_norms_in_a_row_are_two(train):
    fn = linen(SOUND["two norms in a row"], train=train)
    wrong = {"train_in_inference" if train else "eval_in_training"}
    assert kinds(fn, train=not train) == {"BatchNorm_0": wrong, "BatchNorm_1": wrong}


# Whose norms

LIBRARIES = ["Flax linen", "Flax nnx", "jaxbn linen", "jaxbn nnx", "Haiku", "Equinox"]


@pytest.mark.parametrize("library", LIBRARIES)
def test_norms_of_any_library_are_seen(library, monkeypatch):
    """Four of them in each, in eval mode: the wrong mode of a training step."""
    monkeypatch.syspath_prepend(ROOT / "examples" / "fold")
    with as_pasted():
        fn = networks()[library]
        found = health.lint(fn, X, train=True)
    assert [finding.kind for finding in found] == ["eval_in_training"] * 4


@functools.cache
def networks():
    import resnets

    return resnets.networks(jnp.asarray(X))


def functional(options, x):
    params, state = jaxbn.init(4)
    h = x.reshape(-1, x.shape[-1]) @ jnp.ones((3, 4)) + jnp.arange(4.0)
    y, new = jaxbn.batch_norm(h, params, state, **options)
    z, _ = jaxbn.batch_norm(jnp.maximum(y, 0), params, state, train=False)
    return z, new


@pytest.mark.parametrize(
    "options", [{}, {"virtual_batch_size": 36}, {"mask": np.ones((1, 1), bool)}]
)
def test_functional_norms_are_numbered(options):
    with as_pasted():
        found = health.lint(functools.partial(functional, {"train": True, **options}), X)
    assert [(f.layer, f.kind, f.figure) for f in found] == [
        ("norm 0", "lost_bias", 4),
        ("norm 1", "relu_before_norm", 0.5),
    ]


# Figures and modes


def test_figures_are_counts_and_the_variance_of_dropout():
    """1 / q: values that are kept are divided by q, so E[x²] grows by 1 / q where E[x] is 0."""
    x = RNG.normal(size=(20_000, 3)).astype(np.float32)
    body = BROKEN["dropout"][0]
    with as_pasted():
        (finding,) = health.lint(linen(body), X)
        seen = nn.Dropout(0.25, deterministic=False).apply(
            {}, x, rngs={"dropout": jax.random.key(0)}
        )
    assert finding[:5] == ("BatchNorm_0", "dropout_before_norm", "warning", 1 / 0.75, 1)
    np.testing.assert_allclose(np.var(seen) / np.var(x), finding.figure, rtol=0.03)
    (finding,) = health.lint(linen(BROKEN["bias"][0]), X)
    assert (finding.figure, finding.threshold) == (4, 0)
    (finding,) = health.lint(linen(BROKEN["integers"][0]), X)
    assert (finding.figure, finding.threshold) == (2, 0)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("kind", ["flax", "jaxbn", "functional"])
def test_one_value_per_channel_is_found(kind, rows):
    x = jax.ShapeDtypeStruct((rows, 3), jnp.float32)
    if kind == "functional":

        def fn(x):
            options = {"train": True, "mask": jnp.ones((1, 1), bool)}
            return jaxbn.batch_norm(x, *jaxbn.init(3), **options)[0]
    else:
        fn = linen(lambda norm, x: norm()(x), np.ones((2, 3), np.float32), norm=NORMS[kind])
    found = [(f.kind, f.severity, f.figure, f.threshold) for f in health.lint(fn, x)]
    assert found == ([("one_value", "error", 1, 2)] if rows == 1 else [])


@pytest.mark.parametrize("train", [True, False])
def test_the_wrong_mode_is_found_where_the_right_one_is_said(train):
    fn = linen(SOUND["conv, norm, relu"], train=train)
    assert kinds(fn, train=train) == kinds(fn, train=None) == {}
    wrong = "train_in_inference" if train else "eval_in_training"
    assert kinds(fn, train=not train) == {"BatchNorm_0": {wrong}}
    (finding,) = health.lint(fn, X, train=not train)
    assert finding.severity == ("error" if train else "warning")


def test_every_kind_has_its_line_in_the_page_and_among_the_kinds():
    page = (ROOT / "docs" / "health.md").read_text()
    found = {kind for _, *both in BROKEN.values() for kinds in both for kind in kinds}
    for kind in {*found, "one_value", "eval_in_training", "train_in_inference"}:
        assert kind in health.KINDS
        assert f"| `{kind}` |" in page


# Bad input

BAD = {
    "variables": (
        lambda: health.lint({"params": {}}, X),
        TypeError,
        "lint: fn is a dict, expected a function with its weights closed over, or an nnx model; "
        "write health.lint(lambda x: net.apply(variables, x), x).",
    ),
    "apply": (
        lambda: health.lint(nn.BatchNorm(use_running_average=True).apply, {"params": {}}, X),
        TypeError,
        "lint: fn is apply of a linen module without its variables, expected a function with its "
        "weights closed over, or an nnx model; write health.lint(lambda x: net.apply(variables, "
        "x), x).",
    ),
    "no batch": (
        lambda: health.lint(lambda: 0),
        ValueError,
        "lint: no arrays, expected a batch to trace fn with; write health.lint(fn, x).",
    ),
    "one size": (
        lambda: health.lint(lambda x: x + jnp.ones((4, 6, 6, 3)), X),
        ValueError,
        "lint: fn computes something else for a longer batch, so rows cannot be told from "
        "channels; expected a function that takes any number of rows, the first axis of its first "
        "array.",
    ),
    "no norm": (
        lambda: health.lint(lambda x: x + 1, X),
        ValueError,
        "lint: fn has no batch norm, expected a network with at least one outside of lax.scan and "
        "shard_map; unroll the loop, or lint the function inside.",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_calls_are_told_what_to_write(what):
    call, kind, expected = BAD[what]
    assert message(kind, call) == expected
