"""Every option on every road and by every caller, against the plain formula in float64.

`python -m benchmarks parity --options` runs it. An option is a row of OPTIONS.
"""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.reporting.report import Table, track
from benchmarks.subjects import roads
from benchmarks.subjects.callers import CALLERS
from benchmarks.subjects.roads import DEVICES, GROUPS, Road
from jaxbn import Params, State

ROWS, C = 4, 3  # on a device
SHAPE = (ROWS * DEVICES, 4, 4, C)
COUNT = np.int32(3)  # of the state before
MOMENTUM, EPSILON = 0.99, 1e-5
DOMAIN = np.arange(SHAPE[0], dtype=np.int32) % 2  # of each row; every device has rows of both
LABELS = np.arange(SHAPE[0], dtype=np.int32) % 3
REFUSED = "refused"


class Option(NamedTuple):
    """What the norm is given: keywords, arrays with a row for each of x's, groups of devices."""

    keywords: Mapping[str, Any] = MappingProxyType({})
    arrays: Callable[[np.random.Generator], dict[str, Any]] = lambda rng: {}
    groups: Any = None


def mask(rng):
    return {"mask": rng.random((*SHAPE[:-1], 1)) < 0.4}


def weights(rng):
    return {"weights": np.float32(rng.uniform(0.1, 2, (SHAPE[0], 1, 1, 1)))}


def residual(rng):
    return {"residual": np.float32(rng.normal(size=SHAPE))}


def domain(rng):
    return {"domain": DOMAIN}


def labels(rng):
    return {"labels": LABELS}


def both(first, second):
    return lambda rng: first(rng) | second(rng)


RENORM = {"renorm": (1.1, 0.3)}
GHOSTS = {"virtual_batch_size": 2}
RELU = {"activation": jax.nn.relu}
DOMAINS, CLASSES = {"domains": 2}, {"classes": 3}
OPTIONS = {
    "none": Option(),
    "mask": Option(arrays=mask),
    "weights": Option(arrays=weights),
    "mask, weights": Option(arrays=both(mask, weights)),
    "update_stats=False": Option({"update_stats": False}),
    "momentum=None": Option({"momentum": None}),
    "unbiased": Option({"unbiased": True}),
    "unbiased, weights": Option({"unbiased": True}, weights),
    "renorm": Option(RENORM),
    "renorm, weights": Option(RENORM, weights),
    "relu": Option(RELU),
    "relu, residual": Option(RELU, residual),
    "relu, weights": Option(RELU, weights),
    "silu, residual": Option({"activation": jax.nn.silu}, residual),
    "ghost batches": Option(GHOSTS),
    "ghost batches, mask": Option(GHOSTS, mask),
    "ghost batches, weights": Option(GHOSTS, weights),
    "ghost batches, renorm": Option(GHOSTS | RENORM),
    "ghost batches, relu, residual": Option(GHOSTS | RELU, residual),
    "ghost batches larger than a device's": Option({"virtual_batch_size": 2 * ROWS}),
    "domain": Option(DOMAINS | {"domain": 1}),
    "domain of each row": Option(DOMAINS, domain),
    "domain of each row, weights": Option(DOMAINS, both(domain, weights)),
    "domain of each row, renorm": Option(DOMAINS | RENORM, domain),
    "labels": Option(CLASSES, labels),
    "domain of each row, labels": Option(DOMAINS | CLASSES, both(domain, labels)),
    "groups of devices": Option(groups=GROUPS["contiguous"]),
    "groups of devices, interleaved": Option(groups=GROUPS["interleaved"]),
    "groups of devices, weights": Option(groups=GROUPS["contiguous"], arrays=weights),
    "groups of devices, renorm": Option(RENORM, groups=GROUPS["contiguous"]),
}


def on_one_device(groups):
    """No axis is mapped here, so groups of devices are refused."""
    return lambda bn: roads.one_device(functools.partial(bn, axis_index_groups=groups))


