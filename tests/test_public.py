"""What is public: `__all__` can be imported, is documented, and each name has an example."""

import ast
import importlib
import pathlib
import re
import subprocess
import sys

import pytest

import jaxbn

ROOT = pathlib.Path(jaxbn.__file__).parent
FILES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}


def public(module):
    """Classes and functions without an underscore that the module itself defines."""
    tree = ast.parse(FILES[module].read_text())
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {n.name for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_")}


def test_all_is_what_can_be_imported():
    assert list(jaxbn.__all__) == sorted(jaxbn.__all__)
    for name in jaxbn.__all__:
        assert getattr(jaxbn, name) is not None
    tree = ast.parse((ROOT / "__init__.py").read_text())
    bound = [
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxbn")
        for alias in node.names
    ]
    missing = {name for name in bound if not name.startswith("_")} - set(jaxbn.__all__)
    assert missing == set()


def test_help_is_a_map():
    """`help(jaxbn)` begins with the docstring of the package: every public name stands in it."""
    words = set(re.findall(r"\w+", jaxbn.__doc__))
    assert set(jaxbn.__all__) - words == set()


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"^module 'jaxbn' has no attribute 'layernorm'$"):
        jaxbn.layernorm  # noqa: B018


@pytest.mark.parametrize("name", sorted(set(jaxbn.__all__) - {"Moments", "Params", "State"}))
def test_what_is_public_has_an_example(name):
    """A `>>>` in the docstring; for a module, in those of its public names."""
    thing = getattr(jaxbn, name)
    if isinstance(thing, type(ast)):
        members = set(getattr(thing, "__all__", None) or public(thing.__name__))
        things = [m for m in (getattr(thing, m) for m in members) if callable(m)]
    else:
        things = [thing]
    assert things
    assert [t.__name__ for t in things if ">>>" not in (t.__doc__ or "")] == []


@pytest.mark.parametrize("module", FILES)
def test_every_module_and_public_name_is_documented(module):
    loaded = importlib.import_module(module)
    assert loaded.__doc__
    for name in public(module):
        assert (getattr(loaded, name).__doc__ or "").strip(), f"{module}.{name}"


def test_importing_jaxbn_imports_nothing_large():
    """Neither Flax nor optax, nor `jax.extend`, which brings Pallas."""
    code = (
        "import sys, jax; of_jax = set(sys.modules); import jaxbn; "
        "print([m for m in ('flax', 'optax', 'jax.extend') if m in set(sys.modules) - of_jax])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
