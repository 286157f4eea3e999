"""Checkpoints read as data: orbax folders, safetensors, Flax msgpack → nested dicts of arrays."""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxbn import _files
from jaxbn._checkpoints.nesting import children, split_at_dots
from jaxbn._extras import need
from jaxbn._text import first_line, printable

# One byte of a file holds at most so many bytes of an array. orbax compresses by zstd, which packs
# at best a block of 128 KiB into 4 bytes.
COMPRESSION = 2**15
# The types in orbax' _METADATA that are no arrays.
NO_ARRAYS = ("None", "Dict", "List", "Tuple", "NamedTuple", "string", "placeholder")


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The arrays of a checkpoint as nested dicts. Nothing in the checkpoint is executed.

    Args:
      path: an orbax folder, a `.safetensors` file, a folder of `.safetensors` files with an index
        (`….index.json`), or a file of `flax.serialization.to_bytes`.
        Of a CheckpointManager's folder of steps the latest step is read.

    Returns:
      Nested dicts of NumPy arrays. Names are split at their dots. Lists and tuples become dicts
      with the keys "0", "1", …. A name that continues the name of an array keeps its dot:
      `fc.weight.absmax` beside `fc.weight`.

    Raises:
      FileNotFoundError: `path` does not exist.
      ValueError: the file is none of these, is damaged, declares more values than it can hold, or
        a link in the folder leads out of the folder.
      ModuleNotFoundError: the package that reads such files is missing.

    >>> import pathlib, tempfile, numpy as np
    >>> from flax import serialization
    >>> from jaxbn._checkpoints.read import read
    >>> tree = {"batch_stats": {"bn": {"mean": np.zeros(2), "var": np.ones(2)}}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder, "model.msgpack")
    ...     _ = file.write_bytes(serialization.to_bytes(tree))
    ...     read(file)["batch_stats"]["bn"]["var"].tolist()
    [1.0, 1.0]
    """
    path = Path(path)
    name = printable(path)
    if not path.exists():
        raise FileNotFoundError(f"read: no checkpoint at {name}: there is no such file or folder")
    if path.name.endswith(".index.json") or (path.is_dir() and _has_safetensors(path)):
        kind, reader = "safetensors files with an index", _sharded
    elif path.is_dir():
        kind, reader = "an orbax checkpoint", _orbax
    elif path.suffix == ".safetensors":
        kind, reader = "a safetensors file", _safetensors
    else:
        kind, reader = "a Flax msgpack file (flax.serialization.to_bytes)", _msgpack
    try:
        _check_file(path)
        tree = reader(path)
    except ModuleNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"read: {name} cannot be read as {kind}: {_reason(error)}. Expected an orbax "
            f"folder, a .safetensors file, or a file of flax.serialization.to_bytes."
        ) from error
    if not children(tree):
        raise ValueError(
            f"read: {name} holds no tree of arrays but {type(tree).__name__}; expected the "
            f"variables of a model, as {kind}."
        )
    return split_at_dots(tree, name)


def _reason(error: Exception) -> str:
    """The first line of an error, without the list of all settings that tensorstore appends."""
    return first_line(error).partition(" [tensorstore_spec")[0]


def _safetensors(path: Path) -> Any:
    return need("read", "safetensors.numpy").load_file(path)


def _has_safetensors(folder: Path) -> bool:
    return any(True for _ in folder.glob("*.safetensors"))


def _sharded(path: Path) -> Any:
    parts = _files.shards(path, [".safetensors"])
    return _files.merged((_safetensors(file), names) for file, names in parts.items())


def _msgpack(path: Path) -> Any:
    return need("read", "flax.serialization").msgpack_restore(path.read_bytes())


def _orbax(path: Path) -> Any:
    """The arrays of an orbax folder, read by tensorstore, the library orbax writes with.

    orbax itself is not used: if a file is damaged, the threads of orbax go on printing after orbax
    has raised.
    """
    root = path = path.resolve()
    steps = [child for child in path.iterdir() if child.is_dir() and child.name.isdecimal()]
    if steps:
        path = max(steps, key=lambda step: int(step.name))
    if (path / "default").is_dir():
        path = path / "default"
    if not (path / "_METADATA").exists():
        raise ValueError("it has no _METADATA")
    size = _size(path, root)
    tensorstore = need("read", "tensorstore")
    try:
        listed = json.loads((path / "_METADATA").read_text())
        kinds = {
            ".".join(str(part["key"]) for part in entry["key_metadata"]): str(
                entry["value_metadata"]["value_type"]
            )
            for entry in listed["tree_metadata"].values()
        }
        driver = "zarr3" if listed.get("use_zarr3") else "zarr"
        # With this note every chunk is in the folder, so a missing chunk is lost. Older versions
        # of orbax do not write chunks of zeros, so there a missing chunk means zeros.
        fill = not listed.get("store_array_data_equal_to_fill_value")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"its _METADATA is not as orbax writes it ({first_line(error)})"
        ) from error
    base = {"driver": "file", "path": f"{path}/"}
    ocdbt = (path / "manifest.ocdbt").exists()
    context = tensorstore.Context()

    def opened(name: str) -> Any:
        # tensorstore refuses a path with `..` in it.
        inner = {"path": f"{name}/"} if ocdbt else {"path": f"{path}/{name}/"}
        store = {"driver": "ocdbt", "base": base, **inner} if ocdbt else {**base, **inner}
        spec = {"driver": driver, "kvstore": store, "fill_missing_data_reads": fill}
        return tensorstore.open(spec, read=True, open=True, context=context)

    opening = {name: opened(name) for name, kind in kinds.items() if kind not in NO_ARRAYS}
    stores = {name: store.result() for name, store in opening.items()}
    _check_declared(stores.values(), size)
    reading = {name: store.read() for name, store in stores.items()}
    return {
        **{
            name: kind for name, kind in kinds.items() if kind == "string"
        },  # not read: the word stands for it
        **{name: v.result() for name, v in reading.items()},
    }


def _check_file(path: Path) -> None:
    """Raises for a device, which may have no end, and for a file that memory cannot hold."""
    if not (path.is_dir() or path.is_file() or path.is_fifo()):
        raise ValueError("it is neither a file nor a folder")
    if path.is_file():
        _files.check_memory(path.stat().st_size, "it has")


def _size(folder: Path, root: Path) -> int:
    """Bytes of all files in a folder. Raises at a link out of root and at devices and pipes."""
    size = 0
    for child in [folder, *folder.rglob("*")]:
        if not child.resolve().is_relative_to(root):
            raise ValueError(f"{printable(child.name)} is a link that leaves the folder")
        if not child.is_dir():
            if not child.is_file():
                raise ValueError(f"{printable(child.name)} is neither a file nor a folder")
            size += child.stat().st_size
    return size


def _check_declared(stores: Iterable[Any], size: int) -> None:
    """Raises if `size` bytes of files, or this machine, cannot hold the declared arrays."""
    declared = sum(
        max(math.prod(store.shape), math.prod(store.chunk_layout.read_chunk.shape or ()))
        * store.dtype.numpy_dtype.itemsize
        for store in stores
    )
    if declared > size * COMPRESSION:
        raise ValueError(
            f"it declares arrays of {declared:.3g} bytes, which its {size} bytes cannot hold"
        )
    _files.check_memory(declared, "it declares arrays of")
