"""The training op's derivatives: right to every order asked for, and small in what they keep."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import export

import jaxbn
from jaxbn._op import sums
from tests.support import cases, oracle

EPS = 2.0**-23  # of float32
REAL = [case for case in cases.SMALL if case.dtype != "complex64"]


def normal(shape, mean=0.0, sd=1.0, seed=0):
    return np.random.default_rng(seed).normal(mean, sd, shape).astype(np.float32)


def train(x, params, state=None, **options):
    return jaxbn.batch_norm(x, params, state, train=True, **options)


def plain(x, params, mask=None, epsilon=1e-5):
    """The textbook formula over all axes but the last, in float64: JAX differentiates it."""
    scale, bias = params
    axes = tuple(range(x.ndim - 1))
    w = jnp.ones(x.shape) if mask is None else jnp.broadcast_to(mask, x.shape).astype(float)
    expand = functools.partial(jnp.expand_dims, axis=axes)
    n = w.sum(axes)
    mean = (x * w).sum(axes) / n
    d = x - expand(mean)
    var = ((d * d.conj()).real * w).sum(axes) / n
    return d * expand(scale / jnp.sqrt(var + epsilon)) + expand(bias)


@functools.partial(jax.jit, static_argnames="axis")
def gradients(x, params, dy, mask, axis):
    def f(x, params):
        return train(x, params, mask=mask, axis=axis)[0]

    return jax.vjp(f, x, params)[1](dy)


@pytest.mark.parametrize("case", REAL, ids=lambda case: case.name)
def test_gradients_equal_the_oracle(case):
    a = cases.arrays(case)
    with jax.enable_x64(case.dtype == "float64"):
        dx, grads = gradients(a.x, jaxbn.Params(a.scale, a.bias), a.dy, a.mask, case.axis)
    desired = oracle.gradients(a.x, a.dy, a.scale.ravel(), case.axis, a.mask)
    assert (dx.dtype, dx.shape) == (case.dtype, case.shape)
    assert (grads.scale.dtype, grads.bias.dtype) == (a.scale.dtype, a.bias.dtype)
    assert grads.scale.shape == grads.bias.shape == case.features
    tolerance = oracle.tolerance(case.dtype, case.count)
    oracle.assert_close(oracle.rows(dx, case.axis), desired[0], tolerance, "dx")
    tolerance = oracle.tolerance(a.scale.dtype, case.count)
    # Relative to what is summed over, since dscale and dbias may cancel.
    size = np.sqrt(case.count)
    for name, got, want in zip(("dscale", "dbias"), grads, desired[1:], strict=True):
        assert np.abs(np.float64(got).ravel() - want).max() <= tolerance * size * 4, name


@pytest.mark.parametrize("cells", [None, "mask", "weights"])
@pytest.mark.parametrize("kept", ["everything", "by policy"])
def test_complex_gradients_equal_those_of_the_formula(cells, kept):
    case = next(case for case in cases.SMALL if case.dtype == "complex64")
    a = cases.arrays(case)
    mask = np.random.default_rng(0).random((*case.shape[:-1], 1)) < 0.6 if cells else None
    options = {cells: mask.astype(np.float32) if cells == "weights" else mask} if cells else {}

    def f(x, params):
        return train(x, params, **options)[0]

    if kept == "by policy":
        f = jax.checkpoint(f, policy=jaxbn.checkpoint_policy)
    _, vjp = jax.vjp(f, jnp.asarray(a.x), jaxbn.Params(a.scale, a.bias))
    dx, (dscale, dbias) = vjp(jnp.asarray(a.dy))
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        params = jaxbn.Params(np.float64(a.scale), np.float64(a.bias))
        _, vjp = jax.vjp(lambda x, p: plain(x, p, mask), np.complex128(a.x), params)
        desired, (dscale_, dbias_) = vjp(jnp.asarray(a.dy, jnp.complex128))
    tolerance = oracle.tolerance("complex64", case.count)
    oracle.assert_close(dx, desired, tolerance, "dx")
    oracle.assert_close(dscale, dscale_, 4 * tolerance, "dscale")
    oracle.assert_close(dbias, dbias_, 4 * tolerance, "dbias")


def example(shape=(4, 6, 3)):
    """x, params, their directions, cotangent and mask, in float64."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape))  # noqa: E731
    c = shape[-1]
    x, params = 2 * normal(*shape) + 3, jaxbn.Params(normal(c), normal(c))
    directions = normal(*shape), jaxbn.Params(normal(c), normal(c))
    return (x, params), directions, normal(*shape), jnp.asarray(rng.random((*shape[:-1], 1)) < 0.7)


