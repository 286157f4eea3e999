"""PyTorch's state_dicts, from memory or from files, read as data: nothing in a file is run."""

import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxbn import _files
from jaxbn._extras import need
from jaxbn._text import a_kind, first_line, short

TORCH = (".pt", ".pth", ".bin", ".ckpt", ".pth.tar")
SAFETENSORS = ".safetensors"
# Types of values that a scale elsewhere multiplies.
NARROW = ("float8_", "float6_", "float4_", "int4", "uint4", "int2", "uint2", "qint", "quint")

Source = Mapping[str, Any] | str | os.PathLike[str]


def read_state_dict(call: str, source: Source) -> dict[str, np.ndarray]:
    """Name → array, of a mapping, a `.safetensors` file, or a PyTorch file with a state_dict.

    A PyTorch file is a pickle, which can run code. `torch.load(weights_only=True)` reads it: that
    builds tensors and runs nothing, but torch must be installed. Arrays of a mapping are shared,
    not copied. A model in several files is read by its folder or by its index.

    Raises:
      FileNotFoundError: the file does not exist.
      ImportError: the package that reads such files is missing.
      ValueError: the file is of another kind, is cut off, holds anything but tensors by name, or
        would run code.
    """
    if not isinstance(source, (str, os.PathLike)):
        return _arrays(call, source)
    path = pathlib.Path(source)
    if not (path.is_dir() or path.name.endswith(".index.json")):
        return _read_file(call, path)
    try:
        parts = _files.shards(path, (SAFETENSORS, *TORCH))
        if not parts:
            raise ValueError(f"it has no file {SAFETENSORS} or {', '.join(TORCH)}")
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(
            f"{call}: {str(path)!r} is no folder of weights: {first_line(error)}; expected one "
            f"file, or several with an index, as save_pretrained writes them."
        ) from error
    arrays = [(_read_file(call, file), names) for file, names in parts.items()]
    try:
        return _files.merged(arrays)
    except ValueError as error:
        raise ValueError(
            f"{call}: {str(path)!r}: {first_line(error)}; copy or save the whole folder again."
        ) from error


def _read_file(call: str, path: pathlib.Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(f"{call}: no file {str(path)!r}.")
    if path.suffix == SAFETENSORS:
        return _arrays(call, _read_safetensors(call, path), str(path))
    if path.name.endswith(TORCH):
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
      ValueError: it is empty, or holds anything but arrays of numbers.
    """
    if not isinstance(tensors, Mapping):
        raise TypeError(
            f"{call}: {source} is {a_kind(tensors)}, expected a mapping of names to "
            f"arrays, or a path; write model.state_dict()."
        )
    others = [name for name, value in tensors.items() if not hasattr(value, "shape")]
    if others or not tensors:
        raise ValueError(
            f"{call}: {source} holds {short(map(repr, map(str, others))) or 'nothing'}, expected "
            f"arrays by name; write {_hint(tensors)}."
        )
    return {str(name): _array(call, str(name), value) for name, value in tensors.items()}


def _hint(checkpoint: Mapping[str, Any]) -> str:
    """Where in a training checkpoint the weights are, and what a wrapper put before their names."""
    parts = {
        str(name): value
        for name, value in checkpoint.items()
        if isinstance(value, Mapping) and value and all(hasattr(v, "shape") for v in value.values())
    }
    if not parts:
        return "model.state_dict()"
    averaged = [name for name in parts if "ema" in name.lower() or "avg" in name.lower()]
    first = next((name for name in parts if name not in averaged), next(iter(parts)))
    text = f"the state_dict alone: checkpoint[{first!r}]"
    if averaged and first not in averaged:
        text += f", or the averaged weights, checkpoint[{averaged[0]!r}]"
    wrappers = {str(name).partition(".")[0] for name in parts[first]}
    # Lightning calls the module `model`, DataParallel `module`, torch.compile `_orig_mod`.
    if len(wrappers) == 1 and all(str(name).count(".") > 1 for name in parts[first]):
        text += f", with rename={{{next(iter(wrappers))!r}: ''}}"
    return text


def _array(call: str, name: str, value: Any) -> np.ndarray:
    """The value as a NumPy array. A bfloat16 torch tensor goes by float32: NumPy lacks bfloat16.

    Raises:
      ValueError: the tensor has no values, or values that a scale elsewhere multiplies.
    """
    kind = str(value.dtype).removeprefix("torch.")
    if getattr(value, "is_meta", False):
        raise ValueError(
            f"{call}: {name!r} is on the meta device, a shape without values; load the weights "
            f"first: model.load_state_dict(torch.load(path, weights_only=True), assign=True)."
        )
    if getattr(value, "is_quantized", False) or kind.startswith(NARROW):
        raise ValueError(
            f"{call}: {name!r} is {kind}, whose scale is not part of the array; expected floats of "
            f"16 bits or more; write the model's own dequantization, or tensor.dequantize(), first."
        )
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if kind == "bfloat16":
            return value.float().numpy().astype(jnp.bfloat16)
        value = value.numpy()
    return np.asarray(value)


def _read_safetensors(call: str, path: pathlib.Path) -> dict[str, np.ndarray]:
    safetensors = need(call, "safetensors.numpy")
    try:
        return safetensors.load_file(path)
    except Exception as error:  # SafetensorError, OSError, …
        for name, kind in _narrow(safetensors, path):
            raise ValueError(
                f"{call}: {name!r} is {kind}, whose scale is not part of the array; expected "
                f"floats of 16 bits or more; write the model's own dequantization first."
            ) from error
        raise ValueError(
            f"{call}: {str(path)!r} is no whole safetensors file ({first_line(error)}); expected "
            f"one that safetensors wrote to the end; copy or save it again."
        ) from error


def _narrow(safetensors: Any, path: pathlib.Path) -> Iterator[tuple[str, str]]:
    """The tensors of a whole file that are too narrow for NumPy, and their dtypes."""
    try:
        with safetensors.safe_open(path, framework="np") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    except Exception:
        return
    yield from ((name, kind) for name, kind in kinds.items() if kind.startswith(("F8", "F6", "F4")))


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
