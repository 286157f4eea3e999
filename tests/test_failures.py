"""Each script of examples/failures: the failure, what the health check says, and the cure."""

import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tests.test_devices_page import as_pasted, compiled_quickly

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "examples" / "failures"
# Script → accuracy at most before and at least after the cure, and what is found before.
EXPECTED = {
    "batch_of_one": (0.2, 0.93, {"few_values"}),  # 0.2: chance is 0.1, its sd on 517 images 0.013
    "never_updated": (0.85, 0.9, {"never_updated"}),
    "tiny_local_batches": (0.88, 0.92, {"few_values"}),
    "high_learning_rate": (0.85, 0.8, {"stale"}),
    "domain_shift": (0.4, 0.93, {"drift"}),
    "frozen_at_start": (0.85, 0.87, {"never_updated"}),
    "torch_momentum": (0.87, 0.88, {"stale"}),
    "large_means": (0.45, 0.9, {"large_mean", "not_finite"}),
    "padding": (0.85, 0.9, {"padding", "stale"}),
}


@pytest.fixture(scope="module", autouse=True)
def _scripts():
    sys.path.insert(0, str(SCRIPTS))
    with as_pasted(), compiled_quickly():
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


@pytest.mark.parametrize("name", EXPECTED)
def test_symptom_finding_and_cure(name, results):
    at_most, at_least, kinds = EXPECTED[name]
    result = results(name)
    assert result.before <= at_most
    assert {finding.kind for finding in result.findings} == kinds
    assert result.after >= max(at_least, result.before + 0.05)
    assert result.left == []


def test_every_script_is_tested():
    assert tuple(EXPECTED) == import_module("all").FAILURES
    scripts = {path.stem for path in SCRIPTS.glob("*.py")} - {"all", "failure"}
    assert scripts == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_page_has_the_scripts_row(name, results):
    """Accuracies within 0.1: the digits are the same everywhere, but not the rounding.

    With large steps, or statistics of two rows, it decides where the last step ends.
    """
    within = {"high_learning_rate": 0.2, "tiny_local_batches": 0.35}.get(name, 0.1)
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    figure = re.compile(r"\b\d\.\d\d\b")
    row = import_module("all").row(results(name))
    words = {figure.sub("", line): line for line in page.splitlines()}
    assert figure.sub("", row) in words
    shown, seen = (list(map(float, figure.findall(v))) for v in (words[figure.sub("", row)], row))
    assert shown == pytest.approx(seen, abs=within)


def test_page_has_a_section_a_script():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    sections = re.findall(r"^## (.+)\n+`examples/failures/(\w+)\.py`", page, re.MULTILINE)
    linked = re.findall(r"^\| \[(.+?)\]\(#(.+?)\) \|", page, re.MULTILINE)
    assert [name for _, name in sections] == list(EXPECTED)
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
