"""Command lines in a text, and what their programs say against them. No work is done."""

import argparse
import contextlib
import functools
import importlib
import io
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

from jaxbn._cli import commands

ROOT = Path(__file__).parents[2]
PYTHON = r"(?:[\w./-]*/)?python (?:-m (?:jaxbn|benchmarks)\b|examples/\S+\.py)"
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
PROGRAM = re.compile(rf"{PYTHON}\S*(?<!jaxbn)|\S*python -m jaxbn(?: \w+)?")


def printed(text: str) -> list[str]:
    """The command lines in a text: in backticks, in quotes, or each in a line of its own.

    In a line of its own a command ends before two blanks, a comment or `>`, `|`, `&`, `;`. `make`
    is an English word too, and is read in backticks and fenced blocks alone. A program alone, in
    backticks or quotes, is a name: `--help` comes with it. A line with `{` is made by a program.
    """
    text = re.sub(r'"\n\s*f?"', "", re.sub(r"\s*\\\n\s*", " ", text))
    inline = re.findall(rf"`((?:{PYTHON}|make )[^`]*)`", FENCE.sub("", text))
    named = [re.sub(r"\s*\n[ #]*", " ", line) for line in inline]
    named += re.findall(rf'"[^"`\n]*?({PYTHON}[^"`\n]*)"', text)
    alone = re.findall(rf"^[ #>$]*({PYTHON}.*)$", text, re.MULTILINE)
    for block in FENCE.findall(text):
        alone += re.findall(r"^[ $]*(make .*)$", block, re.MULTILINE)
    lines = [f"{line} --help" if PROGRAM.fullmatch(line) else line for line in named]
    lines += [re.split(r'  | [#|>&;]|"""', line)[0] for line in alone]
    return [line for line in dict.fromkeys(lines) if "{" not in line]


@functools.cache
def refusal(line: str) -> str:
    """What the program says against a command line; nothing if the program understands the line.

    A name in brackets, as [NAME …], is left out; COMMAND is any command of `python -m jaxbn`.
    """
    line = re.sub(r" \[[A-Z].*\]", "", line).replace(" COMMAND", " doctor")
    program, *words = [word.strip("[]") for word in shlex.split(line)]
    if program == "make":
        return _of_make(words)
    if words[:2] == ["-m", "jaxbn"]:
        return _of_parser(lambda: commands.parse(words[2:]))
    if words[0] == "-m":
        module = f"{words[1]}.__main__" if words[1] == "benchmarks" else words[1]
        return _of_parser(lambda: importlib.import_module(module).main(words[2:]))
    return _of_parser(lambda: _run(*words))


def _of_make(words: list[str]) -> str:
    """What `make` says, and then what the programs say that it would run."""
    made = subprocess.run(["make", "--dry-run", *words], cwd=ROOT, text=True, capture_output=True)
    return made.stderr or "".join(map(refusal, printed(made.stdout)))


def _run(script: str, *words: str) -> None:
    path, cifar10 = ROOT / script, ROOT / "examples" / "cifar10"
    with (
        mock.patch.object(sys, "argv", [str(path), *words]),
        mock.patch.object(sys, "path", [str(path.parent), str(cifar10), *sys.path]),
        # With several hosts it would start this process again, which is that of the tests.
        mock.patch("hosts.supervise"),
    ):
        runpy.run_path(str(path), run_name="__main__")


def _of_parser(act) -> str:
    parse = argparse.ArgumentParser.parse_args

    def parse_and_end(*arguments):
        parse(*arguments)
        sys.exit(0)

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse_and_end),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as said,
    ):
        try:
            act()
        except SystemExit as end:
            return said.getvalue() if end.code else ""
    raise AssertionError("the program has no parser")
