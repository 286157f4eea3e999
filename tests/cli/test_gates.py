"""The commands that a pipeline runs, compare, verify and serving: status and words."""

import json
import pathlib
import re
import sys

import jax
import numpy as np
import pytest

from jaxbn import convert, export
from jaxbn._checkpoints import read, write
from jaxbn._cli import commands
from tests.support.conversion import assert_same

MODEL = "--model=net:network"


def run(capsys, *argv):
    """Status, stdout, stderr."""
    status = commands.main([str(word) for word in argv])
    return status, *capsys.readouterr()


@pytest.fixture
def variables(net):
    return read.read("net.msgpack")["model"]


def changed(variables, path, change):
    """The variables with one array changed; the others are shared."""
    *folders, last = path.split("/")
    new = node = dict(variables)
    for folder in folders:
        node[folder] = dict(node[folder])
        node = node[folder]
    node[last] = change(node[last])
    return new


# compare

CHANGES = {  # array → a change within the bounds, one beyond them, what is said of the second
    "batch_stats/bn/mean": (1e-3, 0.5, "statistics of bn: 2.5e-01, bound 1.0e-04"),
    "batch_stats/bn/var": (1e-3, 0.5, "statistics of bn: 8.3e-02, bound 1.0e-04"),
    "params/conv/kernel": (1e-6, 0.5, "weights of conv/kernel: "),
    "params/bn/scale": (1e-5, 0.5, "weights of bn/scale: 3.3e-01, bound 1.0e-04"),
}


@pytest.mark.parametrize("path", CHANGES)
def test_compare_says_which_layer_differs_and_by_how_much(path, variables, capsys):
    within, beyond, said = CHANGES[path]
    for by, status in ((0.0, 0), (within, 0), (beyond, 1)):
        # One channel alone, so that an average over channels would hide the change.
        new = changed(variables, path, lambda v, by=by: v + by * np.eye(v.shape[-1])[0].astype("f"))
        write.save("new.msgpack", new)
        got, out, err = run(capsys, "compare", "new.msgpack", "net.msgpack", "--json")
        told = json.loads(out)
        assert (got, err, told["passed"], len(told["findings"])) == (status, "", not status, status)
    out = run(capsys, "compare", "new.msgpack", "net.msgpack")[1].splitlines()
    assert out[0] == "new.msgpack and net.msgpack: 1 finding"
    assert out[2].split()[0] == path.split("/")[1]  # the worst layer is first
    assert out[-1].startswith(f"beyond: {said}")
    loose = ["--divergence", "1", "--weights", "9"]
    assert run(capsys, "compare", "new.msgpack", "net.msgpack", *loose)[0] == 0


def test_compare_across_libraries_goes_through_the_model(variables, capsys):
    write.save("torch.safetensors", convert.to_torch(variables)[0])
    assert run(capsys, "compare", "torch.safetensors", "net.msgpack") == (
        2,
        "",
        "compare: A has the names of torch and B those of linen, expected one kind; write --model "
        "MODULE:FUNCTION, into which both are read\n",
    )
    assert run(capsys, "compare", "torch.safetensors", "torch.safetensors")[0] == 0
    status, out, err = run(capsys, "compare", "torch.safetensors", "net.msgpack", MODEL)
    assert (status, err) == (0, "")
    assert out.splitlines()[-1] == (
        "result, 16 rows: error 0.0e+00 of the largest value, top-1 agreement 100 %"
    )


def test_compare_judges_the_results_of_models(net, variables, capsys):
    other = changed(
        variables, "params/fc/bias", lambda v: v + np.float32(100) * (np.arange(5) == 2)
    )
    write.save("other.msgpack", other)
    np.savez("x.npz", net.batches()[1][:4])
    words = ["compare", "other.msgpack", "net.msgpack", MODEL, "--inputs", "x.npz"]
    loose = ["--weights", "1000"]
    status, out, _ = run(capsys, *words, *loose, "--bound", "1e9")
    assert status == 0
    assert "top-1 agreement " in out
    status, out, _ = run(capsys, *words, *loose, "--bound", "1e9", "--agree", "0.99")
    assert status == 1
    assert out.splitlines()[-1].startswith(
        "beyond: result: top-1 agreement: 0.0e+00, bound 9.9e-01"
    )
    assert run(capsys, *words, *loose, "--agree", "0")[0] == 1  # the error is beyond its bound


