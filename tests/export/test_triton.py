"""Model repositories of Triton: whole or not at all, and with settings that fit their file."""

import importlib.util
import json
import re

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbn import export

X = np.random.default_rng(0).normal(size=(4, 8, 3)).astype(np.float32)
TOKENS = re.compile(r'"((?:[^"\\]|\\.)*)"|([A-Za-z_]\w*:?|-?\d+|[{}\[\],])')


def classify(x):
    logits = nn.relu(x["sound"]).mean(1)
    return {"logits": logits, 'la"bel\n': jnp.argmax(logits, -1) + x["tokens"].sum(-1)}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    x = {"sound": X, "tokens": np.arange(8, dtype=np.int32).reshape(4, 2)}
    done = export.onnx(classify, x, tmp_path_factory.mktemp("float") / "net.onnx")
    export.manifest(done)
    return done.path


def parsed(path):
    """config.pbtxt as a dict, by Triton's own message where tritonclient is installed."""
    text = path.read_text()
    ours = message(iter(TOKENS.findall(text)))
    if importlib.util.find_spec("tritonclient") is not None:
        from google.protobuf import json_format, text_format
        from tritonclient.grpc.model_config_pb2 import ModelConfig

        theirs = json_format.MessageToDict(
            text_format.Parse(text, ModelConfig()), preserving_proto_field_name=True
        )
        assert theirs == as_json(ours)
    return ours


def message(tokens):
    """Protobuf's text format: fields with a colon, messages in braces, lists in brackets."""
    fields = {}
    for _, word in tokens:
        if word == "}":
            break
        if word.endswith(":"):
            quoted, plain = next(tokens)
            if plain == "[":
                value = list(iter(lambda: next(v for _, v in tokens if v != ","), "]"))
                value = [int(v) for v in value]
            else:
                value = plain or unescaped(quoted)
                value = int(value) if plain.lstrip("-").isdecimal() else value
            fields[word[:-1]] = value
        else:
            assert next(tokens)[1] == "{"
            inner = message(tokens)
            fields.setdefault(word, []).append(inner) if word in ("input", "output") else (
                fields.update({word: inner})
            )
    return fields


def unescaped(quoted):
    octal = re.sub(rb"\\(\d{3})", lambda m: bytes([int(m[1], 8)]), quoted.encode())
    return octal.decode()


def as_json(value):
    """As protobuf's JSON has it: 64-bit numbers are strings, zeros and empty lists are left out."""
    if isinstance(value, dict):
        pairs = {k: as_json(v) for k, v in value.items()}
        if "max_batch_size" in pairs:
            pairs["max_batch_size"] = int(pairs["max_batch_size"])
        return {k: v for k, v in pairs.items() if v not in (0, [])}
    if isinstance(value, list):
        return [as_json(v) for v in value]
    return str(value) if isinstance(value, int) else value


def test_the_repository_serves_the_file(source, tmp_path):
    path = export.triton(tmp_path / "models", source)
    names = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*"))
    assert names == [
        "models",
        "models/net",
        "models/net/1",
        "models/net/1/model.onnx",
        "models/net/1/model.onnx.manifest.json",
        "models/net/config.pbtxt",
    ]
    assert path.read_bytes() == source.read_bytes()
    assert parsed(path.parents[1] / "config.pbtxt") == {
        "name": "net",
        "backend": "onnxruntime",
        "max_batch_size": 64,
        "input": [
            {"name": "sound", "data_type": "TYPE_FP32", "dims": [8, 3]},
            {"name": "tokens", "data_type": "TYPE_INT32", "dims": [2]},
        ],
        # A result without sizes but the batch: Triton knows none, and reshapes.
        "output": [
            {"name": 'la"bel\n', "data_type": "TYPE_INT32", "dims": [1], "reshape": {"shape": []}},
            {"name": "logits", "data_type": "TYPE_FP32", "dims": [3]},
        ],
        "dynamic_batching": {"max_queue_delay_microseconds": 500},
    }


def test_the_manifest_comes_along(source, tmp_path):
    """The copy's own names and checksums; what the file was made of as the source says."""
    path = export.triton(tmp_path, source)
    copied, original = export.read_manifest(path), export.read_manifest(source)
    assert copied["artifact"] == original["artifact"] | {"file": "model.onnx"}
    assert {k: v for k, v in copied.items() if k != "artifact"} == {
        k: v for k, v in original.items() if k != "artifact"
    }
    assert "artifact" in original["errors"]
    bare = tmp_path / "bare.onnx"
    bare.write_bytes(source.read_bytes())
    assert export.read_manifest(export.triton(tmp_path, bare))["errors"] == {}


def test_each_request_is_a_call_by_option(tmp_path):
    """Without batching the sizes are those of the file; they may be fixed, or another be free."""
    for sizes, dims in (("4, 8, 3", [4, 8, 3]), ("4, n, 3", [4, -1, 3])):
        export.onnx(lambda x: x * 2, X, tmp_path / "net.onnx", sizes=sizes)
        path = export.triton(
            tmp_path / sizes, tmp_path / "net.onnx", max_batch_size=0, name="a-b.c"
        )
        settings = parsed(path.parents[1] / "config.pbtxt")
        assert (settings["name"], settings["max_batch_size"]) == ("a-b.c", 0)
        assert settings["input"][0]["dims"] == settings["output"][0]["dims"] == dims
        assert "dynamic_batching" not in settings


