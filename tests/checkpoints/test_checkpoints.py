"""Checkpoints of every kind are read as arrays, and their norm layers are found."""

import os
import pickle
import re
import shutil

import flax.linen as nn
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from safetensors.numpy import save_file

from jaxbn._checkpoints import contents, nesting, norm_layers, write
from jaxbn._checkpoints.read import read


@pytest.fixture(scope="module")
def variables():
    """Of linen, with numbers of their own."""
    model = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True)])
    random = np.random.default_rng(0)
    tree = model.init(jax.random.key(0), np.ones((1, 2), np.float32))
    return jax.tree.map(lambda v: random.normal(size=v.shape).astype(np.float32), tree)


def flat(tree, separator="."):
    paths = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator=separator): v for p, v in paths}


def save_orbax(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def save_steps(path, tree):
    with ocp.CheckpointManager(path) as manager:
        manager.save(9, args=ocp.args.StandardSave(jax.tree.map(np.zeros_like, tree)))
        manager.save(10, args=ocp.args.StandardSave(tree))


WRITERS = {
    "orbax": save_orbax,
    "orbax, flat names": lambda path, tree: save_orbax(path, flat(tree)),
    "orbax, steps": save_steps,
    "msgpack": lambda path, tree: path.write_bytes(serialization.to_bytes(tree)),
    "model.safetensors": lambda path, tree: save_file(jax.tree.map(np.asarray, flat(tree)), path),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_what_was_saved_is_read_and_its_layer_found(kind, variables, tmp_path):
    path = tmp_path / kind.replace(", ", "-")
    WRITERS[kind](path, {"step": np.int32(7), **variables})
    tree = read(path)
    assert jax.tree.all(
        jax.tree.map(np.array_equal, {k: tree[k] for k in variables}, dict(variables))
    )
    found = norm_layers.norms_in(tree)
    assert list(found) == ["layers_1"]
    layer = found["layers_1"]
    stats, params = variables["batch_stats"]["layers_1"], variables["params"]["layers_1"]
    np.testing.assert_array_equal(layer.state.mean, stats["mean"])
    np.testing.assert_array_equal(layer.state.var, stats["var"])
    np.testing.assert_array_equal(layer.params.scale, params["scale"])
    np.testing.assert_array_equal(layer.params.bias, params["bias"])
    assert layer.state.count is None


def test_an_nnx_state_saved_from_eight_devices(tmp_path):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    norm = nnx.BatchNorm(16, rngs=nnx.Rngs(0))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    state = jax.tree.map(lambda v: jax.device_put(v, spread), nnx.state(nnx.Dict(bn=norm)))
    save_orbax(tmp_path / "nnx", state)
    layer = norm_layers.norms_in(read(tmp_path / "nnx"))["bn"]
    np.testing.assert_array_equal(layer.state.var, np.ones(16))
    np.testing.assert_array_equal(layer.params.scale, np.ones(16))


def test_the_names_of_pytorch(tmp_path):
    names = ("running_mean", "running_var", "weight", "bias")
    tensors = {f"layer1.bn.{name}": np.full(3, i, np.float32) for i, name in enumerate(names)}
    tensors |= {"layer1.bn.num_batches_tracked": np.array(5), "fc.weight": np.ones((2, 3))}
    save_file(tensors, tmp_path / "torch.safetensors")
    found = norm_layers.norms_in(read(tmp_path / "torch.safetensors"))
    assert list(found) == ["layer1/bn"]
    params, state = found["layer1/bn"]
    fields = (state.mean, state.var, params.scale, params.bias)
    assert [field[0] for field in fields] == [0, 1, 2, 3]
    assert state.count == 5


def test_what_is_no_checkpoint_is_refused(tmp_path):
    expected = "Expected an orbax folder, a .safetensors file, or a file of flax.serialization."
    for name, content, kind in (
        ("text.txt", b"hello", "a Flax msgpack file (flax.serialization.to_bytes)"),
        ("short.safetensors", b"\x10\0\0\0\0\0\0\0{", "a safetensors file"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError) as error:
            read(path)
        message = str(error.value)
        assert message.startswith(f"read: {path} cannot be read as {kind}: ")
        assert message.endswith(f"{expected}to_bytes.")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError) as error:
        read(tmp_path / "folder")
    assert str(error.value) == (
        f"read: {tmp_path}/folder cannot be read as an orbax checkpoint: it has no _METADATA. "
        f"{expected}to_bytes."
    )
    with pytest.raises(FileNotFoundError) as missing:
        read(tmp_path / "nothing")
    assert str(missing.value) == (
        f"read: no checkpoint at {tmp_path}/nothing: there is no such file or folder"
    )
    (tmp_path / "number").write_bytes(serialization.msgpack_serialize(3))
    with pytest.raises(ValueError) as error:
        read(tmp_path / "number")
    assert str(error.value) == (
        f"read: {tmp_path}/number holds no tree of arrays but int; expected the variables of a "
        "model, as a Flax msgpack file (flax.serialization.to_bytes)."
    )


LAYOUTS = {
    "ocdbt": {},
    "zarr": {"use_ocdbt": False},
    "zarr3": {"use_ocdbt": False, "use_zarr3": True},
    "zarr3 in ocdbt": {"use_zarr3": True},
}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """A checkpoint in each of orbax' layouts."""
    top = tmp_path_factory.mktemp("layouts")
    tree = {"bn": {"mean": np.zeros(3), "var": np.ones(3, np.float32)}, "a.b/c": np.eye(2)}
    tree |= {"half": np.ones(2, jax.numpy.bfloat16), "steps": [1, 2.5], "none": None, "no": {}}
    for layout, options in LAYOUTS.items():
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
            checkpointer.save(top / layout, tree)
    return top


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_orbax_is_read(layout, layouts):
    tree = read(layouts / layout)
    assert {k: v.tolist() for k, v in tree["bn"].items()} == {"mean": [0] * 3, "var": [1] * 3}
    assert tree["a"]["b/c"].tolist() == [[1, 0], [0, 1]]
    assert tree["half"].dtype == jax.numpy.bfloat16
    assert {k: v.item() for k, v in tree["steps"].items()} == {"0": 1, "1": 2.5}
    assert set(tree) == {"bn", "a", "half", "steps"}


def damaged(layouts, layout, tmp_path):
    shutil.copytree(layouts / layout, tmp_path / "net")
    return tmp_path / "net"


def reason(path, kind="orbax checkpoint"):
    with pytest.raises(ValueError) as error:
        read(path)
    head = re.escape(f"read: {path} cannot be read as a") + rf"n? {kind}( \(.*\))?: "
    found = re.match(head, str(error.value))
    assert found
    return str(error.value)[found.end() :].partition(". Expected an orbax folder")[0]


@pytest.mark.parametrize("what", ["shape", "chunks"])
@pytest.mark.parametrize(
    ("layout", "file"), [("zarr", ".zarray"), ("zarr3", "zarr.json")], ids=["zarr", "zarr3"]
)
def test_what_metadata_declare_is_compared_with_the_bytes_that_are_there(
    what, layout, file, layouts, tmp_path
):
    """Before any of it is taken from memory: 8e8 bytes of a folder of some thousand."""
    path = damaged(layouts, layout, tmp_path)
    text = (path / "bn.mean" / file).read_text()
    assert "[3]" in text
    if what == "shape":
        text = text.replace('"shape":[3]', '"shape":[100000000]')
    else:
        text = re.sub(r'("chunks"|"chunk_shape"):\[3\]', r"\1:[100000000]", text)
    (path / "bn.mean" / file).write_text(text)
    size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    assert reason(path) == (
        f"it declares arrays of 8e+08 bytes, which its {size} bytes cannot hold"
    )


def test_what_this_machine_cannot_hold_is_refused(layouts, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4, "SC_PHYS_PAGES": 5}[name])
    declared = "it declares arrays of 88 bytes, and this machine has 20"
    assert reason(layouts / "ocdbt") == declared


@pytest.mark.parametrize("suffix", [".msgpack", ".safetensors", ""])
def test_no_file_without_an_end_or_beyond_memory_is_read(suffix, tmp_path, monkeypatch):
    """To read such a file would end this process, and perhaps others."""
    path = tmp_path / f"net{suffix}"
    path.symlink_to("/dev/null")  # stands for /dev/zero
    kind = "safetensors file" if suffix == ".safetensors" else "Flax msgpack file"
    assert reason(path, kind) == "it is neither a file nor a folder"
    path.unlink()
    path.write_bytes(bytes(24))
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4, "SC_PHYS_PAGES": 5}[name])
    assert reason(path, kind) == "it has 24 bytes, and this machine has 20"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_link_in_a_folder_leads_out_of_it(layout, layouts, tmp_path, capfd):
    (tmp_path / "secret").write_text("correct horse")
    files = [f for f in (layouts / layout).rglob("*") if f.is_file()]
    for file in files:
        path = damaged(layouts, layout, tmp_path)
        link = path / file.relative_to(layouts / layout)
        link.unlink()
        link.symlink_to(tmp_path / "secret")
        assert reason(path) == f"{link.name} is a link that leaves the folder"
        shutil.rmtree(path)
    path = damaged(layouts, layout, tmp_path)
    (path / "more").symlink_to(tmp_path)
    assert reason(path) == "more is a link that leaves the folder"
    (path / "more").unlink()
    os.mkfifo(path / "pipe")
    assert reason(path) == "pipe is neither a file nor a folder"
    (path / "pipe").unlink()
    (path / "within").symlink_to("_METADATA")
    (tmp_path / "latest").symlink_to(path)  # a link to the folder is its name
    assert read(tmp_path / "latest")
    assert capfd.readouterr() == ("", "")


