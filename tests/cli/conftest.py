"""The user's model that tests of the command line run."""

import pathlib
import re
import sys

import jax
import pytest

from jaxbn._checkpoints import write

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def net(tmp_path, monkeypatch):
    """The module of docs/doctor.md, its untrained checkpoint `net.msgpack`, and x."""
    page = (ROOT / "docs" / "doctor.md").read_text()
    (text,) = re.findall(r"^```python\n(# net\.py.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "net.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "net", raising=False)
    import net

    variables = net.Net().init(jax.random.key(3), net.batches()[0])
    write.save("net.msgpack", {"step": 7, "model": variables})
    return net
