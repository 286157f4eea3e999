"""Images of another kind without labels, on digits and in the smallest form."""

from pathlib import Path

import jax
import numpy as np
import pytest

from tests.support.compiling import as_pasted

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = {"width": 1, "images": 128, "test": 96, "seeds": 1}


@pytest.fixture(autouse=True)
def _beside(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "cifar10")
    monkeypatch.syspath_prepend(EXAMPLES / "adapt")
    with as_pasted():
        yield


@pytest.fixture
def untrained(monkeypatch):
    """Networks as they begin, which cost no compilation of a training step."""
    import task

    def begin(self, seed):
        return self.net.init(jax.random.key(seed), self.scaled(self.test_x[:1]))

    monkeypatch.setattr(task.Task, "trained", begin)


def errors(table, names):
    """The means of a table's cells, by column; each stands with its range."""
    columns = {column.header: list(column.cells) for column in table.columns}
    found = {name: [float(cell.partition("%")[0]) for cell in columns[name]] for name in names}
    assert all(0 <= v <= 100 for values in found.values() for v in values)
    return found


def test_what_a_camera_does():
    import task

    flat = np.full((2, 32, 32, 3), 100, np.uint8)
    flat[1] += 50
    x = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    np.testing.assert_array_equal(task.corrupted("none", x, 0), x)
    for name in ("blur", "contrast"):  # leave what is of one colour, and take from what is not
        np.testing.assert_array_equal(task.corrupted(name, flat, 0), flat)
        assert task.corrupted(name, x, 0).std() < 0.5 * x.std()
    np.testing.assert_array_equal(task.corrupted("brightness", flat, 0), flat + 80)
    noise = np.float32(task.corrupted("noise", flat, 0)) - flat
    assert abs(noise.std() / 30 - 1) < 0.02
    assert (task.corrupted("noise", flat, 0) != task.corrupted("noise", flat, 1)).any()


def test_tent_answers_first_as_recalibration_does_and_a_large_prior_as_the_source(untrained):
    import task
    import tent

    its = task.Task(None, 1, 128, 96)
    its.observed = lambda variables, x, **options: its.net.apply(variables, x, **options)
    variables = its.trained(0)
    batches = [its.scaled(its.test_x[:48])] * 3
    ways = {"source": tent.source, "batch": tent.adapted, "TENT": tent.tent}
    answers = {name: f(its, variables, batches) for name, f in ways.items()}
    tolerance = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(answers["TENT"][0], answers["batch"][0], **tolerance)
    p = [jax.nn.softmax(logits) for logits in answers["TENT"]]
    first, second, third = (-(v * np.log(v)).sum() for v in p)  # of one batch, three times
    assert first > second > third
    prior = tent.blended(its, variables, batches[:1], prior=1e9)
    np.testing.assert_allclose(prior[0], answers["source"][0], **tolerance)


def test_the_table_of_tent(monkeypatch):
    import tent

    monkeypatch.setattr(tent, "CORRUPTIONS", ("none", "contrast"))
    monkeypatch.setattr(tent, "WAYS", {"source": tent.source, "TENT": tent.tent})
    table = tent.main(sizes=(48,), **SMALL)
    found = errors(table, tent.WAYS)
    assert [len(values) for values in found.values()] == [2] * len(tent.WAYS)


def test_weights_make_statistics_those_of_classes_alike(monkeypatch, untrained):
    import weights

    y = np.repeat(np.arange(10), 40)
    rows = weights.uneven(y, 0.8, np.random.default_rng(0))
    assert len(set(rows)) == 50
    assert np.mean(y[rows] == 0) == 0.8
    w = weights.evened(y[rows])
    found = np.unique(y[rows])
    sums = [w[y[rows] == c].sum() for c in found]
    np.testing.assert_allclose(sums, 50 / len(found), rtol=1e-5)

    monkeypatch.setattr(weights, "CORRUPTIONS", ("none",))
    monkeypatch.setattr(weights, "BATCH", 8)
    found = errors(weights.main(**SMALL), weights.WAYS)
    assert [len(values) for values in found.values()] == [1] * len(weights.WAYS)
