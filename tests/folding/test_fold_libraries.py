"""fold: the same ResNet of Flax, Haiku, Equinox and ours, in inference and in training mode."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from tests.support import oracle
from tests.support.folding import IMAGES, affines, normal

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "fold"))

import fold_report
import resnets


@pytest.fixture(scope="module")
def libraries():
    """The networks of the example."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return resnets.networks(jnp.asarray(IMAGES))


NAMES = ["Flax linen", "Flax nnx", "jaxbn linen", "jaxbn nnx", "Haiku", "Equinox"]


@pytest.mark.parametrize("name", NAMES)
def test_the_resnet_of_each_library_is_folded(libraries, name):
    fn = libraries[name]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        folded, report = jaxbn.fold(fn, IMAGES)
        x = normal(9, 3, 8, 8, 3)
        oracle.assert_close(folded(x), np.float64(jax.jit(fn)(x)), 1e-5)
        assert affines(fn, x)["sub"] >= 4
        assert affines(folded, x) == {"add": 5}
    assert [site.folded for site in report.sites] == [True] * 4 + [None]
    assert max(site.relative for site in report.folded) <= 1e-5


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_training_mode_of_each_library_is_refused(name, rows):
    x = jnp.asarray(IMAGES[:rows])
    where = {"Flax linen": "Net/norm0", "jaxbn linen": "Net/norm0", "Haiku": "norm0"}
    where |= {"Equinox": "eqx.nn.BatchNorm"}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        fn = resnets.networks(x, train=True)[name]
        with pytest.raises(Exception) as error:
            jaxbn.fold(fn, x)
    if "nnx" in name:  # Flax's own error, for a variable that is written in a trace
        assert type(error.value).__name__ == "TraceContextError"
        assert error.value.__notes__[-1] == (
            "fold: fn failed while it was traced; expected an inference function of the example "
            "arguments: a module in eval mode (use_running_average=True, model.eval()), with no "
            "variable written."
        )
        return
    assert str(error.value) == (
        f"fold: {where[name]} normalizes by statistics of the batch, expected a function in "
        "inference mode; write train=False (jaxbn.batch_norm), use_running_average=True "
        "(linen), model.eval() (nnx), is_training=False (Haiku) or "
        "eqx.nn.inference_mode(model) (Equinox)."
    )


def test_the_example_prints_the_reports_side_by_side(capsys):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        fold_report.main()
    rows = {line[:26].strip(): line[26:].split() for line in capsys.readouterr().out.splitlines()}
    assert rows["0 conv 3x3, 3 -> 8"][0].endswith("e-07")
    assert set(rows["norm operations, before"]) == {"16"}
    assert rows["norm operations, after"] == ["0"] * 6
    assert all(float(error) < 1e-5 for error in rows["result"][-6:])
