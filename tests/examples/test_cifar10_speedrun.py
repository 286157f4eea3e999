"""The speedrun: its recipe's parts, and a small run from the command line's door."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "cifar10"


@pytest.fixture(scope="module")
def speedrun():
    sys.path.insert(0, str(EXAMPLE))
    try:
        import speedrun

        yield speedrun
    finally:
        sys.path.remove(str(EXAMPLE))


@pytest.fixture(scope="module")
def data(speedrun):
    return speedrun.load("digits", None)


def recipe(speedrun, data, **changes):
    args = {"batch": 256, "epochs": 2.4, "width": 0.125, "dtype": "float32", **changes}
    return speedrun.Recipe(data, SimpleNamespace(**args))


def test_the_first_convolution_whitens(speedrun, data):
    """Patches of the images it was made from leave it uncorrelated, with equal variances."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(64, 32, 32, 3)).cumsum(1) / 6, jnp.float32)
    whiten = speedrun.init(jax.random.key(0), x, [8, 8, 8])[0].whiten
    patches = np.stack([x[:, i : 31 + i, j : 31 + j] for i in (0, 1) for j in (0, 1)], 3)
    out = patches.reshape(-1, 12) @ np.asarray(whiten).reshape(12, 24)
    second = out.T @ out / len(out)
    # The damping of 5e-4 leaves a direction of variance v with v / (v + 5e-4).
    v = np.linalg.eigvalsh(patches.reshape(-1, 12).T @ patches.reshape(-1, 12) / len(out))[::-1]
    np.testing.assert_allclose(second[:12, :12], np.diag(v / (v + 5e-4)), atol=1e-4)
    np.testing.assert_allclose(out[:, 12:], -out[:, :12], rtol=1e-6)


def test_an_epoch_takes_each_image_once_and_the_next_one_mirrors_it(speedrun, data):
    data = data._replace(flip=True)
    plan = recipe(speedrun, data, batch=479, epochs=2)
    rows, mirrored, shifts = plan.plan(jax.random.key(3))
    assert rows.shape == (6, 479)
    assert shifts.shape == (6, 479, 2)
    assert int(shifts.min()) == 0
    assert int(shifts.max()) == 4
    flips = []
    for epoch in (slice(0, 3), slice(3, 6)):
        seen = np.asarray(rows[epoch]).ravel()
        np.testing.assert_array_equal(np.sort(seen), np.arange(1437))
        flips.append(np.asarray(mirrored[epoch]).ravel()[np.argsort(seen)])
    np.testing.assert_array_equal(flips[0], ~flips[1])
    assert 0.4 < flips[0].mean() < 0.6


def test_one_scan_equals_step_by_step(speedrun, data):
    r = recipe(speedrun, data, batch=16, epochs=0.07, width=0.01)
    assert r.steps == 7  # lookahead pulls at 5 and at the end
    x, y = jnp.asarray(data.train_x), jnp.asarray(data.train_y)
    start, plan = r.begin(jax.random.key(0), x), r.plan(jax.random.key(1))
    scanned, losses = jax.jit(r.train)(start, plan, x, y)
    step, run = jax.jit(r.step), start
    for i in range(r.steps):
        run, loss = step(run, jnp.int32(i), jax.tree.map(lambda v, i=i: v[i], plan), x, y)
        np.testing.assert_allclose(loss, losses[i], rtol=1e-4)
    # Rounding grows from step to step; a step that differed would be a matter of 10 %.
    for a, b in zip(jax.tree.leaves(run.weights), jax.tree.leaves(scanned.weights), strict=True):
        assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(a)
    np.testing.assert_array_equal(run.weights.whiten, start.weights.whiten)
    # The last pull leaves both copies equal, statistics included.
    jax.tree.map(np.testing.assert_array_equal, (run.weights, run.states), run.slow)


@pytest.mark.optimized
def test_a_small_run_learns_and_says_so(speedrun, tmp_path, capsys):
    out = tmp_path / "runs.json"
    options = "--data digits --seeds 2 --epochs 3 --batch 32 --width 0.125 --target 70"
    result = speedrun.main([*options.split(), "--out", str(out)])
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    assert [run["seed"] for run in result["runs"]] == [0, 1]
    assert result["runs"][0]["accuracy"] != result["runs"][1]["accuracy"]
    assert min(run["accuracy"] for run in result["runs"]) > 0.7  # chance is 0.1
    assert "% reached" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--batch 5000", "--batch 5000: there are 1437 training images"),
        ("--out /no/such/runs.json", "--out /no/such/runs.json: there is no folder /no/such"),
        ("--seeds 0", "argument --seeds: 0 is out of range, must be at least 1"),
    ],
)
def test_wrong_options_are_one_line(speedrun, options, message, capsys):
    with pytest.raises(SystemExit) as exit:
        speedrun.main(["--data", "digits", *options.split()])
    assert exit.value.code == 2
    assert capsys.readouterr().err == f"speedrun.py: error: {message}\n"
