"""The layout: a room imports only rooms before it, and no path of the package hides what it is."""

import subprocess
import sys

import pytest

import jaxbn
from tests import house_tree
from tests.support.house import FILES, LINE, ROOT, file_of, imports, parts

APART = "_adapt"  # the room whose files do not import one another


def test_each_name_has_a_place_and_each_place_a_name():
    assert {parts(file)[0] for file in FILES} == set(LINE)


@pytest.mark.parametrize("room", LINE)
def test_a_room_imports_only_rooms_before_it(room):
    wrong = [
        f"{'/'.join(parts(file))} imports {'/'.join(other)}"
        for file in FILES
        if parts(file)[0] == room
        for other in imports(file)
        if other[0] != room and LINE[other[0]] >= LINE[room]
    ]
    assert wrong == []


def test_files_that_stand_apart_do_not_import_one_another():
    apart = [file for file in FILES if parts(file)[0] == APART]
    assert [file.stem for file in apart if any(m[0] == APART for m in imports(file))] == []


def test_no_import_goes_in_a_circle():
    """Anywhere in the text, but for a package's own names: `__init__` is what its files make up."""
    graph = {parts(file): {m for m in imports(file) if m != parts(file)} for file in FILES}
    public = {names for names in graph if file_of(names).name == "__init__.py"}
    graph = {names: others - public for names, others in graph.items()}
    while ends := [names for names, others in graph.items() if not others & set(graph)]:
        for names in ends:
            del graph[names]
    assert graph == {}


@pytest.mark.parametrize("file", FILES, ids=lambda file: "/".join(parts(file)))
def test_a_private_path_carries_one_underscore_and_a_public_one_none(file):
    """A private room or a private file in a public room; what carries none is in `__all__`."""
    names = parts(file)
    if names in (("__init__",), ("__main__",)):
        return
    underscores = sum(name.startswith("_") for name in names)
    if len(names) == 1:
        assert (underscores == 0) == (names[0] in jaxbn.__all__)
    else:
        assert underscores == 1
    assert not any(name.startswith("__") for name in names)


def test_the_printed_tree_is_the_tree():
    """CONTRIBUTING has a line for every file: `python -m tests.house_tree` writes them."""
    assert house_tree.page() == house_tree.PAGE.read_text()
    assert [file for file in FILES if not house_tree.first_line(file)] == []


def test_dir_is_what_is_public():
    """No module of an inner room, and nothing that is only imported, is an attribute."""
    code = "import jaxbn; print([n for n in dir(jaxbn) if n[0] != '_' and n not in jaxbn.__all__])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("room", [n for n in LINE if (ROOT / n).is_dir() and n[0] != "_"])
def test_a_public_room_says_what_is_public(room):
    """All of it without an underscore, and defined in the room's own files."""
    module = getattr(jaxbn, room)
    assert list(module.__all__) == sorted(set(module.__all__), key=_order)
    foreign = [
        name
        for name in module.__all__
        if getattr(getattr(module, name), "__module__", module.__name__).split(".")[1:2] != [room]
    ]
    assert foreign == []
    bound = {name for name in vars(module) if name[0] != "_"}
    assert bound == set(module.__all__)


def _order(name):
    """Constants, then classes, then functions, as the linter sorts them."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name
