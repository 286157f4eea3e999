"""The example in one file: what it trains, and the state that it saves."""

import ast
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.compiling import as_pasted

EXAMPLE = Path(__file__).parents[2] / "examples" / "first_steps.py"


@pytest.fixture(scope="module")
def example():
    with as_pasted():
        yield runpy.run_path(str(EXAMPLE))


def test_it_imports_nothing_from_beside_it():
    tree = ast.parse(EXAMPLE.read_text())
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    beside = {path.stem for path in EXAMPLE.parent.rglob("*") if path.suffix in ("", ".py")}
    assert imported & beside == set()


def test_it_learns_and_the_state_in_the_file_is_the_trained_one(example, tmp_path, capsys):
    out = tmp_path / "state.npz"
    scores, again = example["main"](epochs=4, out=out)
    assert scores[-1] > max(0.9, scores[0])
    assert again == scores[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["state.npz"]
    assert capsys.readouterr().out.count(f"{again:.2%}") == 3  # of the epoch, saved, restored
    with np.load(out) as file:  # count is the last leaf: 22 updates an epoch, none by evaluation
        assert list(file.values())[-1] == 4 * 22


def test_a_full_disk_leaves_the_file_before(example, tmp_path, monkeypatch, capsys):
    out = tmp_path / "state.npz"
    out.write_bytes(b"before")

    def full(file, *_):
        file.write(b"PK")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numpy.savez", full)
    monkeypatch.setattr(sys, "argv", ["first_steps.py", "--epochs", "1", "--out", str(out)])
    with as_pasted(), pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert ended.value.code == 2
    expected = f"first_steps.py: error: --out {out}: No space left on device\n"
    assert capsys.readouterr().err == expected
    assert out.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [out]