def test_another_version_leaves_the_settings_as_they_are(source, tmp_path):
    """An edited config.pbtxt stays, as long as the inputs and results are the same."""
    settings = export.triton(tmp_path, source).parents[1] / "config.pbtxt"
    settings.write_text(edited := settings.read_text() + "instance_group { count: 2 }\n")
    second = export.triton(tmp_path, source, version=2)
    assert second == tmp_path / "net" / "2" / "model.onnx"
    assert second.read_bytes() == source.read_bytes()
    assert settings.read_text() == edited
    assert sorted(p.name for p in second.parents[1].iterdir()) == ["1", "2", "config.pbtxt"]


def test_weights_beside_the_file_come_along(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxbn.export._onnx.LIMIT", 100)
    w = np.random.default_rng(1).normal(size=(3, 500)).astype(np.float32)
    done = export.onnx(lambda x: x @ w, X, tmp_path / "net.onnx")
    export.manifest(done)
    path = export.triton(tmp_path / "models", done.path)
    assert export.read_manifest(path)["weights"]["file"] == "model.onnx.data"
    done.path.with_name("net.onnx.data").unlink()
    np.testing.assert_allclose(export.session(path)(X), X @ w, rtol=1e-5, atol=1e-5)


def test_a_file_in_the_place_of_the_folder_is_refused(source, tmp_path):
    with pytest.raises(NotADirectoryError) as error:
        export.triton(source, tmp_path / "models")
    assert str(error.value) == (
        f"triton: {source} is a file, expected the folder of a model repository, and behind it an "
        "ONNX file; write export.triton(folder, source)."
    )
    assert not (tmp_path / "models").exists()


def fixed(x):
    return x


def test_what_does_not_fit_is_refused(source, tmp_path):
    """Nothing is written, and what is there stays as it was."""
    half = tmp_path / "half.onnx"
    export.onnx(lambda x: x * 2, jnp.asarray(X, jnp.bfloat16), half)
    whole = tmp_path / "whole.onnx"
    export.onnx(lambda x: (x, x[0]), X, whole)
    changed = tmp_path / "changed.onnx"
    changed.write_bytes(source.read_bytes())
    note = json.loads(source.with_name("net.onnx.manifest.json").read_text())
    note["artifact"]["sha256"] = "0" * 64
    changed.with_name("changed.onnx.manifest.json").write_text(json.dumps(note))
    there = tmp_path / "there"
    config = export.triton(there, source).parents[1] / "config.pbtxt"
    (there / "other").mkdir()
    cases = [
        (
            source,
            {"name": "../net"},
            "triton: name is '../net', expected letters, digits, '_', '-' and "
            "'.'; write name='net'.",
        ),
        (
            source,
            {"version": 0},
            "triton: version is 0, expected a whole number of at least 1; write version=1.",
        ),
        (
            source,
            {"version": True},
            "triton: version is True, expected a whole number of at least 1; write version=1.",
        ),
        (
            source,
            {"max_batch_size": -1},
            "triton: max_batch_size is -1, expected a whole number of at "
            "least 0; write max_batch_size=1.",
        ),
        (
            source,
            {"max_queue_delay_microseconds": 0.5},
            "triton: max_queue_delay_microseconds is 0.5, "
            "expected a whole number of at least 0; write max_queue_delay_microseconds=1.",
        ),
        (
            half,
            {},
            f"triton: input 'input' of {half} is bfloat16, which Triton's onnxruntime backend "
            "does not take; expected a dtype such as float32; cast inside fn before "
            "jaxbn.export.onnx.",
        ),
        (
            whole,
            {},
            f"triton: result 'output_1' of {whole} has sizes [8, 3], expected a free batch "
            "first (-1), because requests are put together; write max_batch_size=0.",
        ),
        (
            source,
            {},
            f"triton: {there}/net/1 is there already; write version=2, or remove the folder.",
        ),
        (
            whole,
            {"name": "net", "version": 2, "max_batch_size": 0},
            f"triton: {config} lacks the line "
            "'input { name: \"input\" data_type: TYPE_FP32 dims: [ -1, 8, 3 ] }', expected "
            "the inputs and results of the file; write another name, or remove the folder.",
        ),
        (
            source,
            {"name": "other"},
            f"triton: {there}/other is there, but config.pbtxt cannot be read: "
            f"[Errno 2] No such file or directory: '{there}/other/config.pbtxt'; write "
            "another name, or remove the folder.",
        ),
        (
            changed,
            {},
            f"read_manifest: {changed} has the SHA-256 {note_of(source)[:12]}…, but its "
            "manifest says 000000000000…: the file has changed; export it again",
        ),
    ]
    before = sorted(there.rglob("*"))
    for path, options, text in cases:
        with pytest.raises(ValueError) as error:
            export.triton(there, path, **options)
        assert str(error.value) == text
    assert sorted(there.rglob("*")) == before


def note_of(path):
    return export.read_manifest(path)["artifact"]["sha256"]


def test_a_copy_that_fails_leaves_nothing(source, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    export.triton(tmp_path, source)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("jaxbn.export._triton.write_for_copy", full)
    for options in ({"version": 2}, {"name": "new"}):
        with pytest.raises(OSError, match="No space"):
            export.triton(tmp_path, source, **options)
        assert sorted(tmp_path.rglob("*")) == before
