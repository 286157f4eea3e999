"""Files that others serve: they compute what the function computes, or are not written."""

import json
import os
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from flax import nnx

import jaxbn
from jaxbn import export

X = np.random.default_rng(0).normal(size=(6, 8, 8, 3)).astype(np.float32)
EXAMPLE = Path(__file__).parents[2] / "examples" / "cifar10"


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        for features in (4, 6):
            x = nn.Conv(features, (3, 3), strides=2, use_bias=False)(x)
            x = nn.relu(jaxbn.linen.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(5)(x.mean((1, 2)))


@pytest.fixture(scope="module")
def fn():
    variables = Net().init(jax.random.key(0), X)
    random = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda v: v + random.uniform(0, 0.5, v.shape).astype(np.float32), variables
    )
    return lambda x, **options: Net().apply(variables, x, **options)


@pytest.fixture(scope="module")
def folded(fn):
    return jaxbn.fold(fn, X)[0]


def test_stablehlo_is_the_function_at_any_batch_size(fn, tmp_path):
    done = export.stablehlo(fn, X, tmp_path / "net.stablehlo")
    assert done[:2] == (tmp_path / "net.stablehlo", done.path.stat().st_size)
    assert done.relative < 1e-6  # fn runs operation by operation, the file in one program
    program = jax.export.deserialize(bytearray(done.path.read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    read = export.load_stablehlo(done.path)
    for rows in (1, 4):
        np.testing.assert_allclose(read(X[:rows]), fn(X[:rows]), rtol=1e-5, atol=1e-6)


def test_an_nnx_model_is_exported(tmp_path):
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    model.eval()
    done = export.stablehlo(model, X[:, 0, 0], tmp_path / "nnx")
    np.testing.assert_allclose(
        export.load_stablehlo(done.path)(X[:2, 0, 0]), model(X[:2, 0, 0]), rtol=1e-5
    )


def nodes(path):
    return [node.op_type for node in onnx.load(path).graph.node]


def test_onnx_is_the_function_at_any_batch_size(fn, folded, tmp_path):
    """Error: rounding of two convolutions and a dot, a few units in the last place of float32."""
    for name, function in (("net", fn), ("folded", folded)):
        done = export.onnx(function, X, tmp_path / f"{name}.onnx")
        assert done.relative < 2e-6
        assert done.bytes == done.path.stat().st_size
        run = export.session(done.path)
        for rows in (1, 5):
            np.testing.assert_allclose(run(X[:rows]), fn(X[:rows]), rtol=1e-4, atol=1e-5)
    # A folded norm is the bias of its Conv.
    assert nodes(tmp_path / "net.onnx").count("Sub") == 2
    layers = ["Transpose", "Conv", "Relu", "Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm"]
    assert nodes(tmp_path / "folded.onnx") == layers


def test_int8_is_the_function_to_eight_bits(folded, tmp_path):
    export.onnx(folded, X, tmp_path / "float.onnx")
    done = export.int8(tmp_path / "float.onnx", [X, X[:2]], tmp_path / "int8.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float.onnx", "int8.onnx"]
    # 256 levels over the range seen: a few halves of 1 / 127 add up over three layers.
    assert 1e-4 < done.relative < 0.05
    weights = {tensor.data_type for tensor in onnx.load(done.path).graph.initializer}
    assert onnx.TensorProto.INT8 in weights
    y = export.session(done.path)(X[:3])
    largest = np.abs(folded(X)).max()
    assert np.abs(y - np.asarray(folded(X[:3]))).max() < 0.05 * largest


@pytest.mark.parametrize("call", [export.stablehlo, export.onnx])
def test_training_mode_is_refused(call, fn, tmp_path):
    def trains(x):
        return fn(x, train=True, mutable=["batch_stats"])[0]

    with pytest.raises(ValueError) as error:
        call(trains, X, tmp_path / "file")
    assert str(error.value) == (
        f"{call.__name__}: Net/BatchNorm_0 normalizes by statistics of the batch, expected a "
        "function in inference mode: train=False, use_running_average=True, or model.eval()."
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", [export.stablehlo, export.onnx])
@pytest.mark.parametrize(("x", "what"), [([1.0], "a list"), (np.float32(1), "a scalar")])
def test_an_example_that_is_no_batch_is_refused(call, x, what, tmp_path):
    with pytest.raises(TypeError) as error:
        call(jnp.sin, x, tmp_path / "file")
    assert str(error.value) == (
        f"{call.__name__}: x is {what}, expected an example batch, batch first; write "
        "jnp.asarray(x)."
    )


def never(x):
    raise AssertionError("no work is done")


WRITERS = [export.stablehlo, export.onnx, export.tflite, export.saved_model]


@pytest.mark.parametrize("call", [*WRITERS, export.int8, export.tflite_int8])
def test_a_place_that_cannot_be_written_to_is_refused_first(call, tmp_path):
    args = (never, X) if call in WRITERS else (tmp_path / "no source", None)
    with pytest.raises(FileNotFoundError) as error:
        call(*args, tmp_path / "no" / "file")
    assert str(error.value) == f"{call.__name__}: no folder {tmp_path}/no to write file in"
    if call is not export.saved_model:  # whose path is a folder
        with pytest.raises(IsADirectoryError) as error:
            call(*args, tmp_path)
        assert str(error.value) == f"{call.__name__}: {tmp_path} is a folder; name a file"
        os.mkfifo(pipe := tmp_path / "pipe")
        with pytest.raises(FileExistsError) as error:
            call(*args, pipe)
        said = f"{call.__name__}: {pipe} is a device or a pipe; name a file"
        assert str(error.value) == said
        assert pipe.is_fifo()


@pytest.mark.parametrize("call", WRITERS)
def test_an_example_without_numbers_is_refused(call, tmp_path):
    with pytest.raises(ValueError) as error:
        call(never, X[:0], tmp_path / "file")
    assert str(error.value) == (
        f"{call.__name__}: x has shape (0, 8, 8, 3): it holds no number, expected an example batch."
    )


def test_nothing_to_take_and_nothing_to_return(tmp_path):
    with pytest.raises(TypeError) as error:
        export.onnx(never, {}, tmp_path / "file")
    assert str(error.value) == "onnx: x holds no array, expected an example batch, batch first."
    with pytest.raises(ValueError) as nothing:
        export.onnx(lambda x: None, X, tmp_path / "file")
    assert str(nothing.value) == "onnx: fn returns no array, expected one array or several."


def unknown(x):
    return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


STABLEHLO_LACKS = {
    "a callback": (
        lambda x: jax.named_call(unknown, name="Net/sin")(2 * x) + 1,
        "pure_callback in Net/sin cannot be converted: multi-platform lowering for "
        "python_callback; expected operations without calls into Python on platforms that jax "
        "knows. Compute it outside fn.",
    ),
    "one size": (
        lambda x: x if x.shape[0] > 3 else x[:3],
        "fn cannot be traced with sizes B, 8, 8, 3: Symbolic dimension comparison 'B' > '3' is "
        "inconclusive; expected operations that work at any batch size.",
    ),
    "no result": (lambda x: None, "fn returns no array, expected one array or several."),
}


@pytest.mark.parametrize("name", STABLEHLO_LACKS)
def test_what_stablehlo_lacks_is_refused(name, tmp_path):
    fn, message = STABLEHLO_LACKS[name]
    with pytest.raises(ValueError) as error:
        export.stablehlo(fn, X, tmp_path / "file")
    assert str(error.value) == f"stablehlo: {message}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("x", [X, {0: X}], ids=["results", "x"])
def test_what_a_stablehlo_file_cannot_hold_is_refused(x, tmp_path):
    with pytest.raises(ValueError) as error:
        export.stablehlo(lambda x: {0: x}, x, tmp_path / "file")
    assert str(error.value) == (
        "stablehlo: a file cannot hold x or the results of fn as they are: Serialization is "
        "supported only for dictionaries with string keys. Found key 0 of type <class 'int'>; "
        "expected arrays in tuples, lists, and dicts by name; of a NamedTuple write x._asdict()."
    )
    assert list(tmp_path.iterdir()) == []


def test_a_list_of_arrays_is_to_be_a_tuple(tmp_path):
    with pytest.raises(TypeError) as error:
        export.stablehlo(never, [X, X], tmp_path / "file")
    assert str(error.value) == (
        "stablehlo: x is a list, expected an example batch, batch first; write tuple(x)."
    )


def test_a_file_that_differs_is_not_written(folded, tmp_path, monkeypatch):
    path = tmp_path / "net.onnx"
    path.write_text("as it was")
    session = export.session
    monkeypatch.setattr(
        "jaxbn.export._onnx.session",
        lambda *args, **options: lambda x: 2 * session(*args, **options)(x),
    )
    with pytest.raises(ValueError) as error:
        export.onnx(folded, X, path)
    assert str(error.value) == (
        "onnx: the file's result differs from the function's by 1.0e+00 of its largest value, "
        "expected 1.0e-04 at most; nothing was written. If that is enough, write tolerance=2e+00."
    )
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("net.onnx", "as it was")]


@pytest.mark.parametrize(
    ("call", "package"), [(export.stablehlo, "flatbuffers"), (export.onnx, "jax2onnx")]
)
def test_a_missing_package_is_named(call, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError) as error:
        call(jnp.sin, X, "file")
    assert str(error.value) == (
        f"{call.__name__}: needs the package {package}, which is not installed; write "
        f"pip install 'jaxbn[export]'."
    )


V = np.ones((4, 3), np.float32)
OTHERS = "the arguments have another structure"
UNFIT = {  # the arguments, how they are told, and why they do not fit
    "one argument": ((V,), {}, "fn(float32 [4, 3])", OTHERS),
    "an array for a dict": ((V, V), {}, "fn(float32 [4, 3], float32 [4, 3])", OTHERS),
    "a keyword": (({"a": V},), {"b": V}, "fn({'a': float32 [4, 3]}, b=float32 [4, 3])", OTHERS),
    "a list of numbers": (({"a": V}, [1.0]), {}, "fn({'a': float32 [4, 3]}, [float])", OTHERS),
    "another size": (
        ({"a": V}, V[:, :2]),
        {},
        "fn({'a': float32 [4, 3]}, float32 [4, 2])",
        "Shape mismatch for args[1].shape[1] (expected same constant): expected (B, 3) and called "
        "with (4, 2)",
    ),
    "no array": (
        ({"a": V}, "x"),
        {},
        "fn({'a': float32 [4, 3]}, str)",
        "Argument 'x' of type <class 'str'> is not a valid JAX type",
    ),
}


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    path = tmp_path_factory.mktemp("of_two") / "f.stablehlo"
    return export.stablehlo(lambda x, y: x["a"] + y, ({"a": V}, V), path).path


@pytest.mark.parametrize("case", UNFIT)
def test_arguments_that_do_not_fit_a_stablehlo_file_are_refused(of_two, case):
    args, kwargs, came, why = UNFIT[case]
    with pytest.raises(ValueError) as error:
        export.load_stablehlo(of_two)(*args, **kwargs)
    assert str(error.value) == (
        f"load_stablehlo: {of_two} cannot run on {came}: {why}; expected fn({{'a': float32 "
        f"[B, 3]}}, float32 [B, 3])."
    )


def test_a_long_call_is_not_told_whole(of_two):
    with pytest.raises(ValueError) as error:
        export.load_stablehlo(of_two)([0.0] * 1000)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("call", [export.session, export.load_stablehlo])
def test_no_name_of_a_file_is_printed_raw(call, tmp_path):
    path = tmp_path / "\x1b[31mred\n.onnx"
    path.write_bytes(b"hello")
    with pytest.raises(ValueError) as error:
        call(path)
    assert "/\\x1b[31mred\\n.onnx" in str(error.value)
    assert str(error.value).isprintable()


def test_what_is_no_file_of_ours_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"hello")
    with pytest.raises(ValueError) as error:
        export.load_stablehlo(path)
    assert str(error.value) == (
        f"load_stablehlo: {path} is no StableHLO of jax.export that jax {jax.__version__} can "
        "read; expected a file of jaxbn.export.stablehlo, written by this jax or an older one."
    )
    with pytest.raises(ValueError) as error:
        export.session(path)
    assert str(error.value).startswith(f"session: onnxruntime cannot read {path}: ")
    with pytest.raises(FileNotFoundError) as missing:
        export.int8(tmp_path / "nothing.onnx", [X], path)
    assert str(missing.value) == f"int8: no ONNX file at {tmp_path}/nothing.onnx"


def test_int8_refuses_what_it_cannot_calibrate_with(folded, tmp_path):
    source, path = tmp_path / "float.onnx", tmp_path / "int8.onnx"
    export.onnx(folded, X, source)
    cases = {
        "int8: no batches to calibrate with, expected some real inputs; write "
        "jaxbn.export.int8(source, [x], path).": [],
        "int8: batch 1 has shape (6, 4, 8, 3) but batch 0 has (6, 8, 8, 3); expected arrays alike "
        "but for the number of rows.": [X, X[:, :4]],
        "int8: batch 1 has shape (0, 8, 8, 3) and dtype float32: it holds no number, expected real "
        "inputs.": [X, X[:0]],
        "int8: batch 0 has shape () and dtype <U1: it holds no number, expected real inputs.": "x",
        f"int8: 1 of {X.size} values of batch 1 are not finite, expected real inputs, whose range "
        "can be taken.": [X, np.where(np.arange(X.size).reshape(X.shape) == 9, np.inf, X)],
    }
    for message, batches in cases.items():
        with pytest.raises(ValueError) as error:
            export.int8(source, iter(batches), path)
        assert str(error.value) == message
    with pytest.raises(ValueError) as error:
        export.int8(source, [X[..., :2]], path)
    assert str(error.value).startswith(
        "int8: source cannot run on batch 0 of shape (6, 8, 8, 2), dtype float32: "
    )
    assert not path.exists()
    done = export.int8(source, [X], path)
    with pytest.raises(ValueError) as error:
        export.int8(done.path, [X], tmp_path / "again")
    assert str(error.value) == (
        f"int8: {path} is in 8 bits already, expected a file in float of jaxbn.export.onnx."
    )


# The example: a checkpoint through all stages


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLE))
    import ship
    import train

    yield ship, train
    sys.path.remove(str(EXAMPLE))


