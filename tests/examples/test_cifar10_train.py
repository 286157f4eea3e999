"""The CIFAR example's training: to the bit again, on many devices, after a kill; and the errors."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "cifar10"))

import data
import loop
import model
import model_linen
import model_nnx
import optimizer
import report
import steps
import stop
import train
from download import CIFAR10

from jaxbn import writers
from tests.support.compiling import environment

EXAMPLE = Path(__file__).parents[2] / "examples" / "cifar10"
N = 12  # records a file: 60 training images, 12 test images
SMALL = ["--model", "resnet18", "--width", "2", "--batch", "16", "--eval-batch", "8"]
SMALL += ["--epochs", "2", "--lr", "0.1"]
SCALE = ((128.0,) * 3, (70.0,) * 3)  # mean and standard deviation
ONE_BLOCK = {"blocks": (1,), "bottleneck": False}  # a network that compiles in a second


def write_six(folder: Path) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in [*data.TRAIN, data.TEST]:
        raw = rng.integers(0, 256, (N, 3073), np.uint8)
        raw[:, 0] %= 10
        raw.tofile(folder / name)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run("name", "--option", …)` trains the smallest network there is, in this process."""
    monkeypatch.setattr(data, "RECORDS", N)
    monkeypatch.setitem(model.RESNETS, "resnet18", ONE_BLOCK)
    write_six(tmp_path / CIFAR10.folder)
    where = ["--data-dir", str(tmp_path), "--runs", str(tmp_path / "runs")]
    return lambda name, *options: train.main([*where, "--name", name, *SMALL, *options])


def bits(result) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(result["state"])]


# A program that trains as `run` does, and dies in the middle of a save, at the event that it is
# told: (steps, what, end of the path). Audit hooks hear of every folder made and renamed.
KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import jax
jax.config.update("jax_num_cpu_devices", 8)
import checkpoint, data, model, train

fatal_steps, moment, end, save = *sys.argv[2:5], checkpoint.Checkpoints.save
data.RECORDS = int(sys.argv[5])
model.RESNETS["resnet18"] = {"blocks": (1,), "bottleneck": False}

def save_and_die(self, steps, *kept):
    def die(event, args):
        if event == moment and str(args[0]).endswith(end):
            os.kill(os.getpid(), signal.SIGKILL)
    if steps == int(fatal_steps):
        sys.addaudithook(die)
    save(self, steps, *kept)

