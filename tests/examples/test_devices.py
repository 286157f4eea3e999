"""A training step by each road of examples/devices, beside that of one device."""

import runpy
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "devices"
sys.path.insert(0, str(FOLDER))

import network  # noqa: E402 - it is no package

ROADS = runpy.run_path(str(FOLDER / "all.py"))["ROADS"]


def test_all_roads_are_in_the_folder_and_in_all():
    assert set(ROADS) == {path.stem for path in FOLDER.glob("*.py")} - {"all", "network"}


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `network.main` on these roads: its exit status, and its last line."""

    def run(roads):
        monkeypatch.setattr(sys, "argv", ["all.py"])
        monkeypatch.setattr(jax.config, "update", lambda *_: None)  # they are there already
        status = 0
        try:
            network.main("all.py", roads)
        except SystemExit as ended:
            status = ended.code
        return status, capsys.readouterr().out.splitlines()

    return run


def test_all_roads_agree_with_one_device(command):
    status, lines = command(ROADS)
    assert status == 0
    assert lines[-1] == "All agree with one device, up to rounding."
    assert [name for name in ROADS if sum(f"│ {name} " in line for line in lines) != 1] == []


def test_a_road_that_is_off_in_any_array_is_named(monkeypatch, command):
    """By two parts in 100,000, much less than one device's own statistics would be off."""
    right = [np.ones(3, np.float32), np.ones(3, np.float32), np.float32(1)]
    roads = {"right": lambda *_: right}
    for i in range(3):
        off = [*right]
        off[i] = right[i] * np.float32(1 + 2e-5)
        roads[f"off in {i}"] = lambda *_, off=off: off
    monkeypatch.setattr(network, "one_device", lambda *_: right)
    status, lines = command(roads)
    assert (status, lines[-1]) == (1, "off in 0, off in 1, off in 2: not what one device gives")
