"""The contract of a writer, and what the writers share."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from jaxbn._files import check_is_path
from jaxbn._text import distinct, printable
from jaxbn.watch._metrics import Channels

Figures = Mapping[str, Mapping[str, float]]  # layer → metric → figure


class Writer:
    """The base class of writers. A class of your own needs `write`, and goes to `Log` as well.

    >>> from jaxbn import writers
    >>> class Print(writers.Writer):
    ...     def write(self, step, figures, arrays):
    ...         print(step, figures["bn"]["scale_abs_min"])
    >>> Print().write(50, {"bn": {"scale_abs_min": 0.5}}, {})
    50 0.5
    """

    def write(self, step: int, figures: Figures, arrays: Mapping[str, Channels]) -> None:
        """Write all of a step, or raise and write nothing.

        Args:
          step: the training step.
          figures: layer → metric → figure, as from `jaxbn.watch.metrics`.
          arrays: layer → name → array [C], as from `jaxbn.watch.channels`.
        """
        raise NotImplementedError

    def rewind(self, step: int) -> None:
        """Drop what was written for this step and later ones, because training repeats them."""

    def close(self) -> None:
        """Release what the writer holds; nothing more will be written."""

    def __str__(self) -> str:
        """Where to look for the figures."""
        return type(self).__name__


def labelled(of_layers: Mapping[str, Any]) -> dict[str, Any]:
    """The layers by printable, distinct names, which every encoding and terminal can show."""
    names = distinct(printable(layer) or "." for layer in of_layers)
    return dict(zip(names, of_layers.values(), strict=True))


def new_or_there(call: str, folder: Any, name: str = "") -> Path:
    """The path, after making sure that the file exists and can be appended to."""
    check_is_path(call, folder)
    path = Path(folder) / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise OSError(
            f"{call}: cannot write {printable(path)} ({reason(error)}), expected a folder that "
            f"this process may write in."
        ) from None
    return path


def append(path: Path, data: bytes) -> None:
    """Append all of data to the file, or raise and append nothing."""
    size = path.stat().st_size
    try:
        with path.open("ab") as file:
            file.write(data)
    except OSError:
        with suppress(OSError):
            os.truncate(path, size)
        raise


def reason(error: BaseException) -> str:
    """The text of an error, without the number of an OSError."""
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