@pytest.fixture(scope="module", params=["linen", "nnx"])
def run(request, example, tmp_path_factory):
    """A run of a small network on the digits."""
    runs = tmp_path_factory.mktemp("runs")
    options = "--data digits --model resnet9 --width 2 --epochs 1 --batch 128 --devices 1"
    api = request.param
    example[1].main([*options.split(), "--api", api, "--runs", str(runs), "--name", "small"])
    return runs / "small"


def test_a_checkpoint_is_shipped(run, example, capsys, monkeypatch):
    ship, _ = example
    options = "--recalibrate --images 512 --calibrate 64 --test 100 --repeats 5 --bound 100"
    seen = []
    measure = ship.measure
    monkeypatch.setattr(ship, "measure", lambda *args: seen.append(measure(*args)) or seen[-1])
    assert ship.main([str(run), *options.split()]) == 0
    rows = {row["stage"]: row for row in seen}
    stages = ["checkpoint", "recalibrated", "folded", "StableHLO", "ONNX", "ONNX int8"]
    assert list(rows) == stages
    for stage in ("folded", "StableHLO", "ONNX"):  # each beside the one before
        assert rows[stage]["error"] < 1e-5
        assert rows[stage]["accuracy"] == rows["recalibrated"]["accuracy"]
    # Two channels leave little to average over: a wide network's error is some per cent.
    assert 1e-3 < rows["ONNX int8"]["error"] < 0.5
    files = {path.name for path in (run / "export").iterdir()}
    made = ["model.int8.onnx", "model.onnx", "model.stablehlo"]
    assert files == {*made, *(f"{name}.manifest.json" for name in made)}
    (step,) = (run / "checkpoints").iterdir()
    for name in made:
        manifest = export.read_manifest(run / "export" / name)
        assert manifest["checkpoint"]["file"] == step.name
        assert len(manifest["folded"]) == 8
        quantized = {"source"} if "int8" in name else set()
        assert set(manifest["errors"]) == {"fold", "artifact"} | quantized
    out = capsys.readouterr().out
    assert "…" not in out  # the table fits 80 columns
    assert all(stage in out for stage in stages)


