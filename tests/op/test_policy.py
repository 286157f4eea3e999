"""`checkpoint_policy`: less is kept, the same comes out, and no statistic is computed twice."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from tests.support import hlo, networks

POLICY = jaxbn.checkpoint_policy
WRAPS = {
    "none": lambda f: f,
    "policy": lambda f: jax.checkpoint(f, policy=POLICY),
    "dots alone": lambda f: jax.checkpoint(f, policy=jax.checkpoint_policies.dots_saveable),
}
SHAPE, C = (16, 6, 6, 4), 4
OPTIONS = {
    "plain": {},
    "masked": {"mask": np.arange(16)[:, None, None, None] < 12},
    "ghost": {"virtual_batch_size": 8},
    "cumulative": {"momentum": None},
}


def normal(shape, seed, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def example(dtype="float32"):
    """x, weights of two convolutions, params and state of two norms, dy."""
    params = jaxbn.Params(normal((2, C), 1) + 1, normal((2, C), 2))
    state = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), jaxbn.init(C)[1])
    weights = normal((2, 3, 3, C, C), 3, dtype) / 6
    return normal(SHAPE, 0, dtype), weights, params, state, normal(SHAPE, 4, dtype)


def block(x, weights, params, state, **options):
    """Two convolutions, each with its norm and silu, in a residual branch."""
    y, states = x, []
    for i in range(2):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], (params, state))
        y = jax.lax.conv_general_dilated(
            y, weights[i], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        y, new = jaxbn.batch_norm(y, *layer, train=True, **options)
        y = jax.nn.silu(y)
        states.append(new)
    return x + y, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def step(wrap, options, x, weights, params, state, dy):
    """y, state, and the gradients of x, weights and params."""
    f = WRAPS[wrap](functools.partial(block, **options))
    y, vjp, new = jax.vjp(lambda *a: f(*a, state), x, weights, params, has_aux=True)
    return y, new, vjp(dy)


def reductions(text):
    """Sums over arrays of the batch's size (or a strided part of one), as written."""
    operands = re.findall(
        r"stablehlo\.reduce\(.*?applies stablehlo\.add .*?: \(tensor<([^>]*)>", hlo.inlined(text)
    )
    sizes = [np.prod([int(n) for n in operand.split("x")[:-1]], initial=1) for operand in operands]
    return sum(size >= np.prod(SHAPE) / 8 for size in sizes)


def assert_close(got, want, dtype="float32"):
    """The same operations on the same numbers, compiled apart: a few roundings of the largest."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = np.float64(a), np.float64(b)
        assert np.abs(a - b).max() <= 64 * float(jnp.finfo(dtype).eps) * max(1, np.abs(b).max())


@pytest.mark.parametrize("kind", OPTIONS)
def test_no_sum_over_the_batch_is_taken_twice(kind):
    """As many as without a checkpoint; one that keeps convolutions alone takes more."""
    counts = {}
    for wrap in WRAPS:
        f = functools.partial(step, wrap, OPTIONS[kind])
        text = jax.jit(f).lower(*example()).as_text()
        counts[wrap] = reductions(text), text.count("stablehlo.convolution")
    assert counts["policy"] == counts["none"]
    assert counts["dots alone"][0] > counts["none"][0]
    assert counts["none"][1] == 6


@pytest.mark.parametrize(("kind", "dtype"), [("cumulative", "bfloat16"), ("masked", "float32")])
def test_y_state_and_gradients_are_those_without_a_checkpoint(kind, dtype):
    got, want = (
        jax.jit(functools.partial(step, wrap, OPTIONS[kind]))(*example(dtype))
        for wrap in ("policy", "none")
    )
    assert_close(got, want, dtype)
    assert got[1].count.tolist() == [1, 1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", OPTIONS)
def test_kept_are_the_input_and_the_convolutions_once_each(kind, dtype):
    """Of x's size: x and two convolutions, in their dtype; the rest are weights and O(C)."""
    x, weights, params, state, _ = example(dtype)
    f = WRAPS["policy"](functools.partial(block, **OPTIONS[kind]))
    vjp = jax.eval_shape(lambda *a: jax.vjp(lambda *b: f(*b, state)[0], *a)[1], x, weights, params)
    kept = jax.tree.leaves(vjp)
    large = [leaf for leaf in kept if leaf.size >= x.size]
    assert [(leaf.shape, leaf.dtype) for leaf in large] == [(SHAPE, dtype)] * 3
    rest = [leaf for leaf in kept if leaf.size < x.size and leaf.shape != weights.shape]
    assert all(leaf.size <= 4 * C for leaf in rest)


def test_in_a_scan_over_blocks_each_array_is_stacked_once():
    x, weights, params, state, dy = example()
    stack = functools.partial(jax.tree.map, lambda leaf: jnp.stack([leaf, leaf[::-1], leaf]))
    blocks = stack((weights, params, state))

    def run(wrap, x, blocks):
        def loss(x, weights, params):
            f = WRAPS[wrap](block)
            return jax.lax.scan(lambda x, b: f(x, *b), x, (weights, params, blocks[2]))

        y, vjp, new = jax.vjp(loss, x, *blocks[:2], has_aux=True)
        return y, new, vjp

    def gradients(wrap, x, blocks, dy):
        y, new, vjp = run(wrap, x, blocks)
        return y, new, vjp(dy)

    kept = jax.tree.leaves(jax.eval_shape(functools.partial(run, "policy"), x, blocks)[2])
    assert [leaf.shape for leaf in kept if leaf.size >= 3 * x.size] == [(3, *SHAPE)] * 3
    got, want = (
        jax.jit(functools.partial(gradients, wrap))(x, blocks, dy) for wrap in ("policy", "none")
    )
    assert_close(got, want)


