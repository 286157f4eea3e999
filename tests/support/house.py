"""The rooms of the package, in the order in which they may import one another."""

import ast
import pathlib

import jaxbn

ROOT = pathlib.Path(jaxbn.__file__).parent
# A room imports rooms of lines above its own. Rooms of one line never import one another.
ROOMS = (
    ("_text",),
    ("_files", "_extras", "_elsewhere", "_misuse"),
    ("_op",),
    ("_inspection", "_folding"),
    ("linen", "nnx"),
    ("_adapt", "_swapping", "convert", "export", "health", "_checkpoints"),
    ("watch",),
    ("writers",),
    ("__init__",),
    ("_cli",),
    ("__main__",),
)
LINE = {room: i for i, line in enumerate(ROOMS) for room in line}
FILES = sorted(ROOT.rglob("*.py"))


def parts(file):
    """A file of the package as names: ("_op", "moments"), ("health",) for health/__init__.py."""
    names = file.relative_to(ROOT).with_suffix("").parts
    return names[:-1] if len(names) > 1 and names[-1] == "__init__" else names


def imports(file):
    """Modules of the package that a file imports, anywhere in its text, as `parts` names them."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: an import by dots"
            module = (node.module or "").split(".")
            if module[0] == "jaxbn":
                yield from (_module((*module[1:], alias.name)) for alias in node.names)
        elif isinstance(node, ast.Import):
            for names in (alias.name.split(".") for alias in node.names):
                if names[0] == "jaxbn":
                    yield _module(tuple(names[1:]))


def _module(names):
    """The module in which a name is found; the package itself where it is none's."""
    while names and not (ROOT.joinpath(*names).is_dir() or file_of(names).is_file()):
        names = names[:-1]
    return names or ("__init__",)


def file_of(names):
    path = ROOT.joinpath(*names)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
