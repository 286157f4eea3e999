"""Incoming data against running statistics: moments, their merge, false alarms and power."""

import importlib
import re
import urllib.request
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
from jaxbn import health
from tests.support.messages import message
from tests.support.networks import NnxNet

C = 5
RNG = np.random.default_rng(0)
STATE = {"bn": jaxbn.State(RNG.normal(0, 1, C), RNG.uniform(0.5, 2, C), None)}
EPS = 1e-5


def rows_of(x, mask=None):
    """Moments of each row of x [rows, ..., C], in NumPy float64."""
    x = np.asarray(x, np.float64).reshape(len(x), -1, x.shape[-1])
    valid = np.ones(x.shape, bool) if mask is None else np.broadcast_to(mask, x.shape)
    count = valid[..., 0].sum(1)
    weight = valid / np.where(count > 0, count, 1)[:, None, None]
    mean = (weight * x).sum(1)
    var = (weight * (x - mean[:, None]) ** 2).sum(1)
    return jaxbn.Moments(
        jnp.float32(count), jnp.asarray(mean.T, jnp.float32), jnp.asarray(var.T, jnp.float32)
    )


def images(n, rng=RNG, pixels=16, agree=0.8, skew=False):
    """X [n, pixels, C] of the running mean and var, whose pixels agree with one another."""
    draw = (lambda *s: rng.exponential(1, s) - 1) if skew else (lambda *s: rng.normal(0, 1, s))
    x = np.sqrt(agree) * draw(n, 1, C) + np.sqrt(1 - agree) * draw(n, pixels, C)
    return x * np.sqrt(STATE["bn"].var) + STATE["bn"].mean


# what is seen


def test_seen_is_the_weighted_average_over_rows():
    x = RNG.normal(1, 2, (12, 6, C))
    mask = RNG.random((12, 6, 1)) < 0.6
    mask[3] = False  # a row of padding
    seen = health.seen(STATE, {"bn": rows_of(x, mask)})["bn"]
    mean, var = STATE["bn"].mean, STATE["bn"].var
    count = mask.sum((1, 2))
    valid = np.broadcast_to(mask, x.shape)
    weight = count / count.sum()
    shift = ((x - mean) * valid).sum(1) / np.maximum(count, 1)[:, None] / np.sqrt(var + EPS)
    square = ((x - mean) ** 2 * valid).sum(1) / np.maximum(count, 1)[:, None]
    spread = (square - var) / (var + EPS)
    for got, v in ((seen.shift, shift), (seen.spread, spread)):
        average = (weight[:, None] * v).sum(0)
        np.testing.assert_allclose(got.count, count.sum())
        np.testing.assert_allclose(got.mean, average, rtol=1e-4, atol=1e-5)
        between = (weight[:, None] * (v - average) ** 2).sum(0)
        np.testing.assert_allclose(got.var, between, rtol=1e-4)
    # The average is that of all valid cells, as batch norm's own is.
    cells = x[valid].reshape(-1, C).mean(0)
    np.testing.assert_allclose(seen.shift.mean, (cells - mean) / np.sqrt(var + EPS), rtol=1e-4)
    np.testing.assert_allclose(seen.weight2, (count**2).sum())


def test_streams_merge_in_any_order_and_split():
    parts = [health.seen(STATE, {"bn": rows_of(images(n))}) for n in (7, 1, 20, 4)]
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        total = {}
        for i in order:
            total = health.merge(total, parts[i])
        halves = health.merge(health.merge(parts[0], parts[1]), health.merge(parts[2], parts[3]))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), total, halves)
    assert health.decide(total).layers[0].rows == 32
    sizes = [leaf.size for leaf in jax.tree.leaves(total)]
    assert sizes == [leaf.size for leaf in jax.tree.leaves(parts[1])]  # constant memory


