"""`python -m tests.house_tree`: writes the tree of jaxbn/ into CONTRIBUTING.md.

A line a file, from the first line of the file's docstring, between two markers.
"""

import ast
import os
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
START = "<!-- tree: from the files' first docstring lines, by `python -m tests.house_tree` -->"
END = "<!-- /tree -->"
WIDTH = 26  # of the names


def first_line(file: Path) -> str:
    return (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0].rstrip(".")


def tree() -> str:
    """The files of jaxbn/: those at the top, then the rooms, each file under its room."""
    package = ROOT / "jaxbn"
    lines = ["jaxbn/"]

    def add(depth: int, name: str, text: str) -> None:
        lines.append(f"{'  ' * depth + name:{WIDTH}} {text}")

    def walk(room: Path, depth: int) -> None:
        for file in sorted(room.glob("*.py")):
            if file.name != "__init__.py" or room == package:
                add(depth, file.name, first_line(file))
        for init in sorted(room.glob("*/__init__.py")):
            add(depth, f"{init.parent.name}/", first_line(init))
            walk(init.parent, depth + 1)

    walk(package, 1)
    return "\n".join(lines)


def page() -> str:
    """CONTRIBUTING.md with the tree of today."""
    parts = re.split(f"({re.escape(START)}|{re.escape(END)})", PAGE.read_text())
    before, _, _, _, after = parts
    return f"{before}{START}\n\n```text\n{tree()}\n```\n\n{END}{after}"


def main() -> None:
    text = page()
    temporary = PAGE.with_name(f".{PAGE.name}")
    temporary.write_text(text)
    os.replace(temporary, PAGE)


if __name__ == "__main__":
    main()
