"""The CIFAR example goes on: after damage, SIGTERM, Ctrl-C, a full disk, an end before any save."""

import json
import os
import resource
import shlex
import shutil
import signal
import sys
from contextlib import suppress
from functools import cache
from itertools import count
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "cifar10"))

import checkpoint
import data
import hosts
import loop
import optimizer
import report
import steps
import stop
import train
from checkpoint import CheckpointError, Checkpoints
from command import one_line

import jaxbn

COUNT = 3  # steps an epoch
NOISE = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), np.uint8)
LABELS = np.arange(60, dtype=np.int32) % 10
SCALE = ((128.0,) * 3, (70.0,) * 3)  # mean and standard deviation
DATA = data.Data(
    "digits", NOISE[:48], LABELS[:48], NOISE[48:], LABELS[48:], *SCALE, False, data.TEN
)


class Tiny(nn.Module):
    """A norm and a layer: it compiles in no time."""

    @nn.compact
    def __call__(self, x, train):
        x = jaxbn.linen.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(10)(x.mean((1, 2)))


def tiny(args, count):
    tx = optimizer.sgd(lambda step: 0.1, 5e-4)
    return steps.Linen(Tiny(), tx, lambda *v: optimizer.smooth_cross_entropy(*v, smoothing=0.1))


@cache
def the_loop() -> loop.Loop:
    """That of all runs here: it is compiled once."""
    made = tiny(None, COUNT)
    return loop.Loop(made, DATA, loop.make_mesh(1), 16, np.dtype(np.float32), cutout=0)


class Runs:
    """`runs("name", "--option", …)` trains `Tiny` for two epochs of three steps, in `folder`."""

    def __init__(self, folder):
        self.folder = folder
        self.options = ["--runs", str(folder), "--data", "digits", "--devices", "1"]
        self.options += ["--batch", "16", "--eval-batch", "12", "--epochs", "2"]
        self.options += ["--watch", "jsonl", "--watch-every", "1"]

    def __call__(self, name, *more):
        return train.main([*self.options, "--name", name, *more])

    def figures(self, name):
        """What is in a run's two files of figures, without the times."""
        rows, seen = (
            [json.loads(line) for line in (self.folder / name / file).read_text().splitlines()]
            for file in ("metrics.jsonl", "watch.jsonl")
        )
        timed = ("seconds", "images_per_s")
        return [{k: v for k, v in row.items() if k not in timed} for row in rows], seen

    def saved(self, name):
        return sorted(int(path.name) for path in (self.folder / name / "checkpoints").iterdir())


@pytest.fixture(autouse=True, scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_steps", tiny)
        patch.setattr(train, "load", lambda *_: DATA)
        patch.setattr(train, "Loop", lambda *_: the_loop())
        patch.setattr(report, "curves", lambda *_: None)  # a second of matplotlib
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, small):
    """Runs, and in them one called "whole" that nothing disturbed; its state."""
    runs = Runs(tmp_path_factory.mktemp("runs"))
    return runs, runs("whole")["state"]


@pytest.fixture
def runs(undisturbed, tmp_path):
    """The folder of runs with "whole" in it, for this test alone."""
    shutil.copytree(undisturbed[0].folder, tmp_path / "runs")
    return Runs(tmp_path / "runs")


def bits(state) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


# --- damaged checkpoints ----------------------------------------------------------------------

STATE = {"weights": np.random.default_rng(1).normal(size=3000).astype(np.float32), "step": 0}


