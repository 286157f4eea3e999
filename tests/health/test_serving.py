"""`health.serving`: each way in which a row's answer may depend on more than the row."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
from jaxbn import export, health
from tests.support.messages import message

X = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
W = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
PLACES = np.arange(6, dtype=np.float32)[:, None]


def affine(x):
    return jnp.tanh(x @ W)


def once_more(calls=[]):  # noqa: B006
    calls.append(1)
    return np.float32(len(calls))


SICK = {  # fn → the kinds of its findings
    "sound": (affine, []),
    "a batch statistic of one number": (lambda x: x - x.max(), ["batch_dependent", "batch_of_one"]),
    # A maximum that only the last row changes, so that one half is enough to hide it.
    "the last row": (lambda x: x + x[-1:], ["batch_dependent", "row_order", "batch_of_one"]),
    "the first row": (lambda x: x + x[:1], ["batch_dependent", "row_order"]),
    "the place": (lambda x: x + PLACES[: len(x)], ["row_order"]),
    "the size": (lambda x: x * len(x), ["batch_of_one"]),
    "squeezed": (lambda x: (x @ W).squeeze(), ["batch_of_one"]),
    "only full batches": (lambda x: x.reshape(3, 2, 3).reshape(6, 3), ["batch_of_one"]),
    "the time": (lambda x: x * once_more(), ["not_deterministic"]),
    "NaN": (lambda x: x * np.where(x > 1, np.nan, 1).astype(np.float32), ["not_finite"]),
    "infinite masks": (lambda x: jnp.where(x > 1, -jnp.inf, x), []),
    "labels": (lambda x: (x @ W).argmax(-1), []),
    "labels by the batch": (lambda x: (x > x.mean(0)).argmax(-1), ["batch_dependent"]),
    "training": (
        lambda x: jaxbn.batch_norm(x, *jaxbn.init(3), train=True)[0],
        ["train_in_inference"],
    ),
}


@pytest.mark.parametrize("name", SICK)
def test_each_kind_is_found(name):
    fn, kinds = SICK[name]
    found = health.serving(fn, X)
    assert [finding.kind for finding in found] == kinds
    assert all(finding.figure > finding.threshold and finding.remedy for finding in found)


def test_modules_in_both_modes():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(not train, name="bn")(nn.Dense(4)(x))
            return {"logits": x, "label": x.argmax(-1)}

    variables = Net().init(jax.random.key(0), X, False)

    def of(train):
        return lambda x: Net().apply(variables, x, train, mutable=["batch_stats"])[0]

    assert health.serving(of(False), X) == []
    (finding,) = health.serving(of(True), X)
    assert (finding.layer, finding.kind) == ("Net/bn", "train_in_inference")
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    # nnx refuses to be traced in training mode: the results tell.
    assert [f.kind for f in health.serving(model, X)][:1] == ["batch_dependent"]
    model.eval()
    assert health.serving(model, X) == []
    drops = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    assert [f.kind for f in health.serving(drops, X)] == ["not_deterministic"]


def test_trees_of_inputs_and_results_name_the_result():
    def fn(batch):
        return {"sound": batch["x"] * batch["n"][:, None], "sick": batch["x"] - batch["x"].max()}

    found = health.serving(fn, {"x": X, "n": np.arange(6, dtype=np.float32)})
    assert {finding.layer for finding in found} == {"result['sick']"}


def test_the_tolerance_follows_the_dtype_of_the_result():
    """A dependence of 1e-3 is rounding in bfloat16 and none in float32."""

    def fn(x):
        return x + 1e-3 * x.max()

    assert [f.kind for f in health.serving(fn, X)] == ["batch_dependent", "batch_of_one"]
    assert health.serving(lambda x: fn(x).astype(jnp.bfloat16), X) == []
    assert health.serving(fn, X, tolerance=0.01) == []


def test_files_are_functions_too(tmp_path):
    done = export.stablehlo(affine, X, tmp_path / "f.stablehlo", platforms=["cpu"])
    assert health.serving(export.load_stablehlo(done.path), X) == []


EXPECTED = (
    "expected arrays with as many rows on axis 0, at least 2, that differ; pass a batch of real "
    "inputs."
)


def test_what_cannot_be_judged_is_refused():
    for x, shape in ((X[:1], "(1, 3)"), (np.ones((4, 3)), "(4, 3)"), (np.float32(1), "()")):
        said = message(ValueError, health.serving, affine, x)
        assert said == f"serving: x is {shape}, {EXPECTED}"
    said = message(ValueError, health.serving, affine, {"a": X, "b": X[:3]})
    assert said == f"serving: x is (6, 3), (3, 3), {EXPECTED}"
    assert message(ValueError, health.serving, lambda x: (x, x.sum()), X) == (
        "serving: result[1] has shape (), expected a row for each of the 6 rows of x; return "
        "results with rows on axis 0 alone."
    )
    assert message(ValueError, health.serving, lambda x: None, X) == (
        "serving: fn returns no array, expected a row for each of the 6 rows of x; return the "
        "results."
    )
    for tolerance, kind in ((-1, ValueError), (np.nan, ValueError), ("a", TypeError)):
        assert message(kind, health.serving, affine, X, tolerance=tolerance) == (
            f"serving: tolerance={tolerance!r}, expected a relative error of at least 0; write "
            f"tolerance=1e-3."
        )
