"""
The command lines of the examples: `--help` ends with three calls, and what cannot be done is one
line on stderr and exit status 2.
"""

import argparse
import os
import runpy
import sys
from pathlib import Path

import pytest

from tests.support.command_lines import refusal
from tests.support.full import NO_SPACE, no_space, stdout_to

EXAMPLES = Path(__file__).parents[2] / "examples"
NO_DATA = "--data-dir {}/no: no test_batch.bin in it, nor in cifar-10-batches-bin/ below it"
SEEDS = "argument --seeds: 0 is out of range, must be at least 1"
BAD = [
    ("cifar10/ship.py {}", "{} is no run of train.py: it has no config.json"),
    ("cifar10/ship.py {}/list", "{}/list/config.json: a list, expected the options of a run"),
    ("cifar10/ship.py {}/cut", "{}/cut/config.json: no JSON, damaged"),
    (
        "cifar10/ship.py {}/little",
        "{}/little/config.json: does not say model, block, width, api, epochs, lr, schedule, "
        "weight_decay, smoothing",
    ),
    (
        "cifar10/ship.py {}/wide",
        "{}/wide/config.json: argument --width: 0 is out of range, must be at least 1",
    ),
    ("cifar10/speedrun.py --data-dir {}/no", NO_DATA),
    (
        "cifar10/speedrun.py --data digits --out {}",
        "--out {}: expected a file in a folder that this process may write in",
    ),
    (
        "cifar10/speedrun.py --data digits --out {}/no/f",
        "--out {0}/no/f: there is no folder {0}/no",
    ),
    ("cifar10/predict.py {} x.png", "{} is no run of train.py: it has no config.json"),
    (
        "cifar10/predict.py {}/plain x.png",
        "{}/plain/config.json: does not say what the run was trained on",
    ),
    ("cifar10/predict.py {0}/digits {0}/no.png", "{}/no.png: no such file"),
    (
        "cifar10/predict.py {0}/digits {0}/list/config.json",
        "{}/list/config.json: cannot be decoded as PNG or JPEG",
    ),
    (
        "cifar10/predict.py {0}/digits x.png --picture {0}",
        "--picture {}: expected a file in a folder that this process may write in",
    ),
    ("first_steps.py --epochs 0", "--epochs 0: expected 1 or more"),
    ("first_steps.py --epochs x", "argument --epochs: invalid int value: 'x'"),
    ("first_steps.py --out {}", "--out {}: expected a file in a folder that exists"),
    ("first_steps.py --out {}/pipe", "--out {}/pipe: expected a file in a folder that exists"),
    ("first_steps.py --out {}/no/f", "--out {}/no/f: expected a file in a folder that exists"),
    (
        "devices/all.py --cpus 0",
        "argument --cpus: 0 is out of range, must be at least 1",
    ),
    ("devices/pmap.py --cpu x", "argument --cpus: invalid int value: 'x'"),
    ("recalibrate/recalibrate.py --data-dir {}/no", NO_DATA),
    ("recalibrate/recalibrate.py --run {}", "{} has no complete checkpoint"),
    ("recalibrate/recalibrate.py --steps 3", "unrecognized arguments: --steps 3"),
    ("finetune/finetune.py --data-dir {}/no", NO_DATA),
    ("swap/swap.py --data-dir {}/no", NO_DATA),
    ("renorm/renorm.py --data-dir {}/no", NO_DATA),
    ("adapt/tent.py --data-dir {}/no", NO_DATA),
    ("adapt/weights.py --seeds 0", "argument --seeds: 0 is out of range, must be at least 1"),
    ("domains/domains.py --data-dir {}/no", NO_DATA),
    ("studies/learning_rate.py --data-dir {}/no", NO_DATA),
    ("studies/momentum.py --tiny --seeds 0", SEEDS),
    (
        "studies/momentum.py --picture {}",
        "--picture {}: expected a file in a folder that this process may write in",
    ),
    (
        "studies/momentum.py --picture {}/no/f",
        "--picture {0}/no/f: there is no folder {0}/no",
    ),
    ("drift/alarms.py --data-dir {}/no", NO_DATA),
    ("drift/alarms.py --run {} --width 2", "{} has no complete checkpoint"),
    ("drift/alarms.py --window 200", "--window 200: there are 180 images to draw it from"),
    (
        "drift/alarms.py --windows 0",
        "argument --windows: 0 is out of range, must be at least 1",
    ),
    (
        "drift/false_alarms.py --windows 9",
        "argument --windows: 9 is out of range, must be at least 10",
    ),
    (
        "drift/served.py --port 65536",
        "argument --port: 65536 is out of range, must be from 0 to 65535",
    ),
    ("drift/served.py --windows x", "argument --windows: invalid int value: 'x'"),
    (
        "drift/served.py --wait nan",
        "argument --wait: nan is out of range, must be from 0 to 86400",
    ),
    ("convert/zoo.py --tiny --torchvision", "--tiny has no networks of torchvision's"),
    ("convert/torch_roundtrip.py {}/no x", "{0}/no: No such file or directory: {0}/no"),
    (
        "convert/torch_roundtrip.py {0}/plain/config.json {0}/pipe",
        "TARGET {0}/pipe: expected a file in a folder that this process may write in",
    ),
    (
        "convert/torch_roundtrip.py {}/wide/config.json x",
        "{}/wide/config.json: Error while deserializing header: header too large",
    ),
    (
        "watch/watched.py {}/list/config.json 1 0",
        "TensorBoard: cannot write {0}/list/config.json/events.out.tfevents.0.0 "
        "(File exists), expected a folder that this process may write in.",
    ),
]
RUN = (
    '{{"data": "digits", "batch": 64, "model": "resnet9", "block": "post", "width": {}, "api": '
    '"linen", "epochs": 1, "lr": 0.1, "schedule": "cosine", "weight_decay": 0, "smoothing": 0}}'
)


