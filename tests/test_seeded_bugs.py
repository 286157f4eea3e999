"""The table of seeded bugs does not rot; all of it runs by `python -m tests.seeded_bugs`."""

import pytest

from tests.seeded_bugs import BUGS, fails, occurrences


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_the_seeded_line_stands_there_once(bug):
    assert occurrences(bug) == 1


def test_a_seeded_bug_is_caught():
    assert fails(next(bug for bug in BUGS if bug.name == "epsilon outside the root"))
