"""The cost model counts what the compiler makes, and its page shows what it prints."""

import math
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from benchmarks.reporting import report
from benchmarks.studies import cost_model

C = 64


def bytes_of_collectives(f, *arguments):
    text = jax.jit(f).lower(*arguments).compile().as_text()
    results = re.findall(r" = (.*?) all-reduce(?:-start)?\(", text)
    return [
        sum(4 * math.prod(map(int, n.split(","))) for n in re.findall(r"f32\[([\d,]+)\]", result))
        for result in results
    ]


@pytest.mark.optimized
@pytest.mark.parametrize(("road", "gathered"), [("axis_name", 16), ("axis_name", 4), ("jit", 16)])
def test_sizes_are_those_of_the_compiled_module(road, gathered, switched):
    switched(sys.modules["jaxbn._op.pooling"], "GATHERED", gathered)
    switched(cost_model, "GATHERED", gathered)
    params, state = jaxbn.init(C)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    axis_name = "d" if road == "axis_name" else None

    def forward(x):
        return jaxbn.batch_norm(x, params, state, train=True, axis_name=axis_name)

    def backward(x, dy):
        y, vjp, new = jax.vjp(forward, x, has_aux=True)
        return y, new, vjp(dy)

    if road == "axis_name":
        rows = P("d")
        of = {"mesh": mesh, "in_specs": rows}
        forward_ = jax.shard_map(forward, out_specs=(rows, P()), **of)
        backward_ = jax.shard_map(backward, out_specs=(rows, P(), rows), **of)
    else:
        forward_, backward_ = forward, backward
    x = jax.device_put(jnp.ones((32, 4, 4, C)), NamedSharding(mesh, P("d")))
    model = getattr(cost_model, f"of_{road}")(C, 8)
    assert sorted(bytes_of_collectives(forward_, x)) == sorted(model.forward)
    both = bytes_of_collectives(backward_, x, x)  # XLA may move a sum from one to another
    sizes = [*model.forward, *model.backward]
    assert (len(both), sum(both)) == (len(sizes), sum(sizes))


def test_resnet50_has_its_layers():
    """53 norm layers; scale and bias are 53,120 of its parameters."""
    assert (len(cost_model.RESNET50), 2 * sum(cost_model.RESNET50)) == (53, 53_120)


def test_ring_and_tree_of_two_devices_are_one_exchange_each_way():
    assert cost_model.ring(100, 2, 10.0, 1.0) == 100 / 10 + 2
    assert cost_model.tree(100, 2, 10.0, 1.0) == 2 * 100 / 10 + 2


def test_the_page_shows_what_the_script_prints(capsys):
    report.show(cost_model.table())
    page = (pathlib.Path(__file__).parents[2] / "docs" / "cost-model.md").read_text()
    for line in filter(None, map(str.rstrip, capsys.readouterr().out.splitlines())):
        assert line in page
