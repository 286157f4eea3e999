"""Compiled programs as text that can be compared."""

import re

# What a module says of the lines of Python that it came from.
LINES = re.compile(r", metadata=\{[^}]*\}|^\d+ .*\n", re.MULTILINE)


def text(compiled):
    """The module, but for where in the sources it came from."""
    return LINES.sub("", compiled.as_text())
