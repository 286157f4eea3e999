"""The command lines of the benchmarks: help of 80 columns, and failures of one line."""

import argparse
import functools
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

WIDTH = 78  # argparse leaves two columns of 80


def parser(program: str, about: str) -> argparse.ArgumentParser:
    """A parser for `python -m PROGRAM`.

    Args:
      program: the module's name, and its first word if it has several commands.
      about: the module's docstring, or a paragraph of the docstring. The name of the command goes,
        because the usage has the name; indented lines stay as they are.
    """
    about = re.sub(r":? *`python -m [^`]*`[:,]? *", "", about).strip()
    paragraphs = [
        text if text.startswith(" ") else textwrap.fill(" ".join(text.split()), WIDTH)
        for text in (about[:1].upper() + about[1:]).split("\n\n")
    ]
    return argparse.ArgumentParser(
        prog=f"python -m {program}",
        description="\n\n".join(paragraphs),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_size(to: argparse.ArgumentParser, *, full: bool = False) -> None:
    """`--tiny`, and `--full`, for how much is measured: the option `size`."""
    sizes = to.add_mutually_exclusive_group()
    if full:
        sizes.add_argument(
            "--full", action="store_const", dest="size", const="full", help="everything"
        )
    sizes.add_argument(
        "--tiny", action="store_const", dest="size", const="tiny", help="only to see that it runs"
    )
    to.set_defaults(size="usual")


def dtype(text: str) -> Any:
    """A floating dtype by its name."""
    import jax.numpy as jnp

    try:
        found = jnp.dtype(text)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise argparse.ArgumentTypeError(f"{text!r}, expected float32, bfloat16 or float16")
    return found


def positive(text: str) -> int:
    """A number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number above 0")
    return int(text)


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    """The type of an option that is one of these names."""

    def name(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r}, expected some of: {', '.join(names)}")
        return text

    return name


def end(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Ends this process with the status of main, which gets the words after the program's name.

    Failures are one line, as those of `python -m jaxbn`.
    """
    from jaxbn.__main__ import run

    run(functools.partial(main, sys.argv[1:]))
