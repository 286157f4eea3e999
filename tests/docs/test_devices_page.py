"""What docs/devices.md says: its table, and that its training steps equal one device."""

import contextlib
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from tests.support import oracle
from tests.support.compiling import as_pasted, compiled_quickly
from tests.support.pages import BLOCK

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "devices.md").read_text()


@pytest.fixture(scope="module")
def page():
    names = {}
    with as_pasted():
        for block in BLOCK.finditer(PAGE):
            exec(block[1], names)
            if "def outside_step" in block[1]:
                names["train_outside"] = names["train"]  # later blocks assign `train` again
        yield names


# The table: a row's first cell → transforms, options, and the sets of rows behind y and state.

ROWS, C = 64, 6
WHOLE = np.arange(ROWS).reshape(1, -1)
SHARDS, GROUPS, GHOSTS = (WHOLE.reshape(n, -1) for n in (8, 2, 16))
PAIRS = {"axis_index_groups": [[0, 1, 2, 3], [4, 5, 6, 7]]}
POOL, GHOST = {"axis_name": "d"}, {"virtual_batch_size": 4}
MAPPED = ("pmap", "shard_map", "vmap")
TABLE = {
    "plain, or `jit` on one device": (["jit"], {}, WHOLE, WHOLE),
    "`jit`, x sharded over a mesh, Auto or Explicit": (["Auto", "Explicit"], {}, WHOLE, WHOLE),
    "`jit`, x sharded, `virtual_batch_size`": (["Auto", "Explicit"], GHOST, GHOSTS, WHOLE),
    "`pmap`, `shard_map`, `vmap`": (MAPPED, {}, SHARDS, SHARDS),
    "… with `axis_name`": (MAPPED, POOL, WHOLE, WHOLE),
    "… with `axis_name`, `axis_index_groups`": (MAPPED, POOL | PAIRS, GROUPS, GROUPS),
    "… with `virtual_batch_size`": (MAPPED, GHOST, GHOSTS, SHARDS),
    "… with `axis_name`, `virtual_batch_size`": (MAPPED, POOL | GHOST, GHOSTS, WHOLE),
}


