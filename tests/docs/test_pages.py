"""What the pages promise beside their blocks: links, command lines, figures with a device."""

import importlib
import re
import tomllib
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from benchmarks.reporting import gallery, pictures
from tests.support import command_lines

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(DOCS.rglob("*.md")),
    *sorted(ROOT.glob("examples/**/README.md")),
]
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)]+)\)")
DEVICE = re.compile(r"\b(CPUs?|cores?|GPUs?|TPUs?|H100)\b")
RATIO = re.compile(r"\bhalf the\b|\d of Flax's|\d (MB|GB|%)")


def paragraphs(text):
    return [part for part in re.split(r"\n\s*\n", text) if "```" not in part]


def headings(page):
    """What a link may write behind #, as Sphinx and code hosts make it of each heading."""
    lines = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}


def test_the_index_links_every_page_in_the_order_of_its_tree():
    text = (DOCS / "index.md").read_text()
    trees = re.findall(r"```{toctree}\n(?::.*\n)*\n([\s\S]*?)```", text)
    tree = [page for part in trees for page in part.split()]
    assert re.findall(r"\]\(([\w/-]+)\.md\)", text) == tree
    pages = {str(page.relative_to(DOCS).with_suffix("")) for page in DOCS.rglob("*.md")}
    assert set(tree) == pages - {"index"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text()
    for path, heading in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not heading or heading in headings(target), f"{path}#{heading}"


SOURCES = [
    *PAGES,
    ROOT / "benchmarks" / "NOTES.md",
    *(p for room in ("jaxbn", "benchmarks", "examples") for p in (ROOT / room).rglob("*.py")),
]
COMMANDS = {str(p.relative_to(ROOT)): command_lines.printed(p.read_text()) for p in SOURCES}


@pytest.mark.parametrize("source", sorted(name for name in COMMANDS if COMMANDS[name]))
def test_command_lines_are_understood_by_their_programs(source):
    said = {line: command_lines.refusal(line) for line in COMMANDS[source]}
    assert {line: refusal for line, refusal in said.items() if refusal} == {}


def test_command_lines_in_a_text():
    """In backticks, in strings, in blocks; with comments, over two lines."""
    text = """Then `python -m jaxbn
# doctor a`, "python examples/a.py --b" and `make c`; make it so. (`python -m jaxbn fold`.)
```sh
$ python examples/a.py \\
    --c "1 2"    # a comment
make d  # another
python -m jaxbn doctor a > b
```
#   python -m benchmarks op      what it does
`python -m benchmarks {name}` and `python other.py`
    "write python -m jaxbn "
    "fold b"
"""
    assert command_lines.printed(text) == [
        "python -m jaxbn doctor a",
        "make c",
        "python -m jaxbn fold --help",
        "python examples/a.py --b",
        "python -m jaxbn fold b",
        'python examples/a.py --c "1 2"',
        "python -m benchmarks op",
        "make d",
    ]


@pytest.mark.parametrize(
    ("line", "refusal"),
    [
        ("python -m jaxbn doctr a", "argument COMMAND: invalid choice: 'doctr'"),
        ("python -m jaxbn doctor a --plt b", "unrecognized arguments: --plt b"),
        ("python -m jaxbn doctor", "the following arguments are required: CHECKPOINT"),
        ("python -m benchmarks ops", "argument NAME: 'ops', expected some of: op, memory"),
        ("python -m benchmarks.studies.compiled h1 --only op", "invalid choice: 'h1'"),
        ("python -m benchmarks.reporting.gallery none", "argument NAME: 'none', expected some of"),
        ("python examples/studies/momentum.py --seed x", "--seeds: invalid int value: 'x'"),
        ("make benches", "No rule to make target 'benches'"),
        ("make bench ARGS=ops", "argument NAME: 'ops', expected some of: op, memory"),
    ],
)
def test_a_command_line_that_its_program_refuses(line, refusal):
    assert refusal in command_lines.refusal(line)


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
    """In each section that has rates."""
    sections = re.split(r"^#+ ", (DOCS / page).read_text(), flags=re.MULTILINE)
    rates = [part for part in sections if re.search(r"False alarms, measured", part)]
    command = re.compile(r"^    python (examples/drift/|-m benchmarks\.studies\.)", re.MULTILINE)
    assert rates
    assert [part for part in rates if not command.search(part)] == []


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/extending.md"])
def test_files_to_edit_are_there(page):
    text = (ROOT / page).read_text()
    paths = re.findall(r"`((?:jaxbn|tests|docs|benchmarks)/[\w/.]+)`", text)
    assert paths
    assert [path for path in paths if "NAME" not in path and not (ROOT / path).exists()] == []
    for module, name in re.findall(r"`(?:jaxbn\.)?(_\w+)\.(\w+)`", text):
        (file,) = (ROOT / "jaxbn").rglob(f"{module}.py")
        assert re.search(rf"^(def |class )?{name}\b", file.read_text(), re.MULTILINE), name


def test_every_picture_is_small_drawn_by_a_command_and_shown():
    """With words for those who cannot see it."""
    drawn = {DOCS / "pictures" / f"{name}.png" for name in pictures.PICTURES}
    drawn |= {DOCS / "pictures" / "gallery" / f"{name}.png" for name in gallery.PICTURES}
    assert set((DOCS / "pictures").rglob("*.png")) == drawn
    shown = [(page, *match) for page in PAGES for match in PICTURE.findall(page.read_text())]
    assert {(page.parent / path).resolve() for page, _, path in shown} >= drawn
    assert [path for _, words, path in shown if not words] == []
    assert [path.name for path in drawn if path.stat().st_size > 60_000] == []


def scripts():
    """The example scripts that can be run; `all.py` stands for its neighbours."""
    return {
        str(path.relative_to(ROOT))
        for path in ROOT.glob("examples/**/*.py")
        if '__name__ == "__main__"' in path.read_text()
        and (path.stem == "all" or not path.with_name("all.py").exists())
    }


def test_every_example_has_a_picture():
    sections = (DOCS / "gallery.md").read_text().split("\n## ")[1:]
    assert [len(PICTURE.findall(section)) for section in sections] == [1] * len(sections)
    commands = [re.findall(r"`python (examples/\S+?\.py)", section) for section in sections]
    assert sorted(map(tuple, commands)) == sorted((script,) for script in scripts())


def test_the_table_of_examples_has_every_script_with_the_picture_of_the_gallery():
    """And is in the gallery's order."""
    sections = (DOCS / "gallery.md").read_text().split("\n## ")[1:]
    gallery_rows = [
        (re.search(r"`python examples/(\S+?\.py)", section)[1], PICTURE.search(section)[2])
        for section in sections
    ]
    lines = (ROOT / "examples" / "README.md").read_text().splitlines()
    rows = [line.strip("|").split(" | ") for line in lines if line.startswith("| [`")]
    shown = [(re.search(r"\((.*?)\)", row[0])[1], PICTURE.search(row[3])[2]) for row in rows]
    assert [(script, path.removeprefix("../docs/")) for script, path in shown] == gallery_rows
    assert [row for row in rows if not all(cell.strip() for cell in row)] == []


@pytest.mark.parametrize(
    "draw",
    [
        *(pictures.behind, pictures.memory),
        *(gallery.ship, gallery.speedrun, gallery.failures, gallery.alarms, gallery.false_alarms),
        *(gallery.stale, gallery.recalibrate, gallery.finetune, gallery.swap),
        *(gallery.renorm, gallery.tent, gallery.weights),
        *(
            gallery.learning_rate,
            gallery.batch_size,
            gallery.placement,
            gallery.synchronized,
            gallery.momentum,
            gallery.freeze_when,
        ),
    ],
    ids=lambda draw: draw.__name__,
)
def test_a_picture_names_its_subject_and_its_axes(draw):
    """Those that take no run of a script: their tables are in the pages."""
    figure = draw()
    assert figure.get_suptitle() or figure.axes[0].get_title()
    assert [axis for axis in figure.axes if not axis.get_xlabel()] == []


def test_a_picture_of_a_table_that_is_not_there():
    with pytest.raises(ValueError) as error:
        gallery.table("docs/swap.md", "no such column")
    assert str(error.value) == (
        "docs/swap.md: no table whose first column is 'no such column', expected one to draw."
    )


def test_no_arrow_of_the_house_passes_behind_a_room():
    """It would seem to lead there."""
    figure = pictures.house()
    for _ in range(2):  # once for the rooms, whose places the arrows read when they are drawn
        FigureCanvasAgg(figure).draw()
    texts = figure.axes[0].texts
    rooms = [text.get_bbox_patch() for text in texts if text.get_bbox_patch()]
    arrows = [text for text in texts if getattr(text, "arrow_patch", None)]
    assert len(rooms) > 15
    assert len(arrows) > 15
    for arrow in arrows:
        line, ends = arrow.arrow_patch.get_path(), {arrow.xycoords, arrow.anncoords}
        places = {room: room.get_window_extent() for room in rooms if room not in ends}
        assert not any(line.intersects_bbox(place, filled=False) for place in places.values())


def test_the_path_of_x_names_what_is_there():
    text = (DOCS / "design.md").read_text().split("```")[1]
    names = re.findall(r"(\w+)\.(\w+) ", text)
    assert len(names) > 3
    for module, name in names:
        assert hasattr(importlib.import_module(f"jaxbn._op.{module}"), name), f"{module}.{name}"


def test_a_newcomer_finds_install_and_a_tutorial_by_their_names():
    """The search of the site looks for these words in headings and in texts."""
    assert "\n## Install\n" in (DOCS / "index.md").read_text()
    starts = sorted((DOCS / "start").glob("*.md"))
    assert [page.name for page in starts if "tutorial" not in page.read_text().lower()] == []
