"""Anyone's images: folders and .npz files, from a command line to the classes of a new image."""

import io
import os
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "cifar10"))

import class_folders
import data
import images
import model
import norms
import npz_file
import predict
import train
from command import DataError

COLORS = {"blue": (30, 40, 200), "green": (30, 200, 40), "red": (200, 40, 30)}


def picture(color, seed, height=10, width=10):
    noise = np.random.default_rng(seed).integers(-25, 25, (height, width, 3))
    return Image.fromarray((np.array(color) + noise).astype(np.uint8))


def write_folder(root: Path, count=10) -> Path:
    """A folder of PNGs and JPEGs for each color, and what else lies about in folders."""
    for name, color in COLORS.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            picture(color, i).save(root / name / f"{i}.{'JPG' if i == 3 else 'png'}")
        (root / name / "notes.txt").write_text("not an image")
        (root / name / ".hidden.png").write_text("not an image")
    (root / ".cache").mkdir()
    return root


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "jaxbn"


@pytest.fixture
def folder(tmp_path, cache) -> Path:
    return write_folder(tmp_path / "mine")


def quiet(*args):
    pass


def message(call, *args) -> str:
    with pytest.raises(DataError) as caught:
        call(*args)
    return str(caught.value)


# --- from one command to the next -------------------------------------------------------------


@pytest.mark.parametrize(("api", "norm"), [("linen", "sync"), ("nnx", "none")])
def test_images_of_ones_own_are_trained_by_one_command_until_the_target_and_predicted(
    folder, monkeypatch, capsys, tmp_path, api, norm
):
    monkeypatch.setitem(model.RESNETS, "resnet18", {"blocks": (1,), "bottleneck": False})
    monkeypatch.chdir(tmp_path)
    what = folder
    if api == "nnx":
        got = data.load(str(folder), None, quiet)
        splits = {"x": got.train_x, "y": got.train_y, "x_test": got.test_x, "y_test": got.test_y}
        np.savez(what := tmp_path / "mine.npz", **splits, classes=got.classes)
    options = "--model resnet18 --width 4 --batch 8 --eval-batch 8 --devices 1 --target 90"
    options += f" --epochs 30 --name mine --api {api} --norm {norm}"
    asked = ["--data", str(what), *options.split()]
    result = train.main(asked)
    out = capsys.readouterr().out.splitlines()
    begun = "24 training and 6 test images of 3 classes, 10x10 pixels, 30 epochs of batch 8"
    assert f"{what.name}: {begun}" in out
    done = result["epoch"]
    assert [row["test_accuracy"] >= 0.9 for row in result["rows"]] == [False] * (done - 1) + [True]
    assert done < 30
    assert f"Target of 90 % reached in epoch {done}" in out
    (said,) = [line.replace("│", "").split() for line in out if "│ target " in line]
    assert said == ["target", "90.00", "%", "reached"]
    # The images are one's own already.
    assert out[-1].endswith("cifar10/ship.py runs/mine")
    assert "own" not in out[-1]

    # Of another size and kind than the images in the folder.
    for name, color in COLORS.items():
        picture(color, 99, 40, 60).save(f"{name}.jpg")
    files = [f"{name}.jpg" for name in COLORS]
    predict.main(["runs/mine", *files, "--top", "1", "--picture", "top.png"])
    cells = [line.split() for line in capsys.readouterr().out.splitlines() if ".jpg" in line]
    assert [(row[1], row[3]) for row in cells] == list(zip(files, COLORS, strict=True))
    with Image.open("top.png") as drawn:
        assert drawn.format == "PNG"

    if api == "nnx":
        return
    # The target is reached on resuming too, and the run goes on with no other images.
    assert train.main([*asked, "--resume"])["rows"] == result["rows"]
    (folder / "red" / "0.png").unlink()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train.main([*asked, "--resume"])
    expected = f"--resume: runs/mine was trained on other images than {folder} has"
    assert capsys.readouterr().err == f"train.py: error: {expected}\n"


