# The binary versions of CIFAR-10 and CIFAR-100, from their home page into the user's cache. The
# bytes go to a `.part` file that a later run resumes; what is unpacked appears under its final name
# in one rename. So whatever stops this in the middle, nothing half-written looks finished.

import errno
import hashlib
import http.client
import os
import re
import shutil
import tarfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

from command import DataError, shown
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn


class Archive(NamedTuple):
    name: str
    url: str
    size: int  # bytes
    sha256: str
    folder: str  # the one in the archive, and in the cache
    members: tuple[str, ...]  # the files to unpack


HOME = "https://www.cs.toronto.edu/~kriz"
CIFAR10 = Archive(
    "CIFAR-10",
    f"{HOME}/cifar-10-binary.tar.gz",
    170_052_171,
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    "cifar-10-batches-bin",
    (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"),
)
CIFAR100 = Archive(
    "CIFAR-100",
    f"{HOME}/cifar-100-binary.tar.gz",
    168_513_733,
    "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    "cifar-100-binary",
    ("train.bin", "test.bin", "fine_label_names.txt"),
)
TIMEOUT = 10.0  # seconds without an answer, or without a byte, until we call it no network
CHUNK = 1 << 18  # bytes read at a time


def cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "jaxbn"


def cached_or_downloaded(archive: Archive, say=print, patience: float | None = None) -> Path:
    """The folder of the archive's files in the cache, downloaded if it is not there yet."""
    cache = cache_dir()
    folder, part = cache / archive.folder, cache / f"{Path(archive.url).name}.part"
    if folder.is_dir():
        return folder
    try:
        fetch(archive, part, say, patience)
        verify(archive, part)
        unpack(archive, part, folder)
        part.unlink()
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise DataError(f"{error.filename or cache}: {error.strerror or error}") from None
        part.unlink(missing_ok=True)
        raise DataError(
            f"no space left in {cache} ({archive.name} takes {2 * archive.size / 1e6:.0f} MB while "
            "it is unpacked): removed what was written; free some, or set XDG_CACHE_HOME"
        ) from None
    return folder


def fetch(archive: Archive, part: Path, say, patience: float | None) -> None:
    """Bring `part` to its full size, from where an earlier run left it."""
    url, size = archive.url, archive.size
    if part.is_symlink() or (part.exists() and not part.is_file()):
        raise DataError(f"{part}: a link, or no file: not written to, remove it")
    start = part.stat().st_size if part.exists() else 0
    if start >= size:  # complete; if it is wrong, the checksum says so
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    begun, slow = time.monotonic(), False
    say(f"{'Resuming' if start else 'Downloading'} {url} into {part.parent}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            # 206: the bytes from `start` on. 200: the server sends all of it again.
            start = start if answer.status == 206 else 0
            expect_length(url, answer, size - start)
            part.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "ab" if start else "wb") as file, bar() as progress:
                task = progress.add_task(archive.name, total=size, completed=start)
                # read1: what has come, however little, so that patience is asked about in time.
                while not slow and (chunk := answer.read1(min(CHUNK, size - start))):
                    start += file.write(chunk)
                    progress.advance(task, len(chunk))
                    slow = patience is not None and time.monotonic() - begun > patience
    # An HTTPError is a URLError is an OSError: the narrowest comes first.
    except urllib.error.HTTPError as error:
        error.close()
        reason = shown(error.reason)
        raise DataError(f"{url}: the server answered {error.code} {reason}") from None
    except urllib.error.URLError as error:
        raise DataError(f"no network: {url}: {error.reason}") from None
    except (TimeoutError, ConnectionError, http.client.HTTPException):
        pass  # broken off: the size tells how far it came
    except ValueError:  # where a redirection leads, for one
        raise DataError(f"{url}: the server's answer is not to be understood") from None
    if not part.exists():
        raise DataError(f"no network: {url}: no answer within {TIMEOUT:.0f} s")
    if (come := part.stat().st_size) < size:
        why = f"took longer than {patience:.0f} s" if slow else "broke off"
        raise DataError(
            f"the download {why}: {come:,} of {size:,} bytes are kept in {part}, "
            "run again to resume"
        )


def expect_length(url: str, answer, length: int) -> None:
    """
    A login page of some hotel has another length than the archive, or tells none: notice it before
    writing, over bytes that an earlier run has left.
    """
    announced = answer.headers.get("Content-Length", "")
    if announced != str(length):
        known = re.fullmatch("[0-9]{1,15}", announced)
        offered = f"{int(announced):,}" if known else "an unknown number of"
        raise DataError(f"{url}: {offered} bytes were offered, expected {length:,}")


def bar() -> Progress:
    return Progress("{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn())


def verify(archive: Archive, part: Path) -> None:
    with open(part, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != archive.sha256:
        part.unlink()
        raise DataError(
            f"{archive.url}: wrong checksum: SHA-256 {found}, expected {archive.sha256}: removed, "
            "run again"
        )


def unpack(archive: Archive, part: Path, folder: Path) -> None:
    """The archive's members, and nothing else that may be in it, into `folder`."""
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        with tarfile.open(part) as tar:
            for member in tar:
                # We open the file to write ourselves, under a name from our own list:
                # no path, link or mode in the archive can lead anywhere else.
                name = Path(member.name).name
                if name in archive.members and member.isreg():
                    with tar.extractfile(member) as source, open(temporary / name, "wb") as target:
                        shutil.copyfileobj(source, target)
        if missing := sorted({*archive.members} - {path.name for path in temporary.iterdir()}):
            raise DataError(f"{part}: {', '.join(missing)} not in the archive")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
