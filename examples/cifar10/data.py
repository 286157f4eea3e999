# The data sets that `--data` knows: CIFAR-10 and -100, scikit-learn's handwritten digits for a
# machine that cannot have CIFAR, noise to measure throughput by, and anyone's own: a folder of
# images for each class, or an .npz file. Here they are arrays on the host, CIFAR's images still on
# disk; loop.py reads them onto the devices, augment.py makes of them what the network sees.

import os
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import class_folders
import download
import npz_file
import numpy as np
from command import DataError, shown
from download import Archive, cached_or_downloaded

NAMES = ("auto", "cifar10", "cifar100", "digits", "synthetic")
RECORDS = 10_000  # images in each of CIFAR-10's six files, and in CIFAR-100's test.bin
PIXELS = 3 * 32 * 32  # bytes of a record after its labels: red, green, blue planes
TRAIN = [f"data_batch_{i}.bin" for i in range(1, 6)]
TEST = "test_batch.bin"
TEN = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PATIENCE = 120.0  # seconds that --data auto gives a download before it turns to the digits


class About(NamedTuple):
    """What a network must know of its data."""

    classes: tuple[str, ...]  # their names, safe to print
    shape: tuple[int, int, int]  # of an image: height, width, 3
    mean: tuple[float, float, float]  # of the training bytes, per channel
    std: tuple[float, float, float]
    train: int  # images
    test: int


class Data(NamedTuple):
    name: str
    train_x: "np.ndarray | Images"  # [N, H, W, 3] uint8
    train_y: np.ndarray  # [N] int32, 0 to classes - 1
    test_x: "np.ndarray | Images"  # [M, H, W, 3] uint8
    test_y: np.ndarray  # [M] int32
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    flip: bool  # a mirrored horse is a horse, a mirrored 2 is not a 2
    classes: tuple[str, ...]

    @property
    def about(self) -> About:
        shape = tuple(self.train_x.shape[1:])
        return About(self.classes, shape, self.mean, self.std, len(self.train_y), len(self.test_y))


def load(
    choice: str, data_dir: Path | None, say=print, size: int | None = None, most: int = 32
) -> Data:
    """
    The data set that `--data` and `--data-dir` ask for; DataError where there is none. A folder's
    images get `size` pixels a side, or as many as they have, but at most `most`.
    """
    if choice not in NAMES:
        return own(Path(choice), say, size, most)
    if choice == "digits":
        return digits()
    if choice == "synthetic":
        return synthetic(size or most)
    archive, read = (
        (download.CIFAR100, cifar100) if choice == "cifar100" else (download.CIFAR10, cifar10)
    )
    if data_dir is not None:  # then the images are meant to be there: no falling back
        return read(find(archive, data_dir))
    if choice != "auto":
        return read(cached_or_downloaded(archive, say))
    try:
        return read(cached_or_downloaded(archive, say, patience=PATIENCE))
    except DataError as error:
        bar = "!" * 78
        say(f"{bar}\n!! NOT CIFAR-10: training on scikit-learn's handwritten digits instead.")
        say(f"!! {error}\n{bar}")
        return digits()


def find(archive: Archive, data_dir: Path) -> Path:
    """`data_dir` may be the folder of the archive's files, or the folder above it."""
    test = next(name for name in archive.members if name.startswith("test"))
    for folder in (data_dir, data_dir / archive.folder):
        if (folder / test).exists():
            return folder
    raise DataError(f"--data-dir {data_dir}: no {test} in it, nor in {archive.folder}/ below it")


# --- CIFAR's binary versions ------------------------------------------------------------------


def cifar10(folder: Path) -> Data:
    files = Records([folder / name for name in TRAIN], RECORDS)
    test = Records([folder / TEST], RECORDS)
    mean, std = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
    return cifar("cifar10", files, test, mean, std, TEN)


def cifar100(folder: Path) -> Data:
    train = Records([folder / "train.bin"], 5 * RECORDS, labels=2)
    test = Records([folder / "test.bin"], RECORDS, labels=2)
    path = folder / "fine_label_names.txt"
    with opened(path) as file:
        names = file.read(10_000).decode(errors="replace").split()
    if len(names) != 100:
        raise DataError(f"{path}: {len(names)} names, expected those of 100 classes")
    mean, std = (129.3, 124.1, 112.4), (68.2, 65.4, 70.4)
    return cifar("cifar100", train, test, mean, std, tuple(map(shown, names)))


def cifar(name, train: "Records", test: "Records", mean, std, classes) -> Data:
    y, test_y = (records.classes(len(classes)) for records in (train, test))
    return Data(name, Images(train), y, Images(test), test_y, mean, std, True, classes)


