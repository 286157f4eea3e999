"""TFLite and SavedModel: they compute what the function computes, or are not written."""

import fnmatch
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from jaxbn import export
from jaxbn._folding.program import trace
from jaxbn.export._tflite import in_parts
from jaxbn.export._transposed import results_of

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(4, 8, 8, 3)).astype(np.float32)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        x = nn.relu(jaxbn.linen.BatchNorm(use_running_average=True)(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu6(nn.Conv(8, (3, 3), feature_group_count=8)(x))
        return nn.Dense(5)(x.mean((1, 2)))


@pytest.fixture(scope="module")
def folded():
    variables = Net().init(jax.random.key(0), X)
    variables = jax.tree.map(lambda v: v + RANDOM.uniform(0, 0.5, v.shape).astype("f"), variables)
    return jaxbn.fold(lambda x: Net().apply(variables, x), X)[0]


@pytest.fixture(scope="module")
def litert():
    return pytest.importorskip("litert_converter")


@pytest.fixture(scope="module")
def tf():
    return pytest.importorskip("tensorflow")


@pytest.fixture(scope="module")
def source(litert, folded, tmp_path_factory):
    return export.tflite(folded, X, tmp_path_factory.mktemp("tflite") / "net.tflite")


def operators(path):
    """The operators of a file, by LiteRT's own schema."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.Model.GetRootAs(path.read_bytes())
    names = {value: name for name, value in vars(schema.BuiltinOperator).items()}
    graph = model.Subgraphs(0)
    ops = [graph.Operators(k) for k in range(graph.OperatorsLength())]
    return [names[model.OperatorCodes(op.OpcodeIndex()).BuiltinCode()] for op in ops]


def test_a_tflite_file_is_the_function(source, folded):
    """Activations are part of the convolutions, and no axis moves."""
    assert source.relative < 2e-6
    assert source.bytes == source.path.stat().st_size
    layers = ["CONV_2D", "MAX_POOL_2D", "DEPTHWISE_CONV_2D", "MEAN", "FULLY_CONNECTED"]
    assert operators(source.path) == layers
    run = export.load_tflite(source.path)
    more = np.concatenate([X, -X])
    for rows in (1, 4, 5, 8):  # the file has 4
        np.testing.assert_allclose(run(more[:rows]), folded(more[:rows]), rtol=1e-4, atol=1e-5)
    assert export.read_manifest(export.manifest(source) and source.path)["artifact"]["bytes"]


@pytest.mark.parametrize("rows", [1, 4, 5, 8])
def test_all_rows_come_in_batches_of_one_size(rows):
    feed = {"a": np.arange(rows), "b": np.ones((rows, 2))}
    parts = list(in_parts(feed, 4))
    assert {v.shape for part in parts for v in part.values()} == {(4,), (4, 2)}
    together = np.concatenate([part["a"] for part in parts])
    np.testing.assert_array_equal(together, np.minimum(np.arange(len(together)), rows - 1))
    assert 0 <= len(together) - rows < 4


def test_inputs_and_results_have_names_and_dtypes(litert, tmp_path):
    images = RANDOM.integers(0, 255, X.shape).astype(np.uint8)
    tokens = RANDOM.integers(0, 9, (4, 5)).astype(np.int32)
    table = RANDOM.normal(size=(9, 3)).astype(np.float32)

    def fn(x, unread):
        seen = (x["images"].astype(jnp.float32) / 58).mean((1, 2))
        read = jnp.asarray(table)[x["tokens"]].mean(1)
        return {"sum": seen + read, "label": jnp.argmax(read, -1).astype(jnp.int32)}

    x = {"tokens": tokens, "images": images}
    names = ("pixels", "words", "b")
    done = export.tflite(fn, (x, tokens), tmp_path / "f.tflite", inputs=names)
    run, expected = export.load_tflite(done.path), fn(x, tokens)
    for got in (run(images, tokens, tokens), run({"b": tokens, "words": tokens, "pixels": images})):
        assert list(got) == ["label", "sum"]
        np.testing.assert_array_equal(got["label"], expected["label"])
        np.testing.assert_allclose(got["sum"], expected["sum"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dynamic", [False, True])
def test_eight_bits(dynamic, source, tmp_path):
    """256 levels over the range seen: a few halves of 1 / 127 add up over three layers."""
    pytest.importorskip("ai_edge_quantizer")
    more = np.concatenate([X, -X])[:7]
    done = export.tflite_int8(source.path, [X, more], tmp_path / "q.tflite", dynamic=dynamic)
    assert 1e-5 < done.relative < 0.05
    assert [path.name for path in tmp_path.iterdir()] == ["q.tflite"]
    assert set(done.milliseconds) == {"float32", "int8"}
    y, want = export.load_tflite(done.path)(more), export.load_tflite(source.path)(more)
    assert y.dtype == np.float32
    assert np.abs(y - want).max() < 0.05 * np.abs(want).max()
    assert bool(done.in_float) == dynamic


@pytest.mark.parametrize("dynamic", [False, True])
def test_layers_left_out_stay_float(dynamic, source, tmp_path):
    pytest.importorskip("ai_edge_quantizer")

    def in_float(*leave_out):
        options = {"leave_out": leave_out, "dynamic": dynamic}
        return export.tflite_int8(source.path, [X], tmp_path / "q.tflite", **options).in_float

    for pattern, other in (("*/Conv_1/*", "*output*"), ("*output*", "*/Conv_1/*")):
        left = in_float(pattern)
        assert fnmatch.filter(left, pattern)
        assert not fnmatch.filter(left, other)
    assert {*in_float("*Conv*", "*output*")} >= {*in_float("*Conv*")} > {*in_float()}
    with pytest.raises(ValueError) as error:
        in_float("*/Conv_9/*")
    text, _, names = str(error.value).partition(" such as ")
    assert text == "tflite_int8: leave_out has '*/Conv_9/*', which fits no node; expected names"
    assert "/Net/Conv_0/conv_general_dilated" in names.split(", ")[0]


def test_gates_take_a_tflite_file(source, folded, tmp_path, monkeypatch, capsys):
    from jaxbn._cli import commands

    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", X[:3])
    for name, factor in (("a", 1), ("b", 2)):
        export.tflite(lambda x, factor=factor: factor * folded(x), X, f"{name}.tflite")
    told = {}
    for other in "ab":
        words = ["compare", "a.tflite", f"{other}.tflite", "--inputs", "x.npz", "--json"]
        told[other] = (commands.main(words), json.loads(capsys.readouterr().out)["passed"])
    assert told == {"a": (0, True), "b": (1, False)}


def unknown(x):
    return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


LACKING = {
    "a callback": (
        unknown,
        "pure_callback",
        "serialization of host_callbacks is not yet implemented",
    ),
    "a transform": (lambda x: jnp.fft.fft(x).real, "fft", "Failed to export flatbuffer"),
}


@pytest.mark.parametrize("name", LACKING)
def test_what_tflite_lacks_is_refused(litert, name, tmp_path):
    """The error names the operation and its layer."""
    fn, operation, reason = LACKING[name]
    with pytest.raises(ValueError) as error:
        export.tflite(
            lambda x: jax.named_call(fn, name="Net/spectrum")(2 * x) + 1, X, tmp_path / "f"
        )
    assert str(error.value) == (
        f"tflite: {operation} in Net/spectrum cannot be converted: {reason}; expected operations "
        "that TFLite has. Compute it outside fn or by other operations, or write "
        "jaxbn.export.stablehlo, which takes all but calls into Python."
    )
    assert list(tmp_path.iterdir()) == []


TRANSPOSED = {  # kernel, strides, padding, dilation of the kernel, groups, strides of the result
    "SAME": ((3, 3), (2, 2), ((2, 1), (2, 1)), (1, 1), 1, (1, 1)),
    "both sides alike": ((4, 4), (2, 2), ((2, 2), (2, 2)), (1, 1), 1, (1, 1)),
    "PyTorch's padding=1": ((3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), 1, (1, 1)),
    "holes in the kernel": ((3, 2), (2, 2), ((3, 4), (1, 1)), (2, 1), 1, (1, 1)),
    "groups": ((2, 3), (2, 1), ((1, 1), (0, 3)), (1, 1), 2, (1, 1)),
    "a small kernel": ((1, 2), (2, 3), ((0, 1), (-1, 2)), (1, 1), 1, (1, 2)),
    "a line": ((3,), (2,), ((2, 1),), (1,), 1, (1,)),
    "a volume": ((3, 2, 1), (2, 2, 1), ((2, 1), (1, 1), (0, 1)), (1, 2, 1), 1, (1, 1, 1)),
    "float16": ((3,), (2,), ((2, 1),), (1,), 1, (1,)),
}


def transposed(name):
    """A function that is a transposed convolution, and its x."""
    kernel, strides, padding, dilation, groups, steps = TRANSPOSED[name]
    dtype, letters = "float16" if name == "float16" else "float32", "DHW"[-len(kernel) :]
    x = RANDOM.normal(size=(2, *range(4, 4 + len(kernel)), 4)).astype(dtype)
    w = RANDOM.normal(size=(*kernel, 4 // groups, 6)).astype(dtype)
    axes = (f"N{letters}C", f"{letters}IO", f"N{letters}C")

    def fn(x):
        return jax.lax.conv_general_dilated(
            x, w, steps, padding, strides, dilation, axes, feature_group_count=groups
        )

    return jax.named_call(fn, name="Net/up"), x


@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_convolutions_in_the_forms_that_are_converted_rightly(name):
    """One group, no holes, and all places or those without as many on both sides."""
    fn, x = transposed(name)
    program = trace(fn, [x], lambda eqn: True)
    (y,) = results_of(program, [jnp.asarray(x)])
    tolerance = {"rtol": 1e-3, "atol": 1e-2} if name == "float16" else {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(y, fn(x), **tolerance)
    made = trace(lambda x: results_of(program, [x]), [x], lambda eqn: True)
    convolutions = [op for op in made.ops if op.name == "conv_general_dilated"]
    assert len(convolutions) == TRANSPOSED[name][4]
    for op in convolutions:
        p, window = op.eqn.params, [n - 1 for n in op.eqn.invars[1].aval.shape[:-2]]
        assert {p["feature_group_count"], *p["rhs_dilation"]} == {1}
        if {*p["lhs_dilation"]} == {1}:
            assert name == "a volume"
            continue
        assert op.dtype == np.float32
        assert {*p["window_strides"]} == {1}
        everywhere = [(n, n) for n in window] == list(p["padding"])
        assert everywhere or name == "both sides alike"


@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_convolutions(litert, name, tmp_path):
    """The converter makes something else of most of them, or a file that LiteRT cannot run."""
    kinds = operators(export.tflite(*transposed(name), tmp_path / "f").path)
    assert kinds.count("TRANSPOSE_CONV") == (0 if name == "a volume" else TRANSPOSED[name][4])
    if name == "both sides alike":  # as decoders of images have them
        assert kinds == ["TRANSPOSE_CONV"]


NOT_SO = {
    "SAME": "tflite: the file's result has shape ",
    "a volume": "tflite: conv_general_dilated in Net/up cannot be converted: Didn't find op for ",
}


@pytest.mark.parametrize("name", NOT_SO)
def test_what_is_converted_wrongly_is_not_written(litert, name, tmp_path, monkeypatch):
    """Another result, or an operator that LiteRT does not have."""
    monkeypatch.setattr("jaxbn.export._transposed._is_transposed", lambda op: False)
    with pytest.raises(ValueError) as error:
        export.tflite(*transposed(name), tmp_path / "f")
    assert str(error.value).startswith(NOT_SO[name])
    assert list(tmp_path.iterdir()) == []


def test_files_and_inputs_that_do_not_fit_are_refused(source, tmp_path):
    path = tmp_path / "file"
    for content in (b"", b"hello", b"\x1c\0\0\0TFL3" + b"x" * 100, source.path.read_bytes()[:500]):
        path.write_bytes(content)
        with pytest.raises(ValueError) as error:
            export.load_tflite(path)
        assert str(error.value).startswith(f"load_tflite: LiteRT cannot read {path}: ")
    run = export.load_tflite(source.path)
    for inputs, got in (
        ([X[:, :4]], "input float32 [4, 4, 8, 3]"),
        ([X.astype(np.float64)], "input float64 [4, 8, 8, 3]"),
        ([X[:0]], "input float32 [0, 8, 8, 3]"),
        ([X, X], "input float32 [4, 8, 8, 3]"),
        ([{"x": X}], "x float32 [4, 8, 8, 3]"),
        ([np.float32(1)], "input float32 []"),
        ([], "nothing"),
    ):
        with pytest.raises(ValueError) as error:
            run(*inputs)
        assert str(error.value) == (
            f"load_tflite: {source.path} cannot run on {got}; expected input float32 [4, 8, 8, 3]."
        )
    pytest.importorskip("ai_edge_quantizer")
    with pytest.raises(ValueError) as error:
        export.tflite_int8(source.path, [], path)
    assert str(error.value) == (
        "tflite_int8: no batches to calibrate with, expected some real inputs; write "
        "jaxbn.export.tflite_int8(source, [x], path)."
    )
    done = export.tflite_int8(source.path, [X], tmp_path / "int8")
    with pytest.raises(ValueError) as error:
        export.tflite_int8(done.path, [X], path)
    assert str(error.value) == (
        f"tflite_int8: {done.path} is in 8 bits already, expected a file in float of "
        "jaxbn.export.tflite."
    )


# SavedModel


def test_a_saved_model_is_the_function_at_any_batch_size(tf, folded, tmp_path):
    done = export.saved_model(
        lambda x: {"logits": folded(x["image"]), "label": jnp.argmax(folded(x["image"]), -1)},
        {"image": X},
        tmp_path / "net",
    )
    assert done.relative < 1e-5
    files = [path for path in done.path.rglob("*") if path.is_file()]
    assert done.bytes == sum(path.stat().st_size for path in files)
    serve = tf.saved_model.load(str(done.path)).signatures["serving_default"]
    got = serve(image=tf.constant(X[:3]))
    np.testing.assert_allclose(got["logits"], folded(X[:3]), rtol=1e-4, atol=1e-5)


def test_a_saved_model_in_the_order_of_the_function(tf, tmp_path):
    """TensorFlow sorts the names of results; the folder's order is the function's."""
    w = RANDOM.normal(size=(3, 2)).astype(np.float32)
    counts = RANDOM.integers(0, 9, (4, 5)).astype(np.int32)

    def fn(x, counts):
        return [x @ w, counts, x.mean((1, 2))]

    names = {"inputs": ("pixels", "counts"), "outputs": ("m", "b", "a")}
    path = export.saved_model(fn, (X, counts), tmp_path / "net", **names).path
    run = export.load_saved_model(path)
    for got in (run(X[:3], counts[:3]), run({"counts": counts[:3], "pixels": X[:3]})):
        assert list(got) == ["m", "b", "a"]
        for y, expected in zip(got.values(), fn(X[:3], counts[:3]), strict=True):
            np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    for inputs, got in (
        ((X,), "pixels float32 [4, 8, 8, 3]: the inputs are others"),
        ((X, counts, X), "pixels float32 [4, 8, 8, 3], counts int32 [4, 5]: the inputs are others"),
        ((X[:, 1:], counts), "pixels float32 [4, 7, 8, 3], counts int32 [4, 5]: "),
        ((X, counts.astype("f")), "pixels float32 [4, 8, 8, 3], counts float32 [4, 5]: "),
        ((), "nothing: the inputs are others"),
    ):
        with pytest.raises(ValueError) as error:
            run(*inputs)
        text = str(error.value)
        assert text.startswith(f"load_saved_model: {path} cannot run on {got}")
        assert text.endswith("; expected pixels float32 [any, 8, 8, 3], counts int32 [any, 5].")


def test_what_is_no_saved_model_is_refused(tf, tmp_path):
    with pytest.raises(FileNotFoundError) as missing:
        export.load_saved_model(tmp_path)
    assert str(missing.value) == f"load_saved_model: no SavedModel in the folder {tmp_path}"
    (tmp_path / "saved_model.pb").write_bytes(b"abc")
    with pytest.raises(ValueError) as error:
        export.load_saved_model(tmp_path)
    text = str(error.value)
    assert text.startswith(f"load_saved_model: TensorFlow cannot read {tmp_path}: ")
    assert text.endswith("; expected a folder of jaxbn.export.saved_model.")
    tf.saved_model.save(tf.Module(), str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"; expected a folder of jaxbn.export.saved_model\.$"):
        export.load_saved_model(tmp_path / "other")


def test_a_folder_and_its_manifest(tmp_path):
    path = tmp_path / "net"
    (path / "variables").mkdir(parents=True)
    (path / "variables" / "data").write_bytes(b"abc")
    note = export.manifest(export.Exported(path, 3, 0.0, 0.0))
    assert note == tmp_path / "net.manifest.json"
    assert export.read_manifest(path)["artifact"]["bytes"] == 3
    (path / "variables" / "data").write_bytes(b"abd")
    with pytest.raises(ValueError, match="the file has changed; export it again"):
        export.read_manifest(path)


def test_a_saved_model_takes_a_new_folder(tmp_path):
    (tmp_path / "net").mkdir()
    with pytest.raises(FileExistsError) as error:
        export.saved_model(jnp.sin, X, tmp_path / "net")
    assert str(error.value) == f"saved_model: {tmp_path}/net is there already; name a new folder."


def test_a_saved_model_that_cannot_be_is_not_written(tf, tmp_path):
    def fn(x):
        return x if x.shape[0] > 3 else x[:3]

    with pytest.raises(ValueError) as error:
        export.saved_model(fn, X, tmp_path / "net")
    text = str(error.value)
    assert text.startswith("saved_model: fn cannot be traced with sizes B, 8, 8, 3: ")
    assert text.endswith("for this size alone, write sizes='4, 8, 8, 3'.")
    for fn, message in (
        (unknown, "pure_callback in fn cannot be converted: "),
        (lambda x: jnp.linalg.eigh(x[..., 0])[0], "TensorFlow cannot run fn: No FFI handler "),
    ):
        with pytest.raises(ValueError) as error:
            export.saved_model(fn, np.ones((2, 3, 3, 1), "f"), tmp_path / "net")
        assert str(error.value).startswith(f"saved_model: {message}")
    with pytest.raises(ValueError, match="values of the function's result are not finite"):
        export.saved_model(jnp.sqrt, X, tmp_path / "net")
    assert list(tmp_path.iterdir()) == []