def state_of(step: int) -> dict:
    return {name: jax.numpy.asarray(v + step) for name, v in STATE.items()}


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for step in (3, 6):
        Checkpoints(folder, keep=2).save(step, state_of(step), np.array([step, 0.5]))
    return folder


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def random(path):
    path.write_bytes(np.random.default_rng(2).bytes(path.stat().st_size))


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def newest_after(two_saved, tmp_path, damage, file):
    """The step gone on from, whose state and totals it is."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_saved, folder)
    damage(folder / "6" / file)
    found, state, totals, damaged = Checkpoints(folder).newest(state_of(0))
    assert bits(state) == bits(state_of(found))
    assert totals.tolist() == [found, 0.5]
    assert damaged == ([6] if found == 3 else [])
    shutil.rmtree(folder)
    return found


@pytest.mark.parametrize("damage", [cut, Path.unlink, random, flip])
def test_a_damaged_file_of_the_newest_checkpoint_is_never_gone_on_from(
    two_saved, tmp_path, capfd, damage
):
    files = [p.relative_to(two_saved / "6") for p in (two_saved / "6").rglob("*") if p.is_file()]
    found = [newest_after(two_saved, tmp_path, damage, file) for file in files]
    assert found == [3] * len(files)
    assert len(files) > 5
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("what", ["empty", "a file", "gone"])
def test_a_checkpoint_that_is_no_longer_one(two_saved, tmp_path, what):
    def damage(file):
        shutil.rmtree(file.parent)
        if what == "empty":
            file.parent.mkdir()
        elif what == "a file":
            file.parent.write_text("x")

    folder = tmp_path / "checkpoints"
    if what == "gone":
        shutil.copytree(two_saved, folder)
        damage(folder / "6" / "any")
        assert Checkpoints(folder).newest(state_of(0))[::3] == (3, [])
    else:
        assert newest_after(two_saved, tmp_path, damage, "any") == 3


def test_the_state_of_another_network_is_told_as_such(two_saved, capfd):
    with pytest.raises(CheckpointError) as caught:
        Checkpoints(two_saved).restore(6, {"weights": np.zeros(7, np.float32)})
    assert str(caught.value) == f"{two_saved}/6: not the state of this network"
    assert capfd.readouterr() == ("", "")


def test_one_that_another_process_cannot_read_is_left_by_all(two_saved, monkeypatch):
    answers = iter([False, True])
    monkeypatch.setattr(hosts, "all_of_them", lambda sound: sound and next(answers))
    found, state, _, damaged = Checkpoints(two_saved).newest(state_of(0))
    assert (found, bits(state)) == (3, bits(state_of(3)))
    assert damaged == [6]


def test_resumed_beside_a_damaged_checkpoint_it_ends_with_the_same_bits_and_figures(
    undisturbed, runs, capsys
):
    folder = runs.folder / "whole" / "checkpoints"
    shutil.rmtree(folder / "6" / "d")
    resumed = runs("whole", "--resume")
    printed, error = capsys.readouterr()
    assert error == ""
    assert printed.splitlines()[3:6] == [
        f"{folder}/6 was damaged, and is removed",
        "Resumed after epoch 1",
        report.HEADER,
    ]
    assert bits(resumed["state"]) == bits(undisturbed[1])
    assert runs.figures("whole") == undisturbed[0].figures("whole")
    assert runs.saved("whole") == [3, 6]


def refused(capsys, runs, *options) -> str:
    """The one line that a run ends with, status 2."""
    with pytest.raises(SystemExit) as stopped:
        runs(*options)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("train.py: error: ")


def test_with_no_sound_checkpoint_nothing_is_removed(runs, capsys):
    folder = runs.folder / "whole" / "checkpoints"
    for step in (3, 6):
        (folder / str(step) / "manifest.ocdbt").unlink()
    assert refused(capsys, runs, "whole", "--resume") == (
        f"--resume: {folder}: all checkpoints are damaged: [6, 3]"
    )
    assert runs.saved("whole") == [3, 6]


# --- everything else that is read at --resume -------------------------------------------------

CONFIGS = {
    "[1, 2]": "{run}/config.json: a list, expected the options of a run",
    "null": "{run}/config.json: a NoneType, expected the options of a run",
    '{"batch": ': "{run}/config.json: no JSON, damaged",
    "\x00\udcff": "{run}/config.json: no JSON, damaged",
    "[" * 100_000: "{run}/config.json: no JSON, damaged",
    '{"\\u001b[31mbatch": 1}': "{run}/config.json: '\\x1b[31mbatch' is no option of train.py",
    '{"model": "a\\nb"}': "{run} has --model a\\nb, not resnet9",
    '{"model": "resnet9"}': "{run}/config.json: does not say about, api, batch, block, cutout, "
    "data, devices, dtype, epochs, eval_batch, flip, ghost_rows, image_size, lr, norm, scan_epoch, "
    "schedule, seed, smoothing, stem, watch_every, weight_decay, width",
    None: "{run} is no run of train.py: it has no config.json",
}


@pytest.mark.parametrize("text", CONFIGS, ids=lambda text: repr(text)[:20])
def test_a_damaged_config_is_one_line_and_changes_nothing(runs, capsys, text):
    run = runs.folder / "whole"
    if text is None:
        (run / "config.json").unlink()
    else:
        (run / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    files = [path for path in run.rglob("*") if path.is_file()]
    before = [path.read_bytes() for path in files]
    expected = CONFIGS[text].format(run=run)
    assert refused(capsys, runs, "whole", "--resume") == f"--resume: {expected}"
    assert [path.read_bytes() for path in files] == before


ROW = dict.fromkeys(report.FIELDS, 1)
METRICS = [None, b"", b"\xff\x00garbage", b"null\n[1]\n" + b"[" * 100_000, b'{"epoch": 1}\n']
METRICS += [json.dumps({**ROW, name: v}).encode() for name, v in [("epoch", "x"), ("more", 1)]]
METRICS += [json.dumps({**ROW, "epoch": v}).encode() for v in (0, 7, 0.5, float("nan"))]
METRICS += [json.dumps({**ROW, "seconds": 10**400}).encode()]


def test_damaged_metrics_are_left_out_and_the_run_goes_on(undisturbed, runs, capsys):
    run = runs.folder / "whole"
    shutil.rmtree(run / "checkpoints" / "6")
    capsys.readouterr()
    for text in METRICS:  # resumed once for all of them: what is read of each is the same
        path = run / "metrics.jsonl"
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_bytes(text)
        log = report.Log(path, 1)
        assert (log.rows, log.missing, path.read_text()) == ([], 1, ""), text
    path.write_bytes(METRICS[2])
    resumed = runs("whole", "--resume")
    assert f"{run}/metrics.jsonl: 1 of 1 epochs not found, and left out" in (
        capsys.readouterr().out.splitlines()
    )
    assert bits(resumed["state"]) == bits(undisturbed[1])
    assert runs.figures("whole")[0] == undisturbed[0].figures("whole")[0][1:]

    path.unlink()  # and now that all epochs are done
    assert refused(capsys, runs, "whole", "--resume") == (
        f"--resume: {run}/metrics.jsonl: no epoch in it, and none is left to train"
    )


# --- SIGTERM, Ctrl-C, a full disk -------------------------------------------------------------


@pytest.fixture
def ctrl_c():
    """As in a terminal: where a shell has started these tests with `&`, Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def at_step(monkeypatch, step: int, number: int, lost=()):
    """
    Signal `number` comes to this process in that step of the run. What it raises comes to nothing
    if it is `lost`, as in a callback of the garbage collector.
    """
    steps_begun, watched_step = count(1), the_loop().watched_step

    def signalled(*args):
        if next(steps_begun) == step:
            with suppress(*lost):
                os.kill(os.getpid(), number)
        return watched_step(*args)

    monkeypatch.setattr(the_loop(), "watched_step", signalled)