def test_drift_is_the_stream_merged():
    batches = [{"bn": rows_of(images(64))} for _ in range(3)]
    total = {}
    for rows in batches:
        total = health.merge(total, health.seen(STATE, rows))
    at_once, stream = health.drift(STATE, iter(batches)), health.decide(total)
    assert at_once.layers == stream.layers
    assert at_once.findings == ()
    one = health.drift(STATE, batches[0])  # of one batch, without a list around it
    assert one.layers == health.drift(STATE, batches[:1]).layers


def test_values_of_one_image_are_worth_few():
    """Of pixels that agree wholly an image is worth one value; of independent ones, all 16."""
    for agree, worth in ((1.0, 1), (0.0, 16)):
        rows = rows_of(images(2000, agree=agree))
        (layer,) = health.drift(STATE, [{"bn": rows}]).layers
        assert layer.rows == 2000
        np.testing.assert_allclose(layer.values, 2000 * worth, rtol=0.15)


# the decision


def rate(rng, windows, n, false_alarm, of=1, reference=None, **kind):
    """Share of windows of n images without drift that raise an alarm, `of` layers each."""
    alarms = 0
    for _ in range(windows):
        total = {
            f"{i}": health.seen(STATE, {"bn": rows_of(images(n, rng, 4, **kind))})["bn"]
            for i in range(of)
        }
        decision = health.decide(total, false_alarm=false_alarm, tolerance=0.0, reference=reference)
        alarms += decision.alarm
    return alarms / windows


@pytest.mark.parametrize("kind", [{}, {"agree": 1.0}])
def test_false_alarms_are_as_rare_as_asked_for(kind):
    """With no tolerance at all; 3 sd of the binomial are allowed for the number of windows."""
    windows, asked = 300, 0.1
    assert rate(np.random.default_rng(1), windows, 128, asked, 2, **kind) <= asked + 3 * np.sqrt(
        asked * (1 - asked) / windows
    )


def test_channels_that_are_copies_of_one_another_make_no_more_alarms():
    """The case in which the bound is reached: one channel, repeated."""
    rng, alarms, windows = np.random.default_rng(2), 0, 300
    for _ in range(windows):
        x = rng.normal(0, 1, (64, 1, 1)).repeat(C, 2)
        rows = rows_of(x * np.sqrt(STATE["bn"].var + EPS) + STATE["bn"].mean)
        alarms += health.drift(STATE, [{"bn": rows}], false_alarm=0.1, tolerance=0.0).alarm
    assert 0.02 <= alarms / windows <= 0.1 + 3 * np.sqrt(0.09 / windows)


@pytest.mark.parametrize("what", ["mean", "var", "one channel"])
def test_drift_of_each_kind_raises_the_alarm(what):
    x = images(512)
    if what == "mean":
        x = x + 0.5 * np.sqrt(STATE["bn"].var)
    if what == "var":
        x = (x - STATE["bn"].mean) * 2 + STATE["bn"].mean
    if what == "one channel":
        x[..., 2] += 1.5
    drift = health.drift(STATE, [{"bn": rows_of(x)}])
    (finding,) = drift.findings
    (layer,) = drift.layers
    assert (drift.alarm, layer.alarm) == (True, True)
    assert (finding.layer, finding.kind, finding.severity) == ("bn", "drift", "warning")
    assert (finding.figure, finding.threshold) == (layer.figure, layer.threshold)
    assert finding.channels == ((2,) if what == "one channel" else tuple(range(C)))
    assert str(drift).splitlines()[1].split()[:2] == ["bn", "drift"]
    if what == "mean":
        np.testing.assert_allclose(layer.shift, 0.5, atol=0.1)
    if what == "var":
        np.testing.assert_allclose(layer.spread, 3, rtol=0.2)


@pytest.mark.parametrize(("shift", "alarm"), [(0.08, False), (0.15, True)])
def test_what_is_within_the_tolerance_is_no_drift_however_long_the_stream(shift, alarm):
    x = images(20000, pixels=1) + shift * np.sqrt(STATE["bn"].var)
    assert health.drift(STATE, [{"bn": rows_of(x)}]).alarm == alarm
    assert health.drift(STATE, [{"bn": rows_of(x)}], tolerance=0.0).alarm


