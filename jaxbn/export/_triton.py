"""A model repository of NVIDIA's Triton around an ONNX file: settings, version folder, manifest."""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxbn._extras import need
from jaxbn._files import check_file, check_is_path, replacing
from jaxbn._misuse import takes
from jaxbn._text import first_line, printable
from jaxbn.export._beside import WEIGHTS, weights_of
from jaxbn.export._manifest import manifest_of, write_for_copy
from jaxbn.export._session import session

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
MODEL, CONFIG = "model.onnx", "config.pbtxt"
KINDS = {  # what Triton's onnxruntime backend takes
    **{name: f"TYPE_{name.upper()}" for name in ("bool", "int8", "int16", "int32", "int64")},
    **{name: f"TYPE_{name.upper()}" for name in ("uint8", "uint16", "uint32", "uint64")},
    **{"float16": "TYPE_FP16", "float32": "TYPE_FP32", "float64": "TYPE_FP64"},
}


WRITE = "export.triton(folder, source)"


@takes("the folder of a model repository and an ONNX file", WRITE)
def triton(
    folder: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    name: str | None = None,
    version: int = 1,
    max_batch_size: int = 64,
    max_queue_delay_microseconds: int = 500,
) -> Path:
    """Writes an ONNX file into a model repository, as NVIDIA's Triton serves it.

    The repository gets `NAME/config.pbtxt`, `NAME/VERSION/model.onnx`, and the manifest beside that
    file. Triton puts waiting requests together, up to `max_batch_size` rows. Its onnxruntime
    backend runs the file. If the model is there already, the version is added, and config.pbtxt
    stays as it is, edited or not; the inputs and results must be the same.

    Args:
      folder: the model repository; it is made if it does not exist.
      source: a file of `onnx` or `int8`.
      name: of the model. None: the name of the file without its endings.
      version: of the model. Triton serves the highest by default.
      max_batch_size: rows in one call at most. 0: each request is a call, with the sizes that the
        file has.
      max_queue_delay_microseconds: how long a request may wait for others.

    Returns:
      The path of the ONNX file in the repository, which `session` and `python -m jaxbn verify`
      read.

    Raises:
      TypeError: folder or source is no path.
      NotADirectoryError: folder is a file.
      FileNotFoundError: source does not exist.
      ValueError: source is no ONNX file or not the one of its manifest, the name or a number does
        not fit, an input or a result has a dtype that Triton lacks or not the batch first, or the
        repository has this version or other inputs and results. Nothing is written then.
      ModuleNotFoundError: onnx or onnxruntime is missing.

    Source: NVIDIA Triton Inference Server, "Model Repository" and "Model Configuration".

    >>> from jaxbn import export
    >>> export.triton("repository", "nothing.onnx")
    Traceback (most recent call last):
        ...
    FileNotFoundError: triton: no ONNX file at nothing.onnx
    """
    check_is_path("triton", folder, "folder")
    check_is_path("triton", source, "source")
    if Path(folder).is_file():
        raise NotADirectoryError(
            f"triton: {printable(folder)} is a file, expected the folder of a model repository, "
            f"and behind it an ONNX file; write {WRITE}."
        )
    check_file("triton", source, "ONNX")
    need("triton", "onnxruntime")
    session(source)  # raises if onnxruntime cannot read the file
    source = Path(source)
    name = source.name.partition(".")[0] if name is None else name
    if not NAME.fullmatch(name):
        raise ValueError(
            f"triton: name is {name!r}, expected letters, digits, '_', '-' and '.'; write "
            f"name='net'."
        )
    numbers = {
        "version": (version, 1),
        "max_batch_size": (max_batch_size, 0),
        "max_queue_delay_microseconds": (max_queue_delay_microseconds, 0),
    }
    for what, (number, least) in numbers.items():
        if not isinstance(number, int | np.integer) or isinstance(number, bool) or number < least:
            raise ValueError(
                f"triton: {what} is {number!r}, expected a whole number of at least {least}; write "
                f"{what}={max(least, 1)}."
            )
    signature = _signature(source, max_batch_size > 0)
    text = f'name: "{name}"\nbackend: "onnxruntime"\nmax_batch_size: {max_batch_size}\n'
    text += "".join(signature)
    if max_batch_size:
        delay = f"max_queue_delay_microseconds: {max_queue_delay_microseconds}"
        text += f"dynamic_batching {{ {delay} }}\n"
    model = Path(folder, name)
    place, known = model / str(version), model.exists()
    if place.exists():
        raise ValueError(
            f"triton: {printable(place)} is there already; write version={_next_version(model)}, "
            f"or remove the folder."
        )
    if known:
        _check_settings(model / CONFIG, signature)
    content = manifest_of(source)
    model.parent.mkdir(parents=True, exist_ok=True)
    with replacing(place if known else model) as new:
        if not known:
            new.mkdir()
            (new / CONFIG).write_text(text)
            new /= str(version)
        new.mkdir()
        _copy(source, new / MODEL)
        write_for_copy(content, new / MODEL)
    return place / MODEL


