"""The CIFAR example in many processes: what one process computes, and the death of any of them."""

import json
import shlex
import signal
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "cifar10"))

import data
import hosts
import model
import train
from download import CIFAR10

from tests.support.compiling import environment

EXAMPLE = Path(__file__).parents[2] / "examples" / "cifar10"
N = 13  # records a file: 65 training images, 13 test images; neither divides over 4 devices
SMALL = ["--model", "resnet18", "--width", "2", "--batch", "16", "--eval-batch", "8"]
SMALL += ["--epochs", "2", "--lr", "0.01"]
ONE_BLOCK = {"blocks": (1,), "bottleneck": False}  # a network that compiles in a second
PATIENCE = 240  # seconds until a process that hangs is killed and the test fails

# Trains as train.py does, with smaller files and a smaller network. Process `victim` kills itself
# as it comes to save epoch 2. At the end each process leaves its state and the rows it has read.
PROGRAM = """
import sys
example, folder, victim, *argv = sys.argv[1:]
sys.path.insert(0, example)
import hosts

hosts.supervise(argv)
import os, signal
import jax
import numpy as np
import checkpoint, data, model, report, train

report.curves = lambda *args: None  # a second of matplotlib
data.RECORDS = 13
model.RESNETS["resnet18"] = {"blocks": (1,), "bottleneck": False}
rows_read, read, save = [], data.Images.__getitem__, checkpoint.Checkpoints.save

def note_and_read(self, rows):
    rows_read.extend(len(self) * 1000 + rows)
    return read(self, rows)

def save_or_die(self, steps, *kept):
    if (steps, jax.process_index()) == (8, int(victim)):
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, steps, *kept)

data.Images.__getitem__ = note_and_read
checkpoint.Checkpoints.save = save_or_die
leaves = jax.tree.leaves(train.main(argv)["state"])
np.savez(f"{folder}/{jax.process_index()}", *leaves, rows_read=np.array(rows_read))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With the six files in it, and all the runs."""
    folder = tmp_path_factory.mktemp("hosts")
    (folder / CIFAR10.folder).mkdir()
    rng = np.random.default_rng(0)
    for name in [*data.TRAIN, data.TEST]:
        raw = rng.integers(0, 256, (N, 3073), np.uint8)
        raw[:, 0] %= 10
        raw.tofile(folder / CIFAR10.folder / name)
    return folder


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(folder: Path, name: str, commands: list[list[str]], devices: int, victim=-1, stop=False):
    """
    (exit status, stdout, stderr) of one process for each of `commands`, when all have ended. With
    `stop` the first gets a SIGTERM when it has printed an epoch.
    """
    (folder / f"{name}.state").mkdir(exist_ok=True)
    env = environment(
        JAX_PLATFORMS="cpu",
        JAX_NUM_CPU_DEVICES=str(devices),
        # What one run has compiled the next, of as many processes and devices, finds here.
        JAX_COMPILATION_CACHE_DIR=str(folder / "compiled"),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    )
    where = ["--data-dir", str(folder), "--runs", str(folder / "runs"), "--name", name]
    program = [sys.executable, "-c", PROGRAM, str(EXAMPLE), str(folder / f"{name}.state")]
    running = [
        subprocess.Popen(
            [*program, str(victim), *where, *SMALL, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for command in commands
    ]
    try:
        if stop:
            assert any(line.startswith("    1  ") for line in running[0].stdout)
            running[0].terminate()
        outputs = [process.communicate(timeout=PATIENCE) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    return [(p.returncode, out, err) for p, (out, err) in zip(running, outputs, strict=True)]


def meet(processes: int, *options) -> list[list[str]]:
    """The options of each of so many processes."""
    same = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", str(processes)]
    return [[*same, "--process-id", str(i), "--heartbeat", "5", *options] for i in range(processes)]


def arrays(folder: Path, name: str, process: int) -> list[np.ndarray]:
    saved = np.load(folder / f"{name}.state" / f"{process}.npz")
    return [saved[key] for key in saved if key != "rows_read"]


def metrics(folder: Path, name: str) -> list[dict]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    timed = ("seconds", "images_per_s")
    return [{k: v for k, v in json.loads(x).items() if k not in timed} for x in lines]


@pytest.fixture(scope="module")
def one(folder):
    """The state that one process with four devices comes to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "RECORDS", N)
        patch.setitem(model.RESNETS, "resnet18", ONE_BLOCK)
        where = ["--data-dir", str(folder), "--runs", str(folder / "runs"), "--name", "one"]
        result = train.main([*where, *SMALL, "--devices", "4"])
    return [np.asarray(leaf) for leaf in jax.tree.leaves(result["state"])]


@pytest.fixture(scope="module")
def two(folder):
    """Two processes with two devices each."""
    return launch(folder, "two", meet(2), devices=2)


def assert_is_one_process(folder, name, ended, one):
    assert [status for status, _, _ in ended] == [0] * len(ended), ended
    for process in range(len(ended)):
        for a, b in zip(arrays(folder, name, process), one, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    for got, expected in zip(metrics(folder, name), metrics(folder, "one"), strict=True):
        assert got["test_images"] == expected["test_images"] == N
        assert got == pytest.approx(expected, rel=1e-5)


def test_two_processes_of_two_devices_equal_one_of_four(folder, two, one):
    assert_is_one_process(folder, "two", two, one)


def test_four_processes_of_one_device_equal_one_of_four(folder, one):
    ended = launch(folder, "four", meet(4, "--watch", "jsonl", "--watch-every", "3"), devices=1)
    assert_is_one_process(folder, "four", ended, one)

    # What the norm layers saw, all devices together, written by the first process alone.
    lines = (folder / "runs" / "four" / "watch.jsonl").read_text().splitlines()
    seen = [(line["step"], line["layers"]) for line in map(json.loads, lines)]
    assert [step for step, _ in seen] == [0, 3, 6]
    assert all(layers["BatchNorm_0"]["batch_count"] == 16 * 32 * 32 for _, layers in seen)
    assert [err for _, _, err in ended] == [""] * 4

    # Each has read its own quarter: of 68 training rows, 65 and 3 of padding, and of 13 test rows.
    read = [np.load(folder / "four.state" / f"{i}.npz")["rows_read"].tolist() for i in range(4)]
    assert [sum(row >= 1000 * 5 * N for row in rows) for rows in read] == [17, 17, 17, 14]
    assert [sum(row < 1000 * 5 * N for row in rows) for rows in read] == [4, 4, 3, 2]
    assert sorted(row % 1000 for rows in read for row in rows if row >= 5000 * N) == list(
        range(5 * N)
    )
    assert len({row for rows in read for row in rows}) == sum(map(len, read)) == 6 * N


# --- death ------------------------------------------------------------------------------------

RESUME = "Resume with the same command and --resume on every process\n"


def test_when_one_is_killed_the_other_ends_naming_it_and_a_resumed_run_has_the_same_bits(
    folder, two
):
    survivor, killed = launch(folder, "killed", meet(2), devices=2, victim=1)
    assert survivor[::2] == (75, f"Process 1 was lost (no heartbeat for 5 s).\n{RESUME}")
    assert killed[::2] == (75, f"This process was ended by SIGKILL. {RESUME}")

    resumed = launch(folder, "killed", meet(2, "--resume"), devices=2)
    assert [status for status, _, _ in resumed] == [0, 0], resumed
    assert "Resumed after epoch 1\n" in resumed[0][1]
    for process in range(2):
        got, expected = arrays(folder, "killed", process), arrays(folder, "two", process)
        assert [a.tobytes() for a in got] == [a.tobytes() for a in expected]
    assert metrics(folder, "killed") == metrics(folder, "two")


def test_after_a_sigterm_to_one_all_stop_with_the_same_step_saved(folder):
    options = meet(2, "--epochs", "1000")
    ended = launch(folder, "stopped", options, devices=2, stop=True)
    saved = max(int(path.name) for path in (folder / "runs" / "stopped" / "checkpoints").iterdir())
    assert saved >= 4  # the epoch that was printed
    for (status, _, err), its in zip(ended, options, strict=True):
        said, command = err.split(" Go on with: ")
        assert (status, said) == (143, f"Stopped by SIGTERM after {saved} steps.")
        assert command.endswith(f" {shlex.join(its)} --resume\n")


THREE = ["--coordinator", "localhost:1234", "--num-processes", "2", "--process-id"]

# What the coordination service of jaxlib 0.10 and 0.12 writes, shortened.
FATAL = "F1127 05:47:28.2 112 client.h:80] Terminating process. absl::Status: "
FROZEN = (
    FATAL
    + """DEADLINE_EXCEEDED: Deadline Exceeded

RPC: /xla.coordination.CoordinationService/Heartbeat
*** Check failure stack trace: ***
"""
)
TWICE = (
    FATAL
    + """ABORTED: 1 unexpectedly tried to connect with a different incarnation. It has
RPC: /xla.coordination.CoordinationService/PollForError
"""
)
GONE = FATAL + "UNAVAILABLE: the leader task was preempted/died\n"
NOTICE = "W1127 05:50:29.6 139 preemption_notifier.cc:90] SIGTERM caught\n"
CHILDREN = {  # what a child writes, and how it ends → what its parent says, and its exit status
    "frozen": (FROZEN, "SIGABRT", 75, f"Process 0 was lost (no heartbeat for 10 s).\n{RESUME}"),
    "gone": (GONE, "SIGABRT", 75, f"Process 0 was lost (its connection broke).\n{RESUME}"),
    "twice": (
        TWICE,
        "SIGABRT",
        2,
        "train.py: error: --process-id 1: two processes have it. Give each its own, end all, and "
        "start them again\n",
    ),
    "stopped": (f"{NOTICE}Stopped.\n", 143, 143, "Stopped.\n"),
    "stopped early": ("", "SIGTERM", 143, f"Stopped. {RESUME}"),
    "killed": ("", "SIGKILL", 75, f"This process was ended by SIGKILL. {RESUME}"),
    "wrong": ("train.py: error: no\n", 2, 2, "train.py: error: no\n"),
}


@pytest.mark.parametrize("what", CHILDREN)
def test_a_parent_says_in_a_line_how_its_child_has_ended(monkeypatch, capsys, what):
    dump, end, status, expected = CHILDREN[what]
    end = f"os._exit({end})" if isinstance(end, int) else f"os.kill(os.getpid(), signal.{end})"
    code = f"import os, signal, sys; print({dump!r}, end='', file=sys.stderr, flush=True); {end}"
    monkeypatch.setattr(sys, "orig_argv", ["python", "-c", code])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as ended:
            hosts.supervise([*THREE, "1"])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert (ended.value.code, capsys.readouterr().err) == (status, expected)


# --- bad arguments ----------------------------------------------------------------------------


def test_what_cannot_begin_says_so_in_every_process_before_anything_is_written(folder):
    first, second = meet(2)
    second[second.index("--num-processes") + 1] = "4"
    nowhere = f"127.0.0.1:{free_port()}"
    alone = ["--coordinator", nowhere, "--num-processes", "2", "--process-id", "1"]
    commands = [[*first, "--batch", "15"], second, [*alone, "--timeout", "1"]]
    ended = launch(folder, "bad", commands, devices=1)
    assert [(status, err) for status, _, err in ended] == [
        (2, "train.py: error: --batch 15 does not divide over 2 devices\n"),
        (2, "train.py: error: --num-processes 4: there are 2\n"),
        (
            2,
            f"train.py: error: waited 1 s for all 2 processes at {nowhere} in vain: is process 0 "
            "reachable there, are all started, each with a --process-id of its own, is "
            "--num-processes the same everywhere?\n",
        ),
    ]
    assert not (folder / "runs" / "bad").exists()


NAME, DIGITS = ["--name", "x"], ["--data", "digits"]
BAD = [
    (THREE[:4], "--coordinator, --num-processes and --process-id: give all three"),
    (["--process-id", "0"], "--coordinator, --num-processes and --process-id: give all three"),
    ([*THREE, "2"], "--process-id 2: --num-processes 2 are 0 to 1"),
    ([*THREE, "0", "--coordinator", "localhost"], "--coordinator localhost: must be HOST:PORT"),
    ([*THREE, "0"], "many processes: give the run a --name, the same in each"),
    ([*THREE, "0", *NAME], "many processes: give the --data-dir of CIFAR, or other --data"),
    (
        ["--cluster", *THREE, "0"],
        "--cluster: without --coordinator, --num-processes and --process-id",
    ),
    ([*THREE, "one"], "argument --process-id: invalid int value: 'one'"),
    (["--heartbeat", "0"], "argument --heartbeat: 0 is out of range, must be at least 1"),
]


@pytest.mark.parametrize(("options", "expected"), BAD, ids=[" ".join(o) for o, _ in BAD])
def test_a_bad_argument_is_one_line_and_exit_status_2(capsys, options, expected):
    with pytest.raises(SystemExit) as stopped:
        train.main(options)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"train.py: error: {expected}\n"


def test_a_port_that_is_taken_is_one_line(capsys):
    with socket.create_server(("", 0)) as taken:
        where = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(SystemExit):
            train.main(["--coordinator", where, *THREE[2:], "0"])
    assert capsys.readouterr().err == (
        f"train.py: error: --coordinator {where}: port not free here\n"
    )


def test_a_process_with_other_options_is_named(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    told = {"problem": [None, None, None], "terms": ["a", "a", "b"]}

    def gathered(mine):
        rows = [
            [p is not None, zlib.crc32(t.encode())] for p, t in zip(*told.values(), strict=True)
        ]
        assert mine.tolist() in rows
        return np.array(rows, mine.dtype)

    monkeypatch.setattr(multihost_utils, "process_allgather", gathered)
    assert hosts.agree(None, "a") == "process 2 has other options than process 0"
    told["problem"][1] = "no such file"
    assert hosts.agree(None, "a") == "process 1 cannot start, and says why"
    assert hosts.agree("no such file", "a") == "no such file"


def test_all_that_were_lost_are_named():
    dump = "unhealthy (stopped sending heartbeats):\n3\n11\nThe tasks have crashed"
    assert hosts.lost_processes(f"UNAVAILABLE: Task 3 heartbeat timeout. {dump}") == [3, 11]
    assert hosts.lost_processes("ValueError: mine") == []