def collectives(text):
    return len(re.findall(r'"stablehlo\.(?:all_reduce|all_gather|all_to_all)"', text))


@pytest.mark.parametrize(
    ("groups", "check_vma"), [(None, False), (None, True), ([[0, 2, 4, 6], [1, 3, 5, 7]], True)]
)
def test_no_collective_is_called_twice(groups, check_vma):
    """A layer has one for its statistics and one for the sums of backward, as without."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    pooled = {"axis_name": "d", "axis_index_groups": groups}
    # No gradients of weights and params: what check_vma adds to sum those is not ours to count.
    x, weights, params, state, dy = example()

    def shard(wrap, x, dy):
        f = WRAPS[wrap](functools.partial(block, **pooled))
        y, vjp = jax.vjp(lambda x: f(x, weights, params, state)[0], x)
        return y, *vjp(dy)

    def lowered(wrap):
        specs = {"in_specs": P("d"), "out_specs": P("d"), "check_vma": check_vma}
        f = jax.shard_map(functools.partial(shard, wrap), mesh=mesh, **specs)
        return jax.jit(f).lower(x, dy)

    counts = {wrap: collectives(lowered(wrap).as_text()) for wrap in WRAPS}
    assert counts["policy"] == counts["none"]
    assert counts["dots alone"] > counts["none"]
    assert_close(lowered("policy").compile()(x, dy), lowered("none").compile()(x, dy))


def test_under_jit_on_sharded_arrays_no_collective_is_added():
    """Counted in the compiled programs, where the partitioner put them."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    put = lambda v: jax.device_put(v, NamedSharding(mesh, P("d")))  # noqa: E731
    x, weights, params, state, dy = example()
    counts, results = {}, {}
    for wrap in ("none", "policy"):
        f = jax.jit(functools.partial(step, wrap, {})).lower(
            put(x), weights, params, state, put(dy)
        )
        program = f.compile()
        counts[wrap] = len(re.findall(r" all-reduce(?:-start)?\(", program.as_text()))
        results[wrap] = program(put(x), weights, params, state, put(dy))
    assert counts["policy"] == counts["none"] > 0
    assert_close(results["policy"], results["none"])


def test_a_custom_policy_knows_the_statistics_by_name():
    """With the name alone the convolution is computed again, its statistics are not."""
    policy = jax.checkpoint_policies.save_only_these_names("batch_norm_moments")
    x, weights, params, state, dy = example()

    def run(f):
        def both(x, weights, params):
            y, vjp = jax.vjp(lambda *a: f(*a, state)[0], x, weights, params)
            return y, vjp(dy)

        return jax.jit(both).lower(x, weights, params).as_text()

    plain, named = run(block), run(jax.checkpoint(block, policy=policy))
    assert reductions(named) == reductions(plain)
    assert named.count("stablehlo.convolution") > plain.count("stablehlo.convolution")


def test_complex_x():
    z = jax.lax.complex(normal((8, C), 0), normal((8, C), 1))
    f = lambda z: jaxbn.batch_norm(z, None, None, train=True)[0]  # noqa: E731
    got, want = (jax.vjp(wrap(f), z)[1](z[::-1])[0] for wrap in (WRAPS["policy"], WRAPS["none"]))
    np.testing.assert_allclose(got, want, rtol=0, atol=64 * 2.0**-23)


def test_linen_blocks_under_remat():
    """The same sums as written; statistics as after one update, which a second would move on."""
    x, texts, results = normal((8, 6, 6, 3), 0), [], []
    norm = functools.partial(jaxbn.linen.BatchNorm, use_running_average=False, momentum=0.5)
    for cls in (networks.Block, nn.remat(networks.Block, policy=POLICY)):
        model = cls(4, 2, norm, name="block")

        def f(params, batch_stats, x, model=model):
            def loss(params):
                variables = {"params": params, "batch_stats": batch_stats}
                y, updates = model.apply(variables, x, mutable=["batch_stats"])
                return (y**2).sum(), updates

            return jax.value_and_grad(loss, has_aux=True)(params)

        shapes = jax.eval_shape(model.init, jax.random.key(0), x)
        leaves, tree = jax.tree.flatten((shapes["params"], shapes["batch_stats"]))
        arrays = [normal(leaf.shape, i) ** 2 for i, leaf in enumerate(leaves)]
        lowered = jax.jit(f).lower(*tree.unflatten(arrays), x)
        texts.append(lowered.as_text())
        results.append(lowered.compile()(*tree.unflatten(arrays), x))
    large = r"stablehlo\.reduce\(.*?applies stablehlo\.add .*?: \(tensor<\d+x\d+x\d+x"
    counts = [(len(re.findall(large, t)), t.count("stablehlo.convolution")) for t in texts]
    assert counts[0] == counts[1]
    assert_close(*results)


def test_nnx_blocks_under_remat():
    x = normal((8, 6, 6, 3), 0)

    def run(remat):
        model = networks.NnxNet(jaxbn.nnx.BatchNorm, width=4, rngs=nnx.Rngs(0))

        def loss(model, x):
            return (remat(model, x) ** 2).sum()

        value, grads = nnx.jit(nnx.value_and_grad(loss))(model, x)
        stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
        return value, nnx.to_pure_dict(grads), stats

    plain = run(lambda model, x: model(x))
    assert_close(run(nnx.remat(lambda model, x: model(x), policy=POLICY)), plain)
