"""Files that are written whole or not at all, and files in several parts."""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxbn._text import a_kind, printable


def check_place(call: str, path: str | os.PathLike[str]) -> None:
    """Raises if no file can be written to `path`. Called before any work is done for the file.

    Args:
      call: the public call, for errors.
      path: where the file goes.

    Raises:
      TypeError: path is no path.
      FileNotFoundError: the folder of the file does not exist.
      PermissionError: this process may not write in the folder.
      IsADirectoryError: a folder has the name of the file.
      FileExistsError: a device or a pipe has it, which a file would replace.

    >>> from jaxbn import _files
    >>> _files.check_place("onnx", "/")
    Traceback (most recent call last):
        ...
    IsADirectoryError: onnx: / is a folder; name a file
    """
    check_is_path(call, path)
    path = Path(path)
    if not (folder := path.absolute().parent).is_dir():
        raise FileNotFoundError(
            f"{call}: no folder {printable(folder)} to write {printable(path.name)} in"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(
            f"{call}: the folder {printable(folder)} may not be written in; name a file in another"
        )
    if path.is_dir():
        raise IsADirectoryError(f"{call}: {printable(path)} is a folder; name a file")
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{call}: {printable(path)} is a device or a pipe; name a file")


def check_new_folder(call: str, path: str | os.PathLike[str]) -> None:
    """Raises if no new folder can be written to `path`. Called before any work is done for it.

    Args:
      call: the public call, for errors.
      path: where the folder goes.

    Raises:
      TypeError: path is no path.
      FileExistsError: there is something at path.
      FileNotFoundError: the folder around it does not exist.

    >>> from jaxbn import _files
    >>> _files.check_new_folder("saved_model", "/")
    Traceback (most recent call last):
        ...
    FileExistsError: saved_model: / is there already; name a new folder.
    """
    check_is_path(call, path)
    if os.path.lexists(path):
        raise FileExistsError(f"{call}: {printable(path)} is there already; name a new folder.")
    check_place(call, path)


def check_is_path(call: str, path: Any, argument: str = "path") -> None:
    """Raises unless the argument of a public call is the name of a file or of a folder.

    >>> from jaxbn import _files
    >>> _files.check_is_path("session", 3)
    Traceback (most recent call last):
        ...
    TypeError: session: path is an int, expected the name of a file or of a folder; write "NAME".
    """
    if not isinstance(path, str | os.PathLike):
        write = "done.path" if hasattr(path, "path") else '"NAME"'  # what an export returned
        raise TypeError(
            f"{call}: {argument} is {a_kind(path)}, expected the name of a file or of a folder; "
            f"write {write}."
        )


def check_file(call: str, path: Any, kind: str) -> None:
    """Raises unless there is a file to read at `path`.

    Args:
      call: the public call, for errors.
      path: where the file should be.
      kind: of the file, for errors.

    Raises:
      TypeError: path is no path.
      FileNotFoundError: there is no file.

    >>> from jaxbn import _files
    >>> _files.check_file("session", "nothing.onnx", "ONNX")
    Traceback (most recent call last):
        ...
    FileNotFoundError: session: no ONNX file at nothing.onnx
    """
    check_is_path(call, path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"{call}: no {kind} file at {printable(path)}")


def check_memory(size: int, what: str) -> None:
    """Raises if this machine's memory cannot hold so many bytes.

    Args:
      size: the number of bytes.
      what: has them, for the error.

    Raises:
      ValueError: the machine has less memory.

    >>> from jaxbn import _files
    >>> _files.check_memory(10**6, "it declares")
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise ValueError(f"{what} {size:.3g} bytes, and this machine has {memory:.3g}")


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
    try:
        beside = tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        error.filename = os.fspath(path)  # the user knows of no folder beside it
        raise
    with beside as folder:
        file = Path(folder, path.name)
        try:
            yield file
        except OSError as error:
            if error.errno and not error.filename:  # a full disk names no file
                error.filename = os.fspath(path)
            raise
        for part in sorted(file.parent.iterdir(), key=lambda part: part == file):
            os.replace(part, path.parent / part.name)


def shards(path: Path, suffixes: Sequence[str]) -> dict[Path, list[str] | None]:
    """The files of a model in parts, each with the names that the index puts there.

    Args:
      path: a folder, or an index, `….index.json`: a JSON object whose `weight_map` maps the name of
        each array to the file that holds the array. A folder without an index has one file.
      suffixes: those of the files, the preferred first.

    Returns:
      File → its names; None for the one file of a folder without an index. Empty if the folder has
      no such file.

    Raises:
      ValueError: the index is damaged or names a file outside of its folder; there are several
        files and no index, or several indexes.

    >>> import pathlib, tempfile
    >>> from jaxbn import _files
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     pathlib.Path(folder, "net.bin").touch()
    ...     [file.name for file in _files.shards(pathlib.Path(folder), [".safetensors", ".bin"])]
    ['net.bin']
    """
    folder, indexes = path.parent, [path]
    if path.is_dir():
        folder = path
        for suffix in suffixes:
            indexes = sorted(path.glob(f"*{suffix}.index.json"))
            files = sorted(file for file in path.glob(f"*{suffix}") if file.is_file())
            if indexes or files:
                break
        if not indexes:
            if len(files) > 1:
                raise ValueError(f"it has {len(files)} files {suffix} and no {suffix}.index.json")
            return dict.fromkeys(files)
        if len(indexes) > 1:
            raise ValueError(f"it has {len(indexes)} indexes; name one of them")
    content = json.loads(indexes[0].read_text(encoding="utf-8"))
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(v, str) for v in names.values()):
        raise ValueError("its index has no weight_map of names to files")
    places: list[str] = list(dict.fromkeys(names.values()))
    if any(Path(file).name != file or not file.endswith(tuple(suffixes)) for file in places):
        raise ValueError("its index names what is no file of weights in its folder")
    return {
        folder / file: [name for name, place in names.items() if place == file] for file in places
    }


def merged(parts: Iterable[tuple[Mapping[str, Any], Sequence[str] | None]]) -> dict[str, Any]:
    """The arrays of all parts. Raises unless each part holds the names that the index puts there.

    >>> from jaxbn import _files
    >>> _files.merged([({"a": 1}, ["a"]), ({"b": 2}, ["b"])])
    {'a': 1, 'b': 2}
    """
    whole: dict[str, Any] = {}
    for arrays, names in parts:
        if names is not None and set(names) != set(arrays):
            odd = next(iter(set(names) ^ set(arrays)))
            raise ValueError(f"a file and the index disagree about {odd!r}")
        whole |= arrays
    return whole