def test_a_loss_of_accuracy_is_an_exit_status(example, tmp_path, capsys, monkeypatch):
    ship, _ = example
    data = ship.load("digits", None)
    monkeypatch.setattr(ship, "read_run", lambda *args: (data, None, None, None))
    good = {"accuracy": 0.9, "error": 0.0, "bytes": 1, "logits": []}
    good |= {f"p{p}_{batch}": 1.0 for p in (50, 95) for batch in ship.LATENCIES}
    rows = [{**good, "stage": name} for name in ("checkpoint", "ONNX", "ONNX int8")]
    rows[2]["accuracy"] = 0.885
    made = [ship.Stage(str(i), None, 1) for i in range(len(rows))]
    monkeypatch.setattr(ship, "stages", lambda *args: iter(made))
    monkeypatch.setattr(ship, "measure", lambda stage, *args: dict(rows[int(stage.name)]))
    assert ship.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        "ship.py: ONNX int8 loses 1.50 points of accuracy, more than --bound 1\n"
    )
    assert ship.main([str(tmp_path), "--bound", "2"]) == 0
    rows[0]["accuracy"], rows[1]["accuracy"] = 0.91, 0.902  # two small losses are no large one
    rows[2]["accuracy"] = 0.894
    assert ship.main([str(tmp_path)]) == 0
    made[1] = made[1]._replace(failure="ONNX failed")
    assert ship.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err == "ship.py: ONNX failed\n"