# --- folders ----------------------------------------------------------------------------------


def test_images_of_the_right_size_keep_their_pixels_and_every_fifth_is_for_test(folder):
    got = data.load(str(folder), None, quiet)
    assert got.classes == ("blue", "green", "red")
    assert got.train_x.shape == (24, 10, 10, 3)
    test = [1, 6]
    for y, name in enumerate(got.classes):
        files = [f"{i}.{'JPG' if i == 3 else 'png'}" for i in range(10)]
        pixels = [np.asarray(Image.open(folder / name / file)) for file in files]
        here = got.train_x[got.train_y == y]
        np.testing.assert_array_equal(here, [p for i, p in enumerate(pixels) if i not in test])
        np.testing.assert_array_equal(got.test_x[got.test_y == y], [pixels[i] for i in test])
    flat = got.train_x.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(got.mean, flat.mean(0), rtol=1e-9)
    np.testing.assert_allclose(got.std, flat.std(0), rtol=1e-9)


@pytest.mark.parametrize("test", ["test", "val"])
def test_train_and_test_may_be_folders(tmp_path, cache, test):
    write_folder(tmp_path / "mine" / "train", 4)
    write_folder(tmp_path / "mine" / test, 2)
    got = data.load(str(tmp_path / "mine"), None, quiet)
    assert (got.about.train, got.about.test, got.classes) == (12, 6, tuple(sorted(COLORS)))


@pytest.mark.parametrize(("size", "most", "expected"), [(None, 32, 10), (None, 8, 8), (16, 32, 16)])
def test_the_size_is_that_of_the_shortest_side_unless_it_is_asked_for(folder, size, most, expected):
    picture(COLORS["red"], 50, 40, 12).save(folder / "red" / "tall.png")
    got = data.load(str(folder), None, quiet, size, most)
    assert got.about.shape == (expected, expected, 3)


def test_images_are_decoded_once_and_again_when_one_changes_or_the_cache_is_damaged(folder, cache):
    said = []
    first = data.load(str(folder), None, said.append)
    (file,) = cache.iterdir()
    assert said == [f"Reading 30 images of {folder} at 10x10 pixels, for {file}"]
    again = data.load(str(folder), None, said.append)
    assert len(said) == 1
    np.testing.assert_array_equal(again.train_x, first.train_x)

    picture(COLORS["red"], 77).save(folder / "red" / "0.png")
    changed = data.load(str(folder), None, said.append)
    assert len(said) == 2
    assert (changed.train_x != first.train_x).any(axis=(1, 2, 3)).sum() == 1

    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    whole = data.load(str(folder), None, said.append)
    assert len(said) == 3
    np.testing.assert_array_equal(whole.train_x, changed.train_x)
    assert list(cache.iterdir()) == [file]


def test_a_photo_is_turned_upright_and_keeps_its_middle(tmp_path):
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32, 0] = 255  # the middle third is red
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    Image.fromarray(wide).save(tmp_path / "a.png", exif=exif)
    got = images.decode(tmp_path / "a.png", 8, 8)
    red = np.broadcast_to(np.uint8([255, 0, 0]), (8, 8, 3))
    np.testing.assert_allclose(got, red, atol=25)  # at the edge resizing sees some of the black
    got = images.decode(tmp_path / "a.png", 24, 8)  # upright: red between black
    np.testing.assert_array_equal(got[[0, 12, 23], 4, 0], [0, 255, 0])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_images_of_other_modes_become_color(tmp_path, mode):
    picture((90, 90, 90), 0).convert("L").convert(mode).save(tmp_path / "a.png")
    assert images.decode(tmp_path / "a.png", 8, 8).shape == (8, 8, 3)


