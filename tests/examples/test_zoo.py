"""The zoo: torchvision's names are as published, and every network converts, folds and exports."""

import math
import pathlib
import sys

import jax
import numpy as np
import pytest

from jaxbn import export
from tests.support.compiling import as_pasted

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples" / "convert"))
import zoo
import zoo_names
from zoo_networks import ZOO

# Parameters and entries of the state_dict, as torchvision's documentation and files have them.
PUBLISHED = {
    "resnet18": (11_689_512, 122),
    "resnet50": (25_557_032, 320),
    "mobilenet_v2": (3_504_872, 314),
    "efficientnet_b0": (5_288_548, 360),
    "densenet121": (7_978_856, 727),
}


@pytest.mark.parametrize("name", ZOO)
def test_the_names_are_as_many_as_torchvision_has(name):
    names = getattr(zoo_names, "resnet" if name.startswith("resnet") else name)
    state = dict(names(**ZOO[name].arguments))
    learned = [key for key in state if "running" not in key and "tracked" not in key]
    assert (sum(math.prod(state[key]) for key in learned), len(state)) == PUBLISHED[name]


X = np.random.default_rng(1).normal(size=(2, 32, 32, 3)).astype(np.float32)
# Some twenty layers of float32, whose rounding adds up as a random walk.
TOLERANCE = 20**0.5 * 1e-6


@pytest.mark.parametrize("name", ZOO)
def test_a_network_in_flax_is_the_one_in_pytorchs_layout(name):
    with as_pasted():
        _, reference, linen, variables, report = zoo.converted(name, X, tiny=True)
        y = jax.jit(linen.apply)(variables, X)
    assert report.matched_by == "names"
    assert zoo.error(y, reference) < TOLERANCE


def test_a_row_of_the_table(tmp_path):
    """DenseNet's norms stand before a relu: only those after a convolution fold."""
    with as_pasted():
        cells, refused = zoo.row("densenet121", X, tmp_path, tiny=True, formats=["stablehlo"])
    _, _, linen, nnx, back, folded, left, stablehlo, _ = cells
    assert max(linen, nnx, folded, stablehlo) < TOLERANCE
    assert (back, left, refused) == ("same bits", 4, {})
    manifest = export.read_manifest(tmp_path / "densenet121.stablehlo")
    assert len(manifest["not_folded"]) == left