def state_of(params):
    """Running statistics that are differentiated with the parameters."""
    return jaxbn.State(jnp.sin(params.bias), params.scale**2 + 1, None)


def affine(params, x):
    """Eval of one pixel."""
    mean, var, _ = state_of(params)
    return (x - mean) / jnp.sqrt(var + 1e-5) * params.scale + params.bias


def epsilon_of(params):
    return jnp.exp(params.scale[0])


def old_state(dtype="float64"):
    """Running statistics of 3 channels, in some of which renormalization clips r or d."""
    mean, var = np.array([2.5, -2.0, 3.4], dtype), np.array([3.0, 4.0, 0.5], dtype)
    return jaxbn.State(jnp.asarray(mean), jnp.asarray(var), None)


RENORM = (1.5, 0.5)


def renormalized(x, params, mask=None):
    """The formula of batch renormalization, of what `plain` makes of x."""
    ones = jaxbn.Params(jnp.ones(x.shape[-1]), jnp.zeros(x.shape[-1]))
    xhat = plain(x, ones, mask)
    axes, weight = (0, 1), None if mask is None else jnp.broadcast_to(mask, x.shape)
    still = jax.lax.stop_gradient(x)
    mean, sd = still.mean(axes, where=weight), jnp.sqrt(still.var(axes, where=weight) + 1e-5)
    old = old_state()
    old_sd = jnp.sqrt(old.var + 1e-5)
    r = jnp.clip(sd / old_sd, 1 / RENORM[0], RENORM[0])
    d = jnp.clip((mean - old.mean) / old_sd, -RENORM[1], RENORM[1])
    expand = functools.partial(jnp.expand_dims, axis=axes)
    return (xhat * expand(r) + expand(d)) * expand(params.scale) + expand(params.bias)


def renorm(x, params, **options):
    return train(x, params, old_state(), renorm=RENORM, **options)[0]


def weights_of(x, params):
    """Weights that are differentiated with x and with the parameters."""
    return jnp.exp(jnp.sin(x[..., :1]) + params.scale[0])


def pooled_weights(x, params, mask):
    def part(x, m):
        return train(x, params, mask=m, weights=weights_of(x, params), axis_name="d")[0]

    return jax.vmap(part, axis_name="d")(x, mask)


