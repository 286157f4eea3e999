"""`domains=` and `classes=` in the modules: they equal the functional core, and tools know them."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
from jaxbn import calls, convert, health, watch
from tests.support.messages import message

X = jax.random.normal(jax.random.key(0), (8, 5, 3)) * 2 + 1
DY = jax.random.normal(jax.random.key(1), (8, 5, 3))
DOMAIN = jnp.array([0, 2, 2, 0, 0, 2, 0, 2])
LABELS = jnp.array([3, 1, 0, 2, 3, 1, 0, 2])


class Linen:
    """A layer of linen and its variables, with the calls that the tests make of either library."""

    def __init__(self, **options):
        self.layer = jaxbn.linen.BatchNorm(**options)
        call = {"domain": 0} if options.get("domains") else {}
        call |= {"labels": 0} if options.get("classes") else {}
        self.variables = self.layer.init(jax.random.key(0), X, False, **call)

    def run(self, params, x, train=True, **call):
        """Returns y and the statistics."""
        variables = {**self.variables, "params": params}
        y, updates = self.layer.apply(variables, x, not train, mutable=["batch_stats"], **call)
        return y, updates["batch_stats"]

    @property
    def params(self):
        return self.variables.get("params", {})

    @property
    def stats(self):
        return self.variables["batch_stats"]


class Nnx:
    def __init__(self, **options):
        self.layer = jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0), **options)

    def run(self, params, x, train=True, **call):
        layer = nnx.clone(self.layer)
        nnx.update(layer, params)
        y = layer(x, not train, **call)
        return y, nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))

    @property
    def params(self):
        return nnx.to_pure_dict(nnx.state(self.layer, nnx.Param))

    @property
    def stats(self):
        return nnx.to_pure_dict(nnx.state(self.layer, nnx.BatchStat))


LIBRARIES = {"linen": Linen, "nnx": Nnx}
FORMS = {
    "shared, each": ({"domains": 3, "momentum": None}, {"domain": DOMAIN}),
    "affine": ({"domains": 3, "affine_per_domain": True}, {"domain": 2}),
    "affine, each": ({"domains": 3, "affine_per_domain": True}, {"domain": DOMAIN}),
    "no affine": (
        {"domains": 3, "affine_per_domain": True, "use_scale": False, "use_bias": False},
        {"domain": 1},
    ),
    "classes": ({"classes": 4}, {"labels": LABELS}),
    "domains and classes": ({"domains": 3, "classes": 4}, {"domain": 1, "labels": LABELS}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_y_gradients_and_statistics_are_those_of_the_core(library, form):
    options, call = FORMS[form]
    layer = LIBRARIES[library](**options)
    rows = options["domains"] if options.get("affine_per_domain") else options.get("classes")
    keys = jax.random.split(jax.random.key(2), 2)
    shape = (3,) if rows is None else (rows, 3)
    params = {
        name: jax.random.normal(key, shape)
        for name, key in zip(("scale", "bias"), keys, strict=True)
        if name in layer.params
    }
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, layer.params)

    def of_layer(params):
        return layer.run(params, X, **call)

    def of_core(params):
        state = jaxbn.State(layer.stats["mean"], layer.stats["var"], layer.stats.get("count"))
        params = jaxbn.Params(params.get("scale"), params.get("bias"))
        labels = call["domain"] if options.get("affine_per_domain") else call.get("labels")
        core = {"domain": call.get("domain"), "labels": labels}
        momentum = options.get("momentum", 0.99)
        y, state = jaxbn.batch_norm(X, params, state, train=True, momentum=momentum, **core)
        return y, {n: v for n, v in state._asdict().items() if v is not None}

    got, pull, stats = jax.vjp(of_layer, params, has_aux=True)
    want, pull_core, want_stats = jax.vjp(of_core, params, has_aux=True)
    chex.assert_trees_all_close(
        (got, stats, pull(DY)), (want, want_stats, pull_core(DY)), rtol=1e-5, atol=1e-5
    )
    y, same = layer.run(params, X, train=False, **call)
    assert y.shape == X.shape
    chex.assert_trees_all_equal(same, layer.stats)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_step_with_a_traced_domain_compiles_once(library):
    layer = LIBRARIES[library](domains=3)
    step = jax.jit(lambda k: layer.run(layer.params, X, domain=k)[1]["mean"])
    for k in range(3):
        learned = np.flatnonzero(np.any(step(k), 1))
        assert learned.tolist() == [k]
    assert step._cache_size() == 1


ERRORS = {
    "affine without domains": (
        {"affine_per_domain": True},
        {},
        "BatchNorm: affine_per_domain=True without domains; write domains=2, or classes=2 for a "
        "scale and a bias by labels.",
    ),
    "affine and classes": (
        {"domains": 2, "affine_per_domain": True, "classes": 3},
        {"domain": 0, "labels": 0},
        "BatchNorm: affine_per_domain=True with classes=3, but scale and bias are by domain or by "
        "label; leave one of them out.",
    ),
    "no domain": (
        {"domains": 2},
        {},
        "BatchNorm: the layer has domains=2 and its call no domain; write bn(x, domain=0), or one "
        "for each row of x.",
    ),
    "no labels": (
        {"classes": 4},
        {},
        "BatchNorm: the layer has classes=4 and its call no labels; write bn(x, labels=0), or one "
        "for each row of x.",
    ),
    "a domain of none": (
        {},
        {"domain": 1},
        "BatchNorm: domain= in the call of a layer without domains; write domains=2 in the "
        "constructor, or leave domain out.",
    ),
    "labels of none": (
        {},
        {"labels": 1},
        "BatchNorm: labels= in the call of a layer without classes; write classes=2 in the "
        "constructor, or leave labels out.",
    ),
    "out of range": (
        {"domains": 2},
        {"domain": 2},
        "batch_norm: domain=2, expected 0 to 1, one of 2 domains; write domain=1 for the last, or "
        "domains=3 where they are made.",
    ),
    "no number": (
        {"domains": 0},
        {"domain": 0},
        "BatchNorm: domains=0, expected how many there are, an integer of at least 1, or None for "
        "one without an axis of its own; write domains=2.",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_the_message_says_all(library, case):
    options, call, expected = ERRORS[case]

    def f():
        if library == "linen":
            jaxbn.linen.BatchNorm(**options).init(jax.random.key(0), X, False, **call)
        else:
            jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0), **options)(X, **call)

    assert message(ValueError, f) == expected


def test_statistics_of_one_set_say_how_to_become_several():
    variables = jaxbn.linen.BatchNorm().init(jax.random.key(0), X, False)
    layer = jaxbn.linen.BatchNorm(domains=2, use_running_average=True)
    assert message(ValueError, lambda: layer.apply(variables, X, domain=0)) == (
        "BatchNorm: batch_stats/mean has shape (3,), one set of statistics, but domains=2; write "
        "jax.tree.map(lambda v: jnp.stack([v] * 2), batch_stats) for domains that start alike."
    )
    stats = jax.tree.map(lambda v: jnp.stack([v] * 2), variables["batch_stats"])
    y = layer.apply({**variables, "batch_stats": stats}, X, domain=0)
    want = jaxbn.linen.BatchNorm(use_running_average=True).apply(variables, X)
    np.testing.assert_array_equal(y, want)


class Net(nn.Module):
    """Two layers, so that the second one's x depends on the first one's mode."""

    @nn.compact
    def __call__(self, x, domain, train=True):
        norm = functools.partial(
            jaxbn.linen.BatchNorm, domains=3, momentum=None, use_running_average=not train
        )
        x = norm(name="first")(x, domain=domain) ** 2
        return norm(name="second")(x, domain=domain)


class NnxNet(nnx.Module):
    def __init__(self):
        self.first, self.second = (
            jaxbn.nnx.BatchNorm(3, domains=3, momentum=None, rngs=nnx.Rngs(0)) for _ in range(2)
        )

    def __call__(self, x, domain):
        return self.second(self.first(x, domain=domain) ** 2, domain=domain)


def of_linen(batches):
    net = Net()
    variables = net.init(jax.random.key(0), X, 0)

    def apply(variables, batch, **options):
        return net.apply(variables, *batch, train=False, **options)

    return jaxbn.recalibrate(apply, variables, batches)["batch_stats"]


def of_nnx(batches):
    model = jaxbn.recalibrate(lambda model, batch: model(*batch), NnxNet(), batches)
    return nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


def of_states(batches):
    def apply(states, batch):
        x, domain = batch
        x, first = jaxbn.batch_norm(x, None, states["first"], train=True, domain=domain)
        _, second = jaxbn.batch_norm(x**2, None, states["second"], train=True, domain=domain)
        return {"first": first, "second": second}

    _, state = jaxbn.init(3, domains=3)
    new = jaxbn.recalibrate(apply, {"first": state, "second": state}, batches)
    return {path: state._asdict() for path, state in new.items()}


@pytest.mark.parametrize(
    ("given", "model"),
    [("each", of_linen), ("each", of_nnx), ("each", of_states), ("one", of_nnx)],
)
def test_recalibration_is_of_the_rows_of_each_domain(given, model):
    """Each domain as a model of its own; one without a row stays as it was."""
    if given == "each":
        batches = [(X, DOMAIN), (X[::-1] + 1, DOMAIN)]
        own = {k: [v[np.isin(DOMAIN, k)] for v, _ in batches] for k in (0, 2)}
    else:
        batches = [(X, jnp.asarray(2)), (X + 1, jnp.asarray(2))]
        own = {2: [v for v, _ in batches]}

    def alone(states, x):
        x, first = jaxbn.batch_norm(x, None, states["first"], train=True)
        _, second = jaxbn.batch_norm(x**2, None, states["second"], train=True)
        return {"first": first, "second": second}

    got = model(batches)
    _, state = jaxbn.init(3)
    for k in range(3):
        want = {"first": state, "second": state}
        if k in own:
            want = jaxbn.recalibrate(alone, want, own[k])
        for path in want:
            row = {name: v[k] for name, v in got[path].items()}
            chex.assert_trees_all_close(row, want[path]._asdict(), rtol=1e-4, atol=1e-5)


def trained_twice():
    """Variables of a net whose domains 0 and 2 have learned, in the running average."""
    net = Wide()
    variables = net.init(jax.random.key(0), X, 0)
    for domain in (0, 2):
        _, updates = net.apply(variables, X, domain, mutable=["batch_stats"])
        variables = {**variables, **updates}
    return net, variables


class Wide(nn.Module):
    affine: bool = False

    @nn.compact
    def __call__(self, x, domain, train=True):
        norm = jaxbn.linen.BatchNorm(
            domains=3,
            affine_per_domain=self.affine,
            momentum=0.0,
            use_running_average=not train,
            name="norm",
        )
        return norm(nn.Dense(8)(x), domain=domain)


class WideNnx(nnx.Module):
    def __init__(self, affine=False):
        rngs = nnx.Rngs(0)
        self.dense = nnx.Linear(3, 8, rngs=rngs)
        self.norm = jaxbn.nnx.BatchNorm(8, domains=3, affine_per_domain=affine, rngs=rngs)

    def __call__(self, x, domain):
        return self.norm(self.dense(x), domain=domain)


def test_checks_and_figures_are_of_the_domains_in_the_batch():
    net, variables = trained_twice()
    _, seen = calls.hooked_apply(net.apply)(variables, X, 2)
    found = health.check(variables, seen)
    assert not [f for f in found if f.kind in ("stale", "few_values")]
    off = jax.tree.map(lambda v: v.at[2].add(30.0), variables["batch_stats"])
    (stale,) = [
        f for f in health.check({**variables, "batch_stats": off}, seen) if f.kind == "stale"
    ]
    assert stale.channels == tuple(range(16, 24))  # those of domain 2
    assert health.gap(net.apply, variables, X, 2).first is None
    opened = health.gap(net.apply, {**variables, "batch_stats": off}, X, 2).first
    assert opened.cause.kind == "stale"

    _, seen = watch.linen(net.apply)(variables, X, 2)
    figures = watch.metrics(watch.records(seen, variables))["norm"]
    assert figures["batch_count"] == 40
    assert figures["batch_var_min"] > 0
    assert figures["symmetric_kl_max"] < 1e-6


@pytest.mark.parametrize("domain", [2, "array"])
@pytest.mark.parametrize("affine", [False, True])
def test_fold_takes_one_domain(domain, affine):
    net = Wide(affine)
    variables = net.init(jax.random.key(0), X, 0)
    stats = jax.tree.map(lambda v: v + jnp.arange(3.0)[:, None], variables["batch_stats"])
    variables = {**variables, "batch_stats": stats}
    domain = jnp.asarray(2) if domain == "array" else domain

    def served(x):
        return net.apply(variables, x, domain, train=False)

    folded, report = jaxbn.fold(served, X)
    assert [site.folded for site in report.sites] == [True]
    np.testing.assert_allclose(folded(X), served(X), rtol=1e-5, atol=1e-5)


def test_fold_keeps_a_norm_whose_domain_is_an_input():
    net, variables = trained_twice()
    folded, report = jaxbn.fold(lambda x, k: net.apply(variables, x, k, train=False), X, DOMAIN)
    assert [site.folded for site in report.sites if "norm" in site.name] == [False]
    want = net.apply(variables, X, DOMAIN, train=False)
    np.testing.assert_allclose(folded(X, DOMAIN), want, rtol=1e-5, atol=1e-5)


def test_freeze_keeps_all_domains():
    net, variables = trained_twice()
    frozen = jaxbn.freeze(net.apply, variables, allow_untrained=True)
    y, updates = frozen(variables, X, DOMAIN, mutable=["batch_stats"])
    chex.assert_trees_all_equal(updates["batch_stats"], variables["batch_stats"])
    np.testing.assert_array_equal(y, net.apply(variables, X, DOMAIN, train=False))
    model = jaxbn.freeze(WideNnx(), allow_untrained=True)
    before = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    model(X, DOMAIN)
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)), before)


def test_linen_to_nnx_and_back():
    _, variables = trained_twice()
    model = WideNnx()
    model, _ = convert.linen_to_nnx(variables, model, rename={"Dense_0": "dense"})
    np.testing.assert_array_equal(model.norm.mean[...], variables["batch_stats"]["norm"]["mean"])
    back, _ = convert.nnx_to_linen(model, variables, rename={"dense": "Dense_0"})
    chex.assert_trees_all_equal(back, variables)


ONE = "as jax.tree.map(lambda v: v[0], batch_stats) does where axis 0 is theirs"
REFUSED = {
    "to_torch": (
        lambda: convert.to_torch(trained_twice()[1]),
        "to_torch: the source does not fit the target; nothing was converted.\n"
        + "\n".join(
            f"  batch_stats/norm/{name} is (3, 8), and PyTorch's norms have one axis: of several "
            f"domains (or classes, or layers of a scan), take one, {ONE}"
            for name in ("mean", "var")
        ),
    ),
    "from_torch": (
        lambda: convert.from_torch(
            {
                "norm.weight": np.ones(8, np.float32),
                "norm.bias": np.zeros(8, np.float32),
                "norm.running_mean": np.zeros(8, np.float32),
                "norm.running_var": np.ones(8, np.float32),
            },
            trained_twice()[1],
            keep=["Dense_0"],
        ),
        "from_torch: the source does not fit the target; nothing was converted.\n"
        + "\n".join(
            f"  misshapen: norm.running_{name} (8,) becomes (8,), but batch_stats/norm/{name} is "
            "(3, 8), a row for each domain: convert into the model without domains, then "
            "jax.tree.map(lambda v: jnp.stack([v] * 3), batch_stats)"
            for name in ("mean", "var")
        ),
    ),
    "drift": (
        lambda: health.drift(
            trained_twice()[1],
            [health.incoming(trained_twice()[0].apply)(trained_twice()[1], X, 0, train=False)[1]],
        ),
        "drift: the statistics of 'norm' have shape (3, 8), with domains on axis 0, but moments of "
        "rows have shape (1, 8, 8); for the rows of domain 0 write "
        "health.drift(jax.tree.map(lambda v: v[:1], batch_stats), batches).",
    ),
    **{
        f"swap to {to}, {library}": (
            functools.partial(lambda to, f: f(to), to, f),
            f"swap: layer 'norm' has {name}, which Flax's norms do not have; leave the layer out "
            f"by where=, or take the arrays of one, {ONE}, into a model without them.",
        )
        for to, name in (("flax", "domains=3"), ("group", "affine_per_domain=True"))
        for library, f in (
            ("linen", lambda to: swapped_linen(to)(X)),
            ("nnx", lambda to: jaxbn.swap(WideNnx(True), to=to)),
        )
    },
}


def swapped_linen(to):
    net = Wide(True)
    apply, variables, _ = jaxbn.swap(net.apply, net.init(jax.random.key(0), X, 0), to)
    return lambda x: apply(variables, x, 0)


@pytest.mark.parametrize("case", REFUSED)
def test_a_tool_without_domains_says_what_to_write(case):
    f, expected = REFUSED[case]
    with pytest.raises(ValueError) as error:
        f()
    assert str(error.value).partition("\nLayers of")[0] == expected


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_a_norm_without_a_batch_takes_the_place_of_shared_affine(library):
    if library == "linen":
        net = Wide()
        apply, variables, _ = jaxbn.swap(net.apply, net.init(jax.random.key(0), X, 0), "layer")
        y = apply(variables, X, DOMAIN)
    else:
        y = jaxbn.swap(WideNnx(), to="layer").model(X, DOMAIN)
    np.testing.assert_allclose(y.mean(-1), 0, atol=1e-5)
