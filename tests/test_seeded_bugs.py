"""The table of seeded bugs does not rot; all of it runs by `python -m tests.seeded_bugs`."""

import pytest

from tests.seeded_bugs import BUGS, chosen_by, fails, occurrences


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_the_seeded_line_stands_there_once(bug):
    assert occurrences(bug) == 1


def test_a_seeded_bug_is_caught():
    assert fails(next(bug for bug in BUGS if bug.name == "epsilon outside the root"))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["pivot of 1 row"], "'pivot of one row', "),
        (["pivot of one row", "zzz"], "'mean of means, not weighted by count', "),
    ],
)
def test_a_name_that_is_no_bugs_is_refused_with_names_like_it(names, expected):
    """Before any test runs, though another name is right."""
    with pytest.raises(SystemExit) as end:
        chosen_by(names)
    said = f"seeded_bugs: no bug is called {names[-1]!r}, expected a name such as {expected}"
    assert end.value.code.startswith(said)
    assert "\n" not in end.value.code