def test_a_reference_takes_the_place_of_the_running_statistics():
    moved = {"bn": STATE["bn"]._replace(mean=STATE["bn"].mean + 1)}
    clean = health.drift(moved, [{"bn": rows_of(images(1000))}])
    assert clean.alarm
    again = [{"bn": rows_of(images(256))}]
    assert not health.drift(moved, again, reference=clean).alarm
    drifted = [{"bn": rows_of(images(256) + 0.7)}]
    assert health.drift(moved, drifted, reference=clean).alarm


def test_a_nan_raises_the_alarm():
    x = images(64)
    x[5, 0, 3] = np.nan
    drift = health.drift(STATE, [{"bn": rows_of(x)}])
    assert drift.alarm
    assert drift.findings[0].channels == (3,)


def test_a_channel_that_never_changes_is_no_drift():
    state = {"bn": jaxbn.State(np.ones(C), np.zeros(C), None)}
    assert not health.drift(state, [{"bn": rows_of(np.ones((64, 4, C)))}]).alarm


# models


class ScannedNorm(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.BatchNorm(use_running_average=True)(x), None


class Net(nn.Module):
    norm: type = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train=False, mask=None):
        shared = self.norm(not train, name="shared")
        y = shared(x, mask=mask)
        return shared(2 * y, mask=mask)


@pytest.mark.parametrize("norm", [nn.BatchNorm, jaxbn.linen.BatchNorm])
def test_rows_of_a_linen_model_are_those_of_each_layers_input(norm):
    x = RNG.normal(1, 2, (8, 3, 4, C)).astype(np.float32)
    model = Net(norm)
    variables = model.init(jax.random.key(0), x)
    mask = (np.arange(3) < 2)[None, :, None, None]
    for options in ({}, {"mask": mask}):
        y, rows = jax.jit(health.incoming(model.apply))(variables, x, **options)
        np.testing.assert_allclose(y, model.apply(variables, x), rtol=1e-6)
        first = x[:, :2] if options else x
        both = np.concatenate([first, 2 * first / np.sqrt(1 + EPS)], 1)  # called twice
        expected = rows_of(both)
        for got, want in zip(rows["shared"], expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scanned", [False, True])
def test_a_layer_that_is_called_twice_has_each_image_once(scanned):
    """Else chance looks smaller than it is: two rows of one image are not independent."""
    x = RNG.normal(0, 1, (64, 5, C)).astype(np.float32)
    norm = nn.BatchNorm(use_running_average=True)
    if scanned:
        axes = {"params": 0, "batch_stats": 0}
        norm = nn.scan(ScannedNorm, variable_axes=axes, split_rngs={"params": True}, length=3)()

    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x, other):
            shared = norm.copy(name="shared")
            if scanned:
                return shared(x, None), shared(other, None)
            return shared(x), shared(other)

    variables = Twice().init(jax.random.key(0), x, x)

    def layer(*xs):
        rows = health.incoming(Twice().apply)(variables, *xs)[1]
        return health.drift(variables, rows).layers[0]

    once, fewer = layer(x, x), layer(x, x[:32])
    assert once.rows == 64
    np.testing.assert_allclose(fewer.rows, (32 * 10 + 32 * 5) ** 2 / (32 * 10**2 + 32 * 5**2))
    part = np.zeros_like(x)
    mixed = layer(x, part)
    np.testing.assert_allclose(2 * mixed.shift, once.shift, rtol=1e-4)


