"""What a type checker sees of the package: typos, in names as in keywords, and no `Any`."""

import pathlib
import subprocess
import sys
import types

import pytest

import jaxbn

ROOT = pathlib.Path(jaxbn.__file__).parents[1]
RIGHT = """
import jax.numpy as jnp
from flax import nnx

import jaxbn
from jaxbn import calls, layers

params, state = jaxbn.init(3)
y, new = jaxbn.batch_norm(jnp.ones((4, 3)), params, state, train=True)
layer = jaxbn.nnx.BatchNorm(3, momentum=None, virtual_batch_size=2, rngs=nnx.Rngs(0))
net = jaxbn.linen.BatchNorm(use_running_average=True, momentum=None, unbiased=True)
findings: list[jaxbn.health.Finding] = jaxbn.health.check({})
found: dict[str, layers.Layer] = jaxbn.layers.find({})
hooked = calls.hooked_apply(net.apply)
"""
# Line → what mypy must say of it.
TYPOS = {
    "jaxbn.nope": 'Module has no attribute "nope"',
    "jaxbn.linnen.BatchNorm()": 'Module has no attribute "linnen"',
    "jaxbn.health.chek({})": 'Module has no attribute "chek"',
    "jaxbn.layers.fined({})": 'Module has no attribute "fined"',
    "jaxbn.writers.opn": 'Module has no attribute "opn"',
    "jaxbn.init(features=3, dtpe=None)": 'Unexpected keyword argument "dtpe" for "init"',
    "jaxbn.health.check({}, momentm=1)": 'Unexpected keyword argument "momentm" for "check"',
    "jaxbn.nnx.BatchNorm(3, momentm=1, rngs=rngs)": (
        'Unexpected keyword argument "momentm" for "BatchNorm"'
    ),
    "jaxbn.linen.BatchNorm(momentm=1)": 'Unexpected keyword argument "momentm" for "BatchNorm"',
}
HEAD = ["import jaxbn", "from flax import nnx", "rngs = nnx.Rngs(0)"]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What mypy says of the lines of three files, by file and line; notes are of revealed types."""
    folder = tmp_path_factory.mktemp("types")
    (folder / "right.py").write_text(RIGHT)
    (folder / "typos.py").write_text("\n".join([*HEAD, *TYPOS]))
    reveal = ["import jaxbn", *(f"reveal_type(jaxbn.{name})" for name in jaxbn.__all__)]
    (folder / "reveal.py").write_text("\n".join(reveal))
    # The package's own options, so that what `make lint` has read is read no more.
    files = [f"{folder}/{name}.py" for name in ("right", "typos", "reveal")]
    command = [sys.executable, "-m", "mypy", "--hide-error-context", "--no-error-summary", *files]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.stderr == ""
    lines: dict = {"right": {}, "typos": {}, "reveal": {}}
    for line in run.stdout.splitlines():
        path, number, kind, text = line.split(":", 3)
        if kind == " error" or "Revealed type" in text:
            lines[pathlib.Path(path).stem].setdefault(int(number), text.strip())
    return lines


def test_right_calls_pass(said):
    assert said["right"] == {}


@pytest.mark.parametrize("line", TYPOS)
def test_typos_are_found(line, said):
    number = len(HEAD) + 1 + list(TYPOS).index(line)
    assert said["typos"].get(number, "").startswith(TYPOS[line])


def test_nothing_public_is_any(said):
    revealed = {name: said["reveal"][2 + i] for i, name in enumerate(jaxbn.__all__)}
    assert [name for name, kind in revealed.items() if 'is "Any"' in kind] == []
    modules = {name for name, kind in revealed.items() if "Module" in kind}
    assert modules == {
        name for name in jaxbn.__all__ if isinstance(getattr(jaxbn, name), types.ModuleType)
    }


def test_dir_is_all():
    assert dir(jaxbn) == sorted(jaxbn.__all__)
    assert set(jaxbn._LAZY) < set(jaxbn.__all__)