def ended(capsys, runs, name, *more):
    """(exit status, the one line on stderr, the options of the command in it)."""
    with pytest.raises(SystemExit) as stopped:
        runs(name, *more)
    (line,) = capsys.readouterr().err.splitlines()
    program = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv[1:])]
    said, command = line.split("Go on with: ")
    command = shlex.split(command)
    assert command[: len(program)] == program
    return stopped.value.code, said, command[len(program) :]


@pytest.mark.parametrize(("step", "saved"), [(1, [1]), (3, [3]), (5, [3, 5])])
def test_after_a_sigterm_the_step_is_saved_and_the_command_that_is_told_goes_on(
    undisturbed, runs, monkeypatch, capsys, step, saved
):
    with monkeypatch.context() as patch:
        at_step(patch, step, signal.SIGTERM)
        before = signal.getsignal(signal.SIGTERM)
        status, said, options = ended(capsys, runs, "stopped")
    assert (status, said) == (143, f"Stopped by SIGTERM after {step} steps. ")
    assert signal.getsignal(signal.SIGTERM) is before
    assert runs.saved("stopped") == saved
    assert options == [*runs.options, "--name", "stopped", "--resume"]

    resumed = train.main(options)
    epochs, part = divmod(step, COUNT)
    told = f"Resumed after epoch {epochs}" + (f" and {part} of 3 steps" if part else "")
    assert told in capsys.readouterr().out.splitlines()
    assert bits(resumed["state"]) == bits(undisturbed[1])
    assert runs.figures("stopped") == undisturbed[0].figures("whole")


def test_a_sigterm_in_the_last_step_of_all_changes_nothing(undisturbed, runs, monkeypatch):
    at_step(monkeypatch, 2 * COUNT, signal.SIGTERM)
    assert bits(runs("late")["state"]) == bits(undisturbed[1])