ROADS = {
    "weights": lambda x, params, mask: train(x, params, weights=weights_of(x, params))[0],
    "weights, pooled": pooled_weights,
    "weights, ghost": lambda x, params, mask: train(
        x, params, weights=weights_of(x, params), virtual_batch_size=2
    )[0],
    "renorm, masked": lambda x, params, mask: renorm(x, params, mask=mask),
    "renorm, ghost": lambda x, params, mask: renorm(x, params, virtual_batch_size=2),
    "renorm, pooled": lambda x, params, mask: jax.vmap(
        lambda x, m: renorm(x, params, mask=m, axis_name="d"), axis_name="d"
    )(x, mask),
    "renorm, relu, residual": lambda x, params, mask: renorm(
        x, params, activation=jax.nn.relu, residual=jnp.cos(x)
    ),
    "traced epsilon": lambda x, params, mask: train(x, params, epsilon=epsilon_of(params))[0],
    "eval": lambda x, params, mask: eval_functional(x, params, state_of(params)),
    "masked": lambda x, params, mask: train(x, params, mask=mask)[0],
    "ghost": lambda x, params, mask: train(x, params, virtual_batch_size=2)[0],
    "pooled": lambda x, params, mask: jax.vmap(
        lambda x, m: train(x, params, mask=m, axis_name="d")[0], axis_name="d"
    )(x, mask),
}
FORMULAS = {
    "weights": lambda x, params, mask: plain(x, params, weights_of(x, params)),
    "weights, pooled": lambda x, params, mask: plain(
        x, params, jnp.where(mask, weights_of(x, params), 0)
    ),
    "weights, ghost": lambda x, params, mask: jnp.concatenate(
        [plain(part, params, weights_of(part, params)) for part in (x[:2], x[2:])]
    ),
    "renorm, masked": renormalized,
    "renorm, ghost": lambda x, params, mask: jnp.concatenate(
        [renormalized(x[:2], params), renormalized(x[2:], params)]
    ),
    "renorm, pooled": renormalized,
    "renorm, relu, residual": lambda x, params, mask: jax.nn.relu(
        renormalized(x, params) + jnp.cos(x)
    ),
    "traced epsilon": lambda x, params, mask: plain(x, params, epsilon=epsilon_of(params)),
    "masked": plain,
    "ghost": lambda x, params, mask: jnp.concatenate([plain(x[:2], params), plain(x[2:], params)]),
    "pooled": plain,
    "eval": lambda x, params, mask: jax.vmap(jax.vmap(functools.partial(affine, params)))(x),
}


@pytest.mark.parametrize("road", ROADS)
def test_derivatives_of_first_and_second_order(road):
    """Reverse, forward, reverse over reverse and forward over reverse, in float64.

    A wrong second order is off by a percent or more; rounding by far less than 1e-10.
    """
    with jax.enable_x64(True):
        primals, directions, dy, mask = example()

        def derivatives(f):
            def loss(x, params):
                return (jnp.sin(f(x, params, mask)) * dy).sum()

            def along(x, params):
                parts = jax.tree.map(lambda g, v: (g * v).sum(), grad(x, params), directions)
                return sum(jax.tree.leaves(parts))

            grad = jax.grad(loss, (0, 1))
            return {
                "reverse": grad(*primals),
                "forward": jax.jvp(lambda *p: f(*p, mask), primals, directions),
                "linearize": jax.linearize(lambda *p: f(*p, mask), *primals)[1](*directions),
                "reverse over reverse": jax.grad(along, (0, 1))(*primals),
                "forward over reverse": jax.jvp(grad, primals, directions)[1],
            }

        got = jax.jit(lambda: derivatives(ROADS[road]))()
        desired = jax.jit(lambda: derivatives(FORMULAS[road]))()
        for name in desired:
            for u, v in zip(
                jax.tree.leaves(got[name]), jax.tree.leaves(desired[name]), strict=True
            ):
                oracle.assert_close(u, v, 1e-10, f"{road}, {name}")


def test_second_order_in_float32():
    (x, params), (tx, tparams), dy, mask = jax.tree.map(np.asarray, example())

    def product(f, x, params, tx, tparams):
        def grad(x, params):
            return jax.grad(lambda *p: (jnp.sin(f(*p, mask)) * dy).sum(), (0, 1))(x, params)

        return jax.jvp(grad, (x, params), (tx, tparams))[1]

    with jax.enable_x64(True):
        dy = np.float64(dy)
        desired = jax.jit(functools.partial(product, plain))(
            *jax.tree.map(np.float64, (x, params, tx, tparams))
        )
    dy = np.float32(dy)
    got = jax.jit(functools.partial(product, ROADS["masked"]))(
        *jax.tree.map(np.float32, (x, params, tx, tparams))
    )
    for u, v in zip(jax.tree.leaves(got), jax.tree.leaves(desired), strict=True):
        oracle.assert_close(u, v, 1e-4, "forward over reverse")


