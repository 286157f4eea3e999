"""`python -m jaxbn`, and the console command `jaxbn`."""

import os
import sys

from jaxbn._cli.commands import main


def run() -> None:
    """Runs the command of this process and exits with the status of the command."""
    for stream in (
        sys.stdout,
        sys.stderr,
    ):  # print an escape for a character that the terminal lacks
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed the pipe: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 2
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)


if __name__ == "__main__":
    run()