@pytest.mark.parametrize("sizes", [(2, 4), (4, 2), (2, 4, 6), (4, 2, 4)])
@pytest.mark.parametrize("masked", [(), (0,), (1,)])
def test_row_i_of_all_calls_of_a_layer_is_one_row(sizes, masked):
    """However many rows each call has, in whatever order; a mask may differ by feature."""

    class Calls(nn.Module):
        @nn.compact
        def __call__(self, xs, masks):
            shared = nn.BatchNorm(use_running_average=True, name="shared")
            return [shared(x, mask=mask) for x, mask in zip(xs, masks, strict=True)]

    xs = [RNG.normal(i, 2, (n, 3, C)).astype(np.float32) for i, n in enumerate(sizes)]
    valid = [RNG.random(x.shape) < (0.6 if i in masked else 1) for i, x in enumerate(xs)]
    masks = [v if i in masked else None for i, v in enumerate(valid)]
    stats = {"batch_stats": {"shared": {"mean": jnp.zeros(C), "var": jnp.ones(C)}}}
    variables = stats | {"params": {"shared": {"scale": jnp.ones(C), "bias": jnp.zeros(C)}}}
    rows = health.incoming(Calls().apply)(variables, xs, masks)[1]["shared"]
    for i, c in np.ndindex(max(sizes), C):
        cells = [x[i, :, c][v[i, :, c]] for x, v in zip(xs, valid, strict=True) if i < len(x)]
        cells = np.concatenate(cells).astype(np.float64)
        assert np.broadcast_to(rows.count, rows.mean.shape)[c, i] == cells.size
        if cells.size:
            np.testing.assert_allclose(rows.mean[c, i], cells.mean(), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(rows.var[c, i], cells.var(), rtol=1e-5, atol=1e-6)


def test_a_mask_without_an_axis_of_rows_is_one_for_all_rows():
    layer, x = jaxbn.linen.BatchNorm(use_running_average=True), RNG.normal(size=(4, 6, 2))
    variables, mask = layer.init(jax.random.key(0), x), np.arange(6)[:, None] % 3 > 0
    for v, cells in ((jnp.float32(x), mask), (jnp.float32(x[:, :, None]), mask[:, None])):
        rows = health.incoming(layer.apply)(variables, v, mask=cells)[1][""]
        assert rows.count.tolist() == [4] * 4
        np.testing.assert_allclose(rows.mean.T, x[:, mask[:, 0]].mean(1), rtol=1e-5, atol=1e-6)


def test_a_model_called_in_train_mode_is_watched_in_eval_mode():
    x = RNG.normal(1, 2, (8, C)).astype(np.float32)
    variables = Net().init(jax.random.key(0), x)
    y, _ = health.incoming(Net().apply)(variables, x, train=True)
    np.testing.assert_allclose(y, Net().apply(variables, x), rtol=1e-6)


def test_rows_of_a_scanned_model_stay_apart_from_its_layers():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.BatchNorm(use_running_average=True)(x) + 1, None

    model = nn.scan(
        Block, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=8
    )()
    x = RNG.normal(0, 1, (8, C)).astype(np.float32)  # as many rows as layers
    variables = model.init(jax.random.key(0), x, None)
    rows = health.incoming(model.apply)(variables, x, None)[1]
    (layer,) = health.drift(variables, [rows]).layers
    assert rows["BatchNorm_0"].mean.shape == (8, C, 8)
    np.testing.assert_allclose(rows["BatchNorm_0"].mean[0], x.T, rtol=1e-6)
    assert layer.rows == 8
    seen = health.seen(variables, rows)["BatchNorm_0"]
    np.testing.assert_allclose(seen.shift.mean[0], x.mean(0), atol=1e-5)
    assert seen.shift.mean[7].min() > 5  # one is added by each layer before


def test_an_nnx_model_is_watched_and_stays_as_it_is():
    x = RNG.normal(0, 1, (64, 4, 4, 3)).astype(np.float32)
    model = NnxNet(nnx.BatchNorm, rngs=nnx.Rngs(0))
    forward = nnx.jit(lambda model, x: model(x))
    for _ in range(80):
        forward(model, x)
    watched = nnx.jit(lambda model, x: health.incoming(model)(x))
    before = jax.tree.map(np.array, nnx.state(model))
    rows = [watched(model, x + shift)[1] for shift in (0, 3)]
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))
    assert not health.drift(model, rows[:1]).alarm
    assert health.drift(model, rows[1:]).alarm
    y, _ = health.incoming(model)(x)
    model.eval()
    np.testing.assert_allclose(y, model(x), rtol=1e-5, atol=1e-5)


