"""Files that are written whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to. At the end it is renamed to `path`, unless an error came.

    Files written beside that place are moved with it, and before it.

    >>> import pathlib, tempfile
    >>> from jaxbn import _files
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "net.txt")
    ...     with _files.replacing(path) as file:
    ...         _ = file.write_text("whole")
    ...     path.read_text()
    'whole'
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        file = Path(folder, path.name)
        yield file
        for part in sorted(file.parent.iterdir(), key=lambda part: part == file):
            os.replace(part, path.parent / part.name)
