"""Each benchmark runs, returns the rows it promises, and the rows show what is claimed."""

import argparse
import functools
import importlib
import importlib.machinery
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import __main__, timing
from benchmarks.measures import (
    accuracy,
    collectives,
    imports,
    latency,
    memory,
    op,
    options,
    parity,
    step,
)
from benchmarks.reporting import command, plots, report, results, tables, views
from benchmarks.reporting.report import Chart, Table
from benchmarks.studies import cost_model
from benchmarks.subjects import network, peers, shapes
from benchmarks.timing import Times
from tests.support import hlo
from tests.support.compiling import as_pasted
from tests.support.full import NO_SPACE, no_space, stdout_to

ENVIRONMENT = {
    "device": "cpu Some Chip",
    "host": "Some Chip, 2 cores",
    "load": "0.1, average of the minute before",
    "versions": "python 3.11.7, jax 0.10.2, torch not installed",
    "command": "python -m benchmarks op",
    "date": "2026-01-02",
}


def column(table, name):
    """{first cell: the cell in that column}."""
    index = list(table.columns).index(name)
    return {row[0]: row[index] for row in table.rows}


def test_accuracy_has_every_case_and_ours_are_right():
    (table,) = accuracy.run(("jaxbn", "Flax linen"))
    ours, true = column(table, "jaxbn"), column(table, "true")
    assert list(ours) == list(accuracy.CASES)
    for case, value in true.items():
        if isinstance(value, str):
            assert ours[case] == value
        else:  # 1e-4 is the contract for var at 1e3, 2 % that for the sd of a bfloat16 y
            assert ours[case] == pytest.approx(value, rel=0.02, abs=1e-4)
    assert column(table, "Flax linen")["mask all False: running statistics after"] == "NaN"


def test_a_library_that_lacks_an_option_or_is_not_there_says_so_in_its_cell():
    def lacking(*arguments, **options):
        raise NotImplementedError("no mask")

    assert accuracy.measure(accuracy.uneven_shards, lacking) == "no mask"
    assert accuracy.measure(accuracy.uneven_shards, None) == "not installed"


@pytest.mark.optimized
def test_a_training_step_with_ours_is_smaller_than_with_flax():
    """On a CPU; and no larger with activation and residual inside: kept, temporaries."""
    table = memory.step(memory.SMALL._replace(stages=(1,)))
    assert len(table.rows) == 6
    for name, *ratios in table.rows:
        assert all(0.3 < r <= (0.85 if "jaxbn" in name else 1) for r in (ratios[1], ratios[3]))
    for ours, _, fused in (table.rows[:3], table.rows[3:]):
        assert all(fused[i] <= 1.001 * ours[i] for i in (1, 3)), (ours, fused)


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_ours_keeps_x_for_backward_and_moves_less_than_flax(dtype):
    shape = (256, 64)
    ours = memory.of_op(peers.ours, shape, dtype)
    with jax.numpy_dtype_promotion("standard"):
        flax = memory.of_op(peers.linen, shape, dtype)
    small = 16 * 64 * 4 / (256 * 64 * jnp.dtype(dtype).itemsize)  # vectors of one number a channel
    assert 1 <= ours[0] <= 1 + small
    assert flax[0] >= (2 if dtype == jnp.float32 else 4)
    assert ours[3] < flax[3]


@pytest.mark.optimized
def test_ours_keeps_x_in_eval_mode_and_flax_a_wide_copy():
    rows = {tuple(row[::2][:2]): row[3:] for row in memory.eval_mode().rows}
    for dtype, wide in (("float32", 1), ("bfloat16", 2)):
        for library, trained in (("jaxbn", 1), ("Flax linen", wide)):
            # And vectors of one number a channel.
            assert rows[dtype, library] == pytest.approx([trained, 0], abs=1e-3)


def test_parity_holds_on_the_roads_and_cases_asked_for():
    roads, cases = ("shard_map, data x model", "vmap", "jit, ghost batches"), ("an empty shard",)
    by_case, by_quantity = parity.run(roads, cases)
    assert [row[0] for row in by_case.rows] == list(roads)
    # Sums over the 512 cells of a channel, in another order.
    tolerance = 2.0**-23 * math.sqrt(512)
    assert max(row[1] for row in by_case.rows) < tolerance
    assert [max(row[1:]) for row in by_quantity.rows] == [row[1] for row in by_case.rows]


