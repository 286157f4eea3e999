"""Exported files: their formats by name, where they may be written, and how they are run."""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxbn._text import printable


class Format(NamedTuple):
    """A format of exported files, and the functions of `jaxbn.export` for it."""

    name: str
    write: str
    load: str
    int8: str | None = None


FORMATS = {  # by the suffix
    ".onnx": Format("ONNX", "onnx", "session", "int8"),
    ".stablehlo": Format("StableHLO", "stablehlo", "load_stablehlo"),
    ".tflite": Format("TFLite", "tflite", "load_tflite", "tflite_int8"),
    "": Format("a SavedModel", "saved_model", "load_saved_model"),
}
ARTIFACT = ".onnx, .stablehlo or .tflite"


def format_of(dest: Path, int8: bool) -> Format:
    """The format to export to. Raises if dest has the name of none, or cannot be written to."""
    from jaxbn._extras import need
    from jaxbn._files import check_new_folder, check_place
    from jaxbn.export._beside import manifest_beside
    from jaxbn.export._checked_file import PACKAGES

    form = FORMATS.get(dest.suffix)
    ends = f"{printable(dest)} ends in {printable(dest.suffix) or 'nothing'}"
    if form is None or (not dest.suffix and "." in dest.name):  # ".onnx", of an empty $NAME.onnx
        raise ValueError(
            f"{ends}, expected {ARTIFACT}, or a name without a dot for the folder of a SavedModel"
        )
    calls = form.write, form.int8 if int8 else form.write
    if calls[1] is None:
        raise ValueError(f"--int8 is for .onnx and .tflite, and {ends}")
    (check_place if dest.suffix else check_new_folder)("export", dest)
    check_place("export", manifest_beside(dest))
    for package in dict.fromkeys([*PACKAGES[calls[0]], *PACKAGES[calls[1]]]):
        need(f"{printable(dest)} as {form.name}", package)
    return form


def arguments(x: Any) -> tuple[Any, ...]:
    """The arguments of an exported file for a batch: those in a tuple or a list, or one."""
    if not isinstance(x, list | tuple):
        return (x,)
    return (x._asdict(),) if hasattr(x, "_fields") else tuple(x)  # type: ignore[union-attr]


def of_arguments(fn: Any, x: Any) -> Any:
    """fn, a function of a batch of x's kind, as a function of its `arguments`."""
    if not isinstance(x, list | tuple):
        return fn
    kind = type(x)
    if hasattr(x, "_fields"):
        return lambda arrays: fn(kind(**arrays))
    return lambda *arrays: fn(kind(arrays))


def is_artifact(path: str) -> bool:
    """Whether a path is that of an exported file, by its name, or a SavedModel's folder."""
    from jaxbn.export._saved_model import is_saved_model

    suffix = Path(path).suffix
    return (suffix != "" and suffix in FORMATS) or is_saved_model(path)


def load(path: str) -> tuple[Any, Any]:
    """An exported file as a function, and its manifest, which must fit the file; None without."""
    from jaxbn import export
    from jaxbn.export._beside import manifest_beside

    manifest = export.read_manifest(path) if manifest_beside(Path(path)).exists() else None
    suffix = Path(path).suffix
    read: Any = getattr(export, FORMATS.get(suffix, FORMATS[""]).load)
    with _silent_compiler():
        fn = read(path)

    def run(x: Any) -> Any:
        with _silent_compiler():
            y: Any = fn(*arguments(x))
        # Several results of a file stand in the order of the function's leaves, by any names.
        return list(y.values()) if suffix != ".stablehlo" and isinstance(y, Mapping) else y

    return run, manifest


@contextlib.contextmanager
def _silent_compiler() -> Iterator[None]:
    """Drops what C++ prints on stderr: MLIR quotes the bytes of a damaged file."""
    sys.stderr.flush()
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)
