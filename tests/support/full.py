"""A disk without space: what Python says there, and a stdout on it."""

import contextlib
import io

NO_SPACE = "No space left on device"


def no_space(*_, **__):
    raise OSError(28, NO_SPACE)


@contextlib.contextmanager
def stdout_to(path, unbuffered):
    """Sys.stdout writes to path; unbuffered as under PYTHONUNBUFFERED.

    What is left to write at the end is an error again, as at the end of Python.
    """
    with open(path, "wb", buffering=0) as raw:
        buffer = raw if unbuffered else io.BufferedWriter(raw)
        stream = io.TextIOWrapper(buffer, write_through=unbuffered)
        with stream, contextlib.redirect_stdout(stream):
            yield