class Records(NamedTuple):
    """Where the images are: files of so many records, each with its labels first."""

    files: list[Path]
    count: int  # in each file
    labels: int = 1  # bytes; the last is the class

    def classes(self, most: int) -> np.ndarray:
        """[N] int32, of all files."""
        return np.concatenate([self.of_file(path, most) for path in self.files])

    def of_file(self, path: Path, most: int) -> np.ndarray:
        with opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            raw = np.fromfile(file, np.uint8, self.count * self.bytes)
        if size != self.count * self.bytes or raw.size < size:
            raise DataError(
                f"{path}: {size:,} bytes, but {self.count:,} records of {self.bytes:,} bytes are "
                f"{self.count * self.bytes:,}: truncated, or not CIFAR's binary version"
            )
        found = raw[self.labels - 1 :: self.bytes].astype(np.int32)
        if found.max() >= most:
            bad = int(np.argmax(found >= most))
            raise DataError(
                f"{path}: record {bad} has label {found[bad]}, labels are 0 to {most - 1}"
            )
        return found

    @property
    def bytes(self) -> int:
        return self.labels + PIXELS


class Images:
    """
    The images of files in a row, on disk: `images[rows]` reads these rows, [R, 32, 32, 3]. They
    are read and not mapped, since a mapped file that is cut ends the process without a word.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, records: Records):
        self.records = records
        self.shape = (len(records.files) * records.count, 32, 32, 3)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        planes = np.empty((len(rows), 3, 32, 32), self.dtype)  # [R, C, H, W], as in the files
        files, count, labels = self.records
        for i, path in enumerate(files):
            here = np.flatnonzero(rows // count == i)
            with opened(path) as file:
                for at in here:
                    file.seek(rows[at] % count * self.records.bytes + labels)
                    if file.readinto(planes[at]) < PIXELS:
                        raise DataError(f"{path}: was cut since its labels were read")
        return planes.transpose(0, 2, 3, 1)


@contextmanager
def opened(path: Path):
    """The file to read from; what goes wrong with it is a DataError that names it."""
    try:
        with open(path, "rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


# --- the others -------------------------------------------------------------------------------


def own(path: Path, say, size: int | None, most: int) -> Data:
    """A folder of images for each class, or an .npz file."""
    if path.is_dir():
        found = class_folders.read(path, size, most, say)
    elif path.suffix == ".npz":
        found = npz_file.read(path)
    else:
        raise DataError(
            f"--data {path}: expected {', '.join(NAMES)}, a folder of images for each class, or an "
            ".npz file"
        )
    classes = tuple(map(shown, found["classes"]))
    x, y, test_x, test_y = (found[name] for name in ("x", "y", "x_test", "y_test"))
    y, test_y = y.astype(np.int32), test_y.astype(np.int32)
    name = shown(path.resolve().name)
    return Data(name, x, y, test_x, test_y, *moments(x), True, classes)


def moments(x: np.ndarray):
    """Mean and standard deviation of the bytes, per channel; 1 for the deviation of a constant."""
    sums, squares = np.zeros(3), np.zeros(3)  # of whole numbers, so they are exact
    for image in x:
        planes = np.ascontiguousarray(image.transpose(2, 0, 1), np.float64)
        sums += planes.sum(axis=(1, 2))
        squares += (planes**2).sum(axis=(1, 2))
    count = len(x) * x.shape[1] * x.shape[2]
    mean = sums / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return tuple(mean.tolist()), tuple(np.where(std > 0, std, 1).tolist())


def synthetic(size: int) -> Data:
    """Noise, with a color for each of ten classes, so that there is something to learn."""
    rng = np.random.default_rng(0)
    count = min(5000, 2**28 // (3 * size**2))  # at most 256 MB
    y = np.arange(count, dtype=np.int32) % 10
    x = rng.integers(0, 128, (count, size, size, 3), np.uint8)
    x += rng.integers(0, 128, (10, 1, 1, 3), np.uint8)[y]
    test = npz_file.every_fifth(y)
    names = tuple(str(c) for c in range(10))
    return Data("synthetic", x[~test], y[~test], x[test], y[test], *moments(x[:256]), True, names)


def digits() -> Data:
    """1,797 real 8x8 digits that scikit-learn ships, shaped like CIFAR; every fifth is for test."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)  # [1797, 64] float64, 0 to 16
    x = np.rint(x * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    x = x.repeat(4, axis=1).repeat(4, axis=2)  # [1797, 32, 32]
    x = np.stack([x, x, x], axis=-1)  # [1797, 32, 32, 3]
    y = y.astype(np.int32)
    test = np.arange(len(y)) % 5 == 0  # the same split always: 1,437 and 360
    mean, std = (77.8,) * 3, (95.9,) * 3
    arrays = x[~test], y[~test], x[test], y[test]
    return Data("digits", *arrays, mean, std, False, tuple("0123456789"))
