"""What belongs to an exported file and stands beside it: weights, and the manifest."""

import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SUFFIX = ".manifest.json"
WEIGHTS = ".data"  # behind the name of an ONNX file whose weights are too large for the file
NONE = "no such file"  # in place of a checksum
FORMAT = 1
LONGEST = 2**24  # bytes of a manifest; a network of 1000 sites needs a hundredth


def manifest_beside(path: Path) -> Path:
    """Where the manifest of an exported file is."""
    return path.with_name(path.name + SUFFIX)


def weights_of(path: Path) -> Path | None:
    r"""The file of weights beside an ONNX file that refers to it; None if there is none.

    What else has its name may be of an earlier export, or anything.

    >>> import pathlib, tempfile
    >>> from jaxbn.export import _beside
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "f")
    ...     pathlib.Path(folder, "f.data").touch()
    ...     for content in b"no word of it", b"..\n\x08location\x12\x06f.data..":
    ...         _ = path.write_bytes(content)
    ...         print(_beside.weights_of(path) is not None)
    False
    True
    """
    place = _weights_beside(path)
    if not (place.is_file() and path.is_file() and path.stat().st_size):
        return None
    # The file is not parsed: this needs no package, and the file may be another than it should be.
    # ONNX says where weights are by a key and a value, each with its length before it.
    name = place.name.encode(errors="surrogateescape")
    length = bytes([len(name)] if len(name) < 128 else [len(name) % 128 + 128, len(name) // 128])
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = content.find(b"\n\x08location\x12" + length + name)
    return None if found < 0 else place


def _weights_beside(path: Path) -> Path:
    """Where the weights of an ONNX file are that are too large for the file."""
    return path.with_name(path.name + WEIGHTS)


def remove_older_manifest(path: Path) -> None:
    """Removes the manifest of an older file that was at `path`; anything else of its name stays."""
    place = manifest_beside(path)
    try:
        content = read(place)
        older = any(found != declared for _, found, declared in checksums(content, path))
        if older and content["artifact"].get("file") == path.name:
            place.unlink()
    except (OSError, ValueError, RecursionError):  # none, or no manifest
        return


def read(place: Path) -> dict[str, Any]:
    """The content of a manifest. Raises ValueError or RecursionError if it has another form."""
    if place.stat().st_size > LONGEST:
        raise ValueError(f"it is longer than {LONGEST} bytes")
    content = json.loads(place.read_text(encoding="utf-8"))
    _check(content)
    return content


def checksums(content: Mapping[str, Any], path: Path) -> Iterator[tuple[Path, str, str]]:
    """The exported file and its weights, each with its checksum and that of the manifest."""
    for name, part in (("artifact", path), ("weights", weights_of(path))):
        found = NONE if part is None else checksum(part)
        declared = content[name]["sha256"] if content[name] else NONE
        yield part or _weights_beside(path), found, declared


def checksum(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file; of a folder, of the names and checksums of the files in it.

    >>> import pathlib, tempfile
    >>> from jaxbn.export import _beside
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = pathlib.Path(folder, "a").write_bytes(b"")
    ...     _beside.checksum(f"{folder}/a")[:8]
    'e3b0c442'
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        lines = [f"{checksum(file)} {file.relative_to(path).as_posix()}\n" for file in files]
        return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(content: Any) -> None:
    """Raises unless the content of a manifest has its form."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"expected an object of format {FORMAT}")
    for name in ("artifact", "weights", "checkpoint"):
        entry = content.get(name)
        if entry is None and name != "artifact":
            content[name] = None
            continue
        if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
            raise ValueError(f"expected the SHA-256 of the {name}")
    for name, kind in (("folded", list), ("not_folded", list), ("errors", dict)):
        if not isinstance(content.get(name), kind):
            raise ValueError(f"expected {name}, a {kind.__name__}")