def test_names_lead_to_no_file_outside_of_the_folder(layouts, tmp_path):
    path = damaged(layouts, "zarr", tmp_path)
    shutil.copytree(path / "bn.mean", tmp_path / "out.mean")
    text = (path / "_METADATA").read_text()
    for name in ("../out", str(tmp_path / "out")):
        (path / "_METADATA").write_text(text.replace('"key": "bn"', f'"key": "{name}"'))
        assert reason(path)


NAMED = {
    "a dict in place of a list": '{"tree_metadata": {"a": {"key_metadata": {}}}}',
    "no dict": "[3]",
    "no JSON": "{",
    "nothing": "{}",
}


@pytest.mark.parametrize("case", NAMED)
def test_a_list_of_arrays_that_is_none(case, layouts, tmp_path):
    path = damaged(layouts, "zarr", tmp_path)
    (path / "_METADATA").write_text(NAMED[case])
    assert reason(path).startswith("its _METADATA is not as orbax writes it (")


def test_names_that_nest_too_deep(tmp_path):
    save_file({"a." * 5000 + "b": np.ones(1)}, tmp_path / "net.safetensors")
    with pytest.raises(ValueError) as error:
        read(tmp_path / "net.safetensors")
    assert str(error.value) == (f"read: {tmp_path}/net.safetensors nests names more than 100 deep.")


