"""Checkpoints written whole or not at all: safetensors, Flax msgpack, orbax folders."""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jaxbn._checkpoints.nesting import leaves, nested
from jaxbn._extras import need
from jaxbn._files import check_place, replacing
from jaxbn._text import a_kind, first_line, printable


def save(path: str | os.PathLike[str], tree: Mapping[str, Any]) -> None:
    """Writes nested dicts of arrays to `path`, all or nothing.

    The file is written beside its place first and then renamed.

    Args:
      path: the suffix decides the format. `.safetensors`: nesting becomes dots in the names.
        `.msgpack`: as `flax.serialization.to_bytes` writes it. No suffix: an orbax folder, which
        must be new.
      tree: nested dicts with string keys. None and empty dicts are left out.

    Raises:
      ValueError: the suffix is another, a leaf is no array of numbers or has a dtype that the
        format does not hold, or two leaves have one name.
      FileExistsError: the orbax folder exists.
      OSError: the file cannot be written.
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
    check_destination(path)
    arrays: dict[tuple[str, ...], np.ndarray] = {}
    names = set()
    for keys, node in leaves(tree):
        v = _numbers(keys, node)
        # In a file of flat names two arrays of one name would be one array.
        if (name := ".".join(keys)) in names:
            raise ValueError(f"save: two arrays are called {name!r}, expected one; rename a layer.")
        if path.suffix == "" and not v.size:
            raise ValueError(
                f"save: {name!r} has shape {v.shape}, and orbax writes no array without "
                f"values; name a .safetensors or a .msgpack file."
            )
        names.add(name)
        arrays[keys] = v
    _check_dtypes(path, arrays)
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


def check_destination(path: Path) -> None:
    """Raises if `save` cannot write to `path`. Called before any work is done for the file.

    Raises:
      ValueError, OSError: as in `save`.
    """
    name = printable(path)
    if path.suffix not in (".safetensors", ".msgpack", ""):
        raise ValueError(
            f"save: {name} ends in {printable(path.suffix)}, expected .safetensors, .msgpack, or a "
            f"name without a suffix for an orbax folder."
        )
    if path.suffix == "" and path.exists():
        raise FileExistsError(f"save: {name} is there already; name a new orbax folder")
    check_place("save", path)


@contextmanager
def _silent_threads() -> Iterator[None]:
    """If the call fails, waits for the threads it started, and lets them print nothing."""
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


def _check_dtypes(path: Path, arrays: Mapping[tuple[str, ...], np.ndarray]) -> None:
    """Raises for an array whose dtype the format cannot write, or cannot read."""
    if path.suffix == ".msgpack":
        return  # of any dtype
    if path.suffix == ".safetensors":
        form, save = "safetensors", need("save", "safetensors.numpy").save

        def try_dtype(dtype: np.dtype) -> None:
            save({"empty": np.zeros(0, dtype)})
            if dtype.itemsize == 1 and dtype.kind not in "biu":
                raise TypeError("safetensors writes floats of 8 bits, and reads none as NumPy's")
    else:
        form, try_dtype = "orbax", need("save", "tensorstore").dtype
    for keys, v in arrays.items():
        try:
            try_dtype(v.dtype)
        except Exception as error:
            raise ValueError(
                f"save: {printable('/'.join(keys))} is {v.dtype}, which {form} does not hold; name "
                f"a .msgpack file."
            ) from error


def _numbers(keys: tuple[str, ...], node: Any) -> np.ndarray:
    """The leaf as an array that every format can hold."""
    v = np.array(node, order="C")
    if v.dtype.kind in "OSUMm":
        raise ValueError(
            f"save: {printable('/'.join(keys))} is {a_kind(node)}, expected an array of "
            f"numbers; save the part of the tree that holds them."
        )
    # Readers take no bytes but 0 and 1 for booleans; the memory of an array may hold others.
    return v.view(np.uint8) != 0 if v.dtype == bool else v
