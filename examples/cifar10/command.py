# What all command lines here do: an error is one line, `--help` ends with three examples, and what
# takes long shows how far it is.

import argparse
import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path

from rich.console import Console
from rich.progress import track


class DataError(Exception):
    """Something that cannot be read or written, and the line that says why."""


def shown(text: object) -> str:
    """The name of a file, or text from a file, without characters that a terminal would obey."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def told(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{shown(error.filename)}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def check_place(option: str, path: Path | None) -> None:
    """Refuses, before any work, a path where no file can be written."""
    if path is None:
        return
    folder, other = path.absolute().parent, path.exists() and not path.is_file()
    if not folder.is_dir():
        raise DataError(f"{option} {shown(path)}: there is no folder {shown(folder)}")
    if other or not os.access(folder, os.W_OK):
        raise DataError(
            f"{option} {shown(path)}: expected a file in a folder that this process may write in"
        )


@contextmanager
def new_file(path: Path):
    """
    A place beside `path` to write to, renamed to `path` at the end: whoever reads `path` never sees
    half a file. An error names `path`; that of a full disk would name nothing.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


class Output:
    """Stdout, whose errors name it, as those of a file name the file. Then no more is written."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        return self.tried(self.stream.write, text)

    def flush(self):
        self.tried(self.stream.flush)

    def tried(self, act, *text):
        try:
            return act(*text)
        except OSError as error:
            with suppress(OSError):  # Python writes the rest at its end, and would fail again
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            error.filename = "stdout"
            raise


class Parser(argparse.ArgumentParser):
    """`examples` are whole command lines."""

    def __init__(self, *args, examples: Sequence[str] = (), **options):
        if examples:
            options["epilog"] = "\n  ".join(["examples:", *examples])
            options["formatter_class"] = argparse.RawDescriptionHelpFormatter
            options["description"] = textwrap.fill(options["description"], 80)
        super().__init__(*args, **options)

    def print_help(self, file=None):  # argparse's own does not look whether it was written
        with one_line(self):
            print(self.format_help(), end="", file=file)

    def error(self, message):  # one line, without the usage above it
        self.exit(2, f"{self.prog}: error: {shown(message)}\n")


@contextmanager
def one_line(p: Parser):
    """
    What cannot be read or written, or is not installed, ends the program in one line and status 2;
    Ctrl-C in 130.
    """
    try:
        with redirect_stdout(Output(sys.stdout or open(os.devnull, "w"))):
            yield
            print(end="", flush=True)
    except (DataError, OSError, ModuleNotFoundError) as error:
        p.error(told(error))
    except KeyboardInterrupt:
        p.exit(130, "Stopped.\n")


def progress(items: Iterable, what: str):
    """The items, with a bar on stderr where that is a terminal."""
    console = Console(stderr=True)
    return track(items, what, console=console, transient=True, disable=not console.is_terminal)


def between(kind, low, high=float("inf")):
    def convert(text):
        value = kind(text)
        if not low <= value <= high:
            limit = f"at least {low}" if high == float("inf") else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range, must be {limit}")
        return value

    convert.__name__ = kind.__name__  # "invalid int value: 'x'"
    return convert