def test_a_file_that_would_execute_code_is_only_data(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("executed").touch, ())

    for name in ("trap", "trap.safetensors", "trap.pt"):
        (tmp_path / name).write_bytes(pickle.dumps(Trap()))
        with pytest.raises(ValueError, match="cannot be read as"):
            read(tmp_path / name)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("tree", "kind"),
    [
        ({"params": {"mix": {"weight": 1}}}, "linen"),
        ({"batch_stats": {"bn": {"mean": 1}}}, "linen"),
        ({"mix": {"weight": 1}}, "torch"),
        ({"bn": {"running_mean": 1}}, "torch"),
        ({"mix": {"kernel": {"value": 1}}}, "nnx"),
    ],
)
def test_the_kind_is_that_of_the_collections_and_then_of_the_names(tree, kind, tmp_path):
    write.save(tmp_path / "net.msgpack", tree)
    found = contents.read_model(tmp_path / "net.msgpack")
    assert found.kind == kind
    (array,) = jax.tree.leaves(found.variables())
    assert array == found.state_dict()[".".join(next(nesting.leaves(tree))[0])] == 1


def test_a_tuple_of_arrays_is_written_array_by_array(tmp_path):
    """Of different shapes, which no one array holds; a linen parameter may be such a tuple."""
    write.save(tmp_path / "net.msgpack", {"params": {"pair": (np.ones(2), np.zeros(3))}})
    pair = read(tmp_path / "net.msgpack")["params"]["pair"]
    assert {name: v.tolist() for name, v in pair.items()} == {"0": [1, 1], "1": [0, 0, 0]}