ABOUT = (
    '"about": {"classes": ["0", "1"], "shape": [8, 8, 3], "mean": [1, 1, 1], "std": [1, 1, 1], '
    '"train": 64, "test": 1}'
)
SCRIPTS = sorted(
    str(path.relative_to(EXAMPLES))
    for path in EXAMPLES.rglob("*.py")
    if '__name__ == "__main__"' in path.read_text()
)


def status(monkeypatch, script, *options):
    """The exit status of `python examples/SCRIPT OPTIONS`."""
    path = EXAMPLES / script
    monkeypatch.setattr(sys, "argv", [str(path), *options])
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    return ended.value.code


@pytest.mark.parametrize(("command", "expected"), BAD, ids=[command for command, _ in BAD])
def test_a_wrong_command_is_one_line(monkeypatch, tmp_path, capsys, command, expected):
    for name, text in (
        ("list", "[1, 2]"),
        ("cut", RUN[:9]),
        ("little", '{"data": "digits", "batch": 64}'),
        ("wide", RUN.format(0)),
        ("plain", RUN.format(2)),
        ("digits", f"{RUN.format(2)[:-1]}, {ABOUT}}}"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    script, *options = command.format(tmp_path).split()
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("time.time_ns", lambda: 0)  # in the name of TensorBoard's file,
    monkeypatch.setattr("os.getpid", lambda: 0)  # with this
    assert status(monkeypatch, script, *options) == 2
    name = script.split("/")[-1]
    assert capsys.readouterr().err == f"{name}: error: {expected.format(tmp_path)}\n"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_ends_with_three_calls_that_the_script_understands(monkeypatch, capsys, script):
    monkeypatch.setenv("COLUMNS", "80")
    assert status(monkeypatch, script, "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    calls = [line.strip() for line in lines[-3:]]
    assert len({*calls}) == 3
    for call in calls:
        assert call.split()[:2] == ["python", f"examples/{script}"]
        assert refusal(call) == ""


@pytest.mark.parametrize(
    ("command", "during"),
    [
        ("drift/served.py", "jaxbn.writers.open"),
        ("watch/watched.py FOLDER", "jaxbn.writers.open"),
        ("cifar10/predict.py RUN IMAGE", "rich.console.Console.status"),
        ("convert/zoo.py", "tempfile.TemporaryDirectory"),
    ],
)
def test_ctrl_c_is_one_line(monkeypatch, capsys, command, during):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(during, interrupted)
    try:
        code = status(monkeypatch, *command.split())
    except KeyboardInterrupt:  # which would end the tests
        code = None
    assert code == 130
    assert capsys.readouterr() == ("", "Stopped.\n")


def status_when(monkeypatch, script, act):
    """The exit status, if this happens in the first function that is called for a script's work."""
    own, parse = EXAMPLES / "cifar10" / "command.py", argparse.ArgumentParser.parse_args

    def profile(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and EXAMPLES in path.parents and path != own:
            sys.setprofile(None)
            act()

    def parse_and_go_on(*args):
        parsed = parse(*args)
        sys.setprofile(profile)
        return parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_go_on)
    try:
        return status(monkeypatch, script, *ARGUMENTS.get(script.split("/")[-1], []))
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_in_any_script_is_one_line(monkeypatch, capsys, script):
    def interrupt():
        raise KeyboardInterrupt

    try:
        code = status_when(monkeypatch, script, interrupt)
    except KeyboardInterrupt:  # which would end the tests
        code = None
    assert code == 130
    assert capsys.readouterr().err == "Stopped.\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_full_stdout_is_told_by_any_script(monkeypatch, capsys, script):
    with stdout_to("/dev/full", True):
        assert status_when(monkeypatch, script, lambda: print("a line")) == 2
    name = script.split("/")[-1]
    assert capsys.readouterr().err == f"{name}: error: stdout: {NO_SPACE}\n"


@pytest.fixture(scope="module")
def command():
    return runpy.run_path(str(EXAMPLES / "cifar10" / "command.py"))


@pytest.mark.parametrize("unbuffered", [True, False])
def test_a_full_stdout_is_told_at_the_end_too(command, capsys, unbuffered):
    with (
        stdout_to("/dev/full", unbuffered),
        pytest.raises(SystemExit) as ended,
        command["one_line"](command["Parser"]("script.py")),
    ):
        print("a line")
    assert (ended.value.code, capsys.readouterr().err) == (
        2,
        f"script.py: error: stdout: {NO_SPACE}\n",
    )


@pytest.mark.parametrize("unbuffered", [True, False])
def test_help_that_cannot_be_written_is_told(command, capsys, unbuffered):
    with stdout_to("/dev/full", unbuffered), pytest.raises(SystemExit) as ended:
        command["Parser"]("script.py").parse_args(["--help"])
    assert (ended.value.code, capsys.readouterr().err) == (
        2,
        f"script.py: error: stdout: {NO_SPACE}\n",
    )


def test_a_full_disk_names_the_file_and_leaves_the_file_before(command, capsys, tmp_path):
    (path := tmp_path / "file").write_text("before")

    def work():
        parser = command["Parser"]("script.py")
        with command["one_line"](parser), command["new_file"](path) as part:
            part.write_text("half")
            print("a line")
            no_space()

    with pytest.raises(SystemExit) as ended:
        work()
    assert ended.value.code == 2
    assert capsys.readouterr() == ("a line\n", f"script.py: error: {path}: {NO_SPACE}\n")
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_text() == "before"


ARGUMENTS = {
    "ship.py": ["RUN"],
    "predict.py": ["RUN", "IMAGE"],
    "watched.py": ["FOLDER"],
    "torch_roundtrip.py": ["SOURCE", "TARGET"],
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_option_is_one_line(monkeypatch, capsys, script):
    name = script.split("/")[-1]
    options = ARGUMENTS.get(name, [])
    assert status(monkeypatch, script, *options, "--no-such-option") == 2
    expected = f"{name}: error: unrecognized arguments: --no-such-option\n"
    assert capsys.readouterr().err == expected
