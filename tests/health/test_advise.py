"""Which norm: the decisions, and the figure behind them, from a simulation and from the op."""

import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
from jaxbn import health
from jaxbn.health._advise import sd_of_sd
from tests.support.messages import message


@pytest.mark.parametrize("n", [2, 3, 5, 16, 64])
def test_the_noise_of_a_batch_is_that_of_normal_batches(n):
    """The figure against 40,000 batches, through the op's own statistics."""
    x = np.random.default_rng(n).normal(5, 3, (n, 40_000)).astype(np.float32)
    sd = np.sqrt(np.asarray(jaxbn.moments(x).var, np.float64)) / 3
    # The standard error of an sd from 40,000 values is 0.4 %; three of them.
    np.testing.assert_allclose(sd.std(), sd_of_sd(n), rtol=0.012)


def test_the_noise_is_near_its_limit_for_many_values():
    for n in (100, 10_000):
        assert abs(sd_of_sd(n) * math.sqrt(2 * n) - 1) < 1 / n
    assert sd_of_sd(1) == 0


CASES = {
    "one device, few rows": ({"batch_per_device": 2}, ["group", "layer"]),
    "one device, some rows": ({"batch_per_device": 8}, ["group", "renorm", "layer"]),
    "one device, enough rows": ({"batch_per_device": 16}, ["batch"]),
    "positions count": ({"batch_per_device": 2, "positions": 8}, ["batch"]),
    "few on each, enough on all": (
        {"batch_per_device": 2, "devices": 8},
        ["synchronized", "group", "layer"],
    ),
    "enough on each": ({"batch_per_device": 32, "devices": 8}, ["synchronized", "ghost"]),
    "plenty on each": ({"batch_per_device": 64, "devices": 8}, ["ghost", "synchronized"]),
    "uneven devices": ({"batch_per_device": [80, 64], "devices": 2}, ["synchronized"]),
    "a sequence": ({"batch_per_device": 64, "recurrent": True}, ["layer", "batch"]),
    "fine-tuning": (
        {"batch_per_device": 2, "pretrained": True, "positions": 2},
        ["frozen", "group", "renorm"],
    ),
    "fine-tuning on plenty": ({"batch_per_device": 64, "pretrained": True}, ["batch"]),
    "served alone": (
        {"batch_per_device": 8, "serving": "single"},
        ["batch", "group", "renorm", "layer"],
    ),
}


@pytest.mark.parametrize("what", CASES)
def test_decisions(what):
    given, norms = CASES[what]
    found = health.advise(**given)
    assert [advice.norm for advice in found] == norms
    for advice in found:
        assert advice.reason.endswith(".")
        assert advice.source
        assert advice.write


def test_figures_are_those_of_the_values_that_each_norm_takes():
    found = {a.norm: a for a in health.advise(batch_per_device=32, devices=8, positions=2)}
    assert found["ghost"].figure == sd_of_sd(64)
    assert found["synchronized"].figure == sd_of_sd(512)
    assert found["ghost"].write.endswith('"batch", virtual_batch_size=32)')
    assert health.advise(batch_per_device=2)[0].figure == 0


def test_the_axis_that_is_enough_is_named():
    """Of host and member the inner one; both where it is not enough."""
    meshes = {8: "'member'", 4: "('host', 'member')"}
    for rows, name in meshes.items():
        best = health.advise(batch_per_device=rows, devices={"host": 16, "member": 8})[0]
        assert best.norm == "synchronized"
        assert f"axis_name={name})" in best.write
    (best,) = health.advise(batch_per_device=[80, 64], devices=2)
    assert best.reason == (
        "64 values on a device, 144 on 2 devices, each device weighted by its rows."
    )


def test_what_is_served_alone_is_told():
    batch, group, *_ = health.advise(batch_per_device=8, serving="single")
    assert batch.reason == (
        "8 values say enough of the sd. It folds into the kernel before it (jaxbn.fold)."
    )
    assert group.reason.endswith(" It stays in what is served.")


def test_lines_to_write_run():
    """For a linen model as they stand, and for an nnx model alone."""
    net = nn.Sequential([nn.Conv(8, (3, 3)), nn.BatchNorm(use_running_average=False)])
    variables = net.init(jax.random.key(0), jnp.ones((1, 4, 4, 3)))
    variables["batch_stats"] = jax.tree.map(lambda v: v + 1, variables["batch_stats"])
    setups = ({}, {"devices": 8}, {"devices": 8, "pretrained": True}, {"recurrent": True})
    lines = {a.write for rows in (2, 64) for setup in setups for a in health.advise(rows, **setup)}
    lines = {line.partition(";")[0] for line in lines}
    assert {re.split(r"\W", line)[1] for line in lines} >= {"swap", "freeze", "linen"}
    for line in lines - {"norm(x, renorm=(r_max, d_max))"}:
        eval(line, {"jaxbn": jaxbn, "model": net, "variables": variables})
        model = nnx.Sequential(
            nnx.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0)), nnx.BatchNorm(8, rngs=nnx.Rngs(0))
        )
        model.layers[1].mean[...] += 1
        alone = line.replace("(model.apply, variables", "(model").replace("(model, ", "(model, to=")
        eval(alone, {"jaxbn": jaxbn, "model": model})


BAD = {
    "no rows": (
        {"batch_per_device": 0},
        "advise: batch_per_device is 0, expected an integer of at least 1; write "
        "health.advise(batch_per_device=32, devices=8).",
    ),
    "half a device": (
        {"batch_per_device": 8, "devices": 0.5},
        "advise: devices is 0.5, expected an integer of at least 1; write "
        "health.advise(batch_per_device=32, devices=8).",
    ),
    "negative positions": (
        {"batch_per_device": 8, "positions": -1},
        "advise: positions is -1, expected an integer of at least 1; write "
        "health.advise(batch_per_device=32, devices=8).",
    ),
    "no such serving": (
        {"batch_per_device": 8, "serving": "alone"},
        "advise: serving='alone', expected one of ['batch', 'single']: rows are served together, "
        "or each alone.",
    ),
    "sizes of other devices": (
        {"batch_per_device": [8, 8, 4], "devices": 2},
        "advise: batch_per_device has 3 sizes, but there are 2 devices; write one size for all, or "
        "one for each device.",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_calls_are_told_what_to_write(what):
    given, expected = BAD[what]
    assert message(ValueError, health.advise, **given) == expected