checkpoint.Checkpoints.save = save_and_die
train.main(sys.argv[6:])
"""
MOMENTS = [
    ("3", "os.mkdir", "array_metadatas"),  # the first, while the arrays are being written
    ("6", "os.rename", "6.saving"),  # the second, complete but for its name
]


def reproducible(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in r.items() if k not in ("seconds", "images_per_s")} for r in rows]


def test_killed_in_the_middle_of_a_save_it_resumes_to_the_same_bits(run, tmp_path):
    more = ["--devices", "2", "--epochs", "3"]
    undisturbed = run("undisturbed", *more)
    for i, moment in enumerate(MOMENTS):
        name, runs = f"killed{i}", tmp_path / "runs"
        where = ["--data-dir", str(tmp_path), "--runs", str(runs), "--name", name]
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, EXAMPLE, *moment, str(N), *where, *SMALL, *more],
            capture_output=True,
            text=True,
            env=environment(),
            timeout=300,
            check=False,
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        left = sorted(path.name for path in (runs / name / "checkpoints").iterdir())
        assert left == (["3.saving.orbax-checkpoint-tmp"], ["3", "6.saving"])[i]

        resumed = run(name, *more, "--resume")
        assert bits(resumed) == bits(undisturbed)
        assert reproducible(resumed["rows"]) == reproducible(undisturbed["rows"])
        kept = sorted(path.name for path in (runs / name / "checkpoints").iterdir())
        assert kept == ["6", "9"]  # --keep 2, and no temporary folder


def test_the_same_seed_gives_the_same_bits_and_another_does_not(run, capsys, tmp_path):
    options = ["--api", "nnx", "--cutout", "4", "--schedule", "cosine"]
    first, again = run("first", *options), run("again", *options)
    assert bits(first) == bits(again)
    capsys.readouterr()
    other = run("other", *options, "--seed", "1", "--epochs", "1")
    assert bits(first) != bits(other)

    # What a run leaves behind, and what it prints.
    folder = tmp_path / "runs" / "other"
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoints",
        "config.json",
        "curves.png",
        "metrics.jsonl",
    ]
    (row,) = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert row == other["rows"][0]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == [
        "cifar10: 60 training and 12 test images of 10 classes, 32x32 pixels, 1 epoch of batch 16",
        f"resnet18 width 2 (nnx, float32) on 8 x cpu, {os.cpu_count()} cores, "
        f"jax {jax.__version__}, flax {flax.__version__}, in {folder}",
        report.HEADER,
    ]
    accuracy = f"{row['test_accuracy'] * 100:.2f}"
    assert printed[6].split() == ["│", "test", "accuracy", "│", accuracy, "│", "%", "│"]
    assert printed[-2:] == [
        f"Curves: {folder}/curves.png   Metrics: {folder}/metrics.jsonl",
        f"Try next: {sys.orig_argv[0]} examples/cifar10/predict.py {folder} IMAGE, or train on "
        f"images of your own: {sys.orig_argv[0]} examples/cifar10/train.py --data FOLDER",
    ]


def make_loop(api: str, devices: int, eval_batch: int = 8):
    loss = partial(optimizer.smooth_cross_entropy, smoothing=0.1)
    tx = optax.sgd(0.05, momentum=0.9)
    shape = {**ONE_BLOCK, "width": 2}
    if api == "linen":
        kind = steps.Linen(model_linen.ResNet(**shape), tx, loss)
    else:
        kind = steps.Nnx(lambda rngs: model_nnx.ResNet(**shape, rngs=rngs), tx, loss)
    rng = np.random.default_rng(5)
    x, y = rng.integers(0, 256, (61, 32, 32, 3), np.uint8), rng.integers(0, 10, 61, np.int32)
    noise = data.Data("noise", x[:48], y[:48], x[48:], y[48:], *SCALE, True, data.TEN)
    mesh = loop.make_mesh(devices)
    made = loop.Loop(kind, noise, mesh, 16, jnp.dtype("float32"), cutout=0)
    return made, loop.put_data(noise, mesh, eval_batch), noise


def one_epoch(api: str, devices: int, scan: bool):
    made, arrays, _ = make_loop(api, devices)
    key = jax.random.key(0)
    state = made.init(key)
    x, y = made.shuffle(key, arrays.train_x, arrays.train_y)
    shown = []
    state, (losses, _) = train.train_one_epoch(
        made,
        state,
        key,
        x,
        y,
        scan,
        lambda i, loss, accuracy: shown.append(i),
        writers.Log([], every=0),
        stop.Asked(),
        first=0,
    )
    assert len(losses) == made.count == 3
    assert shown == ([] if scan else [1, 2])
    return state, losses


@pytest.mark.parametrize(
    ("api", "others"), [("linen", [(8, False), (1, True)]), ("nnx", [(8, True)])]
)
def test_eight_devices_and_a_scanned_epoch_do_what_one_device_does_step_by_step(api, others):
    state, losses = one_epoch(api, devices=1, scan=False)
    for devices, scan in others:
        other, other_losses = one_epoch(api, devices, scan)
        # Sums in another order: a few eps (1.2e-7) a layer, carried through three steps.
        np.testing.assert_allclose(losses, other_losses, rtol=1e-4)
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_logits_do_not_depend_on_the_batch_and_every_test_image_counts_once(api):
    made, arrays, noise = make_loop(api, devices=1)
    state = made.init(jax.random.key(0))
    x, y = made.shuffle(jax.random.key(0), arrays.train_x, arrays.train_y)
    state, _, _ = made.train_step(state, jax.random.key(1), x, y, 0)

    images = loop.normalize(noise.test_x, noise.mean, noise.std)  # [13, 32, 32, 3]
    logits = jax.jit(made.steps.logits)
    together = np.asarray(logits(state, images))
    alone = np.concatenate([logits(state, images[i : i + 1]) for i in range(len(images))])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)

    log_p = np.asarray(jax.nn.log_softmax(together))
    loss = -log_p[np.arange(13), noise.test_y].mean()
    hits = (together.argmax(axis=-1) == noise.test_y).mean()
    state = jax.device_get(state)
    for devices, eval_batch in ((1, 1), (8, 8)):  # 13 = 8 + 5, and 3 of padding
        made, arrays, _ = make_loop(api, devices, eval_batch)
        got_loss, got_hits, count = made.evaluate(state, arrays)
        assert (got_hits, count) == (pytest.approx(hits), 13)
        assert got_loss == pytest.approx(loss, rel=1e-4)


def test_an_epoch_visits_every_image_once():
    made, arrays, noise = make_loop("linen", devices=8)
    x, y = made.shuffle(jax.random.key(0), arrays.train_x, arrays.train_y)
    assert x.shape == (3, 16, 32, 32, 3)
    assert x.sharding.spec == jax.sharding.PartitionSpec(None, "data")
    seen = np.asarray(x).reshape(48, -1)
    rows = noise.train_x.reshape(48, -1)
    order = np.array([np.flatnonzero((rows == row).all(axis=1))[0] for row in seen])
    np.testing.assert_array_equal(np.sort(order), np.arange(48))
    np.testing.assert_array_equal(np.asarray(y).reshape(-1), noise.train_y[order])
    assert list(order) != sorted(order)


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_watched_it_writes_figures_of_every_norm_layer_and_resumes_where_it_was(
    run, capsys, tmp_path, api
):
    options = ["--api", api, "--watch", "jsonl", "tensorboard", "--watch-every", "2"]
    options += ["--devices", "1"]
    result = run("watched", *options)  # 2 epochs of 3 steps
    folder = tmp_path / "runs" / "watched"
    layers = {
        "linen": ["BatchNorm_0", "BatchNorm_1", "BatchNorm_2"],
        "nnx": ["blocks/0/layers/0/bn", "blocks/0/layers/1/bn", "bn"],
    }[api]

    def figures():
        lines = map(json.loads, (folder / "watch.jsonl").read_text().splitlines())
        return {line["step"]: line["layers"] for line in lines}

    first = figures()
    assert list(first) == [0, 2, 4]
    assert all(sorted(step) == layers for step in first.values())
    assert first[0][layers[0]]["batch_count"] == 16 * 32 * 32
    assert all(step[layers[0]]["dbias_norm"] > 0 for step in (first[2], first[4]))
    (events,) = folder.glob("events.out.tfevents.*")
    printed = capsys.readouterr().out.splitlines()
    where = [line for line in printed if line.startswith("Norm layers, every 2 steps: ")]
    assert [line.split(": ")[1] for line in where] == [str(events), f"{folder}/watch.jsonl"]

    if api == "nnx":
        return  # nothing below depends on it
    # Epoch 2 again: what was written of it is taken back, and written anew.
    shutil.rmtree(folder / "checkpoints" / "6")
    resumed = run("watched", *options, "--resume")
    assert bits(resumed) == bits(result)
    assert figures() == first
    assert len((folder / "watch.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(("api", "devices"), [("linen", 8), ("nnx", 1)])
def test_watching_does_not_change_what_is_learned(api, devices):
    made, arrays, _ = make_loop(api, devices)
    x, y = made.shuffle(jax.random.key(0), arrays.train_x, arrays.train_y)
    plain, watched = (
        step(made.init(jax.random.key(0)), jax.random.key(1), x, y, 0)
        for step in (made.train_step, made.watched_step)
    )
    assert plain[2] == {}
    assert len(watched[2]) == 3
    # The watched step is another program: a few eps (1.2e-7) of the largest terms.
    for a, b in zip(jax.tree.leaves(plain[:2]), jax.tree.leaves(watched[:2]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# --- bad arguments ----------------------------------------------------------------------------

WATCH_EVERY = "argument --watch-every: 0 is out of range, "
BAD = [
    (["--batch", "12"], "--batch 12 does not divide over 8 devices"),
    (["--eval-batch", "4"], "--eval-batch 4 does not divide over 8 devices"),
    (
        ["--devices", "9"],
        "--devices 9: there are 8; JAX_NUM_CPU_DEVICES=9 before the command makes 9 of a CPU",
    ),
    (["--batch", "64"], "--batch 64: there are 60 training images"),
    (
        ["--model", "resnet9", "--block", "pre"],
        "--block pre: resnet9 has no such form, --model resnet18 has",
    ),
    (
        ["--model", "resnet9", "--stem", "imagenet"],
        "--stem imagenet: resnet9 has no such form, --model resnet18 has",
    ),
    (
        ["--norm", "ghost", "--ghost-rows", "5"],
        "--ghost-rows 5: does not divide --batch 16",
    ),
    (
        ["--norm", "group", "--watch", "jsonl"],
        "--watch: shows batch norms, and --norm group has none",
    ),
    (
        ["--data", "cifar10", "--image-size", "64"],
        "--image-size: not with --data cifar10, which has 32x32",
    ),
    (["--data", "digits"], "--data-dir: not with --data digits, it is for CIFAR's files"),
    (
        ["--data", "flowers"],
        "--data flowers: expected auto, cifar10, cifar100, digits, synthetic, a folder of images "
        "for each class, or an .npz file",
    ),
    (["--target", "101"], "argument --target: 101 is out of range, must be from 0 to 100"),
    (["--epochs", "0"], "argument --epochs: 0 is out of range, must be at least 1"),
    (["--smoothing", "2"], "argument --smoothing: 2 is out of range, must be from 0 to 1"),
    (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
    (["--lr", "nan"], "argument --lr: nan is out of range, must be at least 0"),
    (["--bacth", "16"], "unrecognized arguments: --bacth 16"),
    (
        ["--data-dir", "/nowhere"],
        "--data-dir /nowhere: no test_batch.bin in it, nor in cifar-10-batches-bin/ below it",
    ),
    (["--runs", "/proc/none"], "/proc/none: No such file or directory"),
    (["--resume"], "--resume: {runs}/bad is no run of train.py: it has no config.json"),
    (["--name", "old"], "{runs}/old is there already: --resume it, or take another --name"),
    (["--name", "old", "--resume"], "--resume: {runs}/old has --batch 32, not 16"),
    (
        ["--watch", "wandb"],
        "argument --watch: invalid choice: wandb (choose from jsonl, prometheus, tensorboard)",
    ),
    (["--watch", "jsonl", "--watch-every", "0"], WATCH_EVERY + "must be at least 1"),
    (
        ["--watch", "jsonl", "--scan-epoch"],
        "--watch: not with --scan-epoch, which shows nothing before its end",
    ),
    (
        ["--watch", "prometheus", "--watch-port", "{taken}"],
        "--watch-port {taken}: not free here, 0 takes any that is",
    ),
]


@pytest.mark.parametrize(("options", "expected"), BAD, ids=[" ".join(o) for o, _ in BAD])
def test_a_bad_argument_is_one_line_and_exit_status_2(run, capsys, tmp_path, options, expected):
    runs = tmp_path / "runs"
    (runs / "old").mkdir(parents=True)
    (runs / "old" / "config.json").write_text('{"batch": 32}')
    with socket.create_server(("127.0.0.1", 0)) as server:
        names = {"runs": runs, "taken": server.getsockname()[1]}
        options = [option.format(**names) for option in options]
        with pytest.raises(SystemExit) as stopped:
            run("bad", *options)
    assert stopped.value.code == 2
    got, unquoted = capsys.readouterr().err, str.maketrans("", "", "'")
    if "choose from" in got:  # Python quotes choices, or does not, by its version
        got, expected = got.translate(unquoted), expected.translate(unquoted)
    assert got == f"train.py: error: {expected.format(**names)}\n"
    assert not (runs / "bad").exists()  # nothing begun


def test_resume_without_a_name_asks_which(run, capsys, tmp_path):
    with pytest.raises(SystemExit):
        train.main(["--data-dir", str(tmp_path), *SMALL, "--resume"])
    assert capsys.readouterr().err == (
        "train.py: error: --resume: which run? Give its --name too\n"
    )


def test_bfloat16_trains(run):
    result = run("half", "--dtype", "bfloat16", "--epochs", "1")
    assert np.isfinite(result["train_loss"])
    assert {leaf.dtype for leaf in jax.tree.leaves(result["state"])} == {
        jnp.dtype("float32"),
        jnp.dtype("int32"),
    }