def test_options_equal_the_formula_on_the_roads_asked_for():
    names = ("ghost batches larger than a device's", "groups of devices, weights")
    with as_pasted():
        by_road, by_caller = options.run(names=names, chosen=("jit, sharded", "shard_map"))
    refused = [[name, *(cell == "refused" for cell in row)] for name, *row in by_road.rows]
    assert refused == [[names[0], False, True], [names[1], True, False]]
    assert by_road.notes[1:] == [
        f"{names[0]}, shard_map: batch_norm: virtual_batch_size=8 does not divide the 4 rows on "
        f"axis 0 of x with shape (4, 4, 4, 3); write one of [1, 2, 4].",
        f"{names[1]}, jit, sharded: batch_norm: axis_index_groups=[[0, 1, 2, 3], [4, 5, 6, 7]] "
        f"without axis_name; groups are indices along a mapped axis, write axis_name= too, or "
        f"virtual_batch_size= for groups of rows under jit.",
    ]
    # Sums over the 512 cells of a channel; weights differ by 20, and so do the terms.
    tolerance = 2.0**-23 * math.sqrt(512) * 20
    errors = [cell for _, *row in (*by_road.rows, *by_caller.rows) for cell in row]
    assert max(error for error in errors if error != "refused") < tolerance
    assert by_caller.columns == ["option", "functional", "linen", "nnx"]


def test_the_formula_tells_every_option_from_none():
    """So a norm that ignores an option shows in the table."""

    def value(option):
        *given, _ = options.arguments(option)
        with as_pasted():
            (y, of_eval), new = options.formula(option)(*given)
        return [y, of_eval, *(new if option.groups is None else ())]

    none = options.Option()
    for name, option in options.OPTIONS.items():
        pairs = zip(value(option), value(none), strict=False)
        differs = max(options.error(a, np.asarray(b)) for a, b in pairs) > 1e-5
        assert differs == (name != "none"), name