def test_layers_of_one_alone_are_findings(variables, capsys):
    write.save("a.msgpack", changed(variables, "params", lambda v: {**v, "new": {"bias": v["fc"]}}))
    status, out, _ = run(capsys, "compare", "a.msgpack", "net.msgpack")
    assert status == 1
    assert out.splitlines()[-2:] == [
        "beyond: array new/bias/bias is in A alone",
        "beyond: array new/bias/kernel is in A alone",
    ]


def test_not_a_number_is_no_agreement(variables, capsys):
    for path in ("batch_stats/bn/var", "params/conv/kernel"):
        write.save("nan.msgpack", changed(variables, path, lambda v: v * np.float32(np.nan)))
        assert run(capsys, "compare", "nan.msgpack", "net.msgpack")[0] == 1
    same = run(capsys, "compare", "nan.msgpack", "nan.msgpack", MODEL)
    assert same[0] == 1
    assert "values of the reference are NaN" in same[1].splitlines()[-1]


# Exported files


@pytest.fixture
def artifact(net, variables):
    """`net.stablehlo`, not folded, and its manifest."""
    x = net.batches()[0]
    fn = jax.tree_util.Partial(net.Net().apply, variables)
    done = export.stablehlo(fn, x, "net.stablehlo", platforms=["cpu"])
    export.manifest(done, checkpoint="net.msgpack")
    np.savez("x.npz", x[:3])
    return pathlib.Path("net.stablehlo")


ODD = """
from net import *
N = network
def none():
    return lambda v, x: None, *N()[1:]
def empty():
    return *N()[:2], [x[:0] for x in N()[2]]
def no_list():
    return *N()[:2], None
def table():
    apply, *others = N()
    return lambda v, x: (apply(v, x), x.mean((0, 1, 2)), x.mean()), *others
"""


@pytest.fixture
def odd(net, tmp_path):
    """`odd`, models of `net`'s network that are odd."""
    (tmp_path / "odd.py").write_text(ODD)
    yield
    sys.modules.pop("odd", None)


NO_NUMBER = (
    "result holds no number to compare; expected inputs of at least one row, and a model that "
    "returns its results"
)
NOTHING = {  # words, model → what is said
    ("verify net.stablehlo --against net.msgpack", "none"): NO_NUMBER,
    ("compare net.msgpack net.msgpack", "none"): NO_NUMBER,
    ("compare net.msgpack net.msgpack", "empty"): NO_NUMBER,
    ("serving net.msgpack", "none"): "fn returns no array, expected a row for each of the 16 rows "
    "of x; return the results.",
}


@pytest.mark.parametrize(("words", "model"), NOTHING, ids=lambda v: v.split()[0])
def test_nothing_compared_is_nothing_passed(words, model, artifact, odd, capsys):
    status, out, err = run(capsys, *words.split(), f"--model=odd:{model}")
    assert (status, out) == (2, "")
    assert err == f"{words.split()[0]}: {NOTHING[words, model]}\n"


@pytest.mark.parametrize("words", [("--inputs", "x.npz"), ("--agree", "1")], ids=" ".join)
def test_results_are_not_compared_without_a_model(words, net, capsys):
    assert run(capsys, "compare", "net.msgpack", "net.msgpack", *words) == (
        2,
        "",
        "compare: --inputs and --agree are for results, which two checkpoints have by a model "
        "alone; write --model MODULE:FUNCTION\n",
    )


def test_batches_that_are_none_are_refused(odd, net, capsys):
    assert run(capsys, "serving", "net.msgpack", "--model=odd:no_list") == (
        2,
        "",
        "serving: odd:no_list returns batches that are a NoneType, expected a list or another "
        "iterable of batches; write [x].\n",
    )


