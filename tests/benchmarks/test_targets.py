"""What is read off a program for an accelerator; the programs themselves: `tests/accelerators`."""

import itertools
import json

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from benchmarks.measures.step import R18, R50
from benchmarks.studies import compiled, compiling, networks, targets
from benchmarks.subjects import families, peers
from benchmarks.subjects.network import Task

PROGRAM = """
HloModule jit_step, is_scheduled=true

%sample (param_0.6: bf16[64,56,64]) -> f32[64] {
  %param_0.6 = bf16[64,56,64]{2,1,0} parameter(0)
  %convert.1 = f32[64,56,64]{2,1,0} convert(%param_0.6)
  %slice.2 = f32[64,7,64]{2,1,0} slice(%convert.1), slice={[0:64], [0:56:8], [0:64]}
  %constant.3 = f32[] constant(0)
  ROOT %reduce.4 = f32[64]{0} reduce(%slice.2, %constant.3), dimensions={0,1}, to_apply=%add
}

%twice (param_0.7: bf16[64,56,64], param_1.8: f32[64]) -> (f32[64], bf16[64,56,64]) {
  %param_0.7 = bf16[64,56,64]{2,1,0} parameter(0)
  %slice.3 = bf16[64,7,64]{2,1,0} slice(%param_0.7), slice={[0:64], [0:56:8], [0:64]}
  %param_1.8 = f32[64]{0} parameter(1)
  ROOT %tuple.1 = (f32[64]{0}, bf16[64,56,64]{2,1,0}) tuple(%param_1.8, %param_0.7)
}

%near (arg.1: (f32[64], bf16[64,56,64])) -> f32[64] {
  %arg.1 = (f32[64]{0}, bf16[64,56,64]{2,1,0}) parameter(0)
  ROOT %get-tuple-element.1 = f32[64]{0} get-tuple-element(%arg.1), index=0
}

%far (arg.2: (f32[64], bf16[64,56,64])) -> f32[64] {
  %arg.2 = (f32[64]{0}, bf16[64,56,64]{2,1,0}) parameter(0)
  %get-tuple-element.2 = bf16[64,56,64]{2,1,0} get-tuple-element(%arg.2), index=1
  ROOT %fusion.9 = f32[64]{0} fusion(%get-tuple-element.2), kind=kInput, calls=%sample
}

ENTRY %main.1 (x.1: bf16[64,56,64], p.1: pred[]) -> (f32[64], bf16[64,56,64]) {
  %x.1 = bf16[64,56,64]{2,1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="x"}
  %p.1 = pred[] parameter(1)
  %copy-start.1 = (bf16[64,56,64]{2,1,0:S(1)}, bf16[64,56,64]{2,1,0}, u32[]) copy-start(%x.1)
  %copy-done.1 = bf16[64,56,64]{2,1,0:S(1)} copy-done(%copy-start.1)
  %fusion.1 = f32[64]{0} fusion(%copy-done.1), kind=kInput, calls=%sample, backend_config={"window_config":{"estimated_cycles":"1200"}}
  %tuple.2 = (f32[64]{0}, bf16[64,56,64]{2,1,0}) tuple(%fusion.1, %copy-done.1)
  %cond.1 = f32[64]{0} conditional(%p.1, %tuple.2, %tuple.2), branch_computations={%far, %near}, metadata={op_name="jit(f)/cond"}
  %cond.2 = f32[64]{0} conditional(%p.1, %tuple.2, %tuple.2), true_computation=%far, false_computation=%far
  ROOT %fusion.2 = (f32[64]{0}, bf16[64,56,64]{2,1,0}) fusion(%copy-done.1, %cond.2), kind=kLoop, calls=%twice, backend_config={"window_config":{"estimated_cycles":"34"},"other":{"estimated_cycles":"9223372036854775807"}}
}
"""  # noqa: E501
X = 64 * 56 * 64 * 2  # bytes
C = 64 * 4


class Program:
    def __init__(self, text):
        self.text = text

    def as_text(self):
        return self.text


