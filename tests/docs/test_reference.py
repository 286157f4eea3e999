"""The reference has every public name, on the page of the name's namespace, once."""

import inspect
import re
from pathlib import Path

import pytest

import jaxbn

PAGES = Path(__file__).parents[2] / "docs" / "reference"
NAMESPACES = [name for name in jaxbn.__all__ if inspect.ismodule(getattr(jaxbn, name))]
DIRECTIVE = re.compile(r"^\.\. (?:auto(?:function|class)|py:data):: jaxbn\.([\w.]+)$", re.MULTILINE)


def public(namespace):
    """What a namespace declares as public, or else what it defines without an underscore."""
    if namespace == "jaxbn":
        return set(jaxbn.__all__) - set(NAMESPACES)
    module = getattr(jaxbn, namespace)
    if (declared := getattr(module, "__all__", None)) is not None:
        return set(declared)
    return {
        name
        for name, value in vars(module).items()
        if name[0] != "_"
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    }


@pytest.mark.parametrize("namespace", ["jaxbn", *NAMESPACES])
def test_every_public_name_has_an_entry(namespace):
    entries = DIRECTIVE.findall((PAGES / f"{namespace}.md").read_text())
    prefix = "" if namespace == "jaxbn" else f"{namespace}."
    assert all(entry.startswith(prefix) for entry in entries)
    names = [entry.removeprefix(prefix) for entry in entries]
    assert sorted(names) == sorted(set(names))
    assert public(namespace) - set(names) == set()
    module = jaxbn if namespace == "jaxbn" else getattr(jaxbn, namespace)
    assert [name for name in names if not hasattr(module, name)] == []


def test_every_page_is_a_namespace():
    assert {page.stem for page in PAGES.glob("*.md")} == {"jaxbn", *NAMESPACES}
