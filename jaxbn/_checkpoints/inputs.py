"""Inputs for a model from an `.npz` file, read as data: nothing in the file is run."""

import math
import os
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from jaxbn._files import check_memory
from jaxbn._text import first_line, listed, printable


def read_inputs(path: str | os.PathLike[str]) -> Any:
    """The batch in an `.npz` file: its one array, a tuple of several, or a dict of them by name.

    Args:
      path: a file of `np.savez(path, x)`, of `np.savez(path, x, n)` for a tuple, or of
        `np.savez(path, images=x, lengths=n)` for a dict.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is no `.npz` file of numbers, is damaged, or declares more values than it
        holds. An array of Python objects would be a pickle, which can run code, and is refused.

    >>> import tempfile, numpy as np
    >>> from jaxbn._checkpoints.inputs import read_inputs
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/x.npz", np.arange(3.0))
    ...     read_inputs(f"{folder}/x.npz")
    array([0., 1., 2.])
    """
    path = Path(path)
    name = printable(path)
    if not path.is_file():
        raise FileNotFoundError(f"read_inputs: no file {name}; write np.savez(path, x)")
    try:
        with zipfile.ZipFile(path) as file:
            arrays = {info.filename.removesuffix(".npy"): info for info in file.infolist()}
            check_memory(sum(info.file_size for info in arrays.values()), "it declares")
            batch: dict[str, Any] = {}
            for key, info in arrays.items():
                with file.open(info) as stream:
                    batch[key] = _array(stream, info.file_size)
    except Exception as error:
        raise ValueError(
            f"read_inputs: {name} cannot be read as arrays of np.savez: {first_line(error)}; write "
            f"np.savez(path, x)"
        ) from error
    if not batch:
        raise ValueError(f"read_inputs: {name} holds no array; write np.savez(path, x)")
    if odd := [
        key for key, v in batch.items() if v.dtype.kind not in "biufc" or not v.size * v.ndim
    ]:
        raise ValueError(
            f"read_inputs: {listed(odd)} of {name}: expected arrays of numbers with rows on axis "
            f"0, at least one"
        )
    if len(batch) == 1:
        return next(iter(batch.values()))
    in_a_row = [f"arr_{i}" for i in range(len(batch))]  # as np.savez names arrays without names
    return tuple(batch[name] for name in in_a_row) if {*batch} == {*in_a_row} else batch


def _array(stream: IO[bytes], size: int) -> np.ndarray:
    """One array of a stream of `size` bytes, whose header must not declare more."""
    form = np.lib.format
    read = {(1, 0): form.read_array_header_1_0, (2, 0): form.read_array_header_2_0}
    version = form.read_magic(stream)
    if version not in read:
        raise ValueError(f"version {version} of the format is not read")
    shape, _, dtype = read[version](stream)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are pickles and can run code")
    if math.prod(shape) * dtype.itemsize > size:
        raise ValueError(f"it declares an array of shape {shape}, which its bytes cannot hold")
    stream.seek(0)
    return form.read_array(stream, allow_pickle=False)
