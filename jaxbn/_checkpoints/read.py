"""Checkpoints as data: orbax folders, safetensors, Flax msgpack → nested dicts of arrays."""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxbn._checkpoints.nesting import children, split_at_dots
from jaxbn._extras import need
from jaxbn._text import first_line, printable

# No byte of a file stands for more values than this many bytes: the best that zstd, which orbax
# writes, can do (blocks of 128 KiB in 4 bytes).
COMPRESSION = 2**15
# What orbax' _METADATA lists beside arrays.
NO_ARRAYS = ("None", "Dict", "List", "Tuple", "NamedTuple", "string", "placeholder")


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The arrays of a checkpoint, as nested dicts; nothing in it is executed.

    Args:
      path: an orbax folder (one checkpoint, or a manager's folder of steps: the latest), a
        `.safetensors` file, or a file that `flax.serialization.to_bytes` made.

    Returns:
      Nested dicts of NumPy arrays. Names with dots in a flat tree become nesting, and lists and
      tuples dicts of "0", "1", …; a name that continues an array's (`fc.weight.absmax` beside
      `fc.weight`) keeps the dot after which it does.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: it is none of these, or broken, or declares more than it can hold, or a link in
        the folder leads out of it.
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
    if path.is_dir():
        kind, reader = "an orbax checkpoint", _orbax
    elif path.suffix == ".safetensors":
        kind, reader = "a safetensors file", _safetensors
    else:
        kind, reader = "a Flax msgpack file (flax.serialization.to_bytes)", _msgpack
    try:
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
    """What an error says, without tensorstore's list of all its settings."""
    return first_line(error).partition(" [tensorstore_spec")[0]


def _safetensors(path: Path) -> Any:
    return need("read", "safetensors.numpy").load_file(path)


def _msgpack(path: Path) -> Any:
    return need("read", "flax.serialization").msgpack_restore(path.read_bytes())


def _orbax(path: Path) -> Any:
    """The arrays of a folder that orbax wrote, read by tensorstore, which it writes with.

    Not by orbax: where a file is damaged, its threads go on printing after it has raised.
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
        # Where this is noted, a chunk that is not there is lost; before it was, one of zeros.
        fill = not listed.get("store_array_data_equal_to_fill_value")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"its _METADATA is not as orbax writes it ({first_line(error)})"
        ) from error
    base = {"driver": "file", "path": f"{path}/"}
    ocdbt = (path / "manifest.ocdbt").exists()
    context = tensorstore.Context()

    def opened(name: str) -> Any:
        # tensorstore takes no `..` in a path.
        inner = {"path": f"{name}/"} if ocdbt else {"path": f"{path}/{name}/"}
        store = {"driver": "ocdbt", "base": base, **inner} if ocdbt else {**base, **inner}
        spec = {"driver": driver, "kvstore": store, "fill_missing_data_reads": fill}
        return tensorstore.open(spec, read=True, open=True, context=context)

    opening = {name: opened(name) for name, kind in kinds.items() if kind not in NO_ARRAYS}
    stores = {name: store.result() for name, store in opening.items()}
    _check_declared(stores.values(), size)
    reading = {name: store.read() for name, store in stores.items()}
    return {
        **{name: kind for name, kind in kinds.items() if kind == "string"},  # no array: by its kind
        **{name: v.result() for name, v in reading.items()},
    }


def _size(folder: Path, root: Path) -> int:
    """Bytes of the files in a folder; no link leads out of root, and nothing else is in it."""
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
    """Whether files of so many bytes, and this machine, can hold the arrays that are declared."""
    declared = sum(
        max(math.prod(store.shape), math.prod(store.chunk_layout.read_chunk.shape or ()))
        * store.dtype.numpy_dtype.itemsize
        for store in stores
    )
    if declared > size * COMPRESSION:
        raise ValueError(
            f"it declares arrays of {declared:.3g} bytes, which its {size} bytes cannot hold"
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if declared > memory:
        raise ValueError(
            f"it declares arrays of {declared:.3g} bytes, and this machine has {memory:.3g}"
        )
