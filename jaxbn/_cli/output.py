"""What a process prints: if stdout cannot be written, the error says so, and blames no file."""

import os
from contextlib import suppress
from typing import Any


class OutputError(OSError):
    """Stdout cannot be written."""


class Output:
    """A text stream whose errors are `OutputError`.

    After an error nothing more is written, and each later call raises the error again: argparse
    prints its help and does not look whether the help was written.

    >>> import io
    >>> from jaxbn._cli import output
    >>> class Full(io.StringIO):
    ...     def flush(self):
    ...         raise OSError(28, "No space left on device")
    >>> output.Output(Full()).flush()
    Traceback (most recent call last):
        ...
    jaxbn._cli.output.OutputError: [Errno 28] No space left on device
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.failed: OutputError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return self._tried(self.stream.write, text)

    def flush(self) -> None:
        self._tried(self.stream.flush)

    def _tried(self, act: Any, *text: str) -> Any:
        if self.failed:
            raise self.failed
        try:
            return act(*text)
        except OSError as error:
            with suppress(OSError):  # Python writes the rest at its end, and would fail again
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            self.failed = OutputError(error.errno, error.strerror)
            raise self.failed from error