def cells(label):
    line = next(line for line in PAGE.splitlines() if line.startswith(f"| {label} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_the_table_has_no_other_rows():
    table = PAGE.split("## What does")[1].split("\n\n")[1]
    labels = [line.split(" | ")[0][2:] for line in table.splitlines()[2:]]
    assert labels == [*TABLE, "`train=False`, anywhere"]


def collectives(compiled):
    kinds = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
    return len(re.findall(rf" = .*? (?:{kinds})(?:-start)?\(", compiled.as_text()))


def over(transform, f):
    """F, written for what one device holds, on the whole batch [64, C]: y and 8 states."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    if transform in ("pmap", "vmap"):
        mapped = getattr(jax, transform)(f, axis_name="d")
        return lambda x: mapped(x.reshape(8, -1, C))
    if transform == "shard_map":
        stacked = lambda x: jax.tree.map(  # noqa: E731
            lambda v: v if v.ndim == 2 else v[None], f(x)
        )
        return jax.shard_map(stacked, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
    return f


@pytest.mark.optimized
@pytest.mark.parametrize("label", TABLE)
def test_a_row_of_the_table(label):
    transforms, options, y_sets, state_sets = TABLE[label]
    names = {
        WHOLE.shape: "all rows of all devices",
        SHARDS.shape: "each device's rows",
        GROUPS.shape: "the rows of each group of devices",
        GHOSTS.shape: "each group of rows",
    }
    said = cells(label)
    one = label.startswith("plain")
    scopes = ["all rows"] * 2 if one else [names[sets.shape] for sets in (y_sets, state_sets)]
    assert said[:2] == scopes

    rng = np.random.default_rng(0)
    x, dy = np.float32(rng.normal(size=(2, ROWS, C)) + np.arange(ROWS)[:, None] / 8)
    params, fresh = jaxbn.init(C)
    want_y, tolerance = np.empty_like(x, np.float64), oracle.tolerance("float32", ROWS)
    for rows in y_sets:
        _, mean, var = oracle.moments(x[rows])
        # x is off by eps of itself, which counts against the sd of its set.
        tolerance = max(tolerance, 2.0**-22 * np.abs(x[rows]).max() / np.sqrt(var.min()))
        want_y[rows] = oracle.normalize(x[rows], mean, var, 1, 0)
    moments = [oracle.moments(x[rows])[1:] for rows in state_sets]
    want_mean, want_var = (np.repeat(v, 8 // len(moments), 0) for v in zip(*moments, strict=True))

    def f(x):
        return jaxbn.batch_norm(x, params, fresh, train=True, momentum=0.0, **options)

    for transform in transforms:
        x_, dy_ = x, dy
        if transform in ("Auto", "Explicit"):
            mesh = jax.make_mesh((8,), ("d",), axis_types=(getattr(AxisType, transform),))
            x_, dy_ = jax.device_put((x, dy), NamedSharding(mesh, P("d")))
        whole = over(transform, f)

        def backward(x, dy, whole=whole):
            y, vjp, state = jax.vjp(whole, x, has_aux=True)
            return y, state, vjp(dy.reshape(y.shape))

        read = transform not in ("pmap", "vmap")
        with contextlib.nullcontext() if read else compiled_quickly():
            both = jax.jit(backward).lower(x_, dy_).compile()
        y, state, _ = both(x_, dy_)
        oracle.assert_close(y, want_y, tolerance, f"{label}, {transform}: y")
        for got, want in ((state.mean, want_mean), (state.var, want_var)):
            got = np.broadcast_to(np.asarray(got), (8, C))
            oracle.assert_close(got, want, tolerance, f"{label}, {transform}: state")
        if read:
            forward = collectives(jax.jit(whole).lower(x_).compile())
            assert [str(forward), str(collectives(both) - forward)] == said[2:], transform


# The training steps, against the same model on one device.


@pytest.fixture(autouse=True)
def _as_pasted():
    with as_pasted():
        yield


def assert_trees_close(got, want, what=""):
    """To the rounding of two steps through three layers, the widest a sum of 64 terms."""
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    for u, v in zip(got, want, strict=True):
        oracle.assert_close(u, np.float64(v), 32 * oracle.tolerance("float32", 64), what)


@pytest.fixture(scope="module")
def start(page):
    """Name of a model → its loss, and what a step carries at first."""

    def of(model, axis_name=None):
        params, stats, loss = page[f"{model}_model"](axis_name)
        return loss, page["Train"](params, stats, page["optimizer"].init(params))

    return of


@pytest.fixture(scope="module")
def one_device(page, start):
    """Two steps of the global batch on one device; the loss falls, so something is learned."""

    @functools.cache
    def of(model):
        loss, train = start(model)
        step = page["jit_step"](loss)
        train, first = step(train, page["x"], page["target"])
        train, second = step(train, page["x"], page["target"])
        assert second < first
        return train

    return of


STEPS = {
    "shard_map": lambda page, loss: page["shard_map_step"](loss),
    "shard_map, check_vma=False": lambda page, loss: page["shard_map_step"](loss, False),
    "outside": lambda page, loss: page["outside_step"](loss),
    "outside, check_vma=False": lambda page, loss: page["outside_step"](loss, False),
    "pmap": lambda page, loss: page["pmap_step"](loss),
    "Auto": lambda page, loss: page["jit_step"](loss),
    "Explicit": lambda page, loss: page["jit_step"](loss),
}


@pytest.mark.parametrize(
    ("road", "model"),
    [
        ("shard_map", "functional"),
        ("shard_map", "linen"),
        ("shard_map", "nnx"),
        ("shard_map, check_vma=False", "functional"),
        ("outside", "linen"),
        ("outside, check_vma=False", "functional"),
        ("pmap", "nnx"),
        ("Auto", "linen"),
        ("Explicit", "nnx"),
    ],
)
def test_steps_equal_one_device(page, start, one_device, model, road):
    by_jit = road in ("Auto", "Explicit")
    loss, train = start(model, None if by_jit else "data")
    batch = page["x"], page["target"]
    if road == "pmap":
        train, batch = jax.tree.map(lambda v: jnp.stack([v] * 8), train), page["by_device"]
    elif by_jit:
        mesh = jax.make_mesh((8,), ("data",), axis_types=(getattr(AxisType, road),))
        train = jax.device_put(train, NamedSharding(mesh, P()))
        batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
    step = STEPS[road](page, loss)
    for _ in range(2):
        train, _ = step(train, *batch)
    jaxbn.assert_replicated(train)
    if road == "pmap":
        train = jax.tree.map(lambda v: v[0], train)
    assert_trees_close(train, one_device(model), f"{model}, {road}")


PATTERNS = {  # a row of the page's table → loss and gradients pmean'd inside
    "inside, loss pmean'd, gradients pmean'd": (True, True),
    "inside, loss pmean'd": (True, False),
    "inside, gradients pmean'd": (False, True),
    "inside, neither": (False, False),
}


@pytest.mark.parametrize("column", ["check_vma=True", "check_vma=False", "pmap"])
def test_gradient_patterns_are_what_the_page_says(page, start, column):
    loss, train = start("functional", "data")
    one_device_loss, _ = start("functional")

    def local(params, stats, x, target):
        """The gradient of each pattern, one a device."""

        def pattern(mean_loss, mean_grads):
            def of(params):
                value, stats_ = loss(params, stats, x, target)
                return jax.lax.pmean(value, "data") if mean_loss else value, stats_

            grads, _ = jax.grad(of, has_aux=True)(params)
            grads = jax.lax.pmean(grads, "data") if mean_grads else grads
            return grads if column == "pmap" else jax.tree.map(lambda v: v[None], grads)

        return {name: pattern(*means) for name, means in PATTERNS.items()}

    arguments = train.params, train.stats, page["x"], page["target"]
    if column == "pmap":
        run = jax.pmap(local, axis_name="data", in_axes=(None, None, 0, 0))
        got = run(*arguments[:2], *page["by_device"])
    else:
        specs, vma = (P(), P(), P("data"), P("data")), column.endswith("True")
        run = jax.shard_map(
            local, mesh=page["mesh"], in_specs=specs, out_specs=P("data"), check_vma=vma
        )
        got = jax.jit(run)(*arguments)
    want, _ = jax.jit(jax.grad(one_device_loss, has_aux=True))(*arguments)
    for name in PATTERNS:
        said = cells(name)[["check_vma=True", "check_vma=False", "pmap"].index(column)]
        if said == "differs by device":
            w1 = got[name]["w1"]
            assert np.abs(w1 - w1[:1]).max() > 0.1 * np.abs(want["w1"]).max()
        else:
            times = int(said.strip("*"))
            all_devices = jax.tree.map(lambda v: np.stack([times * v] * 8), want)  # noqa: B023
            assert_trees_close(got[name], all_devices, f"{name}, {column}")


def test_the_wrong_step_is_eight_times_too_large(page, start):
    loss, train = start("functional", "data")
    arguments = train.params, train.stats, page["x"], page["target"]
    want, _ = jax.jit(jax.grad(start("functional")[0], has_aux=True))(*arguments)
    got = page["wrong_gradient"](loss)(*arguments)
    assert_trees_close(got, jax.tree.map(lambda v: 8 * v, want))


def test_a_filled_up_batch_equals_its_valid_rows(page, start):
    """37 rows on 8 devices: four full, one with 5, three with none."""
    _, train = start("functional")

    def loss(params, stats, x, target, axis_name=None):
        return page["masked_loss"](params, stats, x, *target, axis_name=axis_name)

    step = page["jit_step"](loss)
    want = step(train, page["x"][:37], (page["target"][:37], np.ones(37, bool)))
    filled = page["last_x"], (page["last_target"], page["mask"])
    assert_trees_close(step(train, *filled), want, "jit")
    pooled = functools.partial(loss, axis_name="data")
    for check_vma in (True, False):
        got = page["shard_map_step"](pooled, check_vma)(train, *filled)
        assert_trees_close(got, want, f"check_vma={check_vma}")


def test_shard_map_runs_on_a_mesh_of_explicit_axes(page, start):
    """The blocks of the page with JAX's default mesh in the place of Auto axes."""
    explicit = jax.make_mesh((8,), ("data",))
    assert explicit.axis_types == (AxisType.Explicit,)
    by_rows = NamedSharding(explicit, P("data"))
    names = page | {"mesh": explicit, "by_rows": by_rows}
    names["batch"] = jax.device_put((page["x"], page["target"]), by_rows)
    blocks = [block[1] for block in BLOCK.finditer(PAGE) if "shard_map(" in block[1]]
    assert len(blocks) == 7
    for block in blocks:
        exec(block.replace("AxisType.Auto", "AxisType.Explicit"), names)
    for name in ("y_grouped", "y_by_axis", "ys"):
        assert names[name].sharding.mesh.axis_types[0] == AxisType.Explicit
        assert_trees_close(names[name], page[name], name)
    loss, train = start("functional")
    want, _ = page["jit_step"](loss)(train, page["x"], page["target"])
    assert_trees_close(names["train"], want, "outside")


def test_a_scan_of_local_statistics_equals_each_device_alone(page):
    params, _ = jaxbn.init(16)
    for device in range(8):
        state = page["state"]
        for x, ys in zip(page["xs"], page["ys"], strict=True):
            rows = slice(4 * device, 4 * device + 4)
            y, state = jaxbn.batch_norm(x[rows], params, state, train=True)
            assert_trees_close(ys[rows], y)
        got = jax.tree.map(lambda v, i=device: v[i], page["scanned_states"])
        assert_trees_close(got, state)


def test_per_device_statistics_under_jit(page):
    x, (params, state) = page["x"], jaxbn.init(16)
    y, _ = page["per_device"](x, params, state)
    shards = [oracle.normalize(v, *oracle.moments(v)[1:], 1, 0) for v in np.split(x, 8)]
    amplified = np.abs(x).max() / min(np.sqrt(oracle.moments(v)[2]).min() for v in np.split(x, 8))
    tolerance = amplified * oracle.tolerance("float32", 8)
    oracle.assert_close(y, np.concatenate(shards), tolerance)


def test_groups_equal_a_mesh_axis(page):
    names = ("y_grouped", "y_by_axis", "states", "states_by_axis")
    y_grouped, y_by_axis, states, by_axis = (page[name] for name in names)
    np.testing.assert_array_equal(y_grouped, y_by_axis)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda v: v[::2], states), by_axis)


