"""What an exported file was made of, as JSON beside the file, with the checksums of both."""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import jax

from jaxbn._files import check_is_path, check_place, replacing
from jaxbn._folding.fold import FoldReport
from jaxbn._misuse import misuse
from jaxbn._text import first_line, printable
from jaxbn.export._beside import FORMAT, checksum, checksums, manifest_beside, read, weights_of
from jaxbn.export._checked_file import Exported
from jaxbn.export._int8 import Quantized


def manifest(
    done: Exported | Quantized,
    *,
    folded: FoldReport | None = None,
    source: Exported | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Path:
    """Writes `NAME.manifest.json` beside an exported file, and returns the manifest's path.

    Use it after an export whose file leaves this machine. `read_manifest` and
    `python -m jaxbn verify` refuse a file that is not the one of its manifest.

    Args:
      done: what `stablehlo`, `onnx`, `int8` or another export returned.
      folded: the report of `jaxbn.fold`.
      source: what `onnx` returned, for a file of `int8`.
      checkpoint: the file or folder that the weights came from. Its checksum is written, and its
        name, without the folders before the name.

    Raises:
      TypeError: done is something else.
      OSError: a file cannot be read or written.

    >>> import tempfile, jax.numpy as jnp
    >>> from jaxbn import export
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     done = export.stablehlo(jnp.sin, jnp.zeros((1, 2)), f"{folder}/sin.stablehlo")
    ...     path = export.manifest(done)
    ...     path.name, export.read_manifest(done.path)["checkpoint"]
    ('sin.stablehlo.manifest.json', None)
    """
    if not isinstance(done, Exported | Quantized):
        raise misuse(
            "manifest", [done], "the result of an export", "manifest(export.onnx(fn, x, path))"
        )
    path = manifest_beside(done.path)
    check_place("manifest", path)
    sites = () if folded is None else folded.sites
    stages = {"fold": folded, "source": source, "artifact": done}
    content = _content() | {
        **_files(done.path),
        "checkpoint": None if checkpoint is None else _entry(Path(checkpoint)),
        "folded": [[site.name, site.note] for site in sites if site.folded],
        "not_folded": [[site.name, site.note] for site in sites if site.folded is False],
        "errors": {
            name: {"absolute": _finite(stage.absolute), "relative": _finite(stage.relative)}
            for name, stage in stages.items()
            if stage is not None
        },
    }
    with replacing(path) as file:
        _write(content, file)
    return path


def manifest_of(path: Path) -> dict[str, Any]:
    """The manifest of a file, or one that says nothing but its own form, if there is none.

    Raises:
      ValueError: the manifest is damaged or that of another file.
    """
    there = manifest_beside(path).exists()
    return read_manifest(path) if there else _content()


def write_for_copy(content: dict[str, Any], path: Path) -> None:
    """Writes the manifest of a copied file beside the copy; the checksums are the copy's."""
    _write(content | _files(path), manifest_beside(path))


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of an exported file, once the file's checksum is that of the manifest.

    Args:
      path: the exported file.

    Returns:
      A dict with `artifact`, `weights` (beside an ONNX file that refers to them) and `checkpoint`,
      each with `file`, `bytes` and `sha256`, or None; `folded`, `not_folded`, `errors`, and the
      versions.

    Raises:
      FileNotFoundError: there is no such file, or no manifest beside the file.
      ValueError: the manifest is damaged, or is that of another file.

    >>> from jaxbn import export
    >>> export.read_manifest("nothing.onnx")
    Traceback (most recent call last):
        ...
    FileNotFoundError: read_manifest: no file nothing.onnx
    """
    check_is_path("read_manifest", path)
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"read_manifest: no file {printable(path)}")
    place = manifest_beside(path)
    if not place.is_file():
        raise FileNotFoundError(
            f"read_manifest: no manifest {printable(place)}; write jaxbn.export.manifest(done) "
            f"after an export"
        )
    try:
        content = read(place)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"read_manifest: {printable(place)} is no manifest of jaxbn.export.manifest: "
            f"{first_line(error)}"
        ) from error
    for part, found, declared in checksums(content, path):
        if found != declared:
            raise ValueError(
                f"read_manifest: {printable(part)} has the SHA-256 {found[:12]}…, but its manifest "
                f"says {printable(declared[:12])}…: the file has changed; export it again"
            )
    return content


def _content() -> dict[str, Any]:
    """A manifest of a file of which nothing is known."""
    return {
        "format": FORMAT,
        "jaxbn": sys.modules["jaxbn"].__version__,  # an import of the package would be a circle
        "jax": jax.__version__,
        "artifact": None,
        "weights": None,
        "checkpoint": None,
        "folded": [],
        "not_folded": [],
        "errors": {},
    }


def _files(path: Path) -> dict[str, Any]:
    """The entries of an exported file and of the weights beside the file."""
    weights = weights_of(path)
    return {"artifact": _entry(path), "weights": None if weights is None else _entry(weights)}


def _write(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def _entry(path: Path) -> dict[str, Any]:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files)
    return {"file": path.name, "bytes": size, "sha256": checksum(path)}


def _finite(v: float) -> float | None:
    return v if math.isfinite(v) else None