# examples


@pytest.fixture
def example(monkeypatch):
    """`example("served")`: the module examples/drift/served.py."""
    folder = Path(__file__).parents[2] / "examples" / "drift"
    monkeypatch.syspath_prepend(folder)
    return importlib.import_module


def test_the_served_model_says_when_the_light_fades(example, capsys, monkeypatch):
    served, out, scrapes = example("served"), [], []

    def between_two_windows(_):
        out.append(capsys.readouterr().out)
        with urllib.request.urlopen(out[0].split("\n")[0], timeout=30) as answer:
            scrapes.append(answer.read().decode())

    monkeypatch.setattr(served.time, "sleep", between_two_windows)
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam
        decisions = served.main(windows=8, port=0)
    for i, (scrape, (*_, verdict)) in enumerate(zip(scrapes, decisions, strict=True)):
        assert f"jaxbn_step {i}.0\n" in scrape
        found = re.findall(r'^jaxbn_layer_(\w+)\{layer="(.*)"\} (\S+)$', scrape, re.MULTILINE)
        shown = {(name, layer): float(v) for name, layer, v in found}
        for layer in verdict.layers:
            assert shown["drift_alarm", layer.layer] == layer.alarm
            assert shown["drift_figure", layer.layer] == layer.figure
            for spread in ("shard_mean_spread", "shard_sd_spread"):  # of the cameras: all fade
                assert 0.2 < shown[spread, layer.layer] < shown["shard_spread_limit", layer.layer]
    assert [verdict.alarm for *_, verdict in decisions] == [False] * 5 + [True] * 3
    hits = [hits for _, hits, _ in decisions]
    clean, dark = np.mean(hits[:5]), np.mean(hits[5:])
    assert "".join(out).count("ALARM") == 3
    assert clean > dark + 0.1


def test_the_table_of_alarms(example, monkeypatch):
    alarms = example("alarms")
    invert = {"light": ([0, 1], lambda x, share: x * (1 - share) + share * (255 - x))}
    monkeypatch.setattr(alarms, "CORRUPTIONS", invert)
    small = ["--width", "1", "--steps", "0", "--images", "60", "--window", "32", "--windows", "3"]
    lines = alarms.main(small)
    assert [line[:2] for line in lines] == [("clean", 0), ("light", 0), ("light", 1)]
    clean, same, inverted = (line[4] for line in lines)  # beside the reference
    assert (clean, same, inverted) == (0, 0, 1)


def test_clean_images_alarm_as_rarely_as_asked(example):
    """Of 64 rows windows of 32 are drawn, and none of 128."""
    rows = {"bn": rows_of(images(64))}
    reference = health.drift(STATE, [rows])
    rates = example("alarms").false_alarms(STATE, rows, np.arange(64), reference, 3)
    assert list(rates) == [32]
    np.testing.assert_array_equal(rates[32], 0)  # the asked rates are 0.1 and less


def test_how_many_sound_statistics_are_called_stale(example):
    """Counted over many batches at once as `health.divergence` says of each."""
    stale = example("stale")
    mean, var, draw = stale.DRAWS["relu"]
    x = draw(np.random.default_rng([16, 1]), (2000, 16, 1))
    state = jaxbn.State(np.full(1, mean), np.full(1, var), None)
    each = [health.divergence(state, jaxbn.Moments(16, v.mean(0), v.var(0))) for v in x]
    table = stale.main(["--batches", "2000", "--rows", "16", "--channels", "1"])
    assert table["relu", 16, 1] == sum(figure > limit for figure, limit, _ in each) > 0


