# Two data sets of the same shape: CIFAR-10, and scikit-learn's handwritten digits for a
# machine that cannot have CIFAR-10. Here they are arrays on the host, CIFAR's images still on
# disk; loop.py reads them onto the devices, augment.py makes of them what the network sees.

import os
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from download import FOLDER, DataError, cached_or_downloaded

RECORDS = 10_000  # images in each of CIFAR-10's six files
RECORD = 1 + 3 * 32 * 32  # bytes of one: the label, then red, green, blue planes
TRAIN = [f"data_batch_{i}.bin" for i in range(1, 6)]
TEST = "test_batch.bin"
PATIENCE = 120.0  # seconds that --data auto gives a download before it turns to the digits


class Data(NamedTuple):
    name: str
    train_x: "np.ndarray | Images"  # [N, 32, 32, 3] uint8
    train_y: np.ndarray  # [N] int32, 0 to 9
    test_x: "np.ndarray | Images"  # [M, 32, 32, 3] uint8
    test_y: np.ndarray  # [M] int32
    mean: tuple[float, float, float]  # of the training bytes, per channel
    std: tuple[float, float, float]
    flip: bool  # a mirrored horse is a horse, a mirrored 2 is not a 2


def load(choice: str, data_dir: Path | None, say=print) -> Data:
    """The data set that `--data` and `--data-dir` ask for; DataError where there is none."""
    if choice == "digits":
        return digits()
    if data_dir is not None:  # then the images are meant to be there: no falling back
        return cifar10(find(data_dir))
    if choice == "cifar10":
        return cifar10(cached_or_downloaded(say))
    try:
        return cifar10(cached_or_downloaded(say, patience=PATIENCE))
    except DataError as error:
        bar = "!" * 78
        say(f"{bar}\n!! NOT CIFAR-10: training on scikit-learn's handwritten digits instead.")
        say(f"!! {error}\n{bar}")
        return digits()


def find(data_dir: Path) -> Path:
    """`data_dir` may be the folder of the six files, or the folder above it."""
    for folder in (data_dir, data_dir / FOLDER):
        if (folder / TEST).exists():
            return folder
    raise DataError(f"--data-dir {data_dir}: no {TEST} in it, nor in {FOLDER}/ below it")


def cifar10(folder: Path) -> Data:
    train, test = [folder / name for name in TRAIN], folder / TEST
    y = np.concatenate([labels(path) for path in train])
    mean, std = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
    return Data("cifar10", Images(train), y, Images([test]), labels(test), mean, std, flip=True)


class Images:
    """
    The images of files in a row, on disk: `images[rows]` reads these rows, [R, 32, 32, 3]. They
    are read and not mapped, since a mapped file that is cut ends the process without a word.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, paths: list[Path]):  # of RECORDS images each
        self.paths, self.shape = paths, (len(paths) * RECORDS, 32, 32, 3)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        planes = np.empty((len(rows), 3, 32, 32), self.dtype)  # [R, C, H, W], as in the files
        for i, path in enumerate(self.paths):
            here = np.flatnonzero(rows // RECORDS == i)
            with opened(path) as file:
                for at in here:
                    file.seek(rows[at] % RECORDS * RECORD + 1)
                    if file.readinto(planes[at]) < RECORD - 1:
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


def labels(path: Path) -> np.ndarray:
    """Those of one file of the binary version, [RECORDS] int32."""
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        raw = np.fromfile(file, np.uint8, RECORDS * RECORD)
    if size != RECORDS * RECORD or raw.size < size:
        raise DataError(
            f"{path}: {size:,} bytes, but {RECORDS:,} records of {RECORD:,} bytes are "
            f"{RECORDS * RECORD:,}: truncated, or not CIFAR-10's binary version"
        )
    found = raw[::RECORD].astype(np.int32)
    if found.max() > 9:
        bad = int(np.argmax(found > 9))
        raise DataError(f"{path}: record {bad} has label {found[bad]}, labels are 0 to 9")
    return found


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
    return Data("digits", x[~test], y[~test], x[test], y[test], mean, std, flip=False)