def test_a_result_without_rows_is_compared_as_it_is(odd, net, capsys):
    """A table of classes and a number for the batch, beside a result for each row."""
    model = "--model=odd:table"
    assert run(capsys, "export", "net.msgpack", "t.stablehlo", model)[0] == 0
    status, out, _ = run(capsys, "verify", "t.stablehlo", "--against", "net.msgpack", model)
    assert (status, out.count("a row alone")) == (0, 3)


def test_verify_and_the_manifest(artifact, variables, capsys):
    words = ["verify", "net.stablehlo", "--against", "net.msgpack", MODEL, "--inputs", "x.npz"]
    status, out, err = run(capsys, *words)
    assert (status, err, out.splitlines()[0]) == (
        0,
        "",
        "net.stablehlo against net.msgpack: passed",
    )
    told = json.loads(run(capsys, *words, "--json")[1])
    assert told["manifest"] == export.read_manifest(artifact)
    assert [(o["result"], o["rows"]) for o in told["outputs"]] == [
        ("result", 3),
        ("a row alone", 1),
    ]

    bias = changed(variables, "params/fc/bias", lambda v: v + np.float32(1e-7))
    write.save("copy.msgpack", bias)
    words[3] = "copy.msgpack"  # equal results, from another file
    status, out, _ = run(capsys, *words)
    assert (status, out.splitlines()[-1]) == (1, "beyond: the manifest names another checkpoint")
    pathlib.Path("net.stablehlo.manifest.json").unlink()
    status, out, _ = run(capsys, *words)
    assert (status, out.splitlines()[-1]) == (
        0,
        "no manifest beside the file: what it was made of is not checked",
    )
    write.save("copy.msgpack", changed(variables, "params/fc/bias", lambda v: v + np.float32(1)))
    assert run(capsys, *words)[0] == 1
    assert run(capsys, *words, "--bound", "100")[0] == 0