def _signature(source: Path, batched: bool) -> list[str]:
    """The inputs and results of an ONNX file as lines of config.pbtxt."""
    library = need("triton", "onnx")
    graph = library.load(os.fspath(source), load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    lines = []
    for what, values in (("input", graph.input), ("output", graph.output)):
        for value in values:
            if value.name in weights:
                continue
            tensor = value.type.tensor_type
            word = (
                f"{'input' if what == 'input' else 'result'} {value.name!r} of {printable(source)}"
            )
            dtype = _dtype(library, tensor.elem_type)
            if dtype not in KINDS:
                raise ValueError(
                    f"triton: {word} is {dtype}, which Triton's onnxruntime backend does not take; "
                    f"expected a dtype such as float32; cast inside fn before jaxbn.export.onnx."
                )
            sizes = [d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim]
            if batched and (not sizes or sizes[0] != -1):
                raise ValueError(
                    f"triton: {word} has sizes {sizes}, expected a free batch first (-1), because "
                    f"requests are put together; write max_batch_size=0."
                )
            lines.append(_entry(what, value.name, KINDS[dtype], sizes[1:] if batched else sizes))
    return lines


def _dtype(library: Any, kind: int) -> str:
    """The name of an ONNX dtype as NumPy has it."""
    names = {"float": "float32", "double": "float64"}
    name = library.TensorProto.DataType.Name(kind).lower()
    return names.get(name, name)


def _entry(what: str, name: str, kind: str, sizes: Sequence[int]) -> str:
    """One input or result. Triton wants at least one size, and reshapes."""
    quoted = "".join(
        chr(c) if 32 <= c < 127 and chr(c) not in '"\\' else f"\\{c:03o}" for c in name.encode()
    )
    dims = ", ".join(map(str, sizes or [1]))
    reshape = "" if sizes else " reshape { shape: [ ] }"
    return f'{what} {{ name: "{quoted}" data_type: {kind} dims: [ {dims} ]{reshape} }}\n'


def _check_settings(path: Path, signature: Sequence[str]) -> None:
    """Raises unless the settings of a model that is there have these inputs and results."""
    try:
        there = path.read_text()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"triton: {printable(path.parent)} is there, but {CONFIG} cannot be read: "
            f"{first_line(error)}; write another name, or remove the folder."
        ) from error
    missing = [line for line in signature if line not in there]
    if missing:
        raise ValueError(
            f"triton: {printable(path)} lacks the line {missing[0].strip()!r}, expected the inputs "
            f"and results of the file; write another name, or remove the folder."
        )


def _next_version(model: Path) -> int:
    return 1 + max(int(path.name) for path in model.iterdir() if path.name.isdecimal())


def _copy(source: Path, path: Path) -> None:
    """Copies an ONNX file; weights beside the file get the name that belongs to the copy."""
    if weights_of(source) is None:
        shutil.copyfile(source, path)
        return
    library = need("triton", "onnx")
    library.save_model(
        library.load(os.fspath(source)),
        os.fspath(path),
        save_as_external_data=True,
        location=f"{path.name}{WEIGHTS}",
    )