ROADS: dict[str, Callable[[Any], Road]] = {  # of groups of devices
    "jit": lambda groups: Road(on_one_device(groups)),
    "jit, sharded": lambda groups: Road(
        on_one_device(groups), place=roads.placed(roads.mesh((DEVICES,), ("data",)))
    ),
    "shard_map": lambda groups: Road(roads.shard_map(groups=groups)),
    "pmap": lambda groups: Road(roads.by_device(jax.pmap, groups)),
    "vmap": lambda groups: Road(roads.by_device(jax.vmap, groups)),
}


def called(caller: str, option: Option):
    """A batch norm for a road: in training, and by the same state in eval mode."""

    def bn(x, params, state, *, mask, **pooled):
        count = np.full(np.shape(state[0])[:-1], COUNT)
        run = functools.partial(
            CALLERS[caller], x, Params(*params), State(*state, count), **option.keywords, **pooled
        )
        y, new = run(train=True, **mask)
        return (y, run(train=False, **mask)[0]), new

    return bn


def formula(option: Option):
    """What `option` means, for whole arrays: `(x, params, state, arrays)` as on a road."""
    keywords = {"momentum": MOMENTUM, "virtual_batch_size": SHAPE[0], **option.keywords}

    def whole(x, params, state, arrays):
        w = jnp.broadcast_to(arrays.get("weights", 1.0) * arrays.get("mask", True), x.shape)
        scale, bias = params
        if "classes" in keywords:
            scale, bias = scale[LABELS][:, None, None], bias[LABELS][:, None, None]
        number = keywords.get("domains", 0)
        domains = np.broadcast_to(keywords.get("domain", DOMAIN if number else 0), len(x))

        def before(rows):
            """Mean and var of the state that these rows, of one domain, go by."""
            return [v[domains[rows][0]] if number else v for v in state]

        def moments(rows):  # [N], which take part
            share = w * rows[:, None, None, None]
            n = share.sum((0, 1, 2))
            mean = (share * x).sum((0, 1, 2)) / n
            return n, mean, (share * (x - mean) ** 2).sum((0, 1, 2)) / n

        def normalized(mean, var, r=1.0, d=0.0):
            y = ((x - mean) / jnp.sqrt(var + EPSILON) * r + d) * scale + bias
            return keywords.get("activation", lambda y: y)(y + arrays.get("residual", 0.0))

        def corrections(mean, var, old_mean, old_var):
            r_max, d_max = keywords.get("renorm", (1.0, 0.0))
            sd = jnp.sqrt(old_var + EPSILON)
            r = jnp.clip(jnp.sqrt(var + EPSILON) / sd, 1 / r_max, r_max)
            return jax.lax.stop_gradient((r, jnp.clip((mean - old_mean) / sd, -d_max, d_max)))

        def learned(rows):
            n, mean, var = moments(rows)
            old_mean, old_var = before(rows)
            var = var * n / (n - 1) if keywords.get("unbiased") else var
            keep = keywords["momentum"]
            keep = COUNT / (COUNT + 1) if keep is None else keep
            return keep * old_mean + (1 - keep) * mean, keep * old_var + (1 - keep) * var

        row = np.arange(len(x))
        parts = row // keywords["virtual_batch_size"]  # that share statistics
        states = [np.ones(len(x), bool)]  # the rows that the state learns from
        if number:
            parts, states = domains, [domains == k for k in range(number)]
        if option.groups is not None:
            of = {device: i for i, group in enumerate(option.groups) for device in group}
            parts = np.vectorize(of.get)(row // ROWS)
            states = [parts == of[device] for device in range(DEVICES)]
        y = y_eval = jnp.zeros_like(x)
        for part in np.unique(parts):
            rows = parts == part
            _, mean, var = moments(rows)
            old = before(rows)
            of_part = normalized(mean, var, *corrections(mean, var, *old))
            y, y_eval = (
                jnp.where(rows[:, None, None, None], new, v)
                for new, v in ((of_part, y), (normalized(*old), y_eval))
            )
        new = [
            learned(rows) if rows.any() else tuple(v[k] for v in state)
            for k, rows in enumerate(states)
        ]
        several = option.groups or number
        new = jax.tree.map(lambda *v: jnp.stack(v) if several else v[0], *new)
        new = new if keywords.get("update_stats", True) else state
        return (y, y_eval), new

    return whole


def arguments(option: Option):
    """x, params, state, arrays and dy."""
    rng = np.random.default_rng(0)
    x, dy = np.float32(rng.normal(size=(2, *SHAPE)))
    vectors = np.float32(rng.uniform(1, 2, (4, C)))
    x = 2 * x + vectors[0]
    params, state = (
        tuple(table(v, option.keywords.get(rows)) for v in pair)
        for pair, rows in ((vectors[:2], "classes"), (vectors[2:], "domains"))
    )
    return x, params, state, option.arrays(rng), dy


def table(v, rows):
    """A table [rows, C] of numbers that differ; v [C] itself without a number of rows."""
    return v if rows is None else v * np.linspace(0.7, 1.4, rows, dtype=np.float32)[:, None]


def step(f):
    """Both y, the statistics, and the gradients of x, params and arrays of numbers."""

    def run(x, params, state, arrays, dy):
        numbers = {k: v for k, v in arrays.items() if jnp.issubdtype(v.dtype, jnp.floating)}

        def forward(x, params, numbers):
            return f(x, params, state, arrays | numbers)

        y, vjp, new = jax.vjp(forward, x, params, numbers, has_aux=True)
        return y, new, vjp((dy, dy))

    return jax.jit(run)


def expected(option: Option):
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda v: np.float64(v) if v.dtype == np.float32 else v, arguments(option)
        )
        return jax.tree.map(np.asarray, step(formula(option))(*wide))


