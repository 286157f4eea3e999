"""Networks of torchvision and timm, and the files that these write: read by name into Flax."""

import json
import pathlib
import sys

import jax
import numpy as np
import pytest

from jaxbn import convert
from tests.support import oracle
from tests.support.compiling import as_pasted

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples" / "convert"))
import zoo
from zoo_networks import ZOO, Linen

torch = pytest.importorskip("torch")
X = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)


def lived_in(model):
    """Random weights, and the statistics of three batches."""
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(4, 3, 64, 64))
        want = model.eval()(torch.from_numpy(np.moveaxis(X, -1, 1).copy()))
    return model, want.numpy()


def likeness(name):
    """The zoo's network, and the shapes of its variables."""
    linen = Linen(ZOO[name].net, tuple(ZOO[name].arguments.items()))
    with as_pasted():
        return linen, jax.eval_shape(linen.init, jax.random.key(0), X)


def assert_computes(linen, variables, want):
    """Some hundred layers, each of which rounds its sums in an order of its own."""
    with as_pasted():
        y = jax.jit(linen.apply)(variables, X)
    oracle.assert_close(y, np.float64(want), 10 * oracle.tolerance("float32", 1000))


def written_as(kind, model, folder):
    """The file or folder, as people write the model."""
    if kind in ("model.pth", "model.ckpt", "model.pth.tar", "pytorch_model.bin"):
        torch.save(model.state_dict(), folder / kind)
        return folder / kind
    from safetensors.torch import save_file, save_model

    if kind == "model.safetensors":
        save_model(model, str(folder / kind))
        return folder / kind
    places, parts = {}, ({}, {})
    for i, (key, value) in enumerate(model.state_dict().items()):
        parts[i % 2][key] = value.contiguous()
        places[key] = f"model-0000{i % 2 + 1}-of-00002.safetensors"
    for i, part in enumerate(parts, 1):
        save_file(part, folder / f"model-0000{i}-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("name", ZOO)
def test_a_network_of_torchvision(name, tmp_path):
    torchvision = pytest.importorskip("torchvision")
    model, want = lived_in(getattr(torchvision.models, name)(weights=None))
    linen, like = likeness(name)
    path = written_as("model.pth", model, tmp_path)
    variables, report = convert.from_torch(path, like, momentum=0.1, eps=1e-5)
    assert report.matched_by == "names"
    assert_computes(linen, variables, want)
    again, _ = convert.to_torch(variables, model.state_dict())
    model.load_state_dict({key: torch.from_numpy(np.asarray(v)) for key, v in again.items()})


KINDS = ("model.ckpt", "model.pth.tar", "pytorch_model.bin", "model.safetensors", "a folder")


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_timm(kind, tmp_path):
    timm = pytest.importorskip("timm")
    model, want = lived_in(timm.create_model("resnet18"))
    linen, like = likeness("resnet18")
    path = written_as(kind, model, tmp_path)
    variables, report = convert.from_torch(path, like, momentum=0.1, eps=1e-5)
    assert report.matched_by == "names"
    if kind == "a folder":  # the others hold the same arrays
        assert_computes(linen, variables, want)


def test_wrappers_are_named(tmp_path):
    """As timm's and Lightning's trainers write them."""
    timm = pytest.importorskip("timm")
    state = timm.create_model("resnet18").state_dict()
    _, like = likeness("resnet18")
    wrappers = {
        "state_dict_ema": {"epoch": 3, "arch": "resnet18", "state_dict_ema": state},
        "state_dict": {
            "epoch": 3,
            "pytorch-lightning_version": "2.5.0",
            "state_dict": {f"model.{key}": v for key, v in state.items()},
        },
    }
    for key, content in wrappers.items():
        path = tmp_path / "last.ckpt"
        torch.save(content, path)
        with pytest.raises(ValueError, match=f"checkpoint\\['{key}'\\]"):
            convert.from_torch(path, like)


def test_the_zoo_beside_torchvision():
    pytest.importorskip("torchvision")
    with as_pasted():
        _, reference, linen, variables, _ = zoo.converted("resnet18", X, torchvision=True)
    assert_computes(linen, variables, reference)
