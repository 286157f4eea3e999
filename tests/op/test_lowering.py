"""Programs for TPU and CUDA, written on a machine that has neither: `jax.export` lowers for both.

Nothing runs here and no speed is meant. The programs are read: which dtypes arrays of the
batch's size have, how often the batch is summed over, what crosses devices, and that nothing in
them belongs to the machine that wrote them.
"""

import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import export
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import jaxbn
from benchmarks.subjects import network, peers
from tests.support import hlo, networks

PLATFORMS = ("tpu", "cuda")
DTYPES = ("float32", "bfloat16")
SHORT = {"float32": "f32", "bfloat16": "bf16"}
shape = jax.ShapeDtypeStruct
C, SHAPE = 4, (8, 6, 6, 4)
PARAMS, STATE = jax.eval_shape(lambda: jaxbn.init(C))

# Forward: sums over all of x, and these with those over the sample that a TPU's branch takes. A
# GPU's grid is smaller.
SUMS = {
    ("tpu", "float32"): (4, 5),
    ("tpu", "bfloat16"): (2, 2),
    ("cuda", "float32"): (2, 2),
    ("cuda", "bfloat16"): (2, 2),
}

# What every back end knows: where arrays lie, and which sizes a symbolic axis may have.
PORTABLE = {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "shape_assertion"}


def program(platform, f, *arguments):
    """(exported, its StableHLO), checked for what no program of ours may hold."""
    exported = export.export(jax.jit(f), platforms=[platform])(*arguments)
    text = exported.mlir_module()
    assert set(re.findall(r"custom_call @([\w$.]+)", text)) <= PORTABLE
    assert "f64" not in text
    return exported, text


def dtypes(avals, at_least):
    """Of the arrays with at least so many elements."""
    return {str(aval.dtype) for aval in avals if math.prod(aval.shape) >= at_least}


def sums(text, at_least):
    """Sums over arrays of at least so many elements, as the program writes and calls them."""
    text = hlo.inlined(text)
    pattern = r"stablehlo\.reduce\(.*?applies stablehlo\.add .*?: \(tensor<([^>]*)>"
    operands = re.findall(pattern, text)
    # On GPUs two by one operation, whose operands are as large.
    operands += 2 * re.findall(r":2 = stablehlo\.reduce\(.*?: \(tensor<([^>]*)>", text)
    return sum(math.prod(map(int, v.split("x")[:-1])) >= at_least for v in operands)


def forward(x, params, state, **options):
    return jaxbn.batch_norm(x, params, state, train=True, **options)


def backward(x, params, state, dy, **options):
    """y, state, dx and dparams."""
    f = functools.partial(forward, state=state, **options)
    y, vjp, state = jax.vjp(f, x, params, has_aux=True)
    return y, state, *vjp(dy)