def test_the_command_parity_takes_options(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(__main__, "measure", lambda name, size, *_: asked.append((name, size)))
    assert __main__.main(["parity", "--options", "--tiny", "--results", str(tmp_path)]) == 1
    assert asked == [("options", "tiny")]
    with pytest.raises(SystemExit):
        __main__.main(["step", "--options"])
    message = "--options: expected it after parity, write parity --options"
    assert capsys.readouterr().err.endswith(f"error: {message}\n")


def test_collectives_are_counted_with_their_bytes():
    (table,) = collectives.run(("shard_map", "jit, Auto"))
    # Forward: count, mean and var of 64 channels from each of 8 devices. Backward: two sums.
    assert table.rows[0][1] == f"1 / {8 * (2 * 64 + 1) * 4:,} B"
    assert table.rows[0][4].startswith("2 / ")
    assert table.rows[1][4].startswith("3 / ")
    assert table.rows[0][7] == table.rows[1][7] == "0"


# The op, and how time is taken.


def measured_op():
    """Two shapes in both directions, times made up; torch failed on one of them."""

    def of(ours, flax, torch):
        return {
            "copy": Times(1.0, 0.1, 5),
            "jaxbn": Times(ours, 0.6, 5),
            "Flax linen": Times(flax, 0.1, 5),
            "torch": torch,
        }

    small, large = of(6.0, 9.0, "RuntimeError"), of(8.0, 4.0, Times(8.0, 0.1, 5))
    return {
        "2x3 MLP": dict.fromkeys(op.FLOOR, small),
        "4x5x5x3 ResNet": dict.fromkeys(op.FLOOR, large),
    }


LIBRARIES = ("jaxbn", "Flax linen", "Haiku", "torch")


def op_tables():
    measured = {"float32": measured_op(), "bfloat16": measured_op()}
    by_shape = [op.by_shape(of, dtype, LIBRARIES, ["A note."]) for dtype, of in measured.items()]
    return [*by_shape, op.over_shapes(measured, LIBRARIES)]


def test_op_reports_ratios_to_ours_and_to_the_floor():
    table, _, summary = op_tables()
    assert table.rows[0][1:6] == ["jaxbn", 6.0, 0.6 / 6, 1.0, 1.5 / 6]
    assert table.rows[1][1:6] == ["Flax linen", 9.0, 0.1 / 9, 1.5, 1.5 / 9]
    assert table.rows[1][6:] == [9.0, 0.1 / 9, 1.5, 4 / 9]
    assert table.rows[2][1:4] == ["Haiku", "not installed", ""]
    assert table.rows[3][1:4] == ["torch", "RuntimeError", ""]
    flax, haiku, torch, floor = summary.rows[:4]
    assert flax[2:] == [
        "Flax linen",
        pytest.approx(math.sqrt(6 / 9 * 2)),
        *(2.0, "4x5x5x3 ResNet", 6 / 9, "2x3 MLP"),
    ]
    assert haiku[2:4] == ["Haiku", "not installed"]
    assert torch[3:] == [1.0, 1.0, "4x5x5x3 ResNet", 1.0, "4x5x5x3 ResNet"]
    assert floor[2:5] == ["the floor", pytest.approx(math.sqrt(4 * 8 / 1.5)), 8 / 1.5]


def test_op_times_every_library_in_both_directions():
    libraries = {"jaxbn": peers.ours, "Flax linen": peers.linen, "Haiku": None}
    measured = op.measure((8, 4, 4, 16), "float32", 1, libraries)
    for direction in op.FLOOR:
        assert set(measured[direction]) == {"copy", "jaxbn", "Flax linen"}
        assert all(times.median > 0 and times.rounds == 1 for times in measured[direction].values())


def test_turns_are_rotated_after_an_untimed_call_and_what_fails_is_named():
    order = []

    def failing():
        raise MemoryError

    functions = {name: timing.Timed(functools.partial(order.append, name)) for name in "abc"}
    measured = timing.measure(functions | {"d": timing.Timed(failing)}, rounds=3)
    assert "".join(order) == "aabbcc" + "aabbcc" + "bbccaa" + "ccaabb"
    assert list(measured) == ["a", "b", "c", "d"]
    assert measured["d"] == "MemoryError"
    assert measured["a"].rounds == 3
    with pytest.raises(MemoryError):
        timing.measure({"jaxbn": timing.Timed(failing)}, rounds=3)


def test_a_loop_of_calls_computes_each_of_them():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(32, 8)), jnp.float32)

    def f(x):
        return jnp.cos(x), x.sum(0)

    lowered = jax.jit(timing.repeated(f, 7)).lower(x)
    for a, b in zip(lowered.compile()(x), jax.jit(f)(x), strict=True):
        np.testing.assert_array_equal(a, b)
    # A barrier over x and both results, and all arithmetic on the x that comes out of it.
    text = lowered.as_text()
    shapes = "tensor<32x8xf32>, tensor<32x8xf32>, tensor<8xf32>"
    (barrier,) = re.findall(rf"(%\d+):3 = stablehlo.optimization_barrier .* : {shapes}\n", text)
    assert re.findall(r"stablehlo.cosine (\S+)", text) == [f"{barrier}#0"]
    assert re.findall(r"stablehlo.reduce\((\S+)", text) == [f"{barrier}#0"]


def test_enough_calls_last_longer_than_a_dispatch():
    assert timing.enough(1) == 500
    assert timing.enough(1 << 40) == 10
    assert timing.enough(1 << 26) == math.ceil(0.01 * 4e12 / 2**29)


def test_shapes_of_each_size():
    def names(size, accelerated=False, free=10**15):
        fit, left_out = shapes.of_size(size, accelerated, free)
        return {shape.shape for shape in fit}, {shape.shape for shape in left_out}

    tiny, usual, full = (names(size)[0] for size in ("tiny", "usual", "full"))
    assert tiny < usual < names("usual", accelerated=True)[0] < full
    assert {(8192, 1024), (100_000, 32), (4096, 300)} < usual
    channels = {channels for _, channels in (*shapes.LAST, *shapes.REST)}
    assert channels == set(cost_model.RESNET50)
    fit, left_out = names("full", free=2 * shapes.ARRAYS * 4 * 8192 * 1024)
    assert fit | left_out == full
    assert max(map(math.prod, fit)) == 8192 * 1024 < min(map(math.prod, left_out))


# Networks.


@pytest.mark.parametrize("batch_norm", [peers.ours, peers.flax_nnx])
def test_a_network_trains_by_any_librarys_norm(batch_norm):
    task = network.Task("ResNet", (1,), True, 4, 4, 8)
    model = task.model(batch_norm, jnp.float32)
    arguments = task.arrays(model)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        run = jax.jit(functools.partial(network.step, model))
        params, batch_stats, first = run(*arguments)
        _, _, second = run(params, batch_stats, *arguments[2:])
        logits = network.infer(model, params, batch_stats, arguments[2])
    assert second < first
    assert logits.shape == (4, 10)
    assert all((v != 0).any() for v in jax.tree.leaves(batch_stats))