def test_a_file_beyond_tolerance_is_kept_under_another_name(example, tmp_path):
    ship, _ = example
    path = tmp_path / "model.int8.onnx"

    def write(path, tolerance=0.1):
        if tolerance < 0.3:
            raise ValueError("int8: differs by 0.3; nothing was written. If that is enough, …")
        path.write_text("a file")
        return export.Exported(path, 6, 0.3, 0.3)

    stage = ship.exported("ONNX int8", path, write, lambda path: path.read_text)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [
        ("model.int8.failed.onnx", "a file")
    ]
    assert stage.run() == "a file"
    assert stage.failure == f"int8: differs by 0.3; see {tmp_path}/model.int8.failed.onnx"
    stage = ship.exported("ONNX", path, lambda path: write(path, 1), lambda path: path.read_text)
    assert stage.failure == ""
    assert {file.name for file in tmp_path.iterdir()} == {path.name, f"{path.name}.manifest.json"}


def test_what_is_no_run_is_refused(example, tmp_path, capsys):
    ship, _ = example
    config = {"data": "digits", "batch": 64}
    for content, message in (
        (None, "{} is no run of train.py: it has no config.json"),
        (config, "{} has no complete checkpoint"),
    ):
        if content:
            (tmp_path / "config.json").write_text(json.dumps(content | MODEL))
        with pytest.raises(SystemExit) as exit:
            ship.main([str(tmp_path)])
        assert exit.value.code == 2
        assert capsys.readouterr().err == f"ship.py: error: {message.format(tmp_path)}\n"


MODEL = {"api": "linen", "model": "resnet9", "block": "post", "width": 2, "schedule": "onecycle"}
MODEL |= {"lr": 0.1, "epochs": 1, "weight_decay": 0.0, "smoothing": 0.0}