def test_kernels_are_listed_with_the_bytes_they_move():
    """A slice counts as what it takes, in the parameter's dtype, but for one that is read whole
    too; what starts nothing is left out; of a conditional's branches the smallest is listed.
    """
    listed = targets.kernels(Program(PROGRAM))
    assert listed == [
        ("%fusion.1", "fusion", X // 8, C),
        ("%fusion.9", "fusion", X // 8, C),  # of %cond.2, both of whose branches are %far
        ("%fusion.2", "fusion", X + C, X + C),
    ]
    assert targets.moved(listed) == 2 * (X // 8 + C) + 2 * (X + C)


def test_cycles_that_are_known_are_summed():
    assert targets.cycles(Program(PROGRAM)) == 1234


@pytest.mark.parametrize("opcode", ["while", "call"])
def test_a_loop_is_refused(opcode):
    with pytest.raises(ValueError) as error:
        targets.kernels(Program(PROGRAM.replace(" conditional(", f" {opcode}(")))
    assert str(error.value) == f"targets: the program has a {opcode}: %cond.1."


@pytest.mark.parametrize(
    ("result", "size"),
    [
        ("f32[]", 4),
        ("bf16[3,5]{1,0:T(8,128)(2,1)}", 30),
        ("(pred[7]{0}, s64[2])", 23),
        ("u32[0]", 0),
    ],
)
def test_bytes_of_a_type(result, size):
    assert targets.size(result) == size


def test_a_compiled_program_of_this_machine_is_read_too():
    """Equals x + 1 on a CPU: read once, written once."""
    x = jax.ShapeDtypeStruct((1000,), jnp.float32)
    program = jax.jit(lambda x: x + jnp.float32(1)).lower(x).compile()
    assert [(k.read, k.written) for k in targets.kernels(program)] == [(4000, 4000)]


@pytest.mark.parametrize("name", targets.NAMES)
def test_without_its_compiler_a_target_says_what_to_install(name, monkeypatch):
    module = "jax_plugins.xla_cuda12" if name == "h100" else "libtpu"
    monkeypatch.setitem(__import__("sys").modules, module, None)  # whether installed or not
    with pytest.raises(ImportError) as error:
        targets.device(name)
    assert str(error.value) == (
        f"targets: no compiler for {name!r} ({module} cannot be imported); run `make targets`, or "
        f'pip install "jax-cuda12-plugin==<version of jax>" libtpu'
    )


def test_the_command_refuses_what_it_does_not_know(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        compiled.main(["h300"])
    assert "argument TARGET: invalid choice: 'h300'" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "libtpu", None)
    with pytest.raises(SystemExit):
        compiled.main(["v5e"])
    assert "targets: no compiler for 'v5e'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        networks.main(["--target", "v5e", "--repeats", "3"])
    assert "--repeats times this machine" in capsys.readouterr().err


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_network_is_the_same_with_its_activation_in_the_norm(family):
    """Leaves, shapes and output; and it is as wide as published: parameters in millions."""
    published = {"ResNet-50": 25.6, "DenseNet-121": 8.0, "EfficientNet-B0": 5.3, "MobileNetV2": 3.5}
    x = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    leaves = []
    for name in ("Flax", "jaxbn", "jaxbn, activation and residual"):
        model = families.model(family, networks.VARIANTS[name], 64, jnp.float32)
        with jax.numpy_dtype_promotion("standard"):  # Flax's average pool promotes
            variables = jax.eval_shape(model.init, jax.random.key(0), x)
        leaves.append(jax.tree.map(lambda leaf: leaf.shape, variables))
    assert leaves[0] == leaves[1] == leaves[2]
    size = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert size / 1e6 == pytest.approx(published[family], rel=0.01)


@pytest.mark.parametrize(
    "task", [Task("ResNet-18", R18, False, 16, 2, 32), Task("ResNet-50", R50, True, 8, 2, 64)]
)
def test_both_kinds_of_modules_make_the_same_residual_network(task):
    """Equal parameters and running statistics, shape by shape."""
    leaves = []
    for make in (compiling.in_linen(peers.linen), compiling.in_nnx(nnx.BatchNorm)):
        _, shapes = make(task, jnp.float32)
        # The last two are x and the labels; random keys are not of the network.
        sizes = [leaf.shape for leaf in jax.tree.leaves(shapes) if leaf.dtype == jnp.float32]
        leaves.append(sorted(sizes))
    assert leaves[0] == leaves[1]


def test_the_table_of_compile_times_has_three_stages_a_norm(monkeypatch, capsys):
    """Over Flax's own time, each is 1."""
    norms = {"Flax linen": compiling.in_linen(peers.linen)}
    monkeypatch.setattr(compiling, "NORMS", {"linen": norms})
    tables = []
    monkeypatch.setattr(compiling.report, "show", tables.append)
    compiling.main(["--tiny", "--dtype", "float32", "--turns", "1"])
    ((name, *stages),) = tables[0].rows
    assert name == "Flax linen"
    assert stages[1::3] == [1, 1, 1]
    assert min(stages[::3]) > 0


def test_the_table_of_networks_has_a_row_a_variant(monkeypatch, capsys, tmp_path):
    out = tmp_path / "networks.json"
    small = {"--network": "MobileNetV2", "--dtype": "float32", "--width": "4"}
    small |= {"--batch": "2", "--pixels": "32", "--variant": "jaxbn", "--json": str(out)}
    monkeypatch.setattr(networks, "compiled", lambda *_: jax.jit(lambda: 0).lower().compile())
    networks.main([*itertools.chain(*small.items())])
    (table,) = json.loads(out.read_text())["tables"]
    assert [row[0] for row in table["rows"]] == ["Flax", "jaxbn"]
    assert table["rows"][1][2] < 1  # what is kept for backward, of Flax's
    assert "MobileNetV2" in capsys.readouterr().out
