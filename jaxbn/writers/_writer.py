"""What a writer of figures is, and what all of them share."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from jaxbn._text import distinct, printable
from jaxbn.watch import Channels

Figures = Mapping[str, Mapping[str, float]]  # layer → metric → figure


class Writer:
    """Where figures go; a class of your own with `write` does for `Log` as well.

    >>> from jaxbn import writers
    >>> class Print(writers.Writer):
    ...     def write(self, step, figures, arrays):
    ...         print(step, figures["bn"]["scale_abs_min"])
    >>> Print().write(50, {"bn": {"scale_abs_min": 0.5}}, {})
    50 0.5
    """

    def write(self, step: int, figures: Figures, arrays: Mapping[str, Channels]) -> None:
        """All of a step or nothing: layer → metric → figure, and layer → name → [C]."""
        raise NotImplementedError

    def rewind(self, step: int) -> None:
        """Training goes on from this step: what was written of it and of later ones is void."""

    def close(self) -> None:
        """Nothing more will be written."""

    def __str__(self) -> str:
        """Where to look."""
        return type(self).__name__


def labelled(of_layers: Mapping[str, Any]) -> dict[str, Any]:
    """The layers by names that any encoding and any terminal takes."""
    names = distinct(printable(layer) or "." for layer in of_layers)
    return dict(zip(names, of_layers.values(), strict=True))


def new_or_there(call: str, path: Path) -> Path:
    """The path of a file that can be appended to, made if it was not there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise OSError(
            f"{call}: cannot write {path} ({reason(error)}), expected a folder that this process "
            f"may write in."
        ) from None
    return path


def append(path: Path, data: bytes) -> None:
    """All of data at the end of the file, or none of it."""
    size = path.stat().st_size
    try:
        with path.open("ab") as file:
            file.write(data)
    except OSError:
        with suppress(OSError):
            os.truncate(path, size)
        raise


def reason(error: BaseException) -> str:
    """What an error says, without its number."""
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