@pytest.mark.parametrize("platform", ["cpu", *PLATFORMS])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": jax.nn.relu},
        {"virtual_batch_size": 2**13},
        {"mask": shape((2**14, 512, 512, 1), bool)},
    ],
    ids=["plain", "relu", "ghosts", "mask"],
)
def test_more_values_than_32_bits_count(platform, options):
    """2³² values a channel, of which a GPU's grid has 2²⁶: no number of them is an int32."""
    x = shape((2**14, 512, 512, C), "bfloat16")
    mask = options.get("mask")
    static = {name: v for name, v in options.items() if name != "mask"}
    f = jax.jit(lambda x, p, s, mask, dy: backward(x, p, s, dy, mask=mask, **static))
    f.trace(x, PARAMS, STATE, mask, x).lower(lowering_platforms=(platform,))


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_training(dtype, platform):
    """Two sums over x and one over a sample of it; backward takes two. y and dx have x's dtype.

    On TPUs these three stand in a branch, for channels far from 0, and two sums before it. These
    two are all for a bfloat16 x.
    """
    x = shape(SHAPE, dtype)
    _, text = program(platform, forward, x, PARAMS, STATE)
    exported, both = program(platform, backward, x, PARAMS, STATE, x)
    size = math.prod(SHAPE)
    assert (sums(text, size), sums(text, size // 8)) == SUMS[platform, dtype]
    assert sums(both, size) - sums(text, size) == 2
    assert dtypes(exported.out_avals, size) == {dtype}
    assert "custom_call" not in both


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_eval_of_any_batch(dtype, platform):
    """A symbolic batch stays one; eval is elementwise: no sum, no collective, no state."""
    rows = export.symbolic_shape("rows")

    def evaluate(x, params, state):
        return jaxbn.batch_norm(x, params, state, train=False)[0]

    exported, text = program(platform, evaluate, shape((*rows, *SHAPE[1:]), dtype), PARAMS, STATE)
    assert exported.out_avals[0].shape == (*rows, *SHAPE[1:])
    assert f"-> (tensor<?x6x6x4x{SHORT[dtype]}>" in text
    assert "stablehlo.reduce" not in text


# Above 16 devices their moments travel in two collectives of O(C), see `moments.across`.
COLLECTIVES = {8: 2, 32: 3}


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("devices", COLLECTIVES)
def test_pooled_over_more_devices_than_there_are(devices, check_vma, platform):
    mesh = AbstractMesh((devices,), ("d",), axis_types=(AxisType.Auto,))

    def shard(x, params, state, dy):
        y, state, dx, _ = backward(x, params, state, dy, axis_name="d")
        return y, state, dx

    specs = {"in_specs": (P("d"), P(), P(), P("d")), "out_specs": (P("d"), P(), P("d"))}
    f = jax.shard_map(shard, mesh=mesh, check_vma=check_vma, **specs)
    x = shape((2 * devices, 6, C), "bfloat16")
    exported, text = program(platform, f, x, PARAMS, STATE, x)
    assert text.count('"stablehlo.all_reduce"') == COLLECTIVES[devices]
    calls = [line for line in text.splitlines() if '"stablehlo.all_reduce"' in line]
    # Over all of them: by number, or (jax 0.12) by the name of the axis.
    assert all(f"tensor<1x{devices}xi64>" in call or 'name = "d"' in call for call in calls)
    reduced = r'"stablehlo\.all_reduce".*?\}\) : \(tensor<(?:[^>]*x)?(\w+)>\) -> '
    carried = re.findall(reduced, text, re.DOTALL)
    assert len(carried) == len(calls)
    assert set(carried) == {"f32"}  # statistics never travel in bfloat16
    assert dtypes(exported.out_avals, math.prod(x.shape)) == {"bfloat16"}


def linen_step(norm, dtype):
    """A ResNet's step of gradient descent, and the shapes that it takes."""
    model = networks.ResNet(norm, dtype=dtype)
    x = shape((8, 8, 8, 3), dtype)

    def step(variables, x, label):
        def loss(params):
            logits, updates = model.apply(
                variables | {"params": params}, x, mutable=["batch_stats"]
            )
            return -(jax.nn.one_hot(label, 10) * jax.nn.log_softmax(logits)).sum(), updates

        grads, updates = jax.grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], grads)
        return updates | {"params": params}

    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    return step, (variables, x, shape((8,), "int32"))


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_resnet_step(dtype, platform):
    """Convolutions in the network's dtype; what a step returns has the dtypes it took."""
    step, arguments = linen_step(jaxbn.linen.BatchNorm, dtype)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # Flax needs
        exported, text = program(platform, step, *arguments)
        reference, (variables, *_) = linen_step(nn.BatchNorm, dtype)
        _, theirs = program(platform, reference, variables, *arguments[1:])
    results = re.findall(r"stablehlo\.convolution\(.*?-> tensor<\w*x(\w+)>", text)
    # 6 of them, each with two in backward but for the first, whose x needs no gradient.
    assert results == [SHORT[dtype]] * 17
    assert dtypes(exported.out_avals, 0) == {"float32"}
    assert len(exported.out_avals) == len(jax.tree.leaves(variables))
    # The smallest x has 8 * 4 * 4 * 16 values; Flax's fast variance sums over it as often. On TPUs
    # each layer has two more, in a branch.
    branched = (SUMS[platform, dtype][0] - 2) * len(jax.tree.leaves(variables["batch_stats"])) // 2
    assert sums(text, 2048) - branched <= sums(theirs, 2048)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_nnx_step(dtype, platform):
    """Module in, module out: the running statistics move, and y's dtype is the one asked for."""
    options = {"dtype": jnp.dtype(dtype), "rngs": nnx.Rngs(0)}
    graph, state = nnx.split(networks.NnxNet(jaxbn.nnx.BatchNorm, **options))
    outputs = []

    def step(state, x):
        model = nnx.merge(graph, state)

        def loss(model):
            y = model.norm1(model.conv1(x))
            outputs.append(str(y.dtype))
            return (model(x) ** 2).sum()

        grads = nnx.grad(loss)(model)
        return nnx.to_pure_dict(grads), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    arguments = jax.eval_shape(lambda: state), shape((8, 6, 6, 3), "float32")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # Flax needs
        exported, text = program(platform, step, *arguments)
    assert set(outputs) == {dtype}
    assert dtypes(exported.out_avals, 0) == {"float32"}
    stats = [name for name in re.findall(r'result_info = "([^"]*)"', text) if "norm" in name]
    assert sum("mean" in name or "var" in name for name in stats) == 4


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_checkpoint_policy_lowers_to_barriers(platform):
    """What is computed again stands behind one, or a compiler would merge it with forward."""

    def f(x, params, state, dy, **options):
        def block(x, params):
            return jax.nn.silu(forward(x, params, state)[0])

        block = jax.checkpoint(block, **options) if options else block
        return jax.vjp(block, x, params)[1](dy)

    x = shape(SHAPE, "bfloat16")
    _, plain = program(platform, f, x, PARAMS, STATE, x)
    kept = functools.partial(f, policy=jaxbn.checkpoint_policy)
    _, text = program(platform, kept, x, PARAMS, STATE, x)
    barriers = [re.findall(r"optimization_barrier (.*?) :", t) for t in (plain, text)]
    assert len(barriers[1]) > len(barriers[0])
    assert sums(text, 1) == sums(plain, 1)