def test_the_rates_of_false_alarms(example, monkeypatch):
    false_alarms = example("false_alarms")
    monkeypatch.setattr(false_alarms, "DRAWS", {"gaussian": jax.random.normal})
    rates = false_alarms.main(["--windows", "10", "--images", "64"])
    np.testing.assert_array_equal(rates["gaussian", 64], 0)


# errors


TOLERANCE = (
    "expected the shift in sd that is no drift, a finite number of at least 0; write tolerance=0.1."
)
INCOMING = "health.incoming(model.apply)(variables, x)[1]"


def test_bad_calls_are_told_what_to_write():
    good = rows_of(images(4))
    clean = health.drift(STATE, [{"bn": good}])
    cases = [
        (
            lambda: health.drift(STATE, []),
            f"drift: no batches, or a model without batch norm; expected the result of "
            f"{INCOMING} for each batch.",
        ),
        (
            lambda: health.drift(STATE, [{"norm": good}]),
            f"drift: moments are of a layer 'norm', but the state has ['bn']; pass the result of "
            f"{INCOMING} for these variables.",
        ),
        (
            lambda: health.drift(STATE, [{"bn": jaxbn.Moments(4, np.ones(C), np.ones(C))}]),
            "drift: moments of 'bn' have shape (5,), expected (5, 'rows'), the moments of each "
            f"row; write {INCOMING}, or "
            "jax.vmap(jaxbn.moments, out_axes=-1)(x).",
        ),
        (
            lambda: health.drift(STATE, [{"bn": rows_of(images(1))}]),
            "drift: 1 rows came to layer 'bn', expected 2 at least and better 128, because "
            "the test needs the spread between rows; merge more batches.",
        ),
        (
            lambda: health.drift(STATE, [{"bn": good}], false_alarm=0.5),
            "drift: false_alarm=0.5, expected the chance of an alarm without drift, above "
            "0 and at most 0.2; write false_alarm=0.001.",
        ),
        (
            lambda: health.decide(clean.seen, tolerance=-0.1),
            f"drift: tolerance=-0.1, {TOLERANCE}",
        ),
        (
            lambda: health.drift(STATE, map(pytest.fail, ["the stream is read"]), tolerance=np.nan),
            f"drift: tolerance=nan, {TOLERANCE}",
        ),
        (
            lambda: health.seen(STATE, {"bn": good}, epsilon=-1),
            "drift: epsilon=-1, expected a finite number of at least 0, added to the variance; "
            "write epsilon=1e-5.",
        ),
        (
            lambda: health.decide({"other": clean.seen["bn"]}, reference=clean),
            "drift: the reference has no layer 'other', it has ['bn']; write "
            "reference=health.drift(variables, clean_batches), with the same model.",
        ),
        (
            lambda: health.incoming(nn.BatchNorm(use_running_average=True).apply)(
                {
                    "batch_stats": {"mean": np.zeros(C), "var": np.ones(C)},
                    "params": {"scale": np.ones(C), "bias": np.zeros(C)},
                },
                np.zeros((0, C), np.float32),
            ),
            "drift: x of a batch norm layer has shape (0, 5) with features on axis -1, expected "
            "rows (images) on axis 0, and at least one.",
        ),
    ]
    for call, expected in cases:
        assert message(ValueError, call) == expected
    assert message(TypeError, health.decide, clean.seen, tolerance="a") == (
        f"drift: tolerance='a', {TOLERANCE}"
    )
    for reference, what in ((clean.seen, "a dict"), (0.1, "a float")):
        assert message(TypeError, health.drift, STATE, [], reference=reference) == (
            f"drift: reference is {what}, expected the Drift of clean data; write "
            f"reference=health.drift(variables, clean_batches)."
        )
