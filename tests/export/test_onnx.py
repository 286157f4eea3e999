"""ONNX files have the operators and the layout that runtimes are fast with, for any signature."""

import functools
import importlib.util
import subprocess
import sys
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest

import jaxbn
from jaxbn import export

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(4, 8, 8, 4)).astype(np.float32)  # images
S = RANDOM.normal(size=(3, 12, 4)).astype(np.float32)  # sequences
V = RANDOM.normal(size=(2, 5, 4, 6, 4)).astype(np.float32)  # volumes


def operators(path):
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def with_weights(module, x, **options):
    variables = module.init(jax.random.key(0), x, **options)
    variables = jax.tree.map(lambda v: v + 0.01 * RANDOM.normal(size=v.shape), variables)
    variables = jax.tree.map(lambda v: v.astype(np.float32), variables)
    return lambda x: module.apply(variables, x, **options)


def conv(*args, **options):
    return functools.partial(with_weights, nn.Conv(*args, **options))


def transposed(*args, **options):
    return functools.partial(with_weights, nn.ConvTranspose(*args, **options))


def plain(f):
    return lambda x: f


def average(x, *args, **options):
    with jax.numpy_dtype_promotion("standard"):  # Flax divides by an integer
        return nn.avg_pool(x, *args, **options)


def pooled(x):
    return nn.max_pool(x, (2, 2), (2, 2))


