"""Damaged files end in a status and one line; many more: `python -m tests.fuzz_files`."""

import os
import subprocess
import sys

import pytest

from tests import fuzz_files

COUNT = 150


@pytest.fixture(scope="module")
def top():
    with fuzz_files.workplace() as top:
        yield top


def test_damaged_files_end_in_a_status_and_one_line(top):
    ends = {number: fuzz_files.case(number, top) for number in range(COUNT)}
    assert {number: end for number, end in ends.items() if end[2]} == {}
    assert {status for _, status, _ in ends.values()} == {0, 1, 2}
    assert len({kind for kind, _, _ in ends.values()}) > 15


def test_whole_programs_end_so_too(top):
    """What is printed past Python's streams is seen here: by a thread, by C++, at the exit."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    runs = []
    for number, name in enumerate(("ocdbt", "zarr")):
        path = top / f"program {number}"
        fuzz_files.shutil.copytree(top / "sound" / name, path)
        for file in path.rglob("*"):
            if file.is_file() and file.name not in ("_METADATA", ".zarray", "manifest.ocdbt"):
                file.write_bytes(file.read_bytes()[:-3])
        words = [sys.executable, "-m", "jaxbn", "doctor", str(path)]
        environment = {**os.environ, "PYTHONPATH": root, "PYTHONIOENCODING": "ascii"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        runs.append(subprocess.Popen(words, env=environment, **pipes))
    for run in runs:
        out, err = run.communicate()
        assert (run.returncode, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith("doctor: ")