def error(got, want) -> float:
    """The largest of any array, relative to its largest value."""

    def of_array(a, b):
        return float(np.abs(np.float64(a) - b).max() / np.abs(b).max())

    return max(jax.tree.leaves(jax.tree.map(of_array, got, want)))


def run(size="usual", names=None, chosen=tuple(ROADS)) -> list[Table]:
    names = names or (list(OPTIONS)[: 2 if size == "tiny" else None])
    found, notes = {}, {}
    for name in track(names, "Parity of options"):
        option = OPTIONS[name]
        want = expected(option)
        for road in chosen:
            built = ROADS[road](option.groups)
            for caller in CALLERS:
                f = step(built.build(called(caller, option)))
                try:
                    got = f(*built.place(*arguments(option)))
                except (TypeError, ValueError, NotImplementedError) as e:
                    said = str(e).splitlines()[0]
                    ours = said.lower().replace("_", "").startswith("batchnorm")
                    found[name, road, caller] = REFUSED if ours else type(e).__name__
                    notes.setdefault(said.split("=")[0], f"{name}, {road}: {said}")
                    continue
                found[name, road, caller] = error(got, want)

    def worst(values) -> str | float:
        words = [v for v in values if isinstance(v, str)]
        numbers = [v for v in values if not isinstance(v, str)]
        return max(numbers) if numbers else ", ".join(dict.fromkeys(words))

    def table(title, columns, at, key, notes):
        rows = []
        for name in names:
            cells = [[v for k, v in found.items() if k[0] == name and k[at] == c] for c in columns]
            rows.append([name, *map(worst, cells)])
        return Table(title, ["option", *columns], rows, notes, key=key)

    return [
        table(
            "Parity of options: largest relative error against the formula in float64",
            list(chosen),
            1,
            "parity-options",
            [
                "The largest over functional, linen and nnx, and over y in training and in eval "
                "mode, statistics, and the gradients of x, scale, bias, weights and residual; "
                f"float32, {DEVICES} devices of {ROWS} images of 4 x 4.",
                *notes.values(),
            ],
        ),
        table(
            "Parity of options: the same by caller, the largest over all roads",
            list(CALLERS),
            2,
            "parity-options-callers",
            [],
        ),
    ]
