"""Names, lists and tables as plain text that is safe to print."""

from collections.abc import Iterable, Sequence


def printable(text: object) -> str:
    r"""The text with every character that a terminal would obey or cannot print as an escape.

    Text from a file (the name of a layer, an error that quotes the file) passes through here before
    it is printed. Otherwise an escape sequence could overwrite the screen, a newline could forge a
    line, and a lone surrogate could not be encoded.

    >>> from jaxbn import _text
    >>> _text.printable("\x1b[31mbn\n")
    '\\x1b[31mbn\\n'
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def a_kind(value: object) -> str:
    """The name of the value's type with its article, for errors that say what came.

    >>> from jaxbn import _text
    >>> _text.a_kind({}), _text.a_kind(3)
    ('a dict', 'an int')
    """
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def distinct(names: Iterable[str]) -> list[str]:
    """The names, with a number behind every name that came before.

    >>> from jaxbn import _text
    >>> _text.distinct(["bn", "bn", "head"])
    ['bn', 'bn (2)', 'head']
    """
    seen: dict[str, int] = {}  # name → how often it came so far
    for name in names:
        while name in seen:
            seen[name] += 1
            name = f"{name} ({seen[name]})"
        seen[name] = 1
    return list(seen)


def first_line(error: BaseException) -> str:
    r"""The first line of an error, printable, of at most 500 characters.

    >>> from jaxbn import _text
    >>> _text.first_line(ValueError("no numbers.\nfile content: ..."))
    'no numbers'
    >>> _text.first_line(KeyError("F4"))
    "KeyError: 'F4'"
    """
    line = next(iter(str(error).strip().splitlines()), "").rstrip(".:")
    if not line or isinstance(error, KeyError):  # the text of a KeyError is the key alone
        line = f"{type(error).__name__}: {line}".removesuffix(": ")
    line = printable(line)
    return line if len(line) <= 500 else f"{line[:499]}…"


def aligned(rows: Sequence[Sequence[str]], right: int = 0) -> list[str]:
    """The rows as printable lines with aligned columns; the last `right` columns to the right.

    >>> from jaxbn import _text
    >>> _text.aligned([("site", "error"), ("dense", "0")], right=1)
    ['site   error', 'dense      0']
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = len(widths) - right

    def line(row: Sequence[str]) -> str:
        cells = [x.ljust(n) for x, n in zip(row[:left], widths[:left], strict=True)]
        cells += [x.rjust(n) for x, n in zip(row[left:], widths[left:], strict=True)]
        return "  ".join(cells).rstrip()

    return [line(row) for row in rows]


def short(names: Iterable[object], most: int = 4) -> str:
    """The first `most` names, printable, and the number of the others.

    >>> from jaxbn import _text
    >>> _text.short("abc", most=2)
    'a, b and 1 more'
    """
    all_ = list(map(printable, names))
    return ", ".join(all_[:most]) + (f" and {len(all_) - most} more" if len(all_) > most else "")


def listed(paths: Iterable[str], most: int = 12) -> str:
    """As `short`, quoted as a list, for paths that a user may copy from an error message.

    The path of a model that is one layer and nothing else is empty.

    >>> from jaxbn import _text
    >>> _text.listed("abc", most=2)
    "['a', 'b' and 1 more]"
    >>> _text.listed([""])
    "['' (the model itself)]"
    """
    quoted = (repr(path) if path else "'' (the model itself)" for path in paths)
    return f"[{short(quoted, most)}]"
