"""Names and tables as plain text."""

from collections.abc import Iterable, Sequence


def aligned(rows: Sequence[Sequence[str]], right: int = 0) -> list[str]:
    """The rows as lines with columns under each other, the last `right` of them to the right.

    >>> from jaxbn import text
    >>> text.aligned([("site", "error"), ("dense", "0")], right=1)
    ['site   error', 'dense      0']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = len(widths) - right

    def line(row: Sequence[str]) -> str:
        cells = [x.ljust(n) for x, n in zip(row[:left], widths[:left], strict=True)]
        cells += [x.rjust(n) for x, n in zip(row[left:], widths[left:], strict=True)]
        return "  ".join(cells).rstrip()

    return [line(row) for row in rows]


def short(names: Iterable[str], most: int = 4) -> str:
    """The first names, and how many there are beside.

    >>> from jaxbn import text
    >>> text.short("abc", most=2)
    'a, b and 1 more'
    """
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