def test_jacfwd_equals_jacrev():
    with jax.enable_x64(True):
        (x, params), _, _, _ = example((3, 2, 2))
        f = lambda x, params: train(x, params)[0]  # noqa: E731
        forward = jax.jit(jax.jacfwd(f, (0, 1)))(x, params)
        reverse = jax.jit(jax.jacrev(f, (0, 1)))(x, params)
        for u, v in zip(jax.tree.leaves(forward), jax.tree.leaves(reverse), strict=True):
            oracle.assert_close(u, v, 1e-12)


def assert_trees_close(got, want, count):
    for u, v in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        oracle.assert_close(u, np.asarray(v, np.float64), 4 * oracle.tolerance("float32", count))


@pytest.mark.parametrize("over", ["x", "params", "state", "all"])
def test_vmap_equals_a_loop(over):
    stack = lambda *shape: normal((3, *shape), 1, seed=len(shape))  # noqa: E731
    x, dy = stack(8, 4) * np.float32([[[1]], [[2]], [[3]]]), normal((3, 8, 4), seed=9)
    params = jaxbn.Params(stack(4), 2 * stack(4))
    state = jaxbn.State(stack(4), np.abs(stack(4)), np.arange(3, dtype=np.int32))
    axes = [0 if over in (name, "all") else None for name in ("x", "params", "state")]
    values = [
        v if a == 0 else jax.tree.map(lambda leaf: leaf[0], v)
        for v, a in zip((x, params, state), axes, strict=True)
    ]

    @jax.jit
    def step(x, params, state, dy):
        y, vjp, new = jax.vjp(lambda *p: train(*p, state, momentum=0.9), x, params, has_aux=True)
        return y, new, vjp(dy)

    got = jax.vmap(step, (*axes, 0))(*values, dy)
    pick = lambda i: [  # noqa: E731
        jax.tree.map(lambda leaf: leaf[i], v) if a == 0 else v
        for v, a in zip(values, axes, strict=True)
    ]
    want = [step(*pick(i), dy[i]) for i in range(3)]
    assert_trees_close(got, jax.tree.map(lambda *leaves: np.stack(leaves), *want), 8)


def test_scan_over_layers_equals_a_loop():
    x, dy = normal((8, 4), 1), normal((8, 4), seed=1)
    params = jaxbn.Params(normal((3, 4), 1, seed=2), normal((3, 4), seed=3))
    state = jax.tree.map(lambda leaf: np.stack([leaf] * 3), jaxbn.init(4)[1])

    def layer(x, leaves):
        y, new = train(x, *leaves)
        return jnp.tanh(y), new

    def looped(x, params):
        states = []
        for i in range(3):
            x, new = layer(x, jax.tree.map(lambda leaf, i=i: leaf[i], (params, state)))
            states.append(new)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    def run(f):
        y, vjp, new = jax.vjp(f, x, params, has_aux=True)
        return y, new, vjp(dy)

    got = jax.jit(run, static_argnums=0)(lambda x, params: jax.lax.scan(layer, x, (params, state)))
    assert_trees_close(got, jax.jit(run, static_argnums=0)(looped), 8)


def test_scan_over_microbatches_equals_a_loop():
    x, dy = normal((3, 8, 4), 1), normal((3, 8, 4), seed=1)
    params, state = jaxbn.init(4)

    def microbatch(state, leaves):
        x, dy = leaves
        _, vjp, new = jax.vjp(lambda *p: train(*p, state), x, params, has_aux=True)
        return new, vjp(dy)

    last, gradients = jax.jit(lambda: jax.lax.scan(microbatch, state, (x, dy)))()
    want = []
    for leaves in zip(x, dy, strict=True):
        state, g = jax.jit(microbatch)(state, leaves)
        want.append(g)
    assert_trees_close(gradients, jax.tree.map(lambda *leaves: np.stack(leaves), *want), 8)
    assert_trees_close(last, state, 8)