def test_a_network_without_norms_has_no_statistics():
    task = network.Task("ResNet", (1,), False, 4, 4, 8)
    _, batch_stats, *_ = task.arrays(task.model(None, jnp.float32))
    assert batch_stats == {}


@pytest.mark.parametrize("of", [step.tasks, latency.tasks])
def test_cpu_gets_smaller_tasks_than_an_accelerator(of):
    assert {t.width for t in of("usual", False)} == {16}
    assert {t.width for t in of("full", False)} == {t.width for t in of("usual", True)} == {64}
    assert {t.stages for t in of("usual", False)} == {step.R18, step.R50}


def test_step_and_eval_have_a_row_for_every_norm(monkeypatch):
    installed = {"jaxbn": peers.ours, "Keras": None, "torch": None}
    monkeypatch.setattr(peers, "installed", lambda: installed)
    monkeypatch.setattr(step, "DTYPES", (jnp.float32,))
    (table,) = step.run("tiny")
    assert [row[1] for row in table.rows] == ["jaxbn", step.NONE, "Keras"]
    ours, none, absent = table.rows
    assert ours[4] == ours[7] == 1
    assert 0 < none[6] < ours[6]
    assert absent[2:] == ["not installed", *[""] * 5]
    (table,) = latency.run("tiny")
    assert [row[1] for row in table.rows] == ["jaxbn", step.NONE, "Keras"]


@pytest.mark.optimized
def test_eval_is_the_program_that_flax_compiles_to():
    """Instruction by instruction, but for names: a difference in latency is noise."""
    task = network.Task("ResNet", (1,), True, 4, 2, 8)

    def program(batch_norm):
        model = task.model(batch_norm, jnp.float32)
        infer = jax.jit(functools.partial(network.infer, model))
        text = hlo.text(infer.lower(*task.shapes(model)[:3]).compile())
        names: dict[str, str] = {}
        pattern = r"%[\w.\-]+|\b\w+\.\d+(?=:)"  # an instruction, a parameter of a computation
        return re.sub(pattern, lambda m: names.setdefault(m[0].lstrip("%"), f"n{len(names)}"), text)

    ours, flax = program(peers.ours), program(peers.linen)
    assert "rsqrt(" in ours
    assert ours == flax


def test_imports_are_timed_in_processes_of_their_own(monkeypatch):
    monkeypatch.setitem(imports.MODULES, "no_such_package", "jax")
    (table,) = imports.run("tiny", ("jaxbn", "no_such_package"))
    ours, absent = table.rows
    assert ours[:2] == ["jaxbn", "jax"]
    assert ours[2] > 0
    assert absent == ["no_such_package", "jax", "not installed", ""]


def test_peers_that_are_not_importable_are_none():
    assert set(peers.installed()) == {peer.name for peer in peers.PEERS}
    assert peers.installed()["Flax linen"] is peers.linen


# Tables, files and pages.


def test_report_prints_whole_cells_and_writes_unrounded_numbers(tmp_path, capsys):
    table = Table("Title", ["case", "value"], [["x" * 60, 1 / 3]], ["A note."])
    report.show(table)
    printed = capsys.readouterr().out
    for words in ("Title", "x" * 60, "0.333", "A note."):
        assert words in printed
    report.write(tmp_path / "tables.json", [table])
    written = json.loads((tmp_path / "tables.json").read_text())
    assert written["tables"][0]["rows"] == [["x" * 60, 1 / 3]]
    assert {"device", "versions", "command", "date"} <= set(written)
    assert os.listdir(tmp_path) == ["tables.json"]


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("benchmarks.__main__", "python -m benchmarks"),
        ("benchmarks.studies.networks", "python -m benchmarks.studies.networks"),
    ],
)
def test_the_command_names_the_module_that_runs(module, said, monkeypatch):
    spec = importlib.machinery.ModuleSpec(module, None)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    monkeypatch.setattr(sys, "argv", ["path/of/it.py", "--tiny"])
    assert report.environment()["command"] == f"{said} --tiny"