# Microbatches.


def micro(page, k=4):
    return tuple(v.reshape(k, -1, v.shape[-1]) for v in (page["x"], page["target"]))


def test_accumulation_equals_ghost_batches(page, start, monkeypatch):
    loss, train = start("functional")
    k_updates, one_update = (
        page["accumulate"](loss, merged)(train, *micro(page)) for merged in (False, True)
    )
    with monkeypatch.context() as patch:
        ghost = functools.partial(jaxbn.batch_norm, virtual_batch_size=16)
        patch.setattr(jaxbn, "batch_norm", ghost)
        want, _ = page["jit_step"](loss)(train, page["x"], page["target"])
    assert_trees_close(k_updates.params, want.params)
    assert_trees_close(one_update, want)

    hidden = np.float64(page["x"] @ train.params["w1"]).reshape(4, 16, -1)
    mean, var = (0.99**4 * np.float64(v) for v in train.stats[:2])
    for i, h in enumerate(hidden, start=1):
        mean, var = (
            v + 0.01 * 0.99 ** (4 - i) * b for v, b in ((mean, h.mean(0)), (var, h.var(0)))
        )
    assert_trees_close(k_updates.stats, jaxbn.State(mean, var, 4))


@pytest.mark.parametrize("model", ["linen", "nnx"])
def test_multi_steps_equal_accumulation(page, start, model):
    loss, train = start(model)
    xs, targets = micro(page, 8)
    want = train
    step = page["accumulate"](loss, merged=True)
    for half in (slice(0, 4), slice(4, 8)):
        want = step(want, xs[half], targets[half])
    got = page["multi_steps"](loss, k=4)(train.params, train.stats, xs, targets)
    assert_trees_close(got, (want.params, want.stats), model)


def test_exact_recipes_equal_the_large_batch(page, start):
    loss, train = start("functional")
    large = jax.jit(jax.value_and_grad(loss, has_aux=True))
    want = large(train.params, train.stats, page["x"], page["target"])
    side_by_side = page["side_by_side"](start("functional", "micro")[0])
    for recipe in (page["exact_loss"], side_by_side):
        exact = jax.jit(jax.value_and_grad(recipe, has_aux=True))
        got = exact(train.params, train.stats, *micro(page))
        assert_trees_close(got, want, recipe.__name__)