def test_checkpoint_updates_the_state_once():
    x, dy, (params, state) = normal((8, 4), 1), normal((8, 4), seed=1), jaxbn.init(4)

    def block(x, params, state):
        y, new = train(jnp.sin(x), params, state, momentum=0.5)
        return jnp.tanh(y), new

    def run(f):
        y, vjp, new = jax.vjp(lambda *p: f(*p, state), x, params, has_aux=True)
        return y, new, vjp(dy)

    got = jax.jit(run, static_argnums=0)(jax.checkpoint(block))
    assert_trees_close(got, jax.jit(run, static_argnums=0)(block), 8)
    assert int(got[1].count) == 1


@pytest.mark.parametrize("options", [{}, {"masked": True}, {"virtual_batch_size": 2}])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_export_for_every_platform(mode, options):
    """Serialized, loaded and called: y, state, and (vjp_order=1) gradients."""
    options, (params, state) = dict(options), jaxbn.init(4)
    masked = options.pop("masked", False)
    symbolic = "virtual_batch_size" not in options  # groups need a known number of rows

    def f(x, scale, bias, mean, var):  # arrays alone: a file knows no NamedTuple
        mask = x[:, :, :1] > -1 if masked else None
        state = jaxbn.State(mean, var, jnp.int32(0))
        y, new = jaxbn.batch_norm(
            *(x, jaxbn.Params(scale, bias), state), train=mode == "train", mask=mask, **options
        )
        return y, new.mean, new.var

    rows = export.symbolic_shape("rows, columns") if symbolic else (6, 5)
    shapes = [jax.ShapeDtypeStruct((*rows, 4), jnp.float32)]
    shapes += [jax.ShapeDtypeStruct((4,), jnp.float32)] * 4
    exported = export.export(jax.jit(f), platforms=("cpu", "cuda", "tpu"))(*shapes)
    loaded = export.deserialize(exported.serialize(vjp_order=1))
    x, dy = normal((6, 5, 4), 3), normal((6, 5, 4), seed=1)
    arrays = (x, *params, *state[:2])
    cotangents = (dy, np.zeros(4, np.float32), np.zeros(4, np.float32))

    def run(f):
        values, vjp = jax.vjp(f, *arrays)
        return values, vjp(cotangents)

    assert_trees_close(run(loaded.call), run(jax.jit(f)), 30)


KEPT = {
    "plain": {},
    "scale alone": {},
    "masked": {"mask": np.arange(6)[:, None, None] < 4},
    "mask of x's size": {"mask": normal((6, 5, 4)) > 0},
    "ghost": {"virtual_batch_size": 3},
    "pooled": {"axis_name": "d"},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KEPT)
def test_kept_for_backward_is_x_in_its_own_dtype(kind, dtype):
    """One array of x's size, x's dtype; a mask as booleans; the rest O(C)."""
    x, (params, _) = jnp.asarray(normal((6, 5, 4)), dtype), jaxbn.init(4)
    if kind == "scale alone":
        params = params._replace(bias=None)
    options = KEPT[kind]

    def f(x, params):
        return train(x, params, **options)[0]

    if kind == "pooled":
        one = f
        f = lambda x, p: jax.vmap(one, (0, None), axis_name="d")(x, p)  # noqa: E731
    _, vjp = jax.vjp(f, x, params)
    kept = [leaf for leaf in jax.tree.leaves(vjp) if hasattr(leaf, "dtype")]
    large = [leaf for leaf in kept if leaf.size >= x.size and leaf.dtype != bool]
    assert [leaf.dtype for leaf in large] == [dtype]
    rest = [leaf for leaf in kept if leaf.size < x.size]
    groups = 2 if kind == "ghost" else 1
    assert all(leaf.size <= groups * 4 for leaf in rest if leaf.dtype != bool)
    mask = options.get("mask", np.zeros(0))
    assert sum(leaf.size for leaf in kept if leaf.dtype == bool) <= mask.size


