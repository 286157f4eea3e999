"""Files of weights as others write them: in parts, in wrappers, with types that are refused."""

import json
import struct
import sys
import types

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxbn import convert
from jaxbn._checkpoints import read
from jaxbn.convert._matching import MisfitError
from tests.support.conversion import assert_same, normal
from tests.support.messages import message

STATE = {"a.weight": normal(2, 3), "b.weight": normal(4, 2)}
LIKE = {"params": {"a": {"kernel": jnp.zeros((3, 2))}, "b": {"kernel": jnp.zeros((2, 4))}}}
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    """A model in two files, as save_pretrained writes large ones."""
    places = {}
    for i, (name, v) in enumerate(STATE.items(), 1):
        places[name] = f"model-{i:05}-of-00002.safetensors"
        save_file({name: v}, tmp_path / places[name])
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return tmp_path


def test_a_model_in_parts_is_read_by_its_folder_or_index(folder):
    whole, _ = convert.from_torch(STATE, LIKE)
    for path in (folder, folder / INDEX):
        assert_same(convert.from_torch(path, LIKE)[0], whole)
        assert_same(read.read(path), {k[0]: {"weight": v} for k, v in STATE.items()})


def test_a_folder_with_one_file(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert_same(convert.from_torch(tmp_path, LIKE)[0], convert.from_torch(STATE, LIKE)[0])


DAMAGED = {
    "no file": (lambda f: [p.unlink() for p in f.iterdir()], "it has no file .safetensors or "),
    "no index": (
        lambda f: (f / INDEX).unlink(),
        "it has 2 files .safetensors and no .safetensors.index.json; ",
    ),
    "a list": (lambda f: (f / INDEX).write_text("[]"), "its index has no weight_map of names to "),
    "no JSON": (lambda f: (f / INDEX).write_text("{"), "Expecting property name enclosed in "),
    "deep": (lambda f: (f / INDEX).write_text("[" * 10**5), ""),
    "a number": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"a.weight": 3}}'),
        "its index has no weight_map of names to ",
    ),
    "outside": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"a.weight": "../a.safetensors"}}'),
        "its index names what is no file of weights in its folder; ",
    ),
    "another kind": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"a.weight": "passwd"}}'),
        "its index names what is no file of weights in its folder; ",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_folder_is_refused(kind, folder):
    damage, said = DAMAGED[kind]
    damage(folder)
    text = message(ValueError, convert.from_torch, folder, LIKE)
    assert text.startswith(f"from_torch: {str(folder)!r} is no folder of weights: {said}")
    assert text.endswith(
        "; expected one file, or several with an index, as save_pretrained writes them."
    )


def test_parts_that_are_not_those_of_the_index(folder):
    second = folder / "model-00002-of-00002.safetensors"
    save_file({"c.weight": STATE["b.weight"]}, second)
    said = message(ValueError, convert.from_torch, folder, LIKE)
    assert said.startswith(f"from_torch: {str(folder)!r}: a file and the index disagree about '")
    second.unlink()
    assert message(FileNotFoundError, convert.from_torch, folder, LIKE) == (
        f"from_torch: no file {str(second)!r}."
    )


CHECKPOINTS = {  # checkpoint → what the error says to write
    "optimizer first": (
        {"optimizer": {"state": {}, "groups": []}, "model": STATE},
        "the state_dict alone: checkpoint['model']",
    ),
    "timm": (
        {"epoch": 3, "state_dict_ema": STATE, "state_dict": STATE},
        "the state_dict alone: checkpoint['state_dict'], or the averaged weights, "
        "checkpoint['state_dict_ema']",
    ),
    "averages alone": (
        {"model_ema": STATE, "step": 1},
        "the state_dict alone: checkpoint['model_ema']",
    ),
    "Lightning": (
        {
            "pytorch-lightning_version": "2",
            "state_dict": {f"model.{name}": v for name, v in STATE.items()},
        },
        "the state_dict alone: checkpoint['state_dict'], with rename={'model': ''}",
    ),
    "nothing": ({"epoch": 3}, "model.state_dict()"),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_checkpoint_is_refused_with_the_place_of_the_weights(kind):
    checkpoint, hint = CHECKPOINTS[kind]
    assert message(ValueError, convert.from_torch, checkpoint, LIKE).endswith(
        f"expected arrays by name; write {hint}."
    )


@pytest.mark.parametrize("prefix", ["module", "model.backbone"])
def test_a_wrapper_around_all_layers_is_named(prefix):
    state = {name: normal(2, 2, seed=i) for i, name in enumerate(STATE)}  # no shape occurs once
    like = {"params": {name: {"kernel": jnp.zeros((2, 2))} for name in ("a", "b")}}
    wrapped = {f"{prefix}.{name}": v for name, v in state.items()}
    said = message(MisfitError, convert.from_torch, wrapped, like)
    hint = f"a wrapper called {prefix!r} is around the source: rename={{{prefix!r}: ''}}"
    assert f"\n  {hint}\n" in said
    new, _ = convert.from_torch(wrapped, like, rename={prefix: ""})
    assert_same(new, convert.from_torch(state, like)[0])


@pytest.mark.parametrize("name", ["net.ckpt", "net.pth.tar", "net.pth"])
def test_every_name_of_a_pickle_goes_through_torch(name, tmp_path, monkeypatch):
    calls = []

    def load(path, **options):
        calls.append(options)
        return STATE

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(load=load))
    (tmp_path / name).touch()
    for path in (tmp_path / name, tmp_path):
        assert_same(convert.from_torch(path, LIKE)[0], convert.from_torch(STATE, LIKE)[0])
    assert calls == [{"map_location": "cpu", "weights_only": True}] * 2


class Tensor:
    """A torch tensor as far as `from_torch` looks before it takes the values."""

    shape = (2, 3)

    def __init__(self, dtype, **attributes):
        self.dtype = dtype
        vars(self).update(attributes)

    def detach(self):
        raise AssertionError("the values were taken")


SCALED = (
    "whose scale is not part of the array; expected floats of 16 bits or more; write the model's "
    "own dequantization"
)
REFUSED = {
    "meta": (
        Tensor("torch.float32", is_meta=True),
        "'a.weight' is on the meta device, a shape without values; load the weights first: "
        "model.load_state_dict(torch.load(path, weights_only=True), assign=True).",
    ),
    "quantized": (
        Tensor("torch.qint8", is_quantized=True),
        f"'a.weight' is qint8, {SCALED}, or tensor.dequantize(), first.",
    ),
    "fp8": (
        Tensor("torch.float8_e4m3fn"),
        f"'a.weight' is float8_e4m3fn, {SCALED}, or tensor.dequantize(), first.",
    ),
    "fp8 in NumPy": (
        np.ones((2, 3), ml_dtypes.float8_e5m2),
        f"'a.weight' is float8_e5m2, {SCALED}, or tensor.dequantize(), first.",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_holds_no_weights_is_refused(kind):
    tensor, said = REFUSED[kind]
    state = {**STATE, "a.weight": tensor}
    assert message(ValueError, convert.from_torch, state, LIKE) == f"from_torch: {said}"


def test_fp8_in_a_file(tmp_path):
    entry = {"dtype": "F8_E4M3", "shape": [2, 3], "data_offsets": [0, 6]}
    header = json.dumps({"a.weight": entry}).encode()
    path = tmp_path / "net.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(6))
    assert message(ValueError, convert.from_torch, path, LIKE) == (
        f"from_torch: 'a.weight' is F8_E4M3, {SCALED} first."
    )
