"""Arguments of a wrong kind, to the tools: refused before any work, by one sentence of ours.

The op's own arguments are in `op/test_errors.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
from jaxbn import convert, export, health
from tests.support.messages import message

X = np.arange(12, dtype=np.float32).reshape(6, 2)
PARAMS, STATE = jaxbn.init(2)
MOMENTS = jaxbn.Moments(jnp.float32(6), *STATE[:2])
ROWS = jax.vmap(jaxbn.moments, out_axes=-1)(X[:, None])
UPDATES = jax.tree.map(lambda v: jnp.stack([v, v]), STATE)


def model():
    return nnx.List([jaxbn.nnx.BatchNorm(2, rngs=nnx.Rngs(0))])


def recalibrate(**options):
    return jaxbn.recalibrate(lambda model, x: model[0](x), model(), [X], **options)


SELECTS = {
    "freeze": lambda where: jaxbn.freeze(model(), where=where),
    "unfreeze": lambda where: jaxbn.unfreeze(model(), where),
    "reset": lambda where: jaxbn.reset(model(), where),
    "recalibrate": lambda where: recalibrate(where=where),
    "swap": lambda where: jaxbn.swap(model(), where=where),
    "swap, standardize": lambda where: jaxbn.swap(model(), standardize=where or 0),
    "labels, frozen": lambda where: jaxbn.labels({"norm": PARAMS}, where),
}
NO_SELECTION = {"None": None, "a number": 3, "bytes": b"a", "paths read once": iter(["0"])}


@pytest.mark.parametrize("of", NO_SELECTION)
@pytest.mark.parametrize("call", SELECTS)
def test_what_selects_no_layers(call, of):
    where = NO_SELECTION[of]
    name, _, argument = call.partition(", ")
    given = 0 if where is None and argument == "standardize" else where  # None is its default
    argument = argument or "where"
    assert message(TypeError, SELECTS[call], where) == (
        f"{name}: {argument}={given!r}, expected a glob over the paths, several globs in a list, "
        f'or a function of the path; write {argument}="*" for all.'
    )


WRONG = {
    "merge_updates, momentum": (
        lambda: jaxbn.merge_updates(UPDATES, "0.9"),
        "merge_updates: momentum='0.9', expected the momentum in [0, 1) of the updates that are "
        "merged, or None for the cumulative average; write momentum=0.99.",
    ),
    "fold, tolerance": (
        lambda: jaxbn.fold(lambda x: x, X, tolerance="1e-3"),
        "fold: tolerance='1e-3', expected a relative error above 0; write tolerance=1e-5.",
    ),
    "recalibrate, limit": (
        lambda: recalibrate(limit=2.0),
        "recalibrate: limit=2.0, expected at least 1 batch, or None for all.",
    ),
    "recalibrate, unbiased": (
        lambda: recalibrate(unbiased="no"),
        "recalibrate: unbiased='no', expected True or False, known when tracing. None takes each "
        "layer's own setting.",
    ),
    "freeze, allow_untrained": (
        lambda: jaxbn.freeze(model(), allow_untrained="no"),
        "freeze: allow_untrained='no', expected True or False, known when tracing. Write "
        "allow_untrained=True.",
    ),
    "swap, groups": (
        lambda: jaxbn.swap(model(), groups="8"),
        "swap: groups='8', expected how many groups a GroupNorm has, an integer, or None to choose "
        "for each layer; write groups=32.",
    ),
    "check, momentum": (
        lambda: health.check(STATE, momentum="0.9"),
        "check: momentum='0.9', expected a number in [0, 1], the fraction of the old value that is "
        "kept (PyTorch's momentum m is 1 - m here), or None for the cumulative average; write "
        "momentum=0.99.",
    ),
    **{
        f"{call}, epsilon": (
            f,
            f"{call}: epsilon=None, expected a finite number of at least 0, added to the variance; "
            "write epsilon=1e-5.",
        )
        for call, f in {
            "check": lambda: health.check(STATE, epsilon=None),
            "summary": lambda: health.summary(STATE, epsilon=None),
            "distance": lambda: health.distance(STATE, MOMENTS, None),
            "drift": lambda: health.drift(STATE, {"": ROWS}, epsilon=None),
        }.items()
    },
    "drift, false_alarm": (
        lambda: health.drift(STATE, {"": ROWS}, false_alarm="1e-3"),
        "drift: false_alarm='1e-3', expected the chance of an alarm without drift, above 0 and at "
        "most 0.2; write false_alarm=0.001.",
    ),
    "drift, tolerance": (
        lambda: health.drift(STATE, {"": ROWS}, tolerance="0.1"),
        "drift: tolerance='0.1', expected the shift in sd that is no drift, a finite number of at "
        "least 0; write tolerance=0.1.",
    ),
    "drift, reference": (
        lambda: health.drift(STATE, {"": ROWS}, reference={"": ROWS}),
        "drift: reference is a dict, expected the Drift of clean data; write "
        "reference=health.drift(variables, clean_batches).",
    ),
    "serving, tolerance": (
        lambda: health.serving(lambda x: x, X, tolerance="1e-3"),
        "serving: tolerance='1e-3', expected a relative error of at least 0; write tolerance=1e-3.",
    ),
    "stablehlo, tolerance": (
        lambda: export.stablehlo(lambda x: x, X, "x", platforms=("cpu",), tolerance="1e-3"),
        "stablehlo: tolerance='1e-3', expected a relative error of at least 0; write "
        "tolerance=1e-3.",
    ),
    "norm_arguments, momentum": (
        lambda: convert.norm_arguments("0.1"),
        "norm_arguments: momentum='0.1', expected PyTorch's, in [0, 1], or None for the cumulative "
        "average; write momentum=0.1.",
    ),
    "norm_arguments, eps": (
        lambda: convert.norm_arguments(eps=None),
        "norm_arguments: eps=None, expected at least 0; write eps=1e-5.",
    ),
    "merge, nothing yet": (
        lambda: jaxbn.merge(None, MOMENTS),
        "merge: a is None, expected jaxbn.Moments(count, mean, var); start from jaxbn.moments(x) "
        "of the first batch.",
    ),
    "merge, a state": (
        lambda: jaxbn.merge(MOMENTS, STATE),
        "merge: b is State, expected jaxbn.Moments(count, mean, var); start from jaxbn.moments(x) "
        "of the first batch.",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_has_another_type(what):
    call, expected = WRONG[what]
    assert message(TypeError, call) == expected


@pytest.mark.parametrize("features", [1, 3])
def test_moments_of_other_features_are_not_merged(features):
    """One feature would be broadcast to all. Plain numbers are neutral, or alike for all."""
    other = jaxbn.Moments(jnp.float32(1), jnp.zeros(features), jnp.ones(features))
    assert message(ValueError, jaxbn.merge, MOMENTS, other) == (
        f"merge: a.mean has shape (2,) but b.mean has shape ({features},); expected moments of the "
        "same features; merge those of one layer, and write the same axis= in jaxbn.moments."
    )
    merged = jaxbn.merge(jaxbn.Moments(0.0, 0.0, 0.0), MOMENTS)
    jax.tree.map(np.testing.assert_array_equal, merged, MOMENTS)


def test_a_traced_momentum_merges_updates():
    want = jaxbn.merge_updates(UPDATES, 0.9)
    got = jax.jit(functools.partial(jaxbn.merge_updates, UPDATES))(jnp.float32(0.9))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), got, want)
