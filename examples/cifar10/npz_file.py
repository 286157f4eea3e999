# Images in an .npz file: x [N, H, W, 3] uint8 with their classes y [N], read as data. Nothing in
# the file is run: Python objects in it would be pickles, and are refused.
#
#   np.savez("mine.npz", x=images, y=labels)
#
# [N, H, W] and [N, H, W, 1] are grey. x_test and y_test are optional, and so are the names of the
# classes, `classes`.

import math
import os
import zipfile
from pathlib import Path

import numpy as np
from command import DataError, shown

OBJECTS = "Python objects (pickled), which are not read: save numbers"


def read(path: Path) -> dict[str, np.ndarray]:
    """
    x, y, x_test, y_test and classes, all checked; without x_test every fifth of each class is for
    test. And `key`, where there is one.
    """
    found = arrays(path)
    for name in ("x", "y"):
        if name not in found:
            raise DataError(f"{shown(path)}: no array {name} in it, expected x and y")
    if ("x_test" in found) != ("y_test" in found):
        raise DataError(f"{shown(path)}: expected x_test and y_test, or neither")
    splits = [("x", "y"), ("x_test", "y_test")][: 1 + ("x_test" in found)]
    for x, y in splits:
        found[x] = colored(path, x, found[x])
        found[y] = labels(path, y, found[y], len(found[x]))
    y, names = found["y"], found.get("classes")
    present = np.unique(y)
    if names is not None and (names.dtype.kind != "U" or names.ndim != 1):
        raise DataError(f"{shown(path)}: classes are {kind(names)}, expected a list of names")
    count = len(present) if names is None else len(names)
    for name in [y for _, y in splits]:
        wrong = found[name][(found[name] < 0) | (found[name] >= count)]
        if len(wrong):
            raise DataError(
                f"{shown(path)}: {name} has label {wrong[0]}, but of {count} classes labels are 0 "
                f"to {count - 1}"
            )
    if len(present) < 2:
        raise DataError(f"{shown(path)}: one class, expected two or more")
    if len(present) < count:
        missing = int(np.setdiff1d(np.arange(count), present)[0])
        raise DataError(f"{shown(path)}: no image of class {missing}, of {count} classes")
    if "x_test" not in found:
        test = every_fifth(y)
        found |= {"x_test": found["x"][test], "y_test": y[test]}
        found |= {"x": found["x"][~test], "y": y[~test]}
    if not len(found["y_test"]):
        raise DataError(f"{shown(path)}: no image to test on, expected two of a class or x_test")
    if found["x_test"].shape[1:] != found["x"].shape[1:]:
        raise DataError(
            f"{shown(path)}: x_test has shape {found['x_test'].shape}, x {found['x'].shape}"
        )
    if names is None:
        found["classes"] = np.arange(count).astype(str)
    return found


def every_fifth(y: np.ndarray) -> np.ndarray:
    """[N] bool: the second image of each class, and every fifth from there on."""
    test = np.zeros(len(y), bool)
    for label in np.unique(y):
        test[np.flatnonzero(y == label)[1::5]] = True
    return test


def colored(path: Path, name: str, x: np.ndarray) -> np.ndarray:
    """[N, H, W, 3] of what may be grey."""
    if x.ndim == 3:
        x = x[..., None]
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] not in (1, 3) or not x.size:
        raise DataError(
            f"{shown(path)}: {name} is {kind(x)}, expected uint8 [N, H, W, 3] or [N, H, W]"
        )
    return np.broadcast_to(x, (*x.shape[:3], 3))


def labels(path: Path, name: str, y: np.ndarray, count: int) -> np.ndarray:
    if y.dtype.kind not in "iu" or y.shape != (count,):
        raise DataError(f"{shown(path)}: {name} is {kind(y)}, expected integers [{count}]")
    return y.astype(np.int64)


def kind(array: np.ndarray) -> str:
    return f"{shown(array.dtype)} {list(array.shape)}"


def arrays(path: Path) -> dict[str, np.ndarray]:
    """Those that have one of our names."""
    wanted = ("x", "y", "x_test", "y_test", "classes", "key")
    if not path.is_file():
        raise DataError(f"{shown(path)}: no such file")
    try:
        with zipfile.ZipFile(path) as file:
            members = {info.filename: info for info in file.infolist()}
            check_size(sum(info.file_size for info in members.values()))
            return {
                name: array(file, members[f"{name}.npy"])
                for name in wanted
                if f"{name}.npy" in members
            }
    except DataError as error:
        raise DataError(f"{shown(path)}: {error}") from None
    except Exception as error:  # zipfile and NumPy raise errors of many kinds for damaged files
        why = getattr(error, "strerror", None)
        reason = f"cannot be read: {why}" if why else "damaged, or no .npz file"
        raise DataError(f"{shown(path)}: {reason}") from None


def check_size(size: int) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise DataError(f"declares {size:,} bytes, and this machine has {memory:,}")


def array(file: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """One array, whose header must not declare more bytes than it has."""
    form = np.lib.format
    with file.open(info) as stream:
        header = form.read_array_header_1_0
        if form.read_magic(stream) != (1, 0):
            header = form.read_array_header_2_0
        shape, _, dtype = header(stream)
    if dtype.hasobject:
        raise DataError(f"{info.filename.removesuffix('.npy')} holds {OBJECTS}")
    if math.prod(shape) * dtype.itemsize > info.file_size:
        raise DataError("damaged: an array declares more values than it has")
    with file.open(info) as stream:
        return form.read_array(stream, allow_pickle=False)
