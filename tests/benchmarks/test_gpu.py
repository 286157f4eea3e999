"""`python -m benchmarks gpu` runs to its end, and says what it does not know."""

import json

import pytest

from benchmarks.measures import gpu
from tests.support.compiling import environment


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_part_ends_and_each_result_is_a_line(tmp_path, capsys, monkeypatch):
    """With two of the four norms: on a CPU the time is that of the compiler."""
    chosen = ("Flax linen", "jaxbn, activation and residual")
    monkeypatch.setattr(gpu, "NORMS", {name: gpu.NORMS[name] for name in chosen})
    monkeypatch.setenv("XLA_FLAGS", environment()["XLA_FLAGS"])  # for the process of the speedrun
    assert gpu.main(["--tiny", "--results", str(tmp_path)]) == 0
    said = lines(capsys)
    (path,) = tmp_path.glob("*.jsonl")
    assert [json.loads(line) for line in path.read_text().splitlines()] == said
    assert said[0]["what"] == "run"
    assert said[0]["peak_GB_per_s"].startswith("unknown for 'cpu'")
    steps = [(one["dtype"], one["norm"]) for one in said if one.get("what") == "step"]
    assert steps == [(dtype, norm) for dtype in ("bfloat16", "float32") for norm in chosen]
    assert {one["name"] for one in said if one.get("what") == "pass"} >= {"y", "dx behind relu"}
    assert [one.get("seeds") for one in said if one.get("what") == "speedrun"] == [1]
    failed = {one["what"]: one["failed"] for one in said if "failed" in one}
    assert set(failed) <= {"torch"}
    assert said[-1]["what"] == "end"


def test_what_there_is_no_time_for_is_said(tmp_path, capsys, monkeypatch):
    run = gpu.Run(False, 30.0, tmp_path)
    monkeypatch.setattr(gpu, "plan", lambda *_: [gpu.Part("long", 40, lambda: 1 / 0)])
    monkeypatch.setattr(gpu, "Run", lambda *_: run)
    assert gpu.main(["--tiny", "--results", str(tmp_path)]) == 0
    assert lines(capsys)[1] == {"s": 0.0, "skipped": "long", "left_s": 30, "needs_s": 40}


def test_a_part_that_fails_leaves_the_others(tmp_path, capsys, monkeypatch):
    parts = [gpu.Part("bad", 1, lambda: 1 / 0), gpu.Part("good", 1, lambda: None)]
    monkeypatch.setattr(gpu, "plan", lambda *_: parts)
    assert gpu.main(["--tiny", "--results", str(tmp_path)]) == 0
    _, bad, end = lines(capsys)
    assert bad["failed"] == "ZeroDivisionError: division by zero"
    assert end["what"] == "end"


def test_without_a_gpu_it_says_what_to_write(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--results", str(tmp_path)])
    assert capsys.readouterr().err.splitlines()[-1] == (
        "python -m benchmarks gpu: error: the first device is 'cpu' (cpu), expected a GPU; run it "
        "on a machine with one and pip install 'jax[cuda12]', or write --tiny to see that it runs"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 3352),
        ("NVIDIA H100 PCIe", 2039),
        ("NVIDIA H200", 4800),
        ("NVIDIA A100-SXM4-40GB", None),
    ],
)
def test_the_bandwidth_of_an_unknown_gpu_is_not_guessed(kind, peak):
    assert gpu.bandwidth(kind) == peak
