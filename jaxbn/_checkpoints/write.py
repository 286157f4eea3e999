"""Trees of arrays into checkpoints that `jaxbn._checkpoints.read.read` and others read."""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jaxbn._checkpoints.nesting import nested
from jaxbn._extras import need
from jaxbn._files import replacing
from jaxbn._text import first_line, printable


def save(path: str | os.PathLike[str], tree: Mapping[str, Any]) -> None:
    """Writes nested dicts of arrays, all or nothing: beside its place first, then renamed.

    Args:
      path: a `.safetensors` file, where nesting becomes dots in the names; a `.msgpack` file, as
        of `flax.serialization.to_bytes`; without a suffix an orbax folder, which must be new.
      tree: string keys; leaves without a value (None) and empty dicts are left out.

    Raises:
      ValueError: another suffix, or a leaf that is no array of numbers, or two of one name.
      FileExistsError: the orbax folder is there.
      OSError: it cannot be written.
      ModuleNotFoundError: the package that writes such files is missing.

    >>> import tempfile, numpy as np
    >>> from jaxbn._checkpoints import write
    >>> from jaxbn._checkpoints.read import read
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write.save(f"{folder}/net.msgpack", {"bn": {"mean": np.zeros(2)}})
    ...     read(f"{folder}/net.msgpack")
    {'bn': {'mean': array([0., 0.])}}
    """
    path = Path(path)
    checked(path)
    arrays: dict[tuple[str, ...], np.ndarray] = {}
    names = set()
    for keys, v in _arrays(tree):
        # One name may not be another's in any format: two arrays would be one.
        if (name := ".".join(keys)) in names:
            raise ValueError(f"save: two arrays are called {name!r}, expected one; rename a layer.")
        if path.suffix == "" and not v.size:
            raise ValueError(
                f"save: {name!r} has shape {v.shape}, and orbax writes no array without "
                f"values; name a .safetensors or a .msgpack file."
            )
        names.add(name)
        arrays[keys] = v
    with replacing(path) as place:
        if path.suffix == ".safetensors":
            save_file = need("save", "safetensors.numpy").save_file
            save_file({".".join(keys): v for keys, v in arrays.items()}, place)
        elif path.suffix == ".msgpack":
            serialize = need("save", "flax.serialization").msgpack_serialize
            place.write_bytes(serialize(nested(arrays)))
        else:
            orbax = need("save", "orbax.checkpoint")
            try:
                with _silent_threads(), orbax.StandardCheckpointer() as checkpointer:
                    checkpointer.save(place.absolute(), nested(arrays))
            except Exception as error:
                raise OSError(
                    f"save: orbax cannot write {printable(path)}: {first_line(error)}"
                ) from error


def checked(path: Path) -> None:
    """Whether `save` can write there, before any work is done for it.

    Raises:
      ValueError, OSError: as in `save`.
    """
    name = printable(path)
    if path.suffix not in (".safetensors", ".msgpack", ""):
        raise ValueError(
            f"save: {name} ends in {printable(path.suffix)}, expected .safetensors, .msgpack, or a "
            f"name without a suffix, which is an orbax folder."
        )
    if not (folder := path.absolute().parent).is_dir():
        raise FileNotFoundError(
            f"save: no folder {printable(folder)} to write {printable(path.name)} in"
        )
    if path.suffix == "" and path.exists():
        raise FileExistsError(f"save: {name} is there already; name a new orbax folder")
    if path.suffix != "" and path.is_dir():
        raise IsADirectoryError(f"save: {name} is a folder; name a file")


@contextmanager
def _silent_threads() -> Iterator[None]:
    """Where a call fails, the threads that it started end first and print nothing of their own."""
    before, hook = set(threading.enumerate()), threading.excepthook
    threading.excepthook = lambda _: None
    try:
        yield
    except BaseException:
        for thread in set(threading.enumerate()) - before:
            thread.join(1)
        raise
    finally:
        threading.excepthook = hook


def _arrays(tree: Mapping[str, Any], keys: tuple[str, ...] = ()) -> Iterator[Any]:
    for key, node in tree.items():
        here = (*keys, str(key))
        if isinstance(node, Mapping):
            yield from _arrays(node, here)
        elif node is not None:
            v = np.array(node, order="C")
            if v.dtype.kind in "OSUM":
                raise ValueError(
                    f"save: {printable('/'.join(here))} is a {type(node).__name__}, expected an "
                    f"array of numbers; save the part of the tree that holds them."
                )
            if v.dtype == bool:  # a file may hold other bytes than 0 and 1, which no reader takes
                v = v.view(np.uint8) != 0
            yield here, v