def test_ctrl_c_is_one_line(tmp_path):
    """The signal comes while a module reads a file; a shell's `&` would have it ignored."""
    os.mkfifo(path := tmp_path / "results.json")
    heard = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_module('benchmarks.reporting.plots', run_name='__main__')"
    )
    argv = [sys.executable, "-c", heard, str(path)]
    process = subprocess.Popen(argv, stdout=-1, stderr=-1, text=True)
    with process, open(path, "w"):  # which waits for the module to read
        process.send_signal(signal.SIGINT)
        said = process.communicate()
    assert (process.returncode, *said) == (130, "", "Stopped.\n")


def test_what_is_full_is_told(monkeypatch, tmp_path, capsys):
    """Stdout or the file, whichever it is; a file that was there stays."""
    (page := tmp_path / "page.md").write_text("before")

    def ended(main):
        with pytest.raises(SystemExit) as end:
            command.end(lambda _: main())
        return end.value.code, capsys.readouterr().err

    with stdout_to("/dev/full", False):
        said = f"the output cannot be written: {NO_SPACE}\n"
        assert ended(lambda: print("a line")) == (2, said)
    monkeypatch.setattr(pathlib.Path, "write_text", no_space)
    said = f"{page}: {NO_SPACE}\n"
    assert ended(lambda: report.replace(page, "new")) == (2, said)
    assert page.read_text() == "before"


FOLDER = pathlib.Path(timing.__file__).parent
RUN = [p for p in FOLDER.rglob("*.py") if '\nif __name__ == "__main__":' in p.read_text()]
MODULES = (".".join(p.relative_to(FOLDER.parent).with_suffix("").parts) for p in RUN)
PROGRAMS = {name.removesuffix(".__main__") for name in MODULES} - {"benchmarks.child"}


def test_every_module_that_runs_ends_so():
    ends = {p.name for p in RUN if p.read_text().split('"__main__":')[-1].count("command.end(")}
    assert {p.name for p in RUN} - ends == {"child.py"}  # whose parent says so


@pytest.mark.parametrize("program", [*sorted(PROGRAMS), "benchmarks gpu", "benchmarks tables"])
def test_help_fits_a_terminal_and_a_wrong_option_is_refused(program, monkeypatch, capsys):
    """Before any work, and so at once."""
    monkeypatch.setenv("COLUMNS", "80")
    module, *words = program.split()
    runs = importlib.import_module(f"{module}.__main__" if module == "benchmarks" else module)

    def said(option):
        with pytest.raises(SystemExit) as end:
            runs.main([*words, option])
        return end.value.code, *capsys.readouterr()

    status, out, err = said("--help")
    assert (status, err) == (0, "")
    assert [line for line in out.splitlines() if len(line) > 80] == []
    assert out.startswith(f"usage: python -m {program} ")
    status, out, err = said("--no-such-option")
    assert (status, out) == (2, "")
    assert "error: " in err


@pytest.mark.parametrize(
    ("read", "text", "line"),
    [
        (command.dtype, "int8", "'int8', expected float32, bfloat16 or float16"),
        (command.dtype, "double-ish", "'double-ish', expected float32, bfloat16 or float16"),
        (command.positive, "0", "'0', expected a number above 0"),
        (command.positive, "-3", "'-3', expected a number above 0"),
        (command.positive, "many", "'many', expected a number above 0"),
    ],
)
def test_a_wrong_value_of_an_option_is_told(read, text, line):
    with pytest.raises(argparse.ArgumentTypeError) as told:
        read(text)
    assert str(told.value) == line
    assert (command.dtype("bfloat16"), command.positive("8")) == (jnp.bfloat16, 8)


def test_cells_have_three_digits():
    shown = ["0", "0", "NaN", "3.33e-08", "1.23", "100", "1,234", "word"]
    values = (0, 0.0, math.nan, 1e-7 / 3, 1.2345, 99.96, 1234.5, "word")
    assert [report.cell(v) for v in values] == shown


def test_a_table_survives_its_file():
    for table in op_tables():
        again = report.from_json(json.loads(json.dumps(report.as_json(table))))
        assert again == table._replace(
            **{name: list(getattr(table, name)) for name in ("columns", "notes", "charts")}
        )


def record(*of, **environment):
    tables = [report.as_json(table) for table in of]
    return json.loads(json.dumps({"environment": ENVIRONMENT | environment, "tables": tables}))


