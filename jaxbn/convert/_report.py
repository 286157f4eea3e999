"""What a conversion did: every array that was moved, as a table."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxbn._text import aligned, printable, short


class Move(NamedTuple):
    """One array that was converted."""

    source: str  # key in the source
    target: str  # path in the target
    shape: tuple[int, ...]  # in the target
    how: str  # what was done to the array


class Report(NamedTuple):
    """What a conversion did. `print(report)` prints a table.

    >>> from jaxbn.convert._report import Move, Report
    >>> how = "OI → IO"
    >>> print(
    ...     Report((Move("fc.weight", "params/fc/kernel", (4, 2), how),), "names", (), (), {}, ())
    ... )
    source     target            shape  how
    fc.weight  params/fc/kernel  4x2    OI → IO
    1 array, matched by names
    """

    moves: tuple[Move, ...]
    matched_by: str  # "names", "order" (numbers in the names, or shapes), "rename"
    dropped: tuple[str, ...]  # keys of the source that have no place in the target
    kept: tuple[str, ...]  # paths of the target that stay as they were
    batch_norm: Mapping[str, Mapping[str, Any]]  # layer → arguments that continue the source's norm
    notes: tuple[str, ...]

    def __str__(self) -> str:
        rows = [("source", "target", "shape", "how")]
        rows += [
            (m.source, m.target, "x".join(map(str, m.shape)) or "()", m.how) for m in self.moves
        ]
        lines = aligned(rows)
        plural = "" if len(self.moves) == 1 else "s"
        lines.append(f"{len(self.moves)} array{plural}, matched by {self.matched_by}")
        lines += [f"dropped: {short(self.dropped)}"] * bool(self.dropped)
        lines += [f"kept: {short(self.kept)}"] * bool(self.kept)
        for text, names in _grouped(self.batch_norm).items():
            lines.append(f"BatchNorm({text}) for {short(names)}")
        return "\n".join([*lines, *map(printable, self.notes)])


def _grouped(batch_norm: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for layer, arguments in batch_norm.items():
        text = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        groups.setdefault(text, []).append(layer or "the layer")
    return groups
