"""Compiled programs as text that can be compared."""

import re

# What a module says of the lines of Python that it came from.
LINES = re.compile(r", metadata=\{[^}]*\}|^\d+ .*\n", re.MULTILINE)


def text(compiled):
    """The module, but for where in the sources it came from."""
    return LINES.sub("", compiled.as_text())


def inlined(text):
    """StableHLO with each call of a function replaced by that function's body."""
    pieces = re.split(r"^  func\.func (?:public |private )?@([\w.]+)", text, flags=re.MULTILINE)
    bodies = dict(zip(pieces[1::2], pieces[2::2], strict=True))

    def body(name):
        return re.sub(r"call @([\w.]+)", lambda call: body(call[1]), bodies[name])

    return pieces[0] + body("main")