CASES = {
    "max pool": (X, plain(lambda x: nn.max_pool(x, (3, 3), (2, 2), "SAME")), "MaxPool"),
    "max pool 1-D": (S, plain(lambda x: nn.max_pool(x, (3,), (2,))), "MaxPool"),
    "max pool 3-D": (V, plain(lambda x: nn.max_pool(x, (2, 2, 2), (2, 2, 2))), "MaxPool"),
    "average pool": (X, plain(lambda x: average(x, (2, 2), (2, 2))), "AveragePool"),
    "zeros counted": (X, plain(lambda x: average(x, (3, 3), (1, 1), "SAME")), "AveragePool"),
    "zeros not counted": (
        X,
        plain(lambda x: average(x, (3, 3), (2, 2), "SAME", count_include_pad=False)),
        "AveragePool",
    ),
    "sum pool": (X, plain(lambda x: nn.pool(x, 0.0, jax.lax.add, (2, 2), (1, 1), "SAME")), "Mul"),
    "mean": (X, plain(lambda x: pooled(x).mean((1, 2))), "GlobalAveragePool"),
    "mean with axes of size 1": (
        X,
        plain(lambda x: pooled(x) - pooled(x).mean((1, 2), keepdims=True)),
        "GlobalAveragePool",
    ),
    "mean of channels": (X, plain(lambda x: x.mean(-1)), "ReduceMean"),
    "maximum over the image": (X, plain(lambda x: x.max((1, 2))), "ReduceMax"),
    "pad": (X, plain(lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 1), (0, 0)))), "Pad"),
    "conv 1-D": (S, conv(6, (3,)), "Conv"),
    "causal conv": (S, conv(6, (3,), padding="CAUSAL", kernel_dilation=2), "Conv"),
    "conv 2-D strided": (X, conv(6, (3, 3), strides=2), "Conv"),
    "grouped conv": (X, conv(8, (3, 3), feature_group_count=2, use_bias=False), "Conv"),
    "depthwise conv": (X, conv(4, (3, 3), feature_group_count=4), "Conv"),
    "dilated conv": (X, conv(6, (3, 3), kernel_dilation=(2, 1)), "Conv"),
    "circular conv": (X, conv(6, (3, 3), padding="CIRCULAR"), "Conv"),
    "conv 3-D": (V, conv(6, (3, 3, 1), strides=(1, 2, 1)), "Conv"),
    "conv that cuts": (X, conv(6, (2, 2), padding=((-1, 0), (0, -2))), "Conv"),
    "transposed conv": (X, transposed(6, (3, 3), strides=(2, 2)), "ConvTranspose"),
    "transposed conv 1-D": (S, transposed(6, (4,), strides=(3,), padding="VALID"), "ConvTranspose"),
    "transposed conv widened": (
        X,
        transposed(6, (2, 2), strides=(2, 2), padding=((3, 2), (1, 4))),
        "ConvTranspose",
    ),
    "relu": (X, plain(nn.relu), "Relu"),
    "relu6": (X, plain(nn.relu6), "Clip"),
    "clip": (X, plain(lambda x: jnp.clip(x, -0.5, 0.25)), "Clip"),
    "hard swish": (X, plain(nn.hard_swish), "HardSwish"),
    "hard sigmoid": (X, plain(nn.hard_sigmoid), "HardSigmoid"),
    "sigmoid": (X, plain(nn.sigmoid), "Sigmoid"),
    "silu": (X, plain(nn.silu), "Sigmoid"),
    "gelu": (X, plain(nn.gelu), "Gelu"),
    "gelu exactly": (X, plain(functools.partial(nn.gelu, approximate=False)), "Gelu"),
    "softmax": (X, plain(nn.softmax), "Softmax"),
    "softmax of rows": (X, plain(functools.partial(nn.softmax, axis=1)), "Softmax"),
    "log softmax": (X, plain(nn.log_softmax), "LogSoftmax"),
    "leaky relu": (X, plain(nn.leaky_relu), "LeakyRelu"),
    "leaky relu of a slope": (X, plain(lambda x: nn.leaky_relu(x, -0.25)), "LeakyRelu"),
    "elu": (X, plain(lambda x: nn.elu(x, 0.5)), "Elu"),
    "dense": (S, functools.partial(with_weights, nn.Dense(5)), "MatMul"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """All cases of one input are results of one file. The operators that lead to each result.

    The call itself compares every result with the function's, at three batch sizes.
    """
    found = {}
    for x in (X, S, V):
        fns = {name: made(x) for name, (input, made, _) in CASES.items() if input is x}
        path = tmp_path_factory.mktemp("operators") / "all.onnx"
        export.onnx(lambda x, fns=fns: {name: fn(x) for name, fn in fns.items()}, x, path)
        makers = {name: node for node in onnx.load(path).graph.node for name in node.output}
        for name in fns:
            seen, next_ = {}, [name]
            while next_:
                value = next_.pop()
                if value in makers and value not in seen:
                    seen[value] = makers[value].op_type
                    next_ += makers[value].input
            found[name] = Counter(seen.values())
    return found


@pytest.mark.parametrize("name", CASES)
def test_layers_leave_as_one_operator(name, written):
    found = written[name]
    assert found[CASES[name][2]] == 1
    assert found["Transpose"] <= 2  # into the runtimes' layout, and back
    assert not {"Shape", "Expand", "Gather", "Max"} & {*found}


# Whole networks


class Residual(nn.Module):
    """A small network of ImageNet's kind: a stem, a max pool, a branch, a mean."""

    dtype: object = None

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), 2, dtype=self.dtype)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        y = nn.Conv(8, (3, 3), feature_group_count=8, dtype=self.dtype)(nn.relu6(x))
        x = jnp.concatenate([nn.relu(x + y), x], -1)
        return nn.Dense(5, dtype=self.dtype)(x.mean((1, 2)))


def residual(dtype=None):
    net = Residual(dtype)
    variables = net.init(jax.random.key(0), X.astype(dtype or np.float32))
    return lambda x: net.apply(variables, x)


def test_nothing_is_transposed_between_convolutions(tmp_path):
    path = tmp_path / "net.onnx"
    expected = ["Conv", "Relu", "MaxPool", "Clip", "Conv", "Add", "Relu", "Concat"]
    expected += ["GlobalAveragePool", "Flatten", "Gemm"]
    for options in ({}, {"channels_first": True}):
        export.onnx(residual(), X, path, **options)
        found = [node.op_type for node in onnx.load(path).graph.node]
        assert found == ["Transpose"] * (not options) + expected
    y = export.session(path)(X.transpose(0, 3, 1, 2))
    np.testing.assert_allclose(y, residual()(X), rtol=1e-5, atol=1e-6)


def test_nodes_have_the_names_of_layers(tmp_path):
    export.onnx(residual(), X, tmp_path / "net.onnx")
    names = [node.name for node in onnx.load(tmp_path / "net.onnx").graph.node]
    assert {"Residual/Conv_0/Conv", "Residual/Conv_1/Conv", "Residual/Dense_0/Gemm"} <= {*names}
    assert len({*names}) == len(names)


