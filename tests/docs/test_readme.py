"""Every python block of the README and the docs runs as pasted, those of a page in order."""

import json
import pathlib

import jax
import pytest

from tests.support.pages import BLOCK

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    names = {"__name__": page.stem}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as pasted
        for block in BLOCK.finditer(text):
            above = text[: block.start(1)].count("\n")  # tracebacks name the line of the page
            exec(compile("\n" * above + block[1], page, "exec"), names)


@pytest.mark.parametrize("notebook", sorted((ROOT / "docs").rglob("*.ipynb")), ids=lambda p: p.stem)
def test_a_notebook_is_its_page(notebook):
    """The same blocks in the same order, after a cell that installs: `python docs/notebook.py`."""
    cells = json.loads(notebook.read_text())["cells"]
    install, *code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert install.startswith("%pip install")
    blocks = [block.strip() for block in BLOCK.findall(notebook.with_suffix(".md").read_text())]
    assert code == blocks