def test_a_scanned_epoch_is_ended_and_saved(runs, monkeypatch, capsys):
    asked = iter([False, True])
    monkeypatch.setattr(stop.Asked, "now", lambda self: next(asked))
    none = np.zeros(COUNT)  # what an epoch does is tested elsewhere, and compiles for seconds
    monkeypatch.setattr(the_loop(), "train_epoch", lambda state, *_: (state, (none, none)))
    runs.options = [*runs.options[:-4], "--scan-epoch"]
    assert ended(capsys, runs, "scanned")[:2] == (143, "Stopped by SIGTERM after 3 steps. ")
    assert runs.saved("scanned") == [3]


def test_ctrl_c_in_a_save_waits_until_it_is_whole(undisturbed, runs, monkeypatch, capsys, ctrl_c):
    with monkeypatch.context() as patch:
        save = checkpoint.ocp.Checkpointer.save

        def interrupted(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGINT)
            save(*args, **kwargs)

        patch.setattr(checkpoint.ocp.Checkpointer, "save", interrupted)
        status, said, options = ended(capsys, runs, "interrupted")
    assert (status, said) == (130, "Stopped. ")
    assert runs.saved("interrupted") == [3]
    resumed = train.main(options)
    assert bits(resumed["state"]) == bits(undisturbed[1])
    assert runs.figures("interrupted") == undisturbed[0].figures("whole")


def test_ctrl_c_before_there_is_a_run_is_one_line(runs, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "load", interrupted)
    with pytest.raises(SystemExit) as stopped:
        runs("early")
    with pytest.raises(SystemExit) as other, one_line(train.options.parser()):
        interrupted()
    assert (stopped.value.code, other.value.code) == (130, 130)
    assert capsys.readouterr().err == "Stopped.\n" * 2
    assert not (runs.folder / "early").exists()


def test_ctrl_c_of_a_run_in_the_background_is_ignored_in_a_save_too(
    undisturbed, runs, monkeypatch, ctrl_c
):
    """A shell starts `python train.py &` with the signal ignored: it is for what is in front."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    save = checkpoint.ocp.Checkpointer.save

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        save(*args, **kwargs)

    monkeypatch.setattr(checkpoint.ocp.Checkpointer, "save", interrupted)
    at_step(monkeypatch, 2, signal.SIGINT)
    assert bits(runs("background")["state"]) == bits(undisturbed[1])
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(
    undisturbed, runs, monkeypatch, capfd
):
    full, save = [False, True], checkpoint.ocp.Checkpointer.save
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*args, **kwargs):
        if full.pop(0):  # no file may grow beyond this: the second save ends in the middle
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            save(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.ocp.Checkpointer, "save", limited)
        status, said, options = ended(capfd, runs, "full")
    folder = runs.folder / "full" / "checkpoints"
    assert (status, said) == (
        2,
        f"train.py: error: {folder}/6: cannot be saved: File too large. ",
    )
    assert runs.saved("full") == [3]  # and nothing half-written beside it
    resumed = train.main(options)
    assert bits(resumed["state"]) == bits(undisturbed[1])
    assert runs.figures("full") == undisturbed[0].figures("whole")


@pytest.mark.parametrize(
    ("step", "lost"),
    [(COUNT, ()), (COUNT - 1, (KeyboardInterrupt,))],
    ids=["at once", "before the next step"],
)
def test_stopped_before_the_first_checkpoint_it_writes_no_figure_twice(
    undisturbed, runs, monkeypatch, capsys, ctrl_c, step, lost
):
    with monkeypatch.context() as patch:
        at_step(patch, step, signal.SIGINT, lost)
        status, _, options = ended(capsys, runs, "early")
    assert (status, runs.figures("early")[1][0]["step"]) == (130, 0)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not (runs.folder / "early" / "checkpoints").exists()
    resumed = train.main(options)
    assert bits(resumed["state"]) == bits(undisturbed[1])
    assert runs.figures("early") == undisturbed[0].figures("whole")


def test_the_command_that_goes_on_has_the_name_and_the_data_that_were_chosen(tmp_path):
    given = ["--runs", "my runs", "--epochs", "2"]
    args = train.options.parser().parse_args(given)
    args.data = "digits"  # as --data auto has found
    program = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv[1:])]
    command = train.options.go_on(given, args, tmp_path / "20250101-000000")
    more = ["--name", "20250101-000000", "--data", "digits", "--resume"]
    assert shlex.split(command) == [*program, *given, *more]


def test_a_run_that_all_processes_do_not_agree_on_leaves_no_folder(runs, monkeypatch, capsys):
    monkeypatch.setattr(hosts, "agree", lambda *_: "process 1 has other options than process 0")
    assert refused(capsys, runs, "other") == "process 1 has other options than process 0"
    assert not (runs.folder / "other").exists()
