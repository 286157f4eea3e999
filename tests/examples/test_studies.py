"""The studies: what their parts compute, and each by its command, tiny, on digits."""

import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from tests.support.compiling import as_pasted

STUDIES = Path(__file__).parents[2] / "examples" / "studies"
NAMES = sorted(path.stem for path in STUDIES.glob("*.py") if path.stem != "study")


@pytest.fixture(scope="module", autouse=True)
def study():
    sys.path.insert(0, str(STUDIES))
    with as_pasted():
        yield import_module("study")
    sys.path.remove(str(STUDIES))


@pytest.fixture(scope="module")
def some(study):
    """A small network, its variables, and images with labels."""
    net = study.Net(width=4, depth=1)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(0.5, 2, (16, 16, 16, 3)), jnp.float32)
    return net, study.start(net, 0), x, jnp.asarray(rng.integers(10, size=16))


SMALL = {  # what a test compiles of each study: its constants, and arguments of main
    "learning_rate": ({"LENGTHS": (0.1,)}, {"rates": (0.1,), "steps": 20, "stops": 1}),
    "batch_size": ({"FACTORS": (1,)}, {"images": 128, "sizes": (2, 64)}),
    "placement": ({"PLACES": {"pre": ""}}, {"steps": 2}),
    "synchronized": ({}, {"kinds": {"2": (2, True)}, "images": 160}),
    "momentum": ({}, {"updates": (1, 5)}),
    "freeze_when": ({"WAYS": {"late": (True, "--aa")}}, {"before": 20, "steps": 80}),
}


@pytest.fixture(scope="module")
def digits(study):
    return study.images(most=400, most_tests=100)


@pytest.mark.parametrize("name", NAMES)
def test_a_study_has_tables_with_spreads_and_a_picture(name, study, digits, monkeypatch):
    module = import_module(name)
    constants, arguments = SMALL[name]
    for constant, value in constants.items():
        monkeypatch.setattr(module, constant, value)
    if hasattr(module, "NORMS"):
        monkeypatch.setattr(module, "NORMS", {"batch norm": study.batch_norm})
    tables = module.main(digits, 3, **{**module.TINY, **arguments})
    assert any(" to " in str(table) for table in tables)
    for table in tables:
        assert {len(row) for row in table.rows} == {len(table.headers)}
        cells = [cell for row in table.rows for cell in row[1:] if "(" in cell]
        found = [study.figures(cell) for cell in cells]
        assert all(low <= mean <= high for mean, low, high in found)
        if name not in ("learning_rate", "momentum"):  # accuracies
            assert all(low >= 0 and high <= 100 for _, low, high in found)
    figure = module.picture(*(table.rows for table in tables))
    assert figure.get_suptitle()
    assert [axis for axis in figure.axes if not axis.get_xlabel()] == []


def test_the_command_prints_the_tables_and_writes_the_picture(study, tmp_path, capsys, monkeypatch):
    picture, asked = tmp_path / "picture.png", []

    def main(data, seeds, **tiny):
        asked.append((data.name, seeds, tiny))
        return (study.Table(["n", "norm"], [["1", "20.0 (9.0 to 30.0)"], ["10", "never"]]),)

    def draw(rows):
        figure, (axis,) = study.panels("title", ("", "n", "steps"))
        study.line(axis, [1, 10], [row[1] for row in rows], "norm", "red")
        return figure

    monkeypatch.setattr(sys, "argv", ["a.py", "--tiny", "--seeds", "4", "--picture", str(picture)])
    study.run(main, draw, "About.", "One minute", {"steps": 3})
    assert asked == [("digits", 4, {"steps": 3})]
    assert capsys.readouterr().out == (
        "| n  |               norm |\n"
        "| -- | -----------------: |\n"
        "| 1  | 20.0 (9.0 to 30.0) |\n"
        "| 10 |              never |\n"
        f"\n{picture}\n"
    )
    assert list(tmp_path.iterdir()) == [picture]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_spread_is_read_as_it_was_written(study):
    assert study.spread([1.0, 2.0, 6.0]) == "3.0 (1.0 to 6.0)"
    assert study.figures(study.spread([-1.0, 2.0, 6.0], 3)).tolist() == [2.333, -1.0, 6.0]
    assert np.isnan(study.figures("never in 2 of 3")).all()


def test_every_epoch_draws_every_row_once(study):
    rows = study.drawn(0, 12, steps=6, batch=4)
    assert [sorted(epoch.ravel().tolist()) for epoch in np.split(rows, 2)] == [[*range(12)]] * 2
    assert (rows[:3] != rows[3:]).any()
    assert (study.drawn(1, 12, 6, 4) != rows).any()


