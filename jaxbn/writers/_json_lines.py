"""Figures as lines of JSON in a file."""

import json
import math
import os
from collections.abc import Mapping

from jaxbn._files import replacing
from jaxbn._text import printable
from jaxbn.watch._metrics import Channels
from jaxbn.writers._writer import Figures, Writer, append, new_or_there

BEGIN = b'{"step": '  # of every line


class JSONLines(Writer):
    """A line for each step: `{"step": 50, "layers": {"bn1": {"batch_var_min": 0.25, …}, …}}`.

    Use it to keep all figures in one file that any program can read. NaN and infinity become null,
    because JSON has neither. An existing file is continued. If a killed program left half a line at
    the end, that half is cut off.

    Args:
      path: of the file; missing folders are made.

    Raises:
      TypeError: path is no path.
      OSError: the file cannot be written, or holds something else.

    >>> import pathlib, tempfile
    >>> from jaxbn import writers
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "watch.jsonl")
    ...     writers.JSONLines(path).write(50, {"bn": {"scale_abs_min": 0.5}}, {})
    ...     print(path.read_text(), end="")
    {"step": 50, "layers": {"bn": {"scale_abs_min": 0.5}}}
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = new_or_there("JSONLines", path)
        there = self.path.read_bytes()
        if there[: len(BEGIN)] != BEGIN[: len(there)]:
            raise FileExistsError(
                f"JSONLines: {printable(path)} holds something else than figures, expected a new "
                f"file, or a file that JSONLines has written; name another file."
            )
        if half := len(there) - (there.rfind(b"\n") + 1):
            os.truncate(self.path, len(there) - half)

    def __str__(self) -> str:
        return str(self.path)

    def write(self, step: int, figures: Figures, arrays: Mapping[str, Channels]) -> None:
        """Append the step's line."""
        layers = {
            layer: {k: v if math.isfinite(v) else None for k, v in of_layer.items()}
            for layer, of_layer in figures.items()
        }
        line = json.dumps({"step": step, "layers": layers}, allow_nan=False) + "\n"
        append(self.path, line.encode())

    def rewind(self, step: int) -> None:
        """Drop the lines of this step and later ones."""
        lines = self.path.read_text().splitlines(keepends=True)
        before = [line for line in lines if json.loads(line)["step"] < step]
        if before != lines:  # a device, /dev/null say, has no lines, and is not to be replaced
            with replacing(self.path) as file:
                file.write_text("".join(before))