# Signatures


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [(jnp.float16, 0, 4e-3), (jnp.bfloat16, 0, 3e-2)]
)
def test_half_networks_keep_their_dtypes(dtype, low, high, tmp_path):
    """Rounding of the result alone is 2^-11 and 2^-8 of a value."""
    x = jnp.asarray(X, dtype)
    done = export.onnx(residual(dtype), x, tmp_path / "net.onnx")
    assert low < done.relative < high
    y = export.session(done.path)(np.asarray(x[:2]))
    assert y.dtype == dtype
    with jax.numpy_dtype_promotion("standard"):
        error = np.abs(np.float32(y) - np.float32(residual(dtype)(x[:2])))
    assert error.max() < high * np.abs(np.float32(y)).max()


def test_images_and_tokens_keep_their_dtypes(tmp_path):
    images = RANDOM.integers(0, 255, X.shape).astype(np.uint8)
    tokens = RANDOM.integers(0, 9, (4, 5)).astype(np.int32)
    table, net = RANDOM.normal(size=(9, 5)).astype(np.float32), residual()

    def fn(x):
        seen = net((x["images"].astype(jnp.float32) - 127) / 58)
        read = jnp.asarray(table)[x["tokens"]].mean(1)
        return {"sum": seen + read, "parts": (seen, jnp.argmax(read, -1))}

    x = {"tokens": tokens, "images": images}
    done = export.onnx(fn, x, tmp_path / "net.onnx")
    run, expected = export.session(done.path), fn(x)
    got = run(x)
    assert list(got) == ["parts.0", "parts.1", "sum"]
    np.testing.assert_allclose(got["sum"], expected["sum"], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(got["parts.1"], expected["parts"][1])
    assert got["parts.1"].dtype == np.int32
    again = run(images, tokens)  # in the order of the file: that of jax.tree.leaves
    np.testing.assert_array_equal(again["sum"], got["sum"])


def test_inputs_and_results_are_named(tmp_path):
    def fn(a, b):
        return b * 2, a, a

    done = export.onnx(fn, (X, S[:, 0]), tmp_path / "f", sizes=("n, ...", "m, 4"))
    assert list(export.session(done.path)(X, S[:, 0])) == ["output_0", "output_1", "output_2"]
    names = {"inputs": ("left", "right"), "outputs": ("x", "y", "z")}
    done = export.onnx(fn, (X, X), tmp_path / "f", **names)
    got = export.session(done.path)({"right": X[:2], "left": X[2:]})
    for name, expected in zip("xyz", fn(X[2:], X[:2]), strict=True):
        np.testing.assert_array_equal(got[name], expected)


def test_height_and_width_are_free_by_option(tmp_path):
    for sizes in ("B, h, w, 4", "B, 4*h, 4*w, 4"):
        done = export.onnx(residual(), X, tmp_path / "net.onnx", sizes=sizes)
        x = np.tile(X, (1, 2, 3, 1))[:, :12, :20]
        np.testing.assert_allclose(
            export.session(done.path)(x), residual()(x), rtol=1e-4, atol=1e-5
        )
    layer = with_weights(nn.Conv(3, (3, 3)), X)
    folded, _ = jaxbn.fold(lambda x: (layer(x) * 2).mean((1, 2)), X)  # divides by the size
    export.onnx(folded, X, tmp_path / "net.onnx", sizes="B, h, w, 4")
    export.onnx(residual(), X, tmp_path / "net.onnx", sizes="4, 8, 8, 4")
    dims = onnx.load(tmp_path / "net.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in dims] == [4, 8, 8, 4]


@pytest.mark.parametrize("opset", [17, 18, 23])
def test_the_opset_is_chosen(opset, tmp_path):
    export.onnx(lambda x: nn.gelu(x).mean(-1), X, tmp_path / "f", opset=opset)
    model = onnx.load(tmp_path / "f")
    assert [o.version for o in model.opset_import if o.domain == ""] == [opset]
    assert operators(tmp_path / "f")["Gelu"] == (opset >= 20)


def test_large_weights_lie_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxbn.export._onnx.LIMIT", 1000)
    done = export.onnx(residual(), X, tmp_path / "net.onnx")
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sorted(sizes) == ["net.onnx", "net.onnx.data"]
    assert done.bytes == sum(sizes.values())
    np.testing.assert_allclose(export.session(done.path)(X), residual()(X), rtol=1e-4, atol=1e-5)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("write", [export.onnx, export.stablehlo, export.int8])
def test_an_older_export_goes_as_a_whole(write, manifest, tmp_path, monkeypatch):
    """With the weights that the older file referred to, and with its manifest."""
    folder = tmp_path / "folder"
    folder.mkdir()
    w = RANDOM.normal(size=(8 * 8 * 4, 3)).astype(np.float32)
    fn = {"fn": lambda x: x.reshape(-1, 8 * 8 * 4) @ w}["fn"]
    given = (fn, X) if write is not export.int8 else (export.onnx(fn, X, tmp_path / "f").path, [X])
    with monkeypatch.context() as patch:
        patch.setattr("jaxbn.export._onnx.LIMIT", 100)
        older = export.onnx(fn, X, folder / "net.onnx")
    if manifest:
        export.manifest(older)
        whole = ["net.onnx", "net.onnx.data", "net.onnx.manifest.json"]
        assert names_in(folder) == whole
        with pytest.raises(ValueError, match="not finite"):
            export.onnx(jnp.log, -jnp.ones_like(X), older.path)
        assert (names_in(folder), export.read_manifest(older.path)["weights"]["bytes"]) == (
            whole,
            w.nbytes,
        )
    done = write(*given, older.path)
    assert names_in(folder) == ["net.onnx"]
    export.manifest(done)
    told = export.read_manifest(done.path)
    assert (told["weights"], told["artifact"]["bytes"]) == (None, done.bytes)


def test_what_stands_beside_a_file_and_is_not_of_it_stays_and_does_not_count(tmp_path):
    path = tmp_path / "net.onnx"
    others = {"net.onnx.data": b"a user's", "net.onnx.manifest.json": b'{"format": 2}'}
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    w = RANDOM.normal(size=(4, 3)).astype(np.float32)
    for _ in range(2):
        done = export.onnx(lambda x: x @ w, X, path)
        assert {name: (tmp_path / name).read_bytes() for name in others} == others
    export.int8(path, [X], tmp_path / "int8")
    export.manifest(done)
    copy = export.triton(tmp_path / "models", path)
    assert copy.read_bytes() == path.read_bytes()
    assert export.read_manifest(path)["weights"] is None
    assert "int8.data" not in names_in(tmp_path)
    assert (tmp_path / "net.onnx.data").read_bytes() == others["net.onnx.data"]


def test_a_function_of_other_rows_is_compared_with_itself(tmp_path):
    """The results on some rows are no rows of the results on all."""
    done = export.onnx(lambda x: x[::-1], X, tmp_path / "f")
    assert done.relative < 1e-6


def test_the_converter_leaves_jax_as_it_was(tmp_path):
    export.onnx(lambda x: x * 2, X, tmp_path / "f")
    assert jnp.cumsum(jnp.ones((2, 3)), 1)[0, -1] == 3


OPENVINO = """
import numpy, openvino, sys
folder = sys.argv[1]
# Its default on some processors is bfloat16.
options = {"INFERENCE_PRECISION_HINT": "f32"}
run = openvino.compile_model(f"{folder}/net.onnx", "CPU", options)
for rows in (1, 3):
    numpy.save(f"{folder}/{rows}.npy", *run(numpy.load(f"{folder}/x.npy")[:rows]).values())
"""


def test_openvino_computes_the_same(tmp_path):
    """Another runtime than the one that checked the file, where it is installed.

    In a process of its own: it forks, which a process with JAX must not.
    """
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("openvino is not installed")
    export.onnx(residual(), X, tmp_path / "net.onnx")
    np.save(tmp_path / "x.npy", X)
    subprocess.run([sys.executable, "-c", OPENVINO, tmp_path], check=True)
    for rows in (1, 3):
        y, want = np.load(tmp_path / f"{rows}.npy"), residual()(X[:rows])
        np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)


# Refusals


def unknown(x):
    return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


class Unknown(nn.Module):
    def __call__(self, x):
        return unknown(x)


NO_NUMBERS = (
    "expected numbers that can be compared; nothing was written. Look for NaN and inf in the "
    "weights and in x, or for values beyond what {} holds."
)
REFUSED = {
    "an unknown operation": (
        lambda x: Unknown().apply({}, x),
        {},
        "onnx: pure_callback in Unknown cannot be converted: [converter] No plugins registered for "
        "primitive 'pure_callback'; expected operations that ONNX has. Compute it outside fn or by "
        "other operations, or write jaxbn.export.stablehlo, which takes all but calls into Python.",
    ),
    "NaN": (
        lambda x: jnp.sqrt(x[..., 0]),
        {},
        f"onnx: {(X[..., 0] < 0).sum()} of 256 values of the function's result are not finite, "
        + NO_NUMBERS.format("float32"),
    ),
    "inf in float16": (
        lambda x: x.astype(jnp.float16) * jnp.float16(6e4) * jnp.float16(6e4),
        {},
        "onnx: 1024 of 1024 values of the function's result are not finite, "
        + NO_NUMBERS.format("float16"),
    ),
    "an opset": (jnp.sin, {"opset": 9}, "onnx: opset is 9, expected 17 to 23; write opset=21."),
    "too many names": (
        jnp.sin,
        {"outputs": ("a", "b")},
        "onnx: outputs are ['a', 'b'], expected 1 different names, one for each array; write "
        "outputs=('output_0',).",
    ),
    "a name twice": (
        lambda x: (x, x),
        {"outputs": ("a", "a")},
        "onnx: outputs are ['a', 'a'], expected 2 different names, one for each array; write "
        "outputs=('output_0', 'output_1',).",
    ),
    "sizes of something else": (
        jnp.sin,
        {"sizes": "B, 9, ..."},
        "onnx: sizes 'B, 9, ...' do not fit x of shape (4, 8, 8, 4): syntax error in symbolic "
        "shape 'B, 9, ...' in dimension 1: different size 9 for known dimension; like=(4, 8, 8, "
        "4). Parsed 'B, 9', remaining ', ...'; expected its sizes, with letters where they are "
        "free; write 'B, ...'.",
    ),
    "too many sizes": (
        jnp.sin,
        {"sizes": ("B, ...", "B")},
        "onnx: sizes are 2 but x has 1 arrays, expected one string for each; write "
        "sizes=('B, ...').",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exported_is_refused(name, tmp_path):
    fn, options, message = REFUSED[name]
    with pytest.raises(ValueError) as error:
        export.onnx(fn, X, tmp_path / "f", **options)
    assert str(error.value) == message
    assert list(tmp_path.iterdir()) == []


def test_a_function_of_one_size_is_refused_with_the_line_for_that_size(tmp_path):
    def fn(x):
        return x if x.shape[0] > 3 else x[:3]

    with pytest.raises(ValueError) as error:
        export.onnx(fn, X, tmp_path / "f")
    text = str(error.value)
    assert text.startswith("onnx: fn cannot be traced with sizes B, 8, 8, 4: ")
    assert text.endswith(
        "; expected operations that work at any size; for this size alone, write "
        "sizes='4, 8, 8, 4'."
    )
    export.onnx(fn, X, tmp_path / "f", sizes="4, 8, 8, 4")


def test_inputs_that_do_not_fit_a_file_are_refused(tmp_path):
    export.onnx(jnp.sin, X, tmp_path / "f")
    run = export.session(tmp_path / "f")
    expected = "expected input float32 [B, 8, 8, 4]."
    for inputs, got in (
        ([X[:, :4]], "input float32 [4, 4, 8, 4]"),
        ([X.astype(np.float64)], "input float64 [4, 8, 8, 4]"),
        ([X, X], "input float32 [4, 8, 8, 4]"),
        ([{"x": X}], "x float32 [4, 8, 8, 4]"),
        ([], "nothing"),
    ):
        with pytest.raises(ValueError) as error:
            run(*inputs)
        text = str(error.value)
        assert text.startswith(f"session: {tmp_path}/f cannot run on {got}: ")
        assert text.endswith(expected)
