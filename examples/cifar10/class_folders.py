# A folder with a folder of images for each class → one .npz file in the user's cache, as
# npz_file.py reads it. The images are decoded and resized once, and again when a file has changed.

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

import images
import npz_file
import numpy as np
from command import DataError, new_file, progress, shown
from download import cache_dir

SUFFIXES = {".png", ".jpg", ".jpeg"}
LEAST = 8  # pixels of a side


def read(root: Path, size: int | None, most: int, say=print) -> dict[str, np.ndarray]:
    """
    The arrays of npz_file.py, with images of `size` pixels a side. None: as many as the shortest
    side of all images has, but at most `most`.
    """
    splits = listing(root)
    key = fingerprint(root, splits, size or -most)
    place = hashlib.sha256(os.fsencode(f"{root.resolve()} {size or -most}")).hexdigest()
    file = cache_dir() / f"images-{place[:16]}.npz"
    with suppress(DataError):  # not there, or damaged
        found = npz_file.read(file)
        if str(found.get("key")) == key:
            return found
    if size is None:
        sides = map(shortest_side, progress(all_files(splits), "measuring"))
        size = max(LEAST, min(most, *sides))
    classes = sorted(splits["x"])
    arrays = {"key": np.array(key), "classes": np.array([shown(name) for name in classes])}
    for x, of_class in splits.items():
        paths = [path for name in classes for path in of_class.get(name, [])]
        say(f"Reading {len(paths):,} images of {root} at {size}x{size} pixels, for {file}")
        arrays[x] = decoded(paths, size)
        counts = [len(of_class.get(name, [])) for name in classes]
        arrays[x.replace("x", "y")] = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
    store(file, arrays)
    return npz_file.read(file)


def decoded(paths: list[Path], size: int) -> np.ndarray:
    """[N, size, size, 3] uint8."""
    out = np.empty((len(paths), size, size, 3), np.uint8)
    for i, path in enumerate(progress(paths, "decoding")):
        out[i] = images.decode(path, size, size)
    return out


def store(file: Path, arrays: dict[str, np.ndarray]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with new_file(file) as part, open(part, "wb") as out:
            np.savez(out, **arrays)
    except OSError as error:
        raise DataError(f"{file}: cannot be written: {error.strerror or error}") from None


def fingerprint(root: Path, splits, size: int) -> str:
    """Changes with any file's name, size or time."""
    files = [(path, path.stat()) for path in all_files(splits)]
    facts = [[str(p.relative_to(root)), s.st_size, s.st_mtime_ns] for p, s in files]
    return hashlib.sha256(json.dumps([size, facts]).encode()).hexdigest()


def shortest_side(path: Path) -> int:
    with images.opened(path) as image:
        return min(image.size)


def all_files(splits) -> list[Path]:
    return [path for of_class in splits.values() for paths in of_class.values() for path in paths]


def listing(root: Path) -> dict[str, dict[str, list[Path]]]:
    """
    The files by class, sorted: {"x": {class: files}}; and "x_test" where all that `root` has are
    the folders train and test, or train and val.
    """
    here = folders(root)
    splits = {"x": here}
    if "train" in here and len(here) > 1 and here.keys() <= {"train", "test", "val"}:
        test = here.get("test", here.get("val"))
        splits = {"x": folders(here["train"]), "x_test": folders(test)}
        for name in splits["x_test"].keys() - splits["x"].keys():
            raise DataError(f"{shown(test / name)}: no class of that name to train on")
    if len(splits["x"]) < 2:
        found = shown(", ".join(splits["x"])) or "none"
        raise DataError(
            f"{shown(root)}: expected a folder of images for each class, two or more; found {found}"
        )
    found = {
        x: {name: files(folder, root) for name, folder in sorted(classes.items())}
        for x, classes in splits.items()
    }
    if not found.get("x_test", max(map(len, found["x"].values())) > 1):
        raise DataError(f"{shown(root)}: no image to test on, expected two images of a class")
    return found


def folders(root: Path) -> dict[str, Path]:
    return {path.name: path for path in root.iterdir() if path.is_dir() and is_plain(path)}


def is_plain(path: Path) -> bool:
    return not path.name.startswith(".")


def files(folder: Path, root: Path) -> list[Path]:
    """The images of a class."""
    inside(folder, root)
    found = []
    for path in sorted(filter(is_plain, folder.iterdir())):
        if path.is_dir():
            raise DataError(f"{shown(path)}: a folder in that of a class, expected images alone")
        if path.suffix.lower() in SUFFIXES:
            inside(path, root)
            found.append(path)
    if not found:
        raise DataError(f"{shown(folder)}: no PNG or JPEG in it, expected images of a class")
    return found


def inside(path: Path, root: Path) -> None:
    if not path.resolve().is_relative_to(root.resolve()):
        raise DataError(f"{shown(path)}: a link that leads out of {shown(root)}, not followed")