def test_a_benchmark_replaces_its_own_part_of_the_days_file_alone(tmp_path):
    one, other = Table("One", ["a"], [[1.0]]), Table("Other", ["a"], [[2.0]])
    results.write(tmp_path, "op", record(one))
    results.write(tmp_path, "step", record(one))
    path = results.write(tmp_path, "op", record(other))
    written = json.loads(path.read_text())
    assert path.name == "cpu-some-chip_2026-01-02.json"
    assert written == {"op": record(other), "step": record(one)}
    later = results.write(tmp_path, "op", record(one, date="2026-01-10"))
    gpu = results.write(tmp_path, "op", record(one, device="NVIDIA H200", date="2027-01-01"))
    assert results.newest(tmp_path, "cpu") == later
    assert results.newest(tmp_path, "nvidia") == gpu
    with pytest.raises(FileNotFoundError) as error:
        results.newest(tmp_path, "tpu")
    assert str(error.value) == (
        f"tables: no results of 'tpu' in {tmp_path}, expected a file tpu*_<date>.json; "
        f"write them by `make bench` on such a device."
    )


def test_the_command_writes_what_came_and_names_what_failed(tmp_path, monkeypatch, capsys):
    asked = []

    def measure(name, size, command, load, path):
        asked.append((name, size, command))
        if name == "step":
            return False
        with open(path, "w") as file:
            json.dump(record(*op_tables()), file)
        return True

    monkeypatch.setattr(__main__, "measure", measure)
    arguments = ["step", "op", "--tiny", "--results", str(tmp_path)]
    assert __main__.main(arguments) == 1
    command = f"python -m benchmarks {' '.join(arguments)}"
    assert asked == [("step", "tiny", command), ("op", "tiny", command)]
    printed = capsys.readouterr()
    assert printed.err == "benchmark 'step' failed; what it said stands above\n"
    assert "Time of one batch norm in training, bfloat16" in printed.out
    names = ["cpu-some-chip_2026-01-02.json", "cpu-some-chip_2026-01-02_op.png"]
    assert sorted(os.listdir(tmp_path)) == names


@pytest.mark.parametrize(("size", "written"), [("--tiny", False), ("--full", True)])
def test_a_tiny_run_leaves_the_results_of_the_pages(size, written, tmp_path, monkeypatch, capsys):
    def measure(name, size, command, load, path):
        with open(path, "w") as file:
            json.dump(record(), file)
        return True

    monkeypatch.setattr(__main__, "measure", measure)
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    assert __main__.main(["accuracy", size]) == 0
    assert (tmp_path / "results").exists() == written
    assert ("\nwritten " in capsys.readouterr().out) == written


def test_a_picture_has_every_library_and_shape(tmp_path, monkeypatch):
    charts = [chart for table in op_tables() for chart in table.charts]
    assert [chart.title for chart in charts[:2]] == [
        "forward, float32",
        "forward + backward, float32",
    ]
    assert charts[0].points["jaxbn"] == {"2x3 MLP": 4.0, "4x5x5x3 ResNet": 8 / 1.5}
    assert list(charts[0].points["torch"]) == ["4x5x5x3 ResNet"]
    plots.draw([*charts, Chart("one", "ms", {"import": {"jaxbn": 3.0}})], tmp_path / "op.png")
    assert (tmp_path / "op.png").read_bytes().startswith(b"\x89PNG")
    assert os.listdir(tmp_path) == ["op.png"]


@pytest.fixture
def folder(tmp_path):
    """Results of everything that the views read, made up."""
    cases = [[case, 1e-7, 46.0] for case in views.CASES]
    accuracy = Table("", ["case", "jaxbn", "Flax linen"], cases, key="accuracy")
    kept = [[f"{d}, {n}", 1, 1, 1, 0.7] for d in op.DTYPES for n in ("jaxbn", "Flax linen")]
    kept = Table("", ["norm", "", "", "", "of Flax's"], kept, key="memory-step")
    steps = [["ResNet-50", n, 10.0, 0.1, 1, 1, 200.0, 1] for n in ("jaxbn", "Flax linen")]
    steps = Table("", ["network", "norm", "ms", "", "", "", "MB", ""], steps, key="step")
    times = Table(
        "", ["", "", "ms"], [["jaxbn", "", 30.0], ["flax.linen", "", 200.0]], key="imports"
    )
    folder = tmp_path / "results"
    results.write(folder, "op", record(*op_tables()))
    path = results.write(folder, "rest", record(accuracy, kept, steps, times))
    path.with_name(f"{path.stem}_op.png").write_bytes(b"")
    return folder


