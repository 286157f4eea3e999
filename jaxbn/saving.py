"""Trees of arrays into checkpoints that `jaxbn.checkpoints.read` and others read."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxbn.checkpoints import nested
from jaxbn.files import replacing


def save(path: str | os.PathLike[str], tree: Mapping[str, Any]) -> None:
    """Writes nested dicts of arrays, all or nothing: beside its place first, then renamed.

    Args:
      path: a `.safetensors` file, where nesting becomes dots in the names; a `.msgpack` file, as
        of `flax.serialization.to_bytes`; without a suffix an orbax folder, which must be new.
      tree: string keys; leaves without a value (None) and empty dicts are left out.

    Raises:
      ValueError: another suffix, or a leaf that is no array of numbers.
      FileExistsError: the orbax folder is there.
      OSError: it cannot be written.

    >>> import tempfile, numpy as np
    >>> from jaxbn import checkpoints, saving
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     saving.save(f"{folder}/net.msgpack", {"bn": {"mean": np.zeros(2)}})
    ...     checkpoints.read(f"{folder}/net.msgpack")
    {'bn': {'mean': array([0., 0.])}}
    """
    path = Path(path)
    checked(path)
    arrays = dict(_arrays(tree))
    if path.suffix == "":
        _orbax(path, nested(arrays))
        return
    with replacing(path) as file:
        if path.suffix == ".safetensors":
            from safetensors.numpy import save_file

            save_file({".".join(keys): v for keys, v in arrays.items()}, file)
        else:
            from flax import serialization

            file.write_bytes(serialization.msgpack_serialize(nested(arrays)))


def checked(path: Path) -> None:
    """Whether `save` can write there, before any work is done for it.

    Raises:
      ValueError, OSError: as in `save`.
    """
    if path.suffix not in (".safetensors", ".msgpack", ""):
        raise ValueError(
            f"save: {path} ends in {path.suffix}, expected .safetensors, .msgpack, or a name "
            f"without a suffix, which is an orbax folder."
        )
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"save: no folder {path.absolute().parent} to write {path.name} in")
    if path.suffix == "" and path.exists():
        raise FileExistsError(f"save: {path} is there already; name a new orbax folder")


def _arrays(tree: Mapping[str, Any], keys: tuple[str, ...] = ()) -> Iterator[Any]:
    for key, node in tree.items():
        here = (*keys, str(key))
        if isinstance(node, Mapping):
            yield from _arrays(node, here)
        elif node is not None:
            v = np.array(node, order="C")
            if v.dtype.kind in "OSUM":
                raise ValueError(
                    f"save: {'/'.join(here)} is a {type(node).__name__}, expected an array of "
                    f"numbers; save the part of the tree that holds them."
                )
            yield here, v


def _orbax(path: Path, tree: dict[str, Any]) -> None:
    import orbax.checkpoint as ocp  # type: ignore[import-untyped]

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), tree)
