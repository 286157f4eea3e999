"""The CIFAR example's data: the reader, the digits, the download, and all that can go wrong."""

import errno
import hashlib
import io
import os
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "cifar10"))

import augment
import data
import download
import model
import train
from download import DataError

N = 6  # records a file, in place of 10,000
CIFAR10 = download.CIFAR10
SIX = CIFAR10.members


def write_six(folder: Path) -> None:
    """Six small files in CIFAR-10's layout; record r of file f has the label (f + r) % 10."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for f, name in enumerate(SIX):
        labels = ((f + np.arange(N)) % 10).astype(np.uint8)[:, None]
        planes = rng.integers(0, 256, (N, 3072), np.uint8)
        np.concatenate([labels, planes], axis=1).tofile(folder / name)


@pytest.fixture
def six(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(data, "RECORDS", N)
    write_six(tmp_path / "data" / CIFAR10.folder)
    return tmp_path / "data" / CIFAR10.folder


# --- the reader -------------------------------------------------------------------------------


@pytest.mark.parametrize("above", [False, True])
def test_reads_every_record_with_its_planes_as_channels(six, above):
    got = data.load("auto", six.parent if above else six)
    assert got.train_x.shape == (5 * N, 32, 32, 3)
    assert got.test_x.dtype == got.train_x.dtype == np.uint8
    np.testing.assert_array_equal(got.test_y, (5 + np.arange(N)) % 10)
    np.testing.assert_array_equal(got.train_y[N : 2 * N], (1 + np.arange(N)) % 10)
    raw = np.fromfile(six / "data_batch_2.bin", np.uint8)
    green = raw[3 * 3073 + 1 + 1024 + 32 * 5 + 7]  # record 3, plane 1, row 5, column 7
    assert got.train_x[np.array([N + 3])][0, 5, 7, 1] == green


def message(call, *args) -> str:
    with pytest.raises(DataError) as caught:
        call(*args)
    return str(caught.value)


def test_a_truncated_file_is_named_with_both_sizes(six):
    path = six / "data_batch_4.bin"
    path.write_bytes(path.read_bytes()[:-100])
    assert message(data.load, "cifar10", six) == (
        f"{path}: 18,338 bytes, but 6 records of 3,073 bytes are 18,438: "
        "truncated, or not CIFAR's binary version"
    )


def test_a_wrong_label_byte_is_named_with_its_record(six):
    path = six / "test_batch.bin"
    raw = bytearray(path.read_bytes())
    raw[2 * 3073] = 10
    path.write_bytes(raw)
    assert message(data.load, "cifar10", six) == (
        f"{path}: record 2 has label 10, labels are 0 to 9"
    )


def test_a_missing_file_is_named(six):
    (six / "data_batch_3.bin").unlink()
    assert message(data.load, "auto", six) == (
        f"{six}/data_batch_3.bin: cannot be read: No such file or directory"
    )


def test_a_file_that_is_cut_while_its_images_are_read_is_named(six):
    got = data.cifar10(six)
    path = six / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[: 3 * 3073])
    assert got.train_x[np.array([N + 2])].shape == (1, 32, 32, 3)
    assert message(got.train_x.__getitem__, np.arange(N + 2, N + 4)) == (
        f"{path}: was cut since its labels were read"
    )
    path.unlink()
    assert message(got.train_x.__getitem__, np.array([N])) == (
        f"{path}: cannot be read: No such file or directory"
    )


def test_data_dir_without_data_never_falls_back_to_the_digits(tmp_path):
    assert message(data.load, "auto", tmp_path) == (
        f"--data-dir {tmp_path}: no test_batch.bin in it, nor in cifar-10-batches-bin/ below it"
    )


def test_the_digits_are_shaped_like_cifar_and_split_the_same_always():
    got = data.digits()
    assert got.train_x.shape == (1437, 32, 32, 3)
    assert got.test_x.shape == (360, 32, 32, 3)
    assert (got.train_x.min(), got.train_x.max()) == (0, 255)
    assert set(got.test_y) == set(got.train_y) == set(range(10))
    pixels = got.train_x.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(pixels.mean(axis=0), got.mean, atol=0.1)
    np.testing.assert_allclose(pixels.std(axis=0), got.std, atol=0.1)
    assert not got.flip


# --- augmentation -----------------------------------------------------------------------------


def test_a_crop_is_a_window_of_the_reflected_image():
    image = np.arange(32 * 32 * 3, dtype=np.uint32).reshape(1, 32, 32, 3)
    padded = np.pad(image, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="reflect")[0]
    windows = {padded[i : i + 32, j : j + 32].tobytes(): (i, j) for i in range(9) for j in range(9)}
    crops = np.asarray(augment.random_crop(jax.random.key(0), image.repeat(2000, axis=0)))
    seen = {windows[crop.tobytes()] for crop in crops}
    assert len(seen) == 81  # 2000 draws miss one with a probability below 81 exp(-2000/81) = 2e-9


@pytest.mark.parametrize("size", [7, 8])
def test_cutout_takes_one_square_of_that_size(size):
    images = augment.random_cutout(jax.random.key(1), np.ones((64, 32, 32, 3), np.float32), size)
    area = np.asarray((images[..., 0] == 0).sum(axis=(1, 2)))
    assert area.max() == size**2
    assert area.min() >= (size // 2) ** 2  # at a corner a quarter is left
    np.testing.assert_array_equal(images[..., 0], images[..., 2])


def test_digits_are_not_mirrored_and_half_of_the_others_are():
    key, pad = jax.random.key(2), 32 // augment.SHARE
    images = np.zeros((256, 32, 32, 3), np.uint8)
    images[:, :, :16] = 255  # bright on the left, whatever the crop
    for flip, share in ((False, 0.0), (True, 0.5)):
        out = augment.augment(key, images, (0.0,) * 3, (1.0,) * 3, flip=flip, cutout=0)
        mirrored = np.asarray(out[:, 16, pad, 0]) == 0
        assert abs(mirrored.mean() - share) <= 3 * np.sqrt(share * (1 - share) / 256)


# --- the download -----------------------------------------------------------------------------


def bodies() -> dict[str, bytes]:
    """CIFAR-10's six files."""
    rng = np.random.default_rng(1)
    return {name: rng.integers(0, 10, N * 3073, np.uint8).tobytes() for name in SIX}


