"""Each script of examples/failures: the failure, what the health check says, and the cure."""

import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tests.support.compiling import as_pasted

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "failures"
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
SPREAD = re.compile(r"(\d\.\d\d) \((\d\.\d\d) to (\d\.\d\d)\)")
NAMES = re.findall(r"^`examples/failures/(\w+)\.py`", PAGE, re.MULTILINE)


def rows():
    """Failure → its line on the page: the words, and mean, least and largest of both accuracies."""
    lines = (line for line in PAGE.splitlines() if SPREAD.search(line))
    return {
        SPREAD.sub("", line): [tuple(map(float, v)) for v in SPREAD.findall(line)] for line in lines
    }


@pytest.fixture(scope="module", autouse=True)
def _scripts():
    sys.path.insert(0, str(SCRIPTS))
    with as_pasted():
        yield
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def results(_scripts):
    known = {}

    def result(name):
        if name not in known:
            known[name] = import_module(name).main()
        return known[name]

    return result


@pytest.mark.parametrize("name", NAMES)
def test_symptom_finding_and_cure(name, results):
    """Words are the page's; accuracies in its ranges, widened by half of themselves and 0.03.

    The digits are the same everywhere, but not the rounding, and where steps are large or
    statistics noisy it does what another seed does. Of values that scatter like Gaussians ten span
    3.1 sd, so that a range widened by half on both sides leaves out 1 in 500. 0.03 for ranges
    that are narrow: 16 of 517 images.
    """
    result = results(name)
    row = import_module("all").row([result])
    spreads = rows()[SPREAD.sub("", row)]  # KeyError: the page has other words, or findings
    for figure, (_, least, most) in zip((result.before, result.after), spreads, strict=True):
        slack = (most - least) / 2 + 0.03
        assert least - slack <= figure <= most + slack
    assert result.after > result.before
    assert result.left == []


def test_on_the_page_every_cure_is_better_than_any_seed_without_it():
    assert len(rows()) == len(NAMES)
    for words, (before, after) in rows().items():
        for mean, least, most in (before, after):
            assert least <= mean <= most, words
        assert after[0] > before[2], words


def test_every_script_is_tested():
    assert tuple(NAMES) == import_module("all").FAILURES
    scripts = {path.stem for path in SCRIPTS.glob("*.py")} - {"all", "failure"}
    assert scripts == set(NAMES)


def test_several_seeds_are_several_runs(capsys, monkeypatch):
    failure = import_module("failure")
    found = failure.Finding("norm", "stale", "error", 1.0, 0.25, (), "jaxbn.recalibrate")
    figures = [(0.5, 0.875), (0.25, 1.0), (0.75, 0.75)]

    def main(seed=0):
        before, after = figures[seed]
        return failure.Result("a failure", before, [found], "health.check", "a cure", after, [])

    monkeypatch.setattr(sys, "argv", ["script.py", "--seeds", "3"])
    failure.show(main)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "a failure: test accuracy 0.50 (0.25 to 0.75)"
    assert out[-1] == "cure, a cure: test accuracy 0.88 (0.75 to 1.00), findings 0"


def test_page_has_a_section_a_script():
    sections = re.findall(r"^## (.+)\n+`examples/failures/(\w+)\.py`", PAGE, re.MULTILINE)
    linked = re.findall(r"^\| \[(.+?)\]\(#(.+?)\) \|", PAGE, re.MULTILINE)
    assert [name for _, name in sections] == NAMES
    assert [title.lower() for title, _ in sections] == [title.lower() for title, _ in linked]


def test_the_library_says_what_flax_passes_over():
    batch_of_one, frozen = import_module("batch_of_one"), import_module("frozen_at_start")
    assert batch_of_one.warned() == [
        "BatchNorm 'norm0': x with shape (1, 32) has one value per channel over all devices, so y "
        "is bias whatever x is; expected at least 2 in training. Use a larger batch, pool devices "
        "with axis_name=, or normalize by the running statistics with use_running_average=True "
        "(nnx: model.eval())."
    ]
    assert frozen.refused().startswith("freeze: the statistics of ['norm0'] were never updated")


def test_large_means_are_found_before_the_first_step(results):
    """And what is left after the last one is lost."""
    first, second = results("large_means").findings
    assert (first.kind, first.severity) == ("large_mean", "warning")
    assert 50 < first.figure < 65  # 290 / 5, the largest of 16 channels
    assert second.kind == "not_finite"
