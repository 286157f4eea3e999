"""Layers that a transform stacks on any axis are watched, judged and recalibrated as on axis 0."""

import functools

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
from jaxbn import calls, health, layers, watch
from tests.support.messages import message

C = L = 3  # alike, so that a wrong axis has the right shape
X = np.random.default_rng(0).normal(1, 2, (6, C)).astype(np.float32)


class Block(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        x = linen.Dense(C, name="dense")(x)
        x = linen.BatchNorm(use_running_average=not train, momentum=0.0, name="bn")(x)
        return jnp.tanh(x), None


def lifted(lift, stats, params=0, block=Block, **options):
    axes = {"params": params, "batch_stats": stats}
    more = {"in_axes": linen.broadcast, "length": L}
    if lift == "vmap":
        more = {"in_axes": (None, None), "axis_size": L}
    options = {"variable_axes": axes, "split_rngs": {"params": True}, **more, **options}
    return getattr(linen, lift)(block, **options)()


class Stacked(nnx.Module):
    """Blocks in one nnx.vmap or nnx.scan."""

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(C, C, rngs=rngs)
            self.bn = nnx.BatchNorm(C, momentum=0.0, rngs=rngs)

        def __call__(self, x):
            return jnp.tanh(self.bn(self.dense(x)))

    def __init__(self, lift, axes):
        self.lift, self.axes = lift, axes
        of_each = nnx.split_rngs(splits=L)(nnx.vmap(self.Block, out_axes=axes))
        self.blocks = of_each(nnx.Rngs(0))

    def __call__(self, x):
        if self.lift == "vmap":
            return nnx.vmap(lambda b, x: b(x), in_axes=(self.axes, None))(self.blocks, x)
        scanned = nnx.scan(lambda x, b: b(x), in_axes=(nnx.Carry, self.axes), out_axes=nnx.Carry)
        return scanned(x, self.blocks)


def of_axis(v, axis):
    """An array of stacked layers [C, …] as one with the layers on axis 0."""
    return np.moveaxis(v, axis, 0)


@functools.cache
def figures(api, lift, stats, params=0):
    """What each tool says of a model whose statistics and parameters are stacked on these axes."""
    if api == "linen":
        model = lifted(lift, stats, params)
        variables = model.init(jax.random.key(0), X, True)
        (_, updates), seen = watch.linen(model.apply, shards=2, histogram=True)(
            variables, X, True, mutable=["batch_stats"]
        )
        learned = {**variables, **updates}
        records = watch.records(seen, learned, learned["params"])
        gap = health.gap(model.apply, variables, X, True)
        rows = health.incoming(model.apply)(learned, X, False)[1]
        kernels = watch.kernels(model.apply, variables, X, True, mutable=["batch_stats"])
        new = jaxbn.recalibrate(
            lambda v, x, **more: model.apply(v, x, False, **more), variables, [X, 2 * X]
        )
        drift = health.drift(learned, rows)
    else:
        axes = nnx.StateAxes({nnx.Param: params, nnx.BatchStat: stats})
        model = Stacked(lift, axes)
        gap = health.gap(model, X)
        kernels = watch.kernels(model, X)
        with watch.nnx(model, shards=2, histogram=True) as seen:
            model(X)
        learned = model
        records = watch.records(seen, model, nnx.state(model, nnx.Param))
        drift = health.drift(model, health.incoming(model)(X)[1])
        new = jaxbn.recalibrate(lambda m, x: m(x), nnx.clone(model), [X, 2 * X])
    ((path, record),) = records.items()
    # With momentum 0 the running statistics are those of the batch, where Flax has put them.
    state = layers.find(learned)[path].state
    np.testing.assert_allclose(record.batch.mean, state.mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(record.batch.var, state.var, rtol=1e-4, atol=1e-6)
    found = health.check(learned, {path: record.batch})
    recalibrated = layers.find(new)[path].state
    return {
        "metrics": watch.metrics(records)[path],
        "quantiles": record.quantiles,
        "shards": [of_axis(v, stats - (stats < 0)) for v in record.shards.mean],
        "gap": [report[1:4] for report in gap.layers],
        "outputs": gap.outputs[path],
        "drift": [layer[2:] for layer in drift.layers],
        "kernels": kernels,
        "found": [(finding.kind, finding.severity) for finding in found],
        "recalibrated": [of_axis(v, stats) for v in recalibrated[:2]],
    }


@pytest.mark.parametrize(("stats", "params"), [(1, 0), (-1, 1), (0, 1)])
@pytest.mark.parametrize("lift", ["scan", "vmap"])
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_every_axis_gives_the_figures_of_axis_0(api, lift, stats, params):
    expected, got = figures(api, lift, 0), figures(api, lift, stats, params)
    assert expected["kernels"] == got["kernels"] != {}
    assert expected["found"] == got["found"]
    jax.tree.map(
        lambda a, b: (
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
            if not isinstance(a, str)
            else None
        ),
        expected,
        got,
    )


class Cumulative(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        norm = jaxbn.linen.BatchNorm(use_running_average=not train, momentum=None, name="bn")
        return norm(x), None


@pytest.mark.parametrize("lift", ["scan", "vmap"])
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_counts_are_stacked_on_axis_0_and_on_the_last(api, lift):
    x = X[:, : C - 1]  # not as many as layers, so that a count beside the features fits nowhere

    # As the docstrings of momentum and docs/watch.md say. No other axis fits a number.
    def trained(stats):
        if api == "linen":
            model = lifted(lift, stats, block=Cumulative)
            variables = model.init(jax.random.key(0), x, True)
            (_, updates), seen = watch.linen(model.apply)(variables, x, True, mutable="batch_stats")
            variables |= updates

            def apply(v, x, **more):
                return model.apply(v, x, False, **more)
        else:
            axes = nnx.StateAxes({nnx.BatchStat: stats, ...: 0})
            norm = functools.partial(jaxbn.nnx.BatchNorm, C - 1, momentum=None)
            variables = nnx.vmap(lambda r: norm(rngs=r), out_axes=axes, axis_size=L, in_axes=None)(
                nnx.Rngs(0)
            )
            with watch.nnx(variables) as seen:
                if lift == "vmap":
                    nnx.vmap(lambda b, x: b(x), in_axes=(axes, None))(variables, x)
                else:
                    nnx.scan(lambda x, b: b(x), in_axes=(nnx.Carry, axes), out_axes=nnx.Carry)(
                        x, variables
                    )

            def apply(blocks, x):
                return nnx.vmap(lambda b, x: b(x), in_axes=(axes, None))(blocks, x)

        (record,) = watch.records(seen, variables).values()
        state, batch = record.state, record.batch
        ((_, layer),) = layers.find(jaxbn.recalibrate(apply, variables, [x, 2 * x])).items()
        return [*state, *batch[1:], *layer.state]

    first, last = trained(0), trained(-1)
    assert first[2].tolist() == last[2].tolist() == [1] * L
    assert first[-1].tolist() == last[-1].tolist() == [2] * L
    for a, b in zip(first, last, strict=True):
        np.testing.assert_allclose(a, of_axis(b, -1), rtol=1e-5)


class Domains(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        norm = jaxbn.linen.BatchNorm(use_running_average=not train, momentum=0.0, domains=2)
        return norm(x, domain=jnp.arange(len(x)) % 2), None


@pytest.mark.parametrize("turns", [2, 3])  # 2: as many as domains, so that two axes are alike
@pytest.mark.parametrize("stats", [None, 0, 1, 2, -1])  # None: no transform
def test_the_line_that_drift_advises_for_domains_runs(stats, turns):
    x = np.random.default_rng(0).normal(1, 2, (turns, *X.shape)).astype(np.float32)
    lift = functools.partial(linen.vmap, in_axes=(0, None), axis_size=turns)
    if stats is None:
        x, lift = x[0], lambda block, **_: block
    model = lift(
        Domains, variable_axes={"params": 0, "batch_stats": stats}, split_rngs={"params": True}
    )()
    variables = model.init(jax.random.key(0), x, True)
    _, learned = model.apply(variables, x, True, mutable="batch_stats")
    names = {
        **learned,
        "batches": [health.incoming(model.apply)({**variables, **learned}, x, False)[1]],
    }
    error = message(ValueError, health.drift, *names.values())
    advised = error.partition("write ")[2].rstrip(".")
    drift = eval(advised, {**globals(), **names})
    without = eval(advised.replace(":1]", "0]"), {**globals(), **names})  # the axis of domains
    assert without.layers[0].shift == drift.layers[0].shift
    of_first = x[..., ::2, :].astype(np.float64)  # the rows of domain 0, whose statistics are kept
    off = (x.mean(-2) - of_first.mean(-2)) / np.sqrt(of_first.var(-2) + 1e-5)
    np.testing.assert_allclose(drift.layers[0].shift, np.sqrt((off**2).mean()), rtol=1e-5)


class Nested(linen.Module):
    inner: int = 0

    @linen.compact
    def __call__(self, x, train):
        return lifted("vmap", self.inner)(x, train)[0].sum(0), None


def within(block):
    """A module around the block."""

    class Named(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            return block(name="block")(x, train)

    return Named


@pytest.mark.parametrize(
    ("block", "stats"),
    [
        *((Domains, axis) for axis in (0, 1, 2, -1, -2)),
        *((functools.partial(Nested, inner), axis) for inner in (0, 1) for axis in (1, 2)),
        (functools.partial(Nested, -1), -2),
    ],
)
def test_moments_lie_as_the_statistics_do_wherever_those_are_stacked(block, stats):
    model = lifted("scan", stats, block=within(block), length=2)
    variables = model.init(jax.random.key(0), X, True)
    (_, updates), seen = calls.hooked_apply(model.apply)(
        variables, X, True, mutable=["batch_stats"]
    )
    ((path, of_x),) = seen.items()
    state = layers.find(updates)[path].state
    np.testing.assert_allclose(of_x.mean, state.mean, rtol=1e-4, atol=1e-6)
    in_front = of_x.count.ndim < of_x.mean.ndim
    count = of_x.count[..., None] if in_front else of_x.count
    assert np.broadcast_shapes(count.shape, of_x.mean.shape) == of_x.mean.shape


def test_axes_that_are_counted_from_both_ends_are_refused():
    for inner, outer in ((1, -2), (-1, 2)):
        model = lifted("scan", outer, block=within(functools.partial(Nested, inner)), length=2)
        variables = model.init(jax.random.key(0), X, True)
        assert message(ValueError, calls.hooked_apply(model.apply), variables, X, True) == (
            "calls: nested transforms stack batch_stats on axes that they count from both ends, "
            "expected one end; write axes of variable_axes and StateAxes from 0 up."
        )


NO_AXIS = (
    "calls: a transform shares or carries batch_stats (variable_broadcast, variable_carry, None, "
    "nnx.Carry, cond), expected an axis where the record of each turn has its place; write "
    'variable_axes={"batch_stats": 0} in nn.scan and nn.vmap, nnx.StateAxes({nnx.BatchStat: 0, '
    "...: None}) in nnx's, or a loop in Python."
)
SHARED = {
    "broadcast": {"variable_axes": {}, "variable_broadcast": ["params", "batch_stats"]},
    "carry": {
        "variable_axes": {},
        "variable_broadcast": "params",
        "variable_carry": "batch_stats",
    },
}


@pytest.mark.parametrize("how", [*SHARED, "vmap", "nnx.Carry", "nnx.cond", "nnx.vmap"])
def test_statistics_that_turns_share_are_refused(how):
    if how.startswith("nnx"):
        block = Stacked.Block(nnx.Rngs(0))
        block.eval()
        run = {
            "nnx.Carry": lambda x: nnx.scan(lambda b, x: (b, b(x)))(block, x[None]),
            "nnx.cond": lambda x: nnx.cond(True, lambda b, x: b(x), lambda b, x: x, block, x),
            "nnx.vmap": lambda x: nnx.vmap(lambda b, x: b(x), in_axes=(None, 0))(block, x[None]),
        }[how]
        run(X)

        def watched():
            with watch.nnx(block):
                run(X)
    else:
        variables = Block().init(jax.random.key(0), X, True)
        options = SHARED.get(how, {"variable_axes": {"params": None, "batch_stats": None}})
        model = lifted("vmap" if how == "vmap" else "scan", 0, **options)
        if how == "vmap":
            options["in_axes"] = (0, None)
            model = lifted("vmap", 0, **options, axis_size=len(X))

        def watched():
            watch.linen(model.apply)(variables, X, False)

    assert message(ValueError, watched) == NO_AXIS
