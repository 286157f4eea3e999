"""`python -m jaxbn`, and the console command `jaxbn`."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from jaxbn._cli.output import Output, OutputError


def run(main: Callable[[], int | None] | None = None) -> NoReturn:
    """Ends this process with the status of main; None for the command that its words name.

    What cannot be written, or read, is one line and status 2; Ctrl-C is one line and 130.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this process
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        # Print an escape for a character that the terminal lacks.
        getattr(sys, name).reconfigure(errors="backslashreplace")
    try:
        with contextlib.redirect_stdout(Output(sys.stdout)):
            try:
                status = (main or _command)()
            finally:
                sys.stdout.flush()
    except OutputError as error:
        if error.errno != errno.EPIPE:  # the reader has closed the pipe: `| head`
            print(f"the output cannot be written: {error.strerror}", file=sys.stderr)
        status = 2
    except OSError as error:
        print(f"{error.filename}: {error.strerror}" if error.filename else error, file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        status = 130
    sys.exit(status)


def _command() -> int:
    from jaxbn._cli.commands import main  # takes a second, in which Ctrl-C may come

    return main()


if __name__ == "__main__":
    run()