def bodies_of_100() -> dict[str, bytes]:
    """CIFAR-100's three: record r has the coarse label 255 and the fine label 20 r % 100."""
    rng, files = np.random.default_rng(2), {}
    for name, count in (("train.bin", 5 * N), ("test.bin", N)):
        labels = np.stack([np.full(count, 255), 20 * np.arange(count) % 100], axis=1)
        planes = rng.integers(0, 256, (count, 3072))
        files[name] = np.concatenate([labels, planes], axis=1).astype(np.uint8).tobytes()
    return files | {"fine_label_names.txt": "\n".join(f"class_{c}" for c in range(100)).encode()}


def packed(folder: str, files: dict[str, bytes]) -> bytes:
    """The archive, and what a hostile one would bring along."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        inside = {f"{folder}/{name}": body for name, body in files.items()}
        for name, body in (inside | {"../../evil": b"evil", "readme.html": b"<html>"}).items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
        link = tarfile.TarInfo(f"{folder}/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return out.getvalue()


class Server(BaseHTTPRequestHandler):
    body = b""
    stop_after = None  # bytes of a response until the connection breaks
    ranges = True
    length = "{}"  # Content-Length, of so many bytes; None: it is not told
    asked: list  # the Range header of every request

    def do_GET(self):
        self.asked.append(self.headers["Range"])
        start = 0
        if self.ranges and self.headers["Range"]:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        part = self.body[start:]
        self.send_response(206 if start else 200)
        if self.length is not None:
            self.send_header("Content-Length", self.length.format(len(part)))
        self.end_headers()
        self.wfile.write(part[: self.stop_after])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch, request):
    """The home page of CIFAR-10, or of the archive that is asked for; the cache is empty."""
    name, files = getattr(request, "param", ("CIFAR10", bodies))
    archive = getattr(download, name)
    body = packed(archive.folder, files())
    handler = type("Handler", (Server,), {"body": body, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setenv("no_proxy", "*")
        url = f"http://127.0.0.1:{http.server_port}/{Path(archive.url).name}"
        sha256 = hashlib.sha256(body).hexdigest()
        served = archive._replace(url=url, size=len(body), sha256=sha256)
        monkeypatch.setattr(download, name, served)
        monkeypatch.setattr(data, "RECORDS", N)
        yield handler
        http.shutdown()
        thread.join()


def quiet(*args):
    pass


def fetched(say=quiet) -> Path:
    return download.cached_or_downloaded(download.CIFAR10, say)


def cached(tmp_path) -> list[str]:
    return sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())


COMPLETE = sorted(f"jaxbn/{CIFAR10.folder}/{name}" for name in SIX)
PART = "jaxbn/cifar-10-binary.tar.gz.part"


def test_a_download_leaves_the_six_files_and_nothing_else(server, tmp_path):
    for _ in range(2):  # the second time from the cache
        folder = fetched()
        assert cached(tmp_path) == COMPLETE
    assert server.asked == [None]
    data.cifar10(folder)


@pytest.mark.parametrize("server", [("CIFAR100", bodies_of_100)], indirect=True)
def test_cifar_100_is_downloaded_and_trained_by_one_command(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(model.RESNETS, "resnet18", {"blocks": (1,), "bottleneck": False})
    options = "--data cifar100 --model resnet18 --width 2 --batch 8 --eval-batch 8 --epochs 1"
    where = ["--runs", str(tmp_path / "runs"), "--name", "hundred"]
    result = train.main([*options.split(), *where])
    assert "cifar100: 30 training and 6 test images of 100 classes" in capsys.readouterr().out
    assert result["state"].params["Dense_0"]["kernel"].shape[1] == 100
    folder = tmp_path / "jaxbn" / "cifar-100-binary"
    assert sorted(os.listdir(folder)) == ["fine_label_names.txt", "test.bin", "train.bin"]
    assert os.listdir(folder.parent) == [folder.name]

    got = data.load("cifar100", None, quiet)
    assert server.asked == [None]
    np.testing.assert_array_equal(got.train_y, 20 * np.arange(5 * N) % 100)
    assert got.classes[40] == "class_40"
    raw = np.frombuffer(bodies_of_100()["train.bin"], np.uint8).reshape(-1, 3074)
    image = raw[7, 2:].reshape(3, 32, 32).transpose(1, 2, 0)
    np.testing.assert_array_equal(got.train_x[np.array([7])][0], image)

    (folder / "fine_label_names.txt").write_text("apple")
    expected = f"{folder}/fine_label_names.txt: 1 names, expected those of 100 classes"
    assert message(data.load, "cifar100", folder) == expected
    raw = bytearray((folder / "test.bin").read_bytes())
    raw[3074 + 1] = 100
    (folder / "test.bin").write_bytes(raw)
    (folder / "fine_label_names.txt").write_bytes(bodies_of_100()["fine_label_names.txt"])
    expected = f"{folder}/test.bin: record 1 has label 100, labels are 0 to 99"
    assert message(data.load, "cifar100", folder) == expected


def test_a_download_that_broke_off_is_resumed_by_range(server, tmp_path):
    server.stop_after = 1000
    part = tmp_path / PART
    assert message(fetched) == (
        f"the download broke off: 1,000 of {download.CIFAR10.size:,} bytes are kept in {part}, "
        "run again to resume"
    )
    server.stop_after = None
    said = []
    fetched(said.append)
    assert server.asked == [None, "bytes=1000-"]
    assert said == [f"Resuming {download.CIFAR10.url} into {part.parent}"]
    assert cached(tmp_path) == COMPLETE


def test_a_server_that_ignores_range_starts_over(server, tmp_path):
    (tmp_path / "jaxbn").mkdir()
    (tmp_path / PART).write_bytes(b"x" * 500)
    server.ranges = False
    fetched()
    assert cached(tmp_path) == COMPLETE


def test_a_slow_download_is_kept_for_later_and_auto_goes_on(server, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PATIENCE", -1.0)
    monkeypatch.setattr(download, "CHUNK", 1000)
    said = []
    assert data.load("auto", None, said.append).name == "digits"
    assert said[1].splitlines()[1] == (
        "!! NOT CIFAR-10: training on scikit-learn's handwritten digits instead."
    )
    assert said[2].splitlines()[0] == (
        f"!! the download took longer than -1 s: 1,000 of {download.CIFAR10.size:,} bytes are kept "
        f"in {tmp_path / PART}, run again to resume"
    )


def test_a_wrong_checksum_removes_the_file(server, tmp_path):
    server.body = server.body[:-1] + b"?"
    found = hashlib.sha256(server.body).hexdigest()
    expected = download.CIFAR10.sha256
    assert message(fetched) == (
        f"{download.CIFAR10.url}: wrong checksum: SHA-256 {found}, expected {expected}: removed, "
        "run again"
    )
    assert cached(tmp_path) == []


def test_another_length_is_refused_before_anything_is_written(server, tmp_path):
    server.body = b"<html>Please log in to the hotel's network</html>"
    assert message(fetched) == (
        f"{download.CIFAR10.url}: 49 bytes were offered, expected {download.CIFAR10.size:,}"
    )
    assert cached(tmp_path) == []


@pytest.mark.parametrize("length", [None, "", "many", "-1", "1e3", "9" * 5000])
@pytest.mark.parametrize("begun", [False, True])
def test_a_page_of_no_known_length_is_refused_and_what_is_there_is_kept(
    server, tmp_path, monkeypatch, length, begun
):
    if begun:
        (tmp_path / "jaxbn").mkdir()
        (tmp_path / PART).write_bytes(server.body[:500])
    server.length, server.ranges = length, False
    said = []
    monkeypatch.setattr(data, "digits", lambda: "digits")
    assert data.load("auto", None, said.append) == "digits"  # goes on without it
    assert said[2].splitlines()[0] == (
        f"!! {download.CIFAR10.url}: an unknown number of bytes were offered, expected "
        f"{download.CIFAR10.size:,}"
    )
    assert cached(tmp_path) == [PART] * begun
    if begun:
        assert (tmp_path / PART).read_bytes() == server.body[:500]


class Answer(io.BytesIO):
    """An answer whose bytes come one at a time, a second after each other, and never end."""

    status, clock = 200, 0.0

    def __init__(self, **headers):
        self.headers = headers

    def read1(self, size):
        Answer.clock += 1.0
        return b"x"[:size]

    def read(self, size):
        return b"".join(self.read1(1) for _ in range(size))


@pytest.mark.parametrize(("patience", "kept"), [(5.0, 6), (None, 40)])
def test_a_slow_answer_is_left_in_time_and_an_endless_one_at_the_length_of_the_archive(
    tmp_path, monkeypatch, patience, kept
):
    monkeypatch.setattr(Answer, "clock", 0.0)
    monkeypatch.setattr(download.time, "monotonic", lambda: Answer.clock)
    answer = Answer(**{"Content-Length": "40"})
    monkeypatch.setattr(download.urllib.request, "urlopen", lambda *_, **__: answer)
    forty = CIFAR10._replace(size=40)
    part = tmp_path / "part"
    if patience is None:
        download.fetch(forty, part, quiet, None)
    else:
        assert message(download.fetch, forty, part, quiet, patience) == (
            f"the download took longer than 5 s: 6 of 40 bytes are kept in {part}, run again to "
            "resume"
        )
    assert part.read_bytes() == b"x" * kept


@pytest.mark.parametrize("what", ["link", "dangling", "pipe", "folder"])
def test_a_part_that_is_no_file_of_ours_is_not_followed(server, tmp_path, what):
    part, target = tmp_path / PART, tmp_path / "target"
    part.parent.mkdir()
    target.write_text("mine")
    if what == "pipe":
        os.mkfifo(part)
    elif what == "folder":
        part.mkdir()
    else:
        part.symlink_to(target if what == "link" else tmp_path / "nowhere")
    assert message(fetched) == (f"{part}: a link, or no file: not written to, remove it")
    assert server.asked == []
    assert target.read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


def test_what_a_server_says_is_printed_with_its_control_characters_escaped(server, monkeypatch):
    monkeypatch.setattr(server, "do_GET", lambda self: self.send_error(404, "\x1b[31mNo\x07"))
    assert message(fetched) == (f"{download.CIFAR10.url}: the server answered 404 \\x1b[31mNo\\x07")


def test_no_network_is_one_line_and_writes_nothing(server, tmp_path, monkeypatch):
    nowhere = CIFAR10._replace(url="http://127.0.0.1:1/c.tar.gz")
    monkeypatch.setattr(download, "CIFAR10", nowhere)
    assert message(data.load, "cifar10", None, quiet) == (
        "no network: http://127.0.0.1:1/c.tar.gz: [Errno 111] Connection refused"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["download", "unpacking"])
def test_no_space_removes_what_was_written(server, tmp_path, monkeypatch, where):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "unpacking":
        monkeypatch.setattr(download.shutil, "copyfileobj", full)
    else:

        class Full(io.FileIO):
            write = full

        files = {str(tmp_path / PART): Full}
        monkeypatch.setattr(
            download, "open", lambda path, mode: files.get(str(path), open)(path, mode), False
        )
    assert message(fetched) == (
        f"no space left in {tmp_path}/jaxbn (CIFAR-10 takes 0 MB while it is unpacked): "
        "removed what was written; free some, or set XDG_CACHE_HOME"
    )
    assert cached(tmp_path) == []


def test_a_file_that_is_not_in_the_archive_is_named(server, tmp_path, monkeypatch):
    more = download.CIFAR10._replace(members=(*SIX, "extra.bin"))
    monkeypatch.setattr(download, "CIFAR10", more)
    assert message(fetched) == (f"{tmp_path / PART}: extra.bin not in the archive")
    assert cached(tmp_path) == [PART]  # as downloaded; nothing of it unpacked
