"""The layout: imports go downward, `__all__` is what is public, docstrings carry an example."""

import ast
import importlib
import pathlib
import subprocess
import sys

import pytest

import jaxbn

ROOT = pathlib.Path(jaxbn.__file__).parent
FLOORS = (
    ("extras", "text"),
    ("axes", "collectives", "elsewhere", "files", "jaxprs", "state_dicts"),
    ("state", "affine", "sums", "tensors"),
    ("moments", "normalize", "kernels", "policy", "rewrite", "layouts", "matching", "variables"),
    ("derivative", "peers"),
    ("functional", "layers"),
    ("calls", "checkpoints", "findings", "one_value", "transfer", "selection"),
    ("diagnose", "incoming"),
    ("gap", "drift", "observe", "watch"),
    # No tool imports another.
    (
        "linen",
        "nnx",
        "replicas",
        "recalibrate",
        "freeze",
        "swap",
        "fold",
        "convert",
        "export",
        "health",
    ),
    ("formats",),
    ("writers", "options", "terminal", "pictures", "loading", "saving"),
    ("cli",),
    ("__main__",),
)
FLOOR = {module: i for i, floor in enumerate(FLOORS) for module in floor}
MODULES = sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "__init__")


def imports(module):
    """Modules of the package that a module imports, anywhere in its text."""
    for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "jaxbn":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxbn."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            names = (alias.name.split(".") for alias in node.names)
            yield from (name[1] for name in names if name[0] == "jaxbn" and len(name) > 1)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downward(module):
    assert module in FLOOR, f"{module} stands on no floor yet; add it to FLOORS"
    upward = [name for name in imports(module) if name in FLOOR and FLOOR[name] >= FLOOR[module]]
    assert upward == []


def public(module):
    """Classes and functions without an underscore that the module itself defines."""
    tree = ast.parse((ROOT / f"{module}.py").read_text())
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


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"^module 'jaxbn' has no attribute 'layernorm'$"):
        jaxbn.layernorm  # noqa: B018


@pytest.mark.parametrize("name", sorted(set(jaxbn.__all__) - {"Moments", "Params", "State"}))
def test_what_is_public_has_an_example(name):
    """A `>>>` in the docstring; for a module, in those of its public names."""
    thing = getattr(jaxbn, name)
    if isinstance(thing, type(ast)):
        things = [getattr(thing, member) for member in sorted(public(name))]
    else:
        things = [thing]
    assert things
    assert [t.__name__ for t in things if ">>>" not in (t.__doc__ or "")] == []


@pytest.mark.parametrize("module", MODULES)
def test_every_module_and_public_name_is_documented(module):
    loaded = importlib.import_module(f"jaxbn.{module}") if module != "__main__" else None
    assert loaded is None or loaded.__doc__
    for name in public(module):
        assert (getattr(loaded, name).__doc__ or "").strip(), f"{module}.{name}"


def test_importing_jaxbn_needs_no_flax():
    code = "import sys, jaxbn; print([m for m in ('flax', 'optax') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