def spoil(folder: Path, how: str) -> Path:
    """The file of the message."""
    red, victim = folder / "red", folder / "red" / "5.png"
    if how == "cut":
        victim.write_bytes(victim.read_bytes()[:100])
    elif how == "text":
        victim.write_text("\x1b[31mnot a picture")
    elif how == "gif":
        Image.new("L", (8, 8)).save(victim, format="GIF")
    elif how == "16 bits":
        Image.fromarray(np.full((8, 8), 30_000, np.uint16)).save(victim)
    elif how == "no images":
        for path in red.glob("*.[pJ]*"):
            path.unlink()
        return red
    elif how == "a folder in a class":
        victim.unlink()
        victim.mkdir()
    elif how == "one class":
        for name in ("blue", "green"):
            (folder / name).rename(folder / f".{name}")
        return folder
    elif how == "no class":
        for name in COLORS:
            (folder / name).rename(folder / f".{name}")
        return folder
    elif how == "one image each":
        for path in folder.rglob("[1-9].*"):
            path.unlink()
        return folder
    elif how == "link":
        picture(COLORS["red"], 0).save(folder.parent / "secret.png")
        victim.unlink()
        victim.symlink_to(folder.parent / "secret.png")
    elif how == "linked folder":
        red.rename(folder.parent / "elsewhere")
        red.symlink_to(folder.parent / "elsewhere")
        return red
    elif how == "pipe":
        victim.unlink()
        os.mkfifo(victim)
    elif how == "name":
        victim = red / "\x1b[2Jevil\n.png"
        victim.write_bytes(b"no")
    return victim


