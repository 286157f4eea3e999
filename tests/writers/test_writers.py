"""Writers: what they write, when, in which process, and what happens when one fails."""

import importlib
import json
import pathlib
import re
import resource
import runpy
import socket
import struct
import sys
import time
import urllib.request

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from jaxbn import health, watch, writers
from jaxbn.writers import _prometheus
from tests.support.messages import message
from tests.support.watching import record_of

ROOT = pathlib.Path(__file__).parents[2]
rng = np.random.default_rng(0)

RECORDS = {
    "block/bn": record_of(64),
    "": record_of(3, 1),
    "nan": record_of(3, bm=np.float32([np.nan] * 3)),
}
FIGURES = watch.metrics(RECORDS)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def events(folder):
    """The events of all of a folder's files, their framing and checksums checked."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    out = []
    for path in sorted(pathlib.Path(folder).glob("*tfevents*")):
        raw = path.read_bytes()
        while raw:
            (length,) = struct.unpack("<Q", raw[:8])
            body = raw[12 : 12 + length]
            sums = struct.unpack("<I", raw[8:12]) + struct.unpack("<I", raw[12 + length :][:4])
            assert sums == (masked_crc32c(raw[:8]), masked_crc32c(body))
            out.append(Event.FromString(body))
            raw = raw[16 + length :]
    return out


def test_tensorboard_has_every_figure_and_the_histograms(tmp_path):
    with writers.open(["tensorboard"], tmp_path / "new") as log:
        log.write(50, RECORDS)
        log.rewind(50)
        log.write(50, RECORDS)
    first, written, back, again = events(tmp_path / "new")
    assert first.file_version == "brain.Event:2"
    assert (back.step, back.session_log.status) == (50, back.session_log.START)
    assert written.step == again.step == 50
    assert abs(written.wall_time - time.time()) < 3600
    values = {value.tag: value for value in written.summary.value}
    assert len(values) == len(written.summary.value)
    for layer, figures in FIGURES.items():
        for name, figure in figures.items():
            got = values.pop(f"{name}/{layer or '.'}").simple_value
            assert got == pytest.approx(figure, rel=1e-6, nan_ok=True)  # float32
    assert "batch_mean/nan" not in values  # nothing finite to count
    histogram = values["batch_mean/block/bn"].histo
    mean = RECORDS["block/bn"].batch.mean
    counts = [
        np.sum((mean > low) & (mean <= high))
        for low, high in zip(
            [-np.inf, *histogram.bucket_limit], histogram.bucket_limit, strict=False
        )
    ]
    # NumPy's bins hold their lower edge, TensorBoard's their upper one: one channel may move.
    assert sum(histogram.bucket) == histogram.num == 64
    assert np.abs(np.cumsum(histogram.bucket) - np.cumsum(counts)).max() <= 1
    assert (histogram.min, histogram.max) == (mean.min(), mean.max())
    names = {"batch_mean", "batch_var", "running_mean", "running_var"}
    names |= {"scale", "bias", "dscale", "dbias"}
    assert set(values) == {f"{n}/{p or '.'}" for n in names for p in RECORDS} - {"batch_mean/nan"}


def test_tensorboard_has_the_histogram_of_the_input(tmp_path):
    with writers.open(["tensorboard"], tmp_path) as log:
        log.write(0, {"bn": record_of(3)._replace(quantiles=np.arange(64, dtype=np.float32))})
    values = {v.tag: v for event in events(tmp_path) for v in event.summary.value}
    assert values["x/bn"].histo.num == 64
    assert (values["x/bn"].histo.min, values["x/bn"].histo.max) == (0, 63)


def test_two_event_files_of_one_second_are_two(tmp_path):
    for _ in range(2):
        writers.TensorBoard(tmp_path).close()
    assert len(list(tmp_path.iterdir())) == 2


def test_json_lines_are_whole_lines_of_standard_json(tmp_path):
    path = tmp_path / "new" / "watch.jsonl"
    with writers.open(["jsonl"], path.parent) as log:
        for step in (0, 50):
            log.write(step, RECORDS)

    def refuse(constant):
        raise AssertionError(constant)

    lines = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 50]
    expected = {
        layer: {k: v if np.isfinite(v) else None for k, v in figures.items()}
        for layer, figures in FIGURES.items()
    }
    assert lines[1]["layers"] == expected

    # A kill has left half a line; training resumes at step 50, and repeats it.
    path.write_text(path.read_text() + '{"step": 100, "lay')
    with writers.open(["jsonl"], path.parent) as log:
        log.rewind(50)
        log.write(50, {"": RECORDS[""]})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], len(line["layers"])) for line in lines] == [(0, 3), (50, 1)]
    assert [p.name for p in path.parent.iterdir()] == ["watch.jsonl"]


SAMPLE = re.compile(r'^(\w+)(?:\{layer="([^"]*)"\})? (\S+)$', re.MULTILINE)


def scrape(url):
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.read().decode()


def test_prometheus_serves_the_latest_figures_on_loopback(tmp_path):
    from prometheus_client import REGISTRY

    port = free_port()
    with writers.open(["prometheus"], tmp_path / "unused", port=port) as log:
        (writer,) = log.writers
        assert writer.url == f"http://127.0.0.1:{port}/metrics"
        assert writer._server.server_address == ("127.0.0.1", port)
        assert scrape(writer.url) == ""  # nothing yet
        for step in (0, 50):
            log.write(step, RECORDS)
        text = scrape(writer.url)
        assert log.rewind(0) is None
        assert scrape(writer.url) == ""
    samples = {(name, layer): float(v) for name, layer, v in SAMPLE.findall(text)}
    expected = {("jaxbn_step", ""): 50.0}
    for layer, figures in FIGURES.items():
        expected |= {(f"jaxbn_layer_{k}", layer or "."): v for k, v in figures.items()}
    assert samples == pytest.approx(expected, nan_ok=True)
    helps = re.findall(r"^# HELP jaxbn_layer_(\w+) (.*)$", text, re.MULTILINE)
    assert helps == [(name, metric.help) for name, metric in watch.METRICS.items()]
    assert not [m.name for m in REGISTRY.collect() if m.name.startswith("jaxbn")]
    assert not (tmp_path / "unused").exists()
    socket.create_server(("127.0.0.1", port)).close()  # closed with the log
    by_default = writers.Prometheus(port=0)
    assert by_default._server.server_address[0] == "127.0.0.1"
    by_default.close()


def test_names_that_no_encoding_has_are_shown_as_escapes(tmp_path):
    """And two layers that are shown alike are two."""
    with writers.open(["prometheus", "tensorboard"], tmp_path, port=0) as log:
        log.write(0, {name: record_of(3) for name in ("\ud800\x1b", "\\ud800\\x1b", "")})
        text = scrape(log.writers[0].url)
    escaped = "\\ud800\\x1b"
    in_prometheus = escaped.replace("\\", "\\\\")  # the format escapes a backslash once more
    layers = re.findall(r'^jaxbn_layer_batch_count\{layer="(.*)"\}', text, re.MULTILINE)
    assert set(layers) == {in_prometheus, f"{in_prometheus} (2)", "."}
    tags = {value.tag for event in events(tmp_path) for value in event.summary.value}
    assert {f"batch_count/{name}" for name in (escaped, f"{escaped} (2)", ".")} <= tags


def test_a_scrape_that_never_ends_is_ended(monkeypatch):
    """Neither one that sends nothing nor one that stops within its first line holds a thread."""
    monkeypatch.setattr(_prometheus, "PATIENCE", 0.0)
    writer = writers.Prometheus(port=0)
    for begin in (b"", b"GET /metr"):
        with socket.create_connection(writer._server.server_address, timeout=30) as half:
            half.sendall(begin)
            assert half.recv(1) == b""
    writer.close()


def test_prometheus_serves_at_an_address_of_ipv6():
    with pytest.raises(OSError) as error:
        writers.Prometheus(0, "2001:db8::1")  # for documentation: nobody's
    assert str(error.value).startswith("Prometheus: cannot listen at [2001:db8::1]:0 (")
    writer = writers.Prometheus(0, "::ffff:127.0.0.1")
    assert re.fullmatch(r"http://\[::ffff:127\.0\.0\.1\]:\d+/metrics", writer.url)
    writer.write(0, {"bn": {"scale_abs_min": 0.5}}, {})
    assert 'jaxbn_layer_scale_abs_min{layer="bn"} 0.5\n' in scrape(writer.url)
    writer.close()


def test_a_verdict_on_served_data_is_written(tmp_path):
    state = {"bn": jaxbn.State(jnp.zeros(4), jnp.ones(4), None)}
    x = 0.5 + rng.normal(size=(256, 4)).astype(np.float32)
    rows = jax.vmap(jaxbn.moments, out_axes=-1)(jnp.asarray(x))
    drift = health.drift(state, [{"bn": rows}])
    assert drift.alarm
    with writers.open(["jsonl", "prometheus", "tensorboard"], tmp_path, port=0) as log:
        log.write(3, drift)
        text = scrape(log.writers[0].url)
    (layer,) = drift.layers
    expected = {f"drift_{name}": float(v) for name, v in layer._asdict().items() if name != "layer"}
    (line,) = (tmp_path / "watch.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 3, "layers": {"bn": expected}}
    samples = {(name, of): float(v) for name, of, v in SAMPLE.findall(text)}
    shown = {(f"jaxbn_layer_{k}", "bn"): v for k, v in expected.items()}
    assert samples == {("jaxbn_step", ""): 3.0, **shown}
    tags = {value.tag for event in events(tmp_path) for value in event.summary.value}
    assert tags == {f"{name}/bn" for name in expected}


def test_records_and_a_verdict_of_one_step_are_one_line_and_one_scrape(tmp_path):
    layers = [health.LayerDrift(name, True, *range(6)) for name in ("block/bn", "served alone")]
    drift = health.Drift(True, tuple(layers), (), {})
    with writers.open(["jsonl", "prometheus", "tensorboard"], tmp_path, port=0) as log:
        log.write(3, RECORDS, drift)
        text = scrape(log.writers[0].url)
    verdict = {
        f"drift_{name}": float(v) for name, v in layers[0]._asdict().items() if name != "layer"
    }
    expected = {**FIGURES, "block/bn": FIGURES["block/bn"] | verdict, "served alone": verdict}
    (line,) = (tmp_path / "watch.jsonl").read_text().splitlines()
    assert {name: of.keys() for name, of in json.loads(line)["layers"].items()} == {
        name: of.keys() for name, of in expected.items()
    }
    shown = {(name, of) for name, of, _ in SAMPLE.findall(text)} - {("jaxbn_step", "")}
    assert shown == {
        (f"jaxbn_layer_{figure}", name or ".") for name, of in expected.items() for figure in of
    }
    tags = {value.tag for event in events(tmp_path) for value in event.summary.value}
    assert {"drift_alarm/block/bn", "batch_count/block/bn"} <= tags
    wrong = message(TypeError, writers.Log([]).write, 3, RECORDS, {"bn": 0.5})
    assert wrong.startswith("Log.write: called with dict, expected path → watch.Record, or a ")


def test_the_dashboard_reads_what_is_exported_all_of_it():
    dashboard = json.loads((ROOT / "examples" / "watch" / "grafana.json").read_text())
    layer = health.LayerDrift("bn", True, *range(6))
    exported = set()
    with writers.open(["prometheus"], ".", port=0) as log:
        for figures in ({"bn": record_of(3)}, health.Drift(True, (layer,), (), {})):
            log.write(0, figures)
            exported |= {name for name, _, _ in SAMPLE.findall(scrape(log.writers[0].url))}
    read = set()
    for panel in dashboard["panels"]:
        assert panel["targets"]
        for target in panel["targets"]:
            names = set(re.findall(r"[a-zA-Z_:][\w:]*(?=\{)|^[\w:]+$", target["expr"]))
            assert names, target["expr"]
            assert names <= exported, target["expr"]
            read |= names
    for variable in dashboard["templating"]["list"]:
        query = str(variable.get("query"))
        several = re.search(r'__name__=~"(\w+)\((.*)\)"', query)  # a beginning, and some ends
        names = {several[1] + end for end in several[2].split("|")} if several else set()
        names |= set(re.findall(r"jaxbn_\w+\b(?!\()", query))
        assert names <= exported
    assert read == exported
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))


def test_the_example_shows_running_statistics_that_catch_up_with_the_batch(tmp_path, capsys):
    example = runpy.run_path(str(ROOT / "examples" / "watch" / "watched.py"))
    example["main"](tmp_path, steps=60, port=0)
    url, events_at, lines_at, first, second = capsys.readouterr().out.splitlines()
    assert url.startswith("http://127.0.0.1:")
    assert len(events(tmp_path)) == 3  # the file's version, and two records
    assert pathlib.Path(events_at).parent == pathlib.Path(lines_at).parent == tmp_path
    lines = [json.loads(line) for line in (tmp_path / "watch.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 50]
    kl = [[v["symmetric_kl_max"] for v in line["layers"].values()] for line in lines]
    for shown, line, figures in zip((first, second), lines, kl, strict=True):
        assert shown.startswith(f"step {line['step']}  loss ")
        assert shown.endswith(" nats".join([", ".join(f"{v:.3g}" for v in figures), ""]))
    # 0.9**51 of the initial mean 0 and var 1 is left at step 50.
    assert min(kl[0]) > 1 > 0.1 > max(kl[1])


def test_the_benchmark_spreads_a_record_over_the_steps_from_one_to_the_next(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "examples" / "cifar10")
    from benchmarks.studies import watching

    model = importlib.import_module("model")
    monkeypatch.setitem(model.RESNETS, "resnet18", {"blocks": (1,), "bottleneck": False})
    for api in ("linen", "nnx"):
        times = watching.measure(api, "tiny", str(tmp_path / api))
        assert {name: len(v) for name, v in times.items()} == dict.fromkeys(times, 2)
        assert set(times) == {"plain", "watched", "written"}
        assert (tmp_path / api / "watch.jsonl").exists()
    taken = {"plain": 1.0, "watched": 1.5, "written": 0.25}
    taken = {name: np.full(3, value) for name, value in taken.items()}
    monkeypatch.setattr(watching, "measure", lambda *_, **options: taken)
    (table,) = watching.run("tiny")
    names = [api + options for api in ("linen", "nnx") for options in watching.OPTIONS]
    assert table.rows == [[name, 1000, 1.5, 250, 1.5, "1.50 to 1.50"] for name in names]


# --- failure ----------------------------------------------------------------------------------


class Broken(writers.Writer):
    closed = 0

    def write(self, step, figures, arrays):
        if step == 50:
            raise ConnectionError("the other side is gone")

    def close(self):
        self.closed += 1
        raise RuntimeError("twice")


def test_a_writer_that_fails_is_dropped_aloud_and_the_others_go_on(tmp_path):
    path = tmp_path / "watch.jsonl"
    broken = Broken()
    with writers.Log([broken, writers.JSONLines(path)]) as log:
        log.write(0, RECORDS)
        with pytest.warns(RuntimeWarning) as warned:
            log.write(50, RECORDS)
        log.write(100, RECORDS)
    assert [str(w.message) for w in warned] == [
        "watching: a writer failed at step 50 and is closed; training and the other writers go on. "
        "Broken: ConnectionError: the other side is gone"
    ]
    assert warned[0].filename == __file__
    assert broken.closed == 1
    assert [json.loads(x)["step"] for x in path.read_text().splitlines()] == [0, 50, 100]


@pytest.mark.parametrize("name", ["jsonl", "tensorboard"])
def test_what_a_full_disk_cuts_off_is_taken_back(name, tmp_path):
    log = writers.open([name], tmp_path)
    log.write(0, RECORDS)
    (path,) = tmp_path.iterdir()
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, hard))
    try:
        with pytest.warns(RuntimeWarning, match="failed at step 50 .* File too large$"):
            log.write(50, RECORDS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    log.write(100, RECORDS)  # nobody is left to write; training goes on
    log.close()
    assert path.read_bytes() == before


def test_only_the_first_process_writes_and_all_agree_when(monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    log = writers.open(list(writers.NAMES), tmp_path / "none", every=3, port=0)
    assert log.writers == writers.Log([Broken()]).writers == []
    assert [step for step in range(9) if log.due(step)] == [0, 3, 6]
    log.write(0, RECORDS)
    assert not (tmp_path / "none").exists()
    assert not any(writers.Log([], every=0).due(step) for step in range(3))
    assert writers.Log([], every=np.int64(3)).due(6)


# --- bad input --------------------------------------------------------------------------------


def test_unknown_writers_are_refused(tmp_path):
    expected = ", expected a list of some of jsonl, prometheus, tensorboard; write "
    expected += "writers.open(['jsonl'], folder)."
    folder = tmp_path / "none"
    got = message(ValueError, writers.open, ["jsonl", "wandb", "csv"], folder)
    assert got == "writers.open: ['csv', 'wandb']" + expected
    assert message(ValueError, writers.open, "jsonl", folder) == "writers.open: 'jsonl'" + expected
    assert not folder.exists()
    assert message(ValueError, writers.open, [], folder, every=-1) == (
        "Log: every=-1, expected a number of steps, or 0 for never; write every=50."
    )


def test_a_port_that_is_taken_and_one_that_is_none_are_refused(tmp_path):
    def expected(where, why):
        return (
            f"Prometheus: cannot listen at {where} ({why}), expected an address of this machine "
            f"and a port that is free; write port=0 for any free one."
        )

    folder = tmp_path / "none"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        got = message(OSError, writers.open, writers.NAMES, folder, port=port)
    assert got == expected(f"127.0.0.1:{port}", "Address already in use")
    assert not folder.exists()
    got = message(OSError, writers.Prometheus, 0, "203.0.113.1")  # for documentation: nobody's
    assert got == expected("203.0.113.1:0", "Cannot assign requested address")
    assert "cannot listen at 127.0.0.1:65536 (" in message(OSError, writers.Prometheus, 65536)


@pytest.mark.parametrize("name", ["jsonl", "tensorboard"])
def test_a_folder_that_cannot_be_written_is_refused(name, tmp_path):
    (tmp_path / "file").write_text("in the way")
    folder, port = tmp_path / "file", free_port()
    got = message(OSError, writers.open, [name, "prometheus"], folder, port=port)
    kind = {"jsonl": "JSONLines", "tensorboard": "TensorBoard"}[name]
    got = re.sub(r"events\.out\.tfevents\.\d+\.\d+", "EVENTS", got)
    path = folder / {"jsonl": "watch.jsonl", "tensorboard": "EVENTS"}[name]
    assert got == (
        f"{kind}: cannot write {path} (File exists), expected a folder that this process may "
        f"write in."
    )
    socket.create_server(("127.0.0.1", port)).close()  # Prometheus does not stay behind


def test_without_tensorboardx_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboardX.proto.event_pb2", None)
    assert message(ModuleNotFoundError, writers.open, ["tensorboard"], tmp_path / "none") == (
        "TensorBoard: needs the package tensorboardX, which is not installed; write "
        "pip install 'jaxbn[watch]'."
    )
    assert not (tmp_path / "none").exists()


A_NAME = 'is an int, expected the name of a file or of a folder; write "NAME".'
NO_WRITERS = "expected a list of writers; write writers.Log([writers.JSONLines(path)])."
EVERY = "expected a number of steps, or 0 for never; write every=50."
WRONG = {
    "one_writer": (
        lambda: writers.Log(writers.Writer()),
        f"Log: writers is a Writer, {NO_WRITERS}",
    ),
    "a_class": (
        lambda: writers.Log([writers.JSONLines]),
        f"Log: writers is a list of a type, {NO_WRITERS}",
    ),
    "every": (lambda: writers.Log([], every="5"), f"Log: every='5', {EVERY}"),
    "half": (lambda: writers.Log([], every=1.5), f"Log: every=1.5, {EVERY}"),
    "due": (
        lambda: writers.Log([]).due(None),
        "Log.due: step is a NoneType, expected a whole number; write int(step).",
    ),
    "swapped": (
        lambda: writers.Log([]).write(RECORDS, 0),
        "Log.write: step is a dict, expected a whole number; write int(step).",
    ),
    "names": (
        lambda: writers.open(3, "folder"),
        "writers.open: 3, expected a list of some of jsonl, prometheus, tensorboard; write "
        "writers.open(['jsonl'], folder).",
    ),
    "folder": (lambda: writers.open(["jsonl"], 3), f"writers.open: folder {A_NAME}"),
    "path": (lambda: writers.JSONLines(3), f"JSONLines: path {A_NAME}"),
    "events": (lambda: writers.TensorBoard(3), f"TensorBoard: path {A_NAME}"),
    "address": (
        lambda: writers.Prometheus(0, 3),
        "Prometheus: cannot listen at 3:0 (TypeError: getaddrinfo() argument 1 must be string or "
        "None), expected an address of this machine and a port that is free; write port=0 for any "
        "free one.",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_bad_calls_are_told_what_to_write(what):
    call, expected = WRONG[what]
    with pytest.raises((TypeError, ValueError, OSError)) as error:
        call()
    assert str(error.value) == expected


@pytest.mark.parametrize("content", ['{"lr": 0.1}', "a line\n", '{"step"'])
def test_a_file_of_something_else_is_left_as_it_is(content, tmp_path):
    """What has no line end at its end would be taken for half a line, and cut off."""
    path = tmp_path / "config.json"
    path.write_text(content)
    if content == '{"step"':  # half of the first line: a program was killed while writing
        writers.JSONLines(path)
        assert path.read_text() == ""
        return
    assert message(FileExistsError, writers.JSONLines, path) == (
        f"JSONLines: {path} holds something else than figures, expected a new file, or a file that "
        f"JSONLines has written; name another file."
    )
    assert path.read_text() == content


def test_lines_for_a_device_are_written_and_the_device_stays(tmp_path):
    (tmp_path / "watch.jsonl").symlink_to("/dev/null")
    with writers.open(["jsonl"], tmp_path) as log:
        log.write(2, RECORDS)
        log.rewind(0)
    assert (tmp_path / "watch.jsonl").is_symlink()


@pytest.mark.parametrize("step", [np.int64(3), jnp.int32(3)], ids=["numpy", "jax"])
def test_a_step_may_be_a_number_of_numpy_or_jax(step, tmp_path):
    with writers.open(["jsonl"], tmp_path) as log:
        log.write(2, RECORDS)
        log.write(step, RECORDS)
        log.rewind(step)
    assert len((tmp_path / "watch.jsonl").read_text().splitlines()) == 1
    assert message(TypeError, log.write, 0.5, RECORDS) == (
        "Log.write: step is 0.5, expected a whole number; write int(step)."
    )


def test_what_is_no_record_is_refused():
    assert message(ValueError, writers.Log([]).write, 0, {}) == (
        "Log.write: no records, expected the records of a watched step; write "
        "watch.linen(model.apply, on=True), or watch.nnx(model, on=True), in that step."
    )
    for wrong, what in (({"bn": 0.5}, "dict"), ([], "list"), (health.Gap, "type")):
        assert message(TypeError, writers.Log([]).write, 0, wrong) == (
            f"Log.write: called with {what}, expected path → watch.Record, or a health.Drift; "
            f"write log.write(step, watch.records(seen, variables, grads))."
        )
