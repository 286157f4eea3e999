"""What the pages promise beside their blocks: links, commands that exist, figures with a device."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(DOCS.rglob("*.md")),
    *sorted(ROOT.glob("examples/*/README.md")),
]
DEVICE = re.compile(r"\b(CPUs?|cores?|GPUs?|TPUs?|H100)\b")
RATIO = re.compile(r"\bhalf the\b|\d of Flax's|\d (MB|GB|%)")


def paragraphs(text):
    return [part for part in re.split(r"\n\s*\n", text) if "```" not in part]


def test_the_index_links_every_page_in_the_order_of_its_tree():
    text = (DOCS / "index.md").read_text()
    trees = re.findall(r"```{toctree}\n(?::.*\n)*\n([\s\S]*?)```", text)
    tree = [page for part in trees for page in part.split()]
    assert re.findall(r"\]\(([\w/-]+)\.md\)", text) == tree
    pages = {str(page.relative_to(DOCS).with_suffix("")) for page in DOCS.rglob("*.md")}
    assert set(tree) == pages - {"index"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_commands_lead_somewhere(page):
    text = page.read_text()
    for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
        assert (page.parent / link).exists(), link
    joined = text.replace("\\\n", " ")
    for script, rest in re.findall(r"python (examples/\S+?\.py)([^\n`|#]*)", joined):
        source = "".join(p.read_text() for p in (ROOT / script).parent.glob("*.py"))
        for option in re.findall(r"--[a-z][\w-]*", rest):
            assert option == "--help" or f'"{option}"' in source, f"{script} {option}"


@pytest.mark.parametrize(
    "source",
    [*PAGES, ROOT / "pyproject.toml", *sorted((ROOT / "jaxbn").rglob("*.py"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_a_ratio_of_memory_says_of_which_device(source):
    """XLA makes different programs of one source: what is saved on CPUs may not be on GPUs."""
    text = source.read_text()
    if source.suffix == ".toml":
        text = tomllib.loads(text)["project"]["description"]
    claims = [p for p in paragraphs(text) if re.search("memory|temporar", p) and RATIO.search(p)]
    assert [p for p in claims if not DEVICE.search(p)] == []


@pytest.mark.parametrize("page", ["drift.md", "health.md"])
def test_alarm_rates_have_their_command(page):
    """In the section that has the rates."""
    sections = re.split(r"^#+ ", (DOCS / page).read_text(), flags=re.MULTILINE)
    (rates,) = [part for part in sections if re.search(r"False alarms, measured", part)]
    assert "    python examples/drift/" in rates
