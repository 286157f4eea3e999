"""`python -m jaxbn`, and the console command `jaxbn`."""

import os
import sys


def run() -> None:
    """Runs the command of this process and exits with the status of the command."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this process
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        # Print an escape for a character that the terminal lacks.
        getattr(sys, name).reconfigure(errors="backslashreplace")
    try:
        from jaxbn._cli.commands import main  # takes a second, in which Ctrl-C may come

        status = main()
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # whose reader has closed the pipe: `| head`
            print(f"the output cannot be written: {error.strerror}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        status = 130
    sys.exit(status)


if __name__ == "__main__":
    run()