@pytest.mark.parametrize("options", [{}, {"activation": jax.nn.relu}, {"virtual_batch_size": 4}])
def test_a_second_eager_gradient_compiles_nothing(options, caplog):
    """Nor does the forward pass, nor the same call on other arrays of one shape."""
    params, state = jaxbn.init(3)

    def loss(x, params):
        y, _ = jaxbn.batch_norm(x, params, state, train=True, **options)
        return jnp.sum(y**2)

    x = jax.random.normal(jax.random.key(0), (8, 3))
    for again in (False, True):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level("WARNING"):
            jax.grad(loss, (0, 1))(x, params)
        compiled = [r.getMessage() for r in caplog.records if "ompil" in r.getMessage()]
        assert bool(compiled) != again, compiled
        x = x + 1


def test_a_network_takes_fewer_lines_than_with_flaxs_norm():
    """A training step of ResNet-18: equal layers share functions, and no branch is for others."""

    def lines(norm, platform):
        model = task.model(norm, jnp.float32)
        step = jax.jit(functools.partial(network.step, model))
        lowered = step.trace(*task.shapes(model)).lower(lowering_platforms=(platform,))
        return len(lowered.as_text().splitlines())

    task = network.Task("ResNet-18", (2, 2, 2, 2), False, 16, 32, 32)
    flax = lines(peers.linen, "cpu")
    for platform in ("cpu", *PLATFORMS):
        assert lines(peers.ours, platform) < 0.75 * flax
        assert lines(peers.fused, platform) < 0.9 * flax