def eval_functional(x, params, state):
    return jaxbn.batch_norm(x, params, state, train=False)[0]


def eval_linen(x, params, state):
    variables = {"params": params._asdict(), "batch_stats": {"mean": state.mean, "var": state.var}}
    layer = jaxbn.linen.BatchNorm(use_running_average=True, dtype=x.dtype)
    return layer.apply(variables, x)


def eval_nnx(x, params, state):
    layer = jaxbn.nnx.BatchNorm(4, use_running_average=True, dtype=x.dtype, rngs=nnx.Rngs(0))
    layer.scale.set_value(params.scale)
    layer.bias.set_value(params.bias)
    return layer(x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("evaluate", [eval_functional, eval_linen, eval_nnx])
def test_eval_keeps_x_in_its_own_dtype_and_nothing_where_nothing_trains(evaluate, dtype):
    """For layers whose statistics are frozen, in every door that leads there."""
    x, (params, state) = jnp.asarray(normal((6, 5, 4)), dtype), jaxbn.init(4)

    def kept(f, *arguments):
        return [leaf for leaf in jax.tree.leaves(jax.vjp(f, *arguments)[1]) if leaf.size > 4]

    assert [leaf.dtype for leaf in kept(lambda x, p: evaluate(x, p, state), x, params)] == [dtype]
    assert [leaf.dtype for leaf in kept(lambda p: evaluate(x, p, state), params)] == [dtype]
    assert kept(lambda x: evaluate(x, params, state), x) == []


class Norm(nn.Module):
    """jaxbn or Flax, by one word; in training, statistics thrown away."""

    library: str
    dtype: str

    @nn.compact
    def __call__(self, x):
        if self.library == "flax":
            return nn.BatchNorm(use_running_average=False, dtype=self.dtype)(x)
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return train(x, jaxbn.Params(scale, bias))[0]


class ResNet(nn.Module):
    """Three stages of two basic blocks."""

    library: str
    dtype: str
    width: int = 32

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(Norm, self.library, self.dtype)
        x = nn.relu(norm()(conv(self.width, (3, 3))(x)))
        for stage in range(3):
            for block in range(2):
                c, stride = self.width * 2**stage, 2 if stage and not block else 1
                y = nn.relu(norm()(conv(c, (3, 3), (stride, stride))(x)))
                y = norm()(conv(c, (3, 3))(y))
                if x.shape != y.shape:
                    x = norm()(conv(c, (1, 1), (stride, stride))(x))
                x = nn.relu(x + y)
        return nn.Dense(10, dtype=self.dtype)(x.mean((1, 2))).astype(jnp.float32)


def step_memory(library, dtype):
    """Temporary bytes of the compiled training step at batch 64; nothing runs."""
    model = ResNet(library, dtype)
    x = jax.ShapeDtypeStruct((64, 32, 32, 3), dtype)

    def step(params, x):
        def loss(params):
            logits = model.apply({"params": params}, x, mutable=["batch_stats"])[0]
            return (logits**2).sum()  # any loss: what is kept does not depend on it

        gradients = jax.grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # Flax needs
        params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
        compiled = jax.jit(step).lower(params, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("dtype", "allowed", "form"),
    [("float32", 0.70, "by parts"), ("bfloat16", 0.75, "by parts"), ("float32", 0.70, "plain")],
)
def test_a_resnet_step_needs_less_memory_than_with_flax(switched, dtype, allowed, form):
    """With sums as on CPU, and in the form that other platforms get."""
    if form == "plain":
        switched(sums, "SMALL", math.inf)
    ratio = step_memory("jaxbn", dtype) / step_memory("flax", dtype)
    assert ratio <= allowed