UNDECODED = "{}: cannot be decoded as PNG or JPEG"
SPOILT = {
    "cut": UNDECODED,
    "text": UNDECODED,
    "gif": UNDECODED,
    "16 bits": "{}: I;16 pixels, expected 8 bits a channel",
    "no images": "{}: no PNG or JPEG in it, expected images of a class",
    "a folder in a class": "{}: a folder in that of a class, expected images alone",
    "one class": "{}: expected a folder of images for each class, two or more; found red",
    "no class": "{}: expected a folder of images for each class, two or more; found none",
    "one image each": "{}: no image to test on, expected two images of a class",
    "link": "{}: a link that leads out of {folder}, not followed",
    "linked folder": "{}: a link that leads out of {folder}, not followed",
    "pipe": "{}: no such file",
    "name": "{folder}/red/\\x1b[2Jevil\\n.png: cannot be decoded as PNG or JPEG",
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_folder_that_cannot_be_trained_on_is_one_line_and_nothing_is_cached(folder, cache, how):
    file = spoil(folder, how)
    expected = SPOILT[how].format(file, folder=folder)
    assert message(data.load, str(folder), None, quiet) == expected
    assert not cache.exists()


def test_an_image_of_more_pixels_than_pillows_limit_is_refused(folder, cache, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 110)  # Pillow itself warns from here on
    bomb = folder / "red" / "5.png"
    Image.new("1", (10, 12)).save(bomb)
    expected = f"{bomb}: more pixels than the 110 that are decoded"
    assert message(data.load, str(folder), None, quiet) == expected
    assert not cache.exists()


def test_a_test_class_that_is_not_trained_on_is_named(tmp_path, cache):
    write_folder(tmp_path / "mine" / "train", 2)
    write_folder(tmp_path / "mine" / "test", 2)
    (tmp_path / "mine" / "test" / "red").rename(tmp_path / "mine" / "test" / "rose")
    expected = f"{tmp_path}/mine/test/rose: no class of that name to train on"
    assert message(data.load, str(tmp_path / "mine"), None, quiet) == expected


def test_a_full_disk_leaves_nothing_in_the_cache(folder, cache, monkeypatch):
    def full(file, **arrays):
        file.write(b"PK")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(class_folders.np, "savez", full)
    said = message(data.load, str(folder), None, quiet)
    assert said.startswith(f"{cache}/images-")
    assert said.endswith(".npz: cannot be written: No space left on device")
    assert list(cache.iterdir()) == []


# --- .npz files -------------------------------------------------------------------------------

X, Y = np.zeros((10, 8, 8, 3), np.uint8), np.arange(10) % 2
ARRAYS = {
    "no y": ({"x": X}, "no array y in it, expected x and y"),
    "no x": ({"y": Y}, "no array x in it, expected x and y"),
    "x is float": (
        {"x": X / 255, "y": Y},
        "x is float64 [10, 8, 8, 3], expected uint8 [N, H, W, 3] or [N, H, W]",
    ),
    "channels first": (
        {"x": X.transpose(0, 3, 1, 2), "y": Y},
        "x is uint8 [10, 3, 8, 8], expected uint8 [N, H, W, 3] or [N, H, W]",
    ),
    "flat": (
        {"x": X.reshape(10, -1), "y": Y},
        "x is uint8 [10, 192], expected uint8 [N, H, W, 3] or [N, H, W]",
    ),
    "no rows": (
        {"x": X[:0], "y": Y[:0]},
        "x is uint8 [0, 8, 8, 3], expected uint8 [N, H, W, 3] or [N, H, W]",
    ),
    "other rows": ({"x": X, "y": Y[:9]}, "y is int64 [9], expected integers [10]"),
    "one hot": ({"x": X, "y": np.eye(10)}, "y is float64 [10, 10], expected integers [10]"),
    "objects": (
        {"x": X, "y": Y.astype(object)},
        "y holds Python objects (pickled), which are not read: save numbers",
    ),
    "one class": ({"x": X, "y": 0 * Y}, "one class, expected two or more"),
    "from one on": ({"x": X, "y": Y + 1}, "y has label 2, but of 2 classes labels are 0 to 1"),
    "negative": ({"x": X, "y": -Y}, "y has label -1, but of 2 classes labels are 0 to 1"),
    "beyond": (
        {"x": X, "y": Y, "classes": ["a"]},
        "y has label 1, but of 1 classes labels are 0 to 0",
    ),
    "a class without images": (
        {"x": X, "y": Y, "classes": ["a", "b", "c"]},
        "no image of class 2, of 3 classes",
    ),
    "names of bytes": (
        {"x": X, "y": Y, "classes": [b"a", b"b"]},
        "classes are |S1 [2], expected a list of names",
    ),
    "half a test": ({"x": X, "y": Y, "x_test": X}, "expected x_test and y_test, or neither"),
    "a test class": (
        {"x": X, "y": Y, "x_test": X, "y_test": Y + 1},
        "y_test has label 2, but of 2 classes labels are 0 to 1",
    ),
    "a test size": (
        {"x": X, "y": Y, "x_test": X[:, :4], "y_test": Y},
        "x_test has shape (10, 4, 8, 3), x (10, 8, 8, 3)",
    ),
    "one image each": (
        {"x": X[:2], "y": Y[:2]},
        "no image to test on, expected two of a class or x_test",
    ),
}


@pytest.mark.parametrize("what", ARRAYS)
def test_arrays_that_cannot_be_trained_on_are_one_line(tmp_path, what):
    arrays, expected = ARRAYS[what]
    path = tmp_path / "mine.npz"
    np.savez(path, **arrays)
    assert message(data.load, str(path), None, quiet) == f"{path}: {expected}"


@pytest.mark.parametrize("what", ["cut", "text", "flipped", "huge", "missing"])
def test_a_file_that_is_no_npz_is_one_line(tmp_path, what):
    path, expected = tmp_path / "mine.npz", "damaged, or no .npz file"
    np.savez(path, x=X, y=Y)
    raw = bytearray(path.read_bytes())
    if what == "cut":
        path.write_bytes(raw[:1000])
    elif what == "text":
        path.write_text("no arrays")
    elif what == "flipped":
        raw[500] ^= 1
        path.write_bytes(raw)
    elif what == "huge":
        header = io.BytesIO()
        header_of = {"descr": "|u1", "fortran_order": False, "shape": (10**12, 8, 8, 3)}
        np.lib.format.write_array_header_1_0(header, header_of)
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("x.npy", header.getvalue())
        expected = "damaged: an array declares more values than it has"
    else:
        path = tmp_path / "other.npz"
        expected = "no such file"
    assert message(npz_file.read, path) == f"{path}: {expected}"


def test_grey_images_are_color_and_names_are_safe_to_print(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (10, 8, 9), np.uint8)
    np.savez(tmp_path / "a.npz", x=x, y=np.uint64(Y), classes=["\x1b[31mred", "b\n"])
    got = data.load(str(tmp_path / "a.npz"), None, quiet)
    assert got.classes == ("\\x1b[31mred", "b\\n")
    assert got.about.shape == (8, 9, 3)
    for c in range(3):
        np.testing.assert_array_equal(got.train_x[..., c], x[~npz_file.every_fifth(Y)])


# --- synthetic images, and the norms ----------------------------------------------------------


@pytest.mark.parametrize(("size", "count"), [(32, 5000), (512, 341)])
def test_synthetic_images_are_of_any_size_and_fit_in_memory(size, count):
    got = data.load("synthetic", None, quiet, size)
    assert got.about.train + got.about.test == count
    assert got.about.shape == (size, size, 3)
    assert got.train_x.nbytes + got.test_x.nbytes <= 2**28


def expected_norm(kind, x):
    """What the norm of this kind gives of x [8, 3, 3, C] in float64, by hand."""
    x, eps = np.float64(x), 1e-5
    axes = {"sync": (0, 1, 2), "layer": 3}
    if kind == "none":
        return x
    if kind in ("batch", "ghost"):  # two devices of four rows; ghost batches of two
        rows = {"batch": 4, "ghost": 2}[kind]
        return np.concatenate(
            [expected_norm("sync", x[i : i + rows]) for i in range(0, len(x), rows)]
        )
    if kind == "group":  # 16 channels are two groups of 8
        y = x.reshape(*x.shape[:3], 2, 8)
        mean, var = (f((1, 2, 4), keepdims=True) for f in (y.mean, y.var))
        return ((y - mean) / np.sqrt(var + 1e-6)).reshape(x.shape)
    if kind == "layer":
        eps = 1e-6
    mean, var = (f(axes[kind], keepdims=True) for f in (x.mean, x.var))
    return (x - mean) / np.sqrt(var + eps)


@pytest.mark.parametrize("kind", [name for name in norms.NAMES if name != "renorm"])
def test_each_norm_is_what_its_name_says_in_linen_and_in_nnx(kind):
    args = SimpleNamespace(norm=kind, batch=8, devices=2, ghost_rows=2)
    x = np.random.default_rng(0).normal(3, 2, (8, 3, 3, 16)).astype(np.float32)
    options = {"momentum": 0.9, "dtype": jnp.float32, "scale_init": jax.nn.initializers.ones}

    class Net(norms.nn.Module):
        @norms.nn.compact
        def __call__(self, x):
            return norms.linen(args)(use_running_average=False, **options)(x)

    variables = Net().init(jax.random.key(0), x)
    assert ("batch_stats" in variables) == (kind in norms.BATCH)
    y, _ = Net().apply(variables, x, mutable=["batch_stats"])
    layer = norms.nnx(args)(16, **options, rngs=nnx.Rngs(0))
    # A sum of 72 values in float32, of size 3 beside an sd of 2: some 1e-6.
    for got in (y, layer(x, False)):
        np.testing.assert_allclose(got, expected_norm(kind, x), atol=2e-5)


def test_batch_renormalization_has_its_limits():
    args = SimpleNamespace(norm="renorm", batch=8, devices=1, ghost_rows=2)
    assert norms.linen(args)().renorm == norms.LIMITS
    assert norms.nnx(args)(4, rngs=nnx.Rngs(0)).renorm == norms.LIMITS