PAGE = """# A page

<!-- table: cpu/op-forward-float32 -->
old
<!-- end -->
between
<!-- notes: cpu/op-float32 -->
<!-- end -->
<!-- figure: cpu/op -->
<!-- end -->
after
"""
FILLED = """# A page

<!-- table: cpu/op-forward-float32 -->
| shape | ours, ms | spread | floor / ours | Flax linen / ours | Haiku / ours | torch / ours |
| --- | ---: | ---: | ---: | ---: | --- | ---: |
| 2x3 MLP | 6 | 0.1 | 0.25 | 1.5 | not installed | RuntimeError |
| 4x5x5x3 ResNet | 8 | 0.075 | 0.188 | 0.5 | not installed | 1 |

<sub>`python -m benchmarks op`, 2026-01-02, Some Chip, 2 cores, load before 0.1; python 3.11.7, \
jax 0.10.2, torch not installed.</sub>
<!-- end -->
between
<!-- notes: cpu/op-float32 -->
- A note.
- Floor: 3N bytes forward, 8N in all, at a copy's bandwidth: 0, 0 GB/s.
<!-- end -->
<!-- figure: cpu/op -->
![op, measured on cpu](../results/cpu-some-chip_2026-01-02_op.png)
<!-- end -->
after
"""


def test_a_page_is_filled_between_its_markers_and_again_the_same(folder, tmp_path):
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(PAGE)
    assert tables.main([str(page), "--results", str(folder)]) == 0
    assert page.read_text() == FILLED
    assert tables.fill(page, folder) == 3
    assert page.read_text() == FILLED


def test_the_first_table_stands_beside_flax(folder):
    found, environment = views.find(
        json.loads(results.newest(folder, "cpu").read_text()), "headline"
    )
    rows = {row[0]: row[1:] for row in found.rows}
    assert environment == ENVIRONMENT
    assert rows["relative error of var, float32 N(1e4, 1), 256 rows"] == ["1e-07", "46"]
    assert rows["temporary memory of a small ResNet's step, bfloat16"] == ["0.7 of Flax's", "1"]
    op_row = rows["time of the op, forward, float32 (best, worst shape)"]
    assert op_row == ["1.15 of Flax's (0.667 to 2)", "1"]
    assert rows["training step of ResNet-50: ms"] == ["10", "10"]
    assert rows["import, beyond that of jax: ms"] == ["30", "200"]


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (
            "<!-- table: cpu/op-float32 -->\n\n<!-- table: cpu/op-float32 -->\n<!-- end -->\n",
            "tables: page.md has <!-- table: cpu/op-float32 --> without its end; write a line "
            "<!-- end --> below it.",
        ),
        (
            "<!-- figure: cpu/step -->\n<!-- end -->\n",
            "tables: no cpu-some-chip_2026-01-02_step.png beside cpu-some-chip_2026-01-02.json, "
            "expected the picture that `python -m benchmarks step` draws.",
        ),
        (
            "<!-- table: cpu/ops -->\n<!-- end -->\n",
            "tables: no table 'ops' in these results, expected one of: op-float32, op-bfloat16, "
            "op-summary, accuracy, memory-step, step, imports, headline, compiled-by-shape, "
            "op-forward-float32, "
            "op-forward-bfloat16, op-both-float32, op-both-bfloat16; the benchmark that makes it "
            "may not have been run.",
        ),
    ],
)
def test_a_page_that_cannot_be_filled_stays_as_it_was(page, message, folder, tmp_path, capsys):
    path = tmp_path / "page.md"
    path.write_text(page)
    assert tables.main([str(path), "--results", str(folder)]) == 1
    assert capsys.readouterr().err == f"{message}\n"
    assert path.read_text() == page


def test_every_marker_of_our_pages_names_a_table_of_some_benchmark():
    known = {"accuracy", "parity", "parity-quantity", "collectives", "memory-op", "memory-step"}
    known |= {"op-float32", "op-bfloat16", "op-summary", "step", "latency", "imports", *views.VIEWS}
    known |= {"compiled-op", "compiled-step", "parity-options", "parity-options-callers"}
    for page in tables.PAGES:
        for kind, _, key in tables.OPEN.findall(page.read_text()):
            assert key in (__main__.DEVICES if kind == "figure" else known)
