"""PyTorch's state_dicts, from memory or from files, read as data: nothing in a file is run."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxbn._extras import need
from jaxbn._text import first_line, short

TORCH = (".pt", ".pth", ".bin")


Source = Mapping[str, Any] | str | os.PathLike[str]


def read_state_dict(call: str, source: Source) -> dict[str, np.ndarray]:
    """Name → array, of a mapping, a `.safetensors` file, or a PyTorch file with a state_dict.

    A PyTorch file is a pickle, which can run code. `torch.load(weights_only=True)` reads it: that
    builds tensors and runs nothing, but torch must be installed. Arrays of a mapping are shared,
    not copied.

    Raises:
      FileNotFoundError: the file does not exist.
      ImportError: the package that reads such files is missing.
      ValueError: the file is of another kind, is cut off, holds anything but tensors by name, or
        would run code.
    """
    if not isinstance(source, (str, os.PathLike)):
        return _arrays(call, source)
    path = pathlib.Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"{call}: no file {str(path)!r}.")
    if path.suffix == ".safetensors":
        return _read_safetensors(call, path)
    if path.suffix in TORCH:
        return _arrays(call, _read_torch(call, path), str(path))
    raise ValueError(
        f"{call}: {str(path)!r} is no file of weights by its name; expected .safetensors, or "
        f"PyTorch's {', '.join(TORCH)}; write "
        f"safetensors.torch.save_file(model.state_dict(), path)."
    )


def _arrays(call: str, tensors: Any, source: str = "the source") -> dict[str, np.ndarray]:
    """Name → array of a mapping of arrays or torch tensors.

    Raises:
      TypeError: it is no mapping.
      ValueError: it is empty, or holds anything but arrays.
    """
    if not isinstance(tensors, Mapping):
        raise TypeError(
            f"{call}: {source} is a {type(tensors).__name__}, expected a mapping of names to "
            f"arrays, or a path; write model.state_dict()."
        )
    others = [name for name, value in tensors.items() if not hasattr(value, "shape")]
    if others or not tensors:
        nested = [str(name) for name, value in tensors.items() if isinstance(value, Mapping)]
        hint = (
            f"the state_dict alone: checkpoint[{nested[0]!r}]" if nested else "model.state_dict()"
        )
        raise ValueError(
            f"{call}: {source} holds {short(map(repr, map(str, others))) or 'nothing'}, expected "
            f"arrays by name; write {hint}."
        )
    return {str(name): _array(value) for name, value in tensors.items()}


def _array(value: Any) -> np.ndarray:
    """The value as a NumPy array. A bfloat16 torch tensor goes by float32: NumPy lacks bfloat16."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":
            return value.float().numpy().astype(jnp.bfloat16)
        value = value.numpy()
    return np.asarray(value)


def _read_safetensors(call: str, path: pathlib.Path) -> dict[str, np.ndarray]:
    safetensors = need(call, "safetensors.numpy")
    try:
        return safetensors.load_file(path)
    except Exception as error:  # SafetensorError, OSError, …
        raise ValueError(
            f"{call}: {str(path)!r} is no whole safetensors file ({first_line(error)}); expected "
            f"one that safetensors wrote to the end; copy or save it again."
        ) from error


def _read_torch(call: str, path: pathlib.Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{call}: {str(path)!r} is a pickle, which only torch reads without running what is in "
            f"it, and torch is not installed; where it is, write "
            f"safetensors.torch.save_file(torch.load(path, weights_only=True), new_path)."
        ) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # UnpicklingError, RuntimeError, EOFError, …: by kind of damage
        raise ValueError(
            f"{call}: {str(path)!r} was refused by torch.load(weights_only=True): it would run "
            f"code, is cut off, or is no file of PyTorch; nothing in it was run. Where the model "
            f"comes from, write torch.save(model.state_dict(), path)."
        ) from error