def test_a_step_is_one_of_gradient_descent(study, some):
    net, variables, x, y = some
    after, losses = study.fit(net.apply, variables, x, y, np.arange(16)[None], 0.5)

    def loss(params):
        held = {**variables, "params": params}
        logits, _ = net.apply(held, x, train=True, mutable=["batch_stats"])
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(16), y])

    value, grads = jax.jit(jax.value_and_grad(loss))(variables["params"])
    np.testing.assert_allclose(losses, [value], rtol=1e-5)
    expected = jax.tree.map(lambda p, g: p - 0.5 * g, variables["params"], grads)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), after["params"], expected
    )


@pytest.mark.parametrize(
    ("losses", "step"),
    [
        ([3.0] * 20 + [1.0] * 20, 31),  # 10 of 20 and one more
        ([1.0] * 20, 20),
        ([3.0] * 40, np.inf),
        ([np.nan] * 40, np.inf),
    ],
)
def test_the_step_that_reaches_the_target(losses, step):
    assert import_module("learning_rate").reached(np.array(losses), 2.0) == step


def test_ahead_along_the_gradient_of_a_square():
    """The loss is |p|² / 2 and its gradient p, so a step of length t leaves (1 - t) p."""
    ahead = import_module("learning_rate").ahead
    p = jnp.array([[3.0, 4.0]])

    def apply(variables, x, **_):  # the cross entropy of these logits is softplus(|p|² / 2)
        size = jnp.sum(variables["params"] ** 2) / 2
        return jnp.stack([jnp.log(jnp.expm1(size)), jnp.zeros(())])[None], {}

    lengths = jnp.array([0.5, 1.0, 2.0])
    loss, gradient = ahead(apply, {"params": p}, None, jnp.array([1]), lengths)
    np.testing.assert_allclose(loss[0], 12.5 * (0.5**2 - 1), rtol=1e-4)
    np.testing.assert_allclose(gradient[0], 0.5, rtol=1e-4)
    np.testing.assert_allclose(gradient[2], 2.0, rtol=1e-4)


@pytest.mark.parametrize("momentum", [0.9, None])
def test_running_statistics_are_those_of_the_layer(momentum):
    updated = import_module("momentum").updated
    batches = np.random.default_rng(0).normal(2, 3, (5, 8, 4)).astype(np.float32)
    _, state = jaxbn.init(4)
    mine = {"mean": state.mean, "var": state.var}
    for done, x in enumerate(map(jnp.asarray, batches)):
        _, state = jaxbn.batch_norm(x, None, state, train=True, momentum=momentum)
        mine = updated(mine, {"mean": x.mean(0), "var": x.var(0)}, momentum, float(done))
    np.testing.assert_allclose(mine["mean"], state.mean, rtol=1e-5)
    np.testing.assert_allclose(mine["var"], state.var, rtol=1e-5)


@pytest.mark.parametrize("pooled", [True, False])
def test_devices_normalize_by_all_images_or_by_their_own(study, some, pooled):
    """Eight rows of a vmap, two images each, beside the network on what it normalizes by."""
    module = import_module("synchronized")
    net, variables, x, _ = some
    of = study.Net(module.pooled_norm, 4, 1) if pooled else net
    stats = jax.tree.map(lambda v: jnp.stack([v] * 8), variables["batch_stats"])
    held = {**variables, "batch_stats": stats}
    train = {"train": True, "mutable": ["batch_stats"]}
    logits, new = jax.jit(partial(module.on_devices, of.apply, **train))(held, x)
    parts = [x] if pooled else jnp.split(x, 8)
    apply = jax.jit(partial(net.apply, **train))
    alone = [apply(variables, part) for part in parts]
    np.testing.assert_allclose(logits, jnp.concatenate([y for y, _ in alone]), atol=1e-4)
    for i in (0, 7):
        one = alone[0 if pooled else i][1]["batch_stats"]
        jax.tree.map(
            lambda v, w, i=i: np.testing.assert_allclose(v[i], w, rtol=1e-4, atol=1e-5),
            new["batch_stats"],
            one,
        )


def test_scales_and_biases_of_norms_stay_and_the_rest_learns(study, some):
    without_norms = partial(import_module("freeze_when").without_norms, some[0].apply)
    _, variables, x, y = some
    after, _ = study.fit(without_norms, variables, x, y, np.arange(16)[None], 0.5)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), variables["params"], after["params"])
    for path, kept in jax.tree_util.tree_leaves_with_path(same):
        assert kept == ("Norm" in str(path)), path
