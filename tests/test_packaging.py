"""The package's metadata: dependencies, pins, versions, and links on a package index."""

import ast
import importlib.util
import pathlib
import re
import sys
import tomllib

import pytest

import jaxbn

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXAMPLE = "https://code.example/team/jaxbn"


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _requirements():
    """(name, lower bound) of all that the package and its extras ask for."""
    project = PROJECT["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    found = {
        re.match(r"([\w.-]+)(?:>=([\w.]+))?", item).groups() for group in groups for item in group
    }
    return {(name.lower(), bound) for name, bound in found if name != "jaxbn"}


def _pins():
    """Pinned versions by name, one for each line of constraints.txt."""
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split(";")[0].strip().split("==")
            pins.setdefault(name.lower(), []).append(version)
    return pins


def _version(text):
    return tuple(int(part) for part in re.findall(r"\d+", text))


def test_links_of_the_readme_lead_to_files(build):
    readme = (ROOT / "README.md").read_text()
    targets = [match[3].split("#")[0] for match in build.LINK.finditer(readme)]
    assert targets
    assert [t for t in targets if not (ROOT / t).exists()] == []


def test_on_a_package_index_every_link_is_absolute(build):
    text = build.long_description((ROOT / "README.md").read_text(), EXAMPLE)
    assert build.LINK.findall(text) == []
    assert f"]({EXAMPLE}/blob/main/CONTRIBUTING.md)" in text
    picture = build.long_description("![y](docs/y.png) [a](https://a.example) [b](#b)", EXAMPLE)
    assert picture == f"![y]({EXAMPLE}/raw/main/docs/y.png) [a](https://a.example) [b](#b)"


def test_without_an_address_nothing_is_named(build):
    assert build.long_description("[a](docs/a.md)", "") == "[a](docs/a.md)"
    assert build.urls("") == {}
    assert set(build.urls(EXAMPLE)) == {"Source", "Documentation", "Changelog", "Issues"}
    assert build.address(ROOT) == PROJECT["tool"]["jaxbn"]["address"].rstrip("/")


def test_every_dependency_is_pinned_at_or_above_its_bound():
    pins = _pins()
    low = [
        (name, bound, pins.get(name))
        for name, bound in _requirements()
        if not pins.get(name) or any(_version(pin) < _version(bound or "0") for pin in pins[name])
    ]
    assert low == []


def test_hooks_format_with_the_ruff_that_is_pinned():
    hooks = set(re.findall(r"ruff==([\d.]+)", (ROOT / ".pre-commit-config.yaml").read_text()))
    assert hooks == set(_pins()["ruff"])


def test_one_version_everywhere():
    citation = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1]
    assert jaxbn.__version__ == PROJECT["project"]["version"] == citation


def test_the_package_imports_only_what_it_asks_for():
    """Each imported package is the standard library's, a dependency, or in an extra."""
    imported = set()
    for path in (ROOT / "jaxbn").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.split(".")[0])
    asked = {name.replace("-", "_") for name, _ in _requirements()} | {"orbax"}
    theirs = (
        imported - set(sys.stdlib_module_names) - {"jaxbn", "numpy", "scipy"}
    )  # jax brings these two
    lowered = {name.lower() for name in theirs}
    # PyTorch is never installed by us: its files are read where a user has it.
    assert lowered - asked - {"torch", "jaxlib", "msgpack"} == set()
    assert "optax" not in lowered
