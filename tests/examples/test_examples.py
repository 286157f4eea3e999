"""What an example's command line cannot do is one line on stderr and exit status 2."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NO_DATA = "--data-dir {}/no: no test_batch.bin in it, nor in cifar-10-batches-bin/ below it"
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
        "--out {}: a folder, expected the file to write",
    ),
    (
        "cifar10/speedrun.py --data digits --out {}/no/f",
        "--out {0}/no/f: there is no folder {0}/no",
    ),
    ("first_steps.py --epochs 0", "--epochs 0: expected 1 or more"),
    ("first_steps.py --epochs x", "argument --epochs: invalid int value: 'x'"),
    ("first_steps.py --out {}", "--out {}: expected a file in a folder that exists"),
    ("first_steps.py --out {}/no/f", "--out {}/no/f: expected a file in a folder that exists"),
    ("devices/all.py --cpus 0", "--cpus 0: expected 1 or more"),
    ("devices/pmap.py --cpu x", "argument --cpus: invalid int value: 'x'"),
    ("recalibrate/recalibrate.py --data-dir {}/no", NO_DATA),
    ("recalibrate/recalibrate.py --run {}", "{} has no complete checkpoint"),
    ("recalibrate/recalibrate.py --steps 3", "unrecognized arguments: --steps 3"),
    ("finetune/finetune.py --data-dir {}/no", NO_DATA),
    ("swap/swap.py --data-dir {}/no", NO_DATA),
    ("renorm/renorm.py --data-dir {}/no", NO_DATA),
    ("domains/domains.py --data-dir {}/no", NO_DATA),
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
    ("convert/zoo.py --tiny --torchvision", "--tiny has no networks of torchvision's"),
    ("convert/torch_roundtrip.py {}/no x", "{0}/no: No such file or directory: {0}/no"),
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


@pytest.mark.parametrize(("command", "expected"), BAD, ids=[command for command, _ in BAD])
def test_a_wrong_command_is_one_line(monkeypatch, tmp_path, capsys, command, expected):
    for name, text in (
        ("list", "[1, 2]"),
        ("cut", RUN[:9]),
        ("little", '{"data": "digits", "batch": 64}'),
        ("wide", RUN.format(0)),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    script, *options = command.format(tmp_path).split()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", [script, *options])
    monkeypatch.setattr(sys, "path", [str((EXAMPLES / script).parent), *sys.path])
    monkeypatch.setattr("time.time_ns", lambda: 0)  # in the name of TensorBoard's file,
    monkeypatch.setattr("os.getpid", lambda: 0)  # with this
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    assert ended.value.code == 2
    name = script.split("/")[-1]
    assert capsys.readouterr().err == f"{name}: error: {expected.format(tmp_path)}\n"
    assert sorted(tmp_path.rglob("*")) == before