def test_a_manifest_that_is_not_of_its_file_is_refused(artifact, capsys):
    manifest = pathlib.Path("net.stablehlo.manifest.json")
    before = manifest.read_text()
    words = ["verify", "net.stablehlo", "--against", "net.msgpack", MODEL]
    name = "net.stablehlo.manifest.json is no manifest of jaxbn.export.manifest: "
    content = json.loads(before)
    for text, said in (
        ("[]", f"{name}expected an object of format 1"),
        ("{", f"{name}Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        (json.dumps(content | {"folded": 3}), f"{name}expected folded, a list"),
        (json.dumps(content | {"artifact": {}}), f"{name}expected the SHA-256 of the artifact"),
        ("[" * 100_000, None),
    ):
        manifest.write_text(text)
        status, out, err = run(capsys, *words)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert said is None or err == f"verify: {said}\n"
    manifest.write_text(before)
    sha = json.loads(before)["artifact"]["sha256"]
    content = artifact.read_bytes()
    artifact.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    status, out, err = run(capsys, *words)
    assert (status, out) == (2, "")
    assert err.endswith(f"its manifest says {sha[:12]}…: the file has changed; export it again\n")


def test_the_weights_beside_a_large_file_are_part_of_it(tmp_path):
    """If the file refers to them."""
    path = tmp_path / "net.onnx"
    beside = tmp_path / "net.onnx.data"
    beside.write_bytes(b"weights")
    for content, size in ((b"no word of it", None), (b"\n\x08location\x12\rnet.onnx.data", 7)):
        path.write_bytes(content)
        export.manifest(export.Exported(path, 0, 0.0, 0.0))
        weights = export.read_manifest(path)["weights"]
        assert (weights and weights["bytes"]) == size
    beside.write_bytes(b"others")
    with pytest.raises(ValueError, match=r"net\.onnx\.data has the SHA-256 "):
        export.read_manifest(path)
    beside.unlink()
    with pytest.raises(ValueError, match="has the SHA-256 no such file…"):
        export.read_manifest(path)


def test_compare_two_exported_files(artifact, capsys):
    words = ["compare", "net.stablehlo", "net.stablehlo"]
    assert run(capsys, *words, "--inputs", "x.npz")[0] == 0
    assert run(capsys, *words, MODEL)[0] == 0  # on the model's first batch
    assert run(capsys, *words) == (
        2,
        "",
        "compare: no inputs for two exported files to run on; write --inputs FILE.npz, or --model "
        "MODULE:FUNCTION for its first batch\n",
    )
    assert run(capsys, *words, MODEL)[0] == 0  # on the model's first batch
    assert run(capsys, "compare", "net.stablehlo", "net.msgpack") == (
        2,
        "",
        "compare: one of the two is an exported file and the other a checkpoint, expected two of a "
        "kind; write python -m jaxbn verify ARTIFACT --against CHECKPOINT --model "
        "MODULE:FUNCTION\n",
    )
    assert run(capsys, "verify", "net.msgpack", "--against", "net.msgpack", MODEL) == (
        2,
        "",
        "verify: net.msgpack is no exported file by its name, expected .onnx, .stablehlo or "
        ".tflite, or the folder of a SavedModel\n",
    )


def test_export_looks_at_the_place_of_the_manifest_first(net, capsys):
    place = pathlib.Path("a.stablehlo.manifest.json")
    place.mkdir()
    assert run(capsys, "export", "net.msgpack", "a.stablehlo", MODEL) == (
        2,
        "",
        f"export: {place} is a folder; name a file\n",
    )
    assert [path.name for path in pathlib.Path().glob("*.stablehlo*")] == [place.name]


def test_export_writes_a_manifest(net, capsys):
    assert run(capsys, "export", "net.msgpack", "no/a.stablehlo", MODEL) == (
        2,
        "",
        f"export: no folder {pathlib.Path('no').absolute()} to write a.stablehlo in\n",
    )
    assert run(capsys, "export", "net.msgpack", "a.stablehlo", MODEL)[0] == 0
    told = export.read_manifest("a.stablehlo")
    assert told["folded"] == [["0 conv 3x3, 3 -> 8 Net/conv", "sub, mul, add of Net/bn"]]
    assert set(told["errors"]) == {"fold", "artifact"}
    assert told["checkpoint"]["file"] == "net.msgpack"
    assert sorted(p.name for p in pathlib.Path().glob("*.stablehlo*")) == [
        "a.stablehlo",
        "a.stablehlo.manifest.json",
    ]


@pytest.fixture
def folder(net):
    """The folder of a SavedModel by its names, and its manifest."""
    path = pathlib.Path("net")
    path.mkdir()
    (path / "saved_model.pb").write_bytes(b"abc")
    export.manifest(export.Exported(path, 3, 0.0, 0.0))
    return path


def test_a_saved_model_needs_tensorflow(folder, monkeypatch, capsys):
    """One line says what to install, and a folder that is not its manifest's is refused first."""
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    needs = (
        "needs the package tensorflow, which is not installed; write pip install "
        "'jaxbn[saved-model]'.\n"
    )
    for name in ("net", "net/"):
        words = ["verify", name, "--against", "net.msgpack", MODEL]
        assert run(capsys, *words) == (2, "", f"verify: {needs}")
    np.savez("x.npz", np.zeros(2))
    words = ["compare", "net", "net", "--inputs", "x.npz"]
    assert run(capsys, *words) == (2, "", f"compare: {needs}")
    (folder / "saved_model.pb").write_bytes(b"abd")
    for name in ("net", "net/"):
        status, out, err = run(capsys, "verify", name, "--against", "net.msgpack", MODEL)
        assert (status, out) == (2, "")
        assert err.startswith("verify: net has the SHA-256 ")
        assert err.endswith("…: the file has changed; export it again\n")


LACKING = {  # destination, package → the format, and what to install
    ("a.onnx", "jax2onnx"): ("ONNX", "'jaxbn[export]'"),
    ("a.stablehlo", "flatbuffers"): ("StableHLO", "'jaxbn[export]'"),
    ("a.tflite", "litert_converter"): ("TFLite", "'jaxbn[tflite]'"),
    ("a", "tensorflow"): ("a SavedModel", "'jaxbn[saved-model]'"),
}


@pytest.mark.parametrize(("dest", "package"), LACKING, ids=lambda v: v)
def test_what_a_format_needs_is_told_before_any_work(dest, package, net, monkeypatch, capsys):
    """Nothing is folded, and the user's code does not run."""
    monkeypatch.setitem(sys.modules, package, None)
    name, install = LACKING[dest, package]
    assert run(capsys, "export", "net.msgpack", dest, "--model=no_such:model") == (
        2,
        "",
        f"export: {dest} as {name}: needs the package {package}, which is not installed; write "
        f"pip install {install}.\n",
    )


def test_a_saved_model_through_the_gates(net, variables, capsys):
    pytest.importorskip("tensorflow")
    x = net.batches()[0]
    status, out, err = run(capsys, "export", "net.msgpack", "net", MODEL)
    assert (status, err, out.splitlines()[-1][:11]) == (0, "", "wrote net: ")
    assert export.read_manifest("net")["folded"] != []
    assert [path.name for path in pathlib.Path().iterdir() if path.name.startswith(".")] == []
    np.savez("x.npz", x[:3])
    words = ["verify", "net", "--against", "net.msgpack", MODEL, "--inputs", "x.npz"]
    status, out, err = run(capsys, *words)
    assert (status, err, out.splitlines()[0]) == (0, "", "net against net.msgpack: passed")
    assert "no manifest" not in out
    write.save("other.msgpack", changed(variables, "params/fc/bias", lambda v: v + np.float32(1)))
    words[3] = "other.msgpack"
    assert run(capsys, *words)[0] == 1
    assert run(capsys, "compare", "net", "net", "--inputs", "x.npz")[0] == 0
    np.savez("x.npz", x[:3, 1:])
    status, out, err = run(capsys, *words)
    assert (status, out, err.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("more", [[], ["--int8"]], ids=["float", "int8"])
def test_a_tflite_file_through_the_gates(more, net, capsys):
    """A file of one batch size is verified on other numbers of rows, and on one row alone."""
    pytest.importorskip("ai_edge_quantizer")
    x = net.batches()[0]
    np.savez("more.npz", np.concatenate([x, x[:3]]))
    assert run(capsys, "export", "net.msgpack", "net.tflite", MODEL, *more)[0] == 0
    words = ["verify", "net.tflite", "--against", "net.msgpack", MODEL, "--inputs", "more.npz"]
    status, out, err = run(capsys, *words, "--bound", "0.1" if more else "1e-4")
    assert (status, err, out.splitlines()[0]) == (
        0,
        "",
        "net.tflite against net.msgpack: passed",
    )
    assert "no manifest" not in out
    assert run(capsys, *words, "--bound", "1e-9")[0] == 1


# Models of several inputs

SEVERAL = """
from functools import partial
from typing import NamedTuple
import flax.linen as nn
import jax
import numpy as np

class Rows(NamedTuple):
    a: object
    b: object

class Net(nn.Module):
    @nn.compact
    def __call__(self, a, b):
        a = nn.BatchNorm(use_running_average=True, name="bn")(nn.Dense(3, name="fc")(a))
        return a * nn.Dense(3, name="scale")(b)

def rows(n=8):
    random = np.random.default_rng(n)
    return random.normal(3, 2, (n, 4)).astype("f"), random.normal(size=(n, 2)).astype("f")

V = Net().init(jax.random.key(0), *rows())

def network(make, take):
    return lambda v, x, **how: Net().apply(v, *take(x), **how), V, [make(*rows()), make(*rows())]

arrays = partial(network, lambda a, b: (a, b), lambda x: x)
a_list = partial(network, lambda a, b: [a, b], lambda x: x)
a_dict = partial(network, lambda a, b: {"a": a, "b": b}, lambda x: (x["a"], x["b"]))
fields = partial(network, Rows, lambda x: (x.a, x.b))
nested = partial(network, lambda a, b: {"c": (a, {"b": b})}, lambda x: (x["c"][0], x["c"][1]["b"]))
deeper = partial(network, lambda a, b: ({"a": a}, (b,)), lambda x: (x[0]["a"], x[1][0]))
"""


@pytest.fixture
def several(tmp_path, monkeypatch):
    """`several`, models of one network whose two inputs come in one batch."""
    (tmp_path / "several.py").write_text(SEVERAL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "several", raising=False)
    import several

    write.save("net.msgpack", several.V)
    return several


BATCHES = ["arrays", "a_list", "a_dict", "fields", "nested", "deeper"]


@pytest.mark.parametrize("batch", BATCHES)
def test_a_batch_of_several_inputs_is_good_for_every_command(batch, several, capsys):
    model = f"--model=several:{batch}"
    for words in (
        "recalibrate net.msgpack new.msgpack",
        "fold new.msgpack",
        "serving new.msgpack",
        "compare new.msgpack new.msgpack",
        "export new.msgpack f.stablehlo",
        "verify f.stablehlo --against new.msgpack",
        "compare f.stablehlo f.stablehlo",
    ):
        status, _, err = run(capsys, *words.split(), model)
        assert (words, status, err) == (words, 0, "")
    assert run(capsys, "lint", model)[0] == 1  # a bias that the mean takes away


def test_several_inputs_in_onnx_and_int8(several, capsys):
    """A tuple and a dict of dicts: arrays by their places, and by the keys that lead to them."""
    for batch in ("a_list", "nested"):
        model = f"--model=several:{batch}"
        for more in ([], ["--int8"]):
            assert run(capsys, "export", "net.msgpack", "f.onnx", model, *more)[0] == 0
            words = ["verify", "f.onnx", "--against", "net.msgpack", model]
            status, _, err = run(capsys, *words, "--bound", "0.2" if more else "1e-4")
            assert (status, err) == (0, "")
        assert run(capsys, *words, "--bound", "1e-9")[0] == 1


def test_arrays_of_savez_without_names_are_a_tuple(several, capsys):
    np.savez("x.npz", *several.rows(5))
    words = ["serving", "net.msgpack", "--inputs", "x.npz"]
    for batch in ("arrays", "a_list", "a_dict"):
        status, out, err = run(capsys, *words, f"--model=several:{batch}")
        assert (status, out, err) == (
            (0, "net.msgpack: passed\n", "")
            if batch != "a_dict"
            else (
                2,
                "",
                "serving: the model fails on the inputs: TypeError: tuple indices must be integers "
                "or slices, not str; expected inputs as the model takes them, one array, a tuple "
                "or a dict by name\n",
            )
        )


# serving


def test_serving_as_a_command(net, capsys, tmp_path):
    (tmp_path / "modes.py").write_text(
        "from net import *\nN = network\n"
        "def network():\n"
        "    apply = partial(Net().apply, train=True, mutable=['batch_stats'])\n"
        "    return lambda v, x: apply(v, x)[0], *N()[1:]\n"
    )
    passed = (0, "net.msgpack: passed\n", "")
    assert run(capsys, "serving", "net.msgpack", MODEL) == passed
    np.savez("x.npz", net.batches()[0][:3])
    assert run(capsys, "serving", "net.msgpack", MODEL, "--inputs", "x.npz") == passed
    status, out, err = run(capsys, "serving", "net.msgpack", "--model=modes:network")
    assert (status, err) == (1, "")
    assert out == (
        "net.msgpack: 1 finding\n"
        "error train_in_inference in Net/bn\n"
        "  share of the batch in the statistics that x is normalized by: 1, threshold 0\n"
        "  remedy: run the norms in eval mode: train=False, use_running_average=True, "
        "model.eval()\n"
    )
    told = json.loads(run(capsys, "serving", "net.msgpack", "--model=modes:network", "--json")[1])
    assert (told["passed"], [f["kind"] for f in told["findings"]]) == (
        False,
        ["train_in_inference"],
    )


# Inputs


class Trap:
    def __reduce__(self):
        return pathlib.Path("executed").touch, ()


def declared(shape):
    """The bytes of an array that declares more values than follow."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
    header = header.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(8)


def savez(**members):
    import zipfile

    with zipfile.ZipFile("x.npz", "w") as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)


HOW = "write np.savez(path, x)"
BAD_INPUTS = {
    "objects": (
        lambda: np.savez("x.npz", np.array([Trap()], object)),
        "x.npz cannot be read as arrays of np.savez: it holds Python objects, which are pickles "
        f"and can run code; {HOW}",
    ),
    "a text file": (
        lambda: pathlib.Path("x.npz").write_text("x"),
        f"x.npz cannot be read as arrays of np.savez: File is not a zip file; {HOW}",
    ),
    "more than there is": (
        lambda: savez(x=declared("(10000000000, 8)")),
        "x.npz cannot be read as arrays of np.savez: it declares an array of shape (10000000000, "
        f"8), which its bytes cannot hold; {HOW}",
    ),
    "nothing": (lambda: np.savez("x.npz"), f"x.npz holds no array; {HOW}"),
    "words": (
        lambda: np.savez("x.npz", a=np.array(["x"]), b=np.ones(())),
        "['a', 'b'] of x.npz: expected arrays of numbers with rows on axis 0, at least one",
    ),
    "no rows": (
        lambda: np.savez("x.npz", np.ones((0, 8))),
        "['arr_0'] of x.npz: expected arrays of numbers with rows on axis 0, at least one",
    ),
    "no file": (lambda: None, f"no file x.npz; {HOW}"),
}


@pytest.mark.parametrize("kind", BAD_INPUTS)
def test_bad_inputs_are_refused_and_nothing_in_them_runs(kind, net, capsys):
    make, said = BAD_INPUTS[kind]
    make()
    status = run(capsys, "serving", "net.msgpack", MODEL, "--inputs", "x.npz")
    assert status == (2, "", f"serving: {said}\n")
    assert not pathlib.Path("executed").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("verify", "net.stablehlo", "--against", "net.msgpack"),
        ("compare", "net.msgpack", "net.msgpack"),
        ("serving", "net.msgpack"),
    ],
    ids=lambda words: words[0],
)
def test_inputs_that_the_model_does_not_take_are_told(words, artifact, net, capsys):
    x = net.batches()[0][:4]
    np.savez("x.npz", images=x, more=x)
    assert run(capsys, *words, MODEL, "--inputs", "x.npz") == (
        2,
        "",
        f"{words[0]}: the model fails on the inputs: AttributeError: 'dict' object has no "
        "attribute 'ndim'; expected inputs as the model takes them, one array, a tuple or a dict "
        "by name\n",
    )


def test_several_inputs_come_as_a_dict(net, capsys):
    from jaxbn._checkpoints.inputs import read_inputs

    np.savez("x.npz", images=np.ones((2, 3)), lengths=np.arange(2))
    expected = {"images": np.ones((2, 3)), "lengths": np.arange(2)}
    assert_same(read_inputs("x.npz"), expected)


def test_the_recipe_in_the_docs_is_of_commands_that_are_there():
    page = (pathlib.Path(__file__).parents[2] / "docs" / "gates.md").read_text()
    (recipe,) = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert recipe.count("\n") == 20
    model = re.search("MODEL: (.*)", recipe)[1]
    one_line = re.sub(r"\n {10,}(--)", r" \1", recipe.replace("$MODEL", model))
    commands_ = re.findall(r"python -m jaxbn (.*)", one_line)
    parsed = [commands.parse(words.split()) for words in commands_]
    names = ["doctor", "serving", "compare", "export", "verify"]
    assert [args.command for args in parsed] == names
    assert parsed[2].agree == 0.98
