"""`python docs/notebook.py`: writes the pages of `docs/start` that are notebooks as notebooks.

The page is the source. The notebook has the page's cells, and a first cell that installs jaxbn.
"""

import os
import pathlib

import jupytext
import nbformat

PAGES = [pathlib.Path(__file__).parent / "start" / "one-network.md"]
INSTALL = "%pip install -q 'jaxbn[examples,export,watch]'"


def main() -> None:
    for page in PAGES:
        notebook = jupytext.reads(page.read_text(), fmt="md")
        notebook.cells.insert(1, nbformat.v4.new_code_cell(INSTALL))
        for number, cell in enumerate(notebook.cells):
            cell.id = f"cell-{number}"  # the same in every run
        path = page.with_suffix(".ipynb")
        temporary = path.with_name(f".{path.name}")
        nbformat.write(notebook, temporary)
        os.replace(temporary, path)
        print(f"written   {path.name}, {len(notebook.cells)} cells")


if __name__ == "__main__":
    main()
