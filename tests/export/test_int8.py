"""int8 files: how ranges are found, what stays float, what the report says."""

import flax.linen as nn
import jax
import numpy as np
import onnx
import pytest

from jaxbn import export

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(16, 8, 8, 4)).astype(np.float32)
Q = onnx.TensorProto


class Net(nn.Module):
    """Most positions reach the result by a maximum: a ReduceMax between two layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        return nn.softmax(nn.Dense(5)(x.max((1, 2))))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    variables = Net().init(jax.random.key(0), X)
    path = tmp_path_factory.mktemp("float") / "net.onnx"
    return export.onnx(lambda x: Net().apply(variables, x), X, path).path


def dtypes(path):
    """The dtypes of zero points of activations."""
    graph = onnx.load(path).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    return {kinds[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"}


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({}, {Q.UINT8}),
        ({"activations": "int8"}, {Q.INT8}),
        ({"calibration": "entropy"}, {Q.UINT8}),
        ({"calibration": "percentile", "per_channel": False}, {Q.UINT8}),
        ({"dynamic": True}, set()),
        ({"activations": "int8", "per_channel": False}, {Q.INT8}),
    ],
)
def test_eight_bits_in_every_way(options, kinds, source, tmp_path):
    """256 levels over the range seen; softmax divides the error of the logits once more."""
    done = export.int8(source, [X, X[:3]], tmp_path / "int8.onnx", **options)
    assert 1e-5 < done.relative < 0.05
    assert dtypes(done.path) == kinds
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int8.onnx"]
    weights = [t.data_type for t in onnx.load(done.path).graph.initializer if len(t.dims) > 1]
    assert set(weights) == {Q.INT8}
    assert set(done.milliseconds) == {"float32", "int8"}
    assert min(done.milliseconds.values()) > 0


def test_outliers_widen_the_range_of_minmax_alone(source, tmp_path):
    """One value of 16,384 is 1000 times as large: in its range all others are one number."""
    other = np.tile(X, (3, 1, 1, 1))
    other[0, 0, 0, 0] = 1000
    errors = {
        way: export.int8(source, [X, other], tmp_path / "q", calibration=way, tolerance=9).relative
        for way in ("minmax", "percentile")
    }
    assert errors["percentile"] < errors["minmax"] / 2


def test_what_stays_float_is_in_the_report(source, tmp_path):
    done = export.int8(source, [X], tmp_path / "q")
    assert not [name for name in done.in_float if "Conv" in name]
    left = export.int8(source, [X], tmp_path / "q", leave_out=("*/Conv_0/*", "*Dense*"))
    alone = export.int8(source, [X], tmp_path / "one", leave_out="*/Conv_0/*")
    assert "Net/Conv_0/Conv" in alone.in_float
    assert "Net/Conv_0/Conv" in left.in_float
    assert "Net/Conv_1/Conv" not in left.in_float
    assert f"in float: {left.in_float[0]}" in str(left)
    weights = {t.data_type for t in onnx.load(left.path).graph.initializer if len(t.dims) > 1}
    assert weights == {Q.INT8, Q.FLOAT}


def test_several_inputs_are_calibrated_by_name(tmp_path):
    w = RANDOM.normal(size=(4, 3)).astype(np.float32)
    x = {"a": X[:, 0, 0], "b": X[:, 1, 1]}
    fn = {"sum": lambda x: (x["a"] + x["b"]) @ w}["sum"]
    export.onnx(fn, x, tmp_path / "f", inputs=("a", "b"))
    for batch in (x["a"], (*x.values(), X), {"a": X}):
        with pytest.raises(ValueError) as error:
            export.int8(tmp_path / "f", [x, batch], tmp_path / "q")
        assert str(error.value) == (
            "int8: batch 1 has other arrays than the file, expected a, b; write a tuple in this "
            "order, or a dict by name."
        )
    for batch in (x, (x["a"], x["b"])):
        done = export.int8(tmp_path / "f", [batch], tmp_path / "q")
        assert 1e-4 < done.relative < 0.05


def test_weights_beside_the_source_are_read_and_written(tmp_path, monkeypatch, source):
    monkeypatch.setattr("jaxbn.export._onnx.LIMIT", 100)
    variables = Net().init(jax.random.key(0), X)
    wide = export.onnx(lambda x: Net().apply(variables, x), X, tmp_path / "net.onnx")
    done = export.int8(wide.path, [X], tmp_path / "int8.onnx")
    assert done.bytes < export.int8(source, [X], tmp_path / "one").bytes + 4000
    assert export.session(done.path)(X).shape == (16, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"calibration": "mean"},
            "int8: calibration is 'mean', expected 'minmax' or 'entropy' or 'percentile'; write "
            "calibration='minmax'.",
        ),
        (
            {"activations": "int4"},
            "int8: activations is 'int4', expected 'uint8' or 'int8'; write activations='uint8'.",
        ),
        (
            {"leave_out": ("*Conv_9*",)},
            "int8: leave_out has '*Conv_9*', which fits no node; expected names such as "
            "Net/Conv_0/Transpose, Net/Conv_0/Conv, Net/Relu, Net/MaxPool and 5 more.",
        ),
    ],
)
def test_what_does_not_fit_is_refused(options, message, source, tmp_path):
    with pytest.raises(ValueError) as error:
        export.int8(source, [X], tmp_path / "q", **options)
    assert str(error.value) == message
    assert list(tmp_path.iterdir()) == []
