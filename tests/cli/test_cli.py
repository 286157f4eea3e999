"""`python -m jaxbn`: what is printed, written and returned for healthy, sick and other input."""

import ast
import contextlib
import json
import os
import pathlib
import pickle
import re
import resource
import shlex
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.colors
import matplotlib.image
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from safetensors.numpy import load_file, save_file

import jaxbn
from jaxbn import __main__, _extras, export
from jaxbn._checkpoints import contents, norm_layers, read
from jaxbn._checkpoints import write as write_
from jaxbn._cli import commands, terminal, users_model
from jaxbn._cli import picture as picture_
from tests.support.full import NO_SPACE, no_space, stdout_to

ROOT = pathlib.Path(__file__).parents[2]
RANDOM = np.random.default_rng(0)


def norm(channels=8):
    """A trained layer's arrays."""
    values = {
        "mean": RANDOM.normal(size=channels),
        "var": RANDOM.uniform(0.5, 2, channels),
        "scale": RANDOM.uniform(0.5, 2, channels),
        "bias": RANDOM.normal(size=channels),
    }
    return {name: v.astype(np.float32) for name, v in values.items()}


HEALTHY = {"stem/bn": norm(), "head/bn": norm(16)}
# One of each: the layer as a whole, some channels, what no axis and no JSON can show.
SICK = {
    "stem/bn": norm(),
    "new/bn": norm(4) | {"mean": np.zeros(4, np.float32), "var": np.ones(4, np.float32)},
    "nan/bn": norm(4) | {"var": np.array([1, np.nan, 2, np.inf], np.float32)},
    "head/bn": norm(16) | {"scale": np.array([0, 200, *[1] * 14], np.float32)},
}


def tree_of(layers, *collections):
    """Nested dicts; those of the statistics and of the rest apart, where these are named."""
    tree = {}
    for path, arrays in layers.items():
        for name, v in arrays.items():
            top = collections[:1] if name in ("mean", "var") else collections[1:]
            node = tree
            for key in (*top, *path.split("/")):
                node = node.setdefault(key, {})
            node[name] = v
    return tree


def linen(layers):
    return tree_of(layers, "batch_stats", "params")


def flat(tree):
    paths = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="."): v for p, v in paths}


def save_orbax(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def save_nnx(path, layers):
    def module(node):
        if "mean" not in node:
            return nnx.Dict({name: module(inner) for name, inner in node.items()})
        new = nnx.BatchNorm(node["mean"].size, rngs=nnx.Rngs(0))
        for name, v in node.items():
            getattr(new, name).set_value(jnp.asarray(v))
        return new

    save_orbax(path, nnx.state(module(tree_of(layers))))


def save_torch(path, layers):
    names = {other: name for name, other in norm_layers.NAMES.items()}
    names = {name: other for other, name in names.items()}
    tensors = {
        f"{layer.replace('/', '.')}.{names[name]}": v
        for layer, arrays in layers.items()
        for name, v in arrays.items()
    }
    save_file(tensors, path)


WRITERS = {
    "linen.orbax": lambda path, layers: save_orbax(path, linen(layers)),
    "nnx.orbax": save_nnx,
    "linen.msgpack": lambda path, layers: path.write_bytes(serialization.to_bytes(linen(layers))),
    "linen.safetensors": lambda path, layers: save_file(flat(linen(layers)), path),
    "torch.safetensors": save_torch,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints of every kind in `healthy` and `sick`."""
    top = tmp_path_factory.mktemp("checkpoints")
    for name, layers in (("healthy", HEALTHY), ("sick", SICK)):
        (top / name).mkdir()
        for kind, write in WRITERS.items():
            write(top / name / kind, layers)
    return top


def run(capsys, *argv):
    """Status, stdout, stderr."""
    status = commands.main([str(word) for word in argv])
    return status, *capsys.readouterr()


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


# doctor


@pytest.mark.parametrize("kind", WRITERS)
def test_the_doctor_finds_the_same_in_every_format(kind, folder, capsys):
    status, out, err = run(capsys, "doctor", folder / "healthy" / kind, "--json")
    told = strict(out)
    assert (status, err, told["healthy"], told["findings"]) == (0, "", True, [])
    assert sorted(layer["layer"] for layer in told["layers"]) == ["head/bn", "stem/bn"]
    status, out, err = run(capsys, "doctor", folder / "sick" / kind, "--json")
    told = strict(out)
    assert (status, err, told["healthy"]) == (1, "", False)
    assert [(f["layer"], f["kind"], f["severity"], f["channels"]) for f in told["findings"]] == [
        ("nan/bn", "not_finite", "error", [1, 3]),
        ("new/bn", "never_updated", "error", []),
        ("head/bn", "exploding", "warning", [1]),
        ("head/bn", "dead", "warning", [0]),
    ]
    layers = [layer["layer"] for layer in told["layers"]]
    assert layers == ["nan/bn", "new/bn", "head/bn", "stem/bn"]  # worst first
    assert told["layers"][0] == {
        "layer": "nan/bn",
        "features": [4],
        "count": None,
        "worst": "not_finite",
        "findings": 1,
        "figures": told["layers"][0]["figures"],
    }
    # Stable keys, null for NaN.
    keys = {"mean_max", "var_min", "var_max", "scale_min", "scale_max"}
    assert all(set(layer["figures"]) == keys for layer in told["layers"])
    assert told["layers"][0]["figures"]["var_min"] is None


def test_the_table_of_a_sick_checkpoint(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    arrays = {
        "mean": np.array([0.5, -3], np.float32),
        "var": np.array([4.0, -0.25], np.float32),
        "scale": np.array([-1.5, 0.001], np.float32),
    }
    new = {"mean": np.zeros(200, np.float32), "var": np.ones(200, np.float32)}
    tree = tree_of({"a": new, "b": arrays, "c": new})
    tree["a"] |= {"count": np.array(1500), "var": 2 * new["var"]}
    write_.save(tmp_path / "net.msgpack", tree)
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, "doctor", "net.msgpack")
    assert (status, err) == (1, "")
    assert out == (
        "net.msgpack: 3 batch norm layers, 2 errors\n"
        "\n"
        "                  |mean|   var var scale scale\n"
        "layer   C updates   / sd   min max   min   max finding\n"
        "b       2       -    949 -0.25   4 0.001   1.5 negative_variance\n"
        "c     200       -      0     1   1     -     - never_updated\n"
        "a     200    1500      0     2   2     -     - -\n"
        "\n"
        "error    negative_variance in b\n"
        "         smallest running variance: -0.25, threshold 0, channel 1\n"
        "         remedy: jaxbn.recalibrate(apply, variables, batches); no update makes a\n"
        "         variance negative: check the conversion or the averaged weights\n"
        "\n"
        "error    never_updated in c\n"
        "         updates that were learned: 0\n"
        '         remedy: train with mutable=["batch_stats"] and keep what apply returns\n'
        "         (nnx: model.train()), or jaxbn.recalibrate(apply, variables, batches)\n"
        "\n"
        "not judged without a batch: stale, and hardly_updated in 3 layers; --momentum tells of 1\n"
    )


@pytest.mark.parametrize("width", [80, 120])
def test_wide_layers_and_long_names_stay_in_the_table(width, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    names = [f"encoder_block_with_a_long_name_{i}/" * 3 + "BatchNorm_0" for i in range(3)]
    layers = {name: norm(4096) for name in names}
    for name in names:
        layers[name]["var"][:] = -1e-30
        layers[name]["scale"][:2] = 1e-12, 3.7e30
        layers[name]["mean"][0] = 3e30
    write_.save(tmp_path / "net.msgpack", tree_of(layers))
    status, out, _ = run(capsys, "doctor", tmp_path / "net.msgpack")
    assert status == 1
    table, *findings = out.split("\n\n")[1:]
    assert max(map(len, (table + "\n".join(findings)).splitlines())) <= width
    header, *rows = table.splitlines()[1:]
    cut = header.index("C") - 4  # the widest C is 4096
    assert "".join(line[:cut].strip() for line in rows) == "".join(names)
    figures = ["4096", "9.5e32", "-1e-30", "-1e-30", "1e-12", "3.7e30", "negative_variance"]
    assert [line.split()[1:] for line in rows if "4096" in line] == [figures] * 3


@pytest.mark.parametrize("width", [1, 20, 40, 60])
def test_a_narrow_terminal_drops_no_column(width, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    tree = tree_of({"encoder/bn": norm()}) | {"c": norm() | {"count": np.array(10**6)}}
    write_.save(tmp_path / "net.msgpack", tree)
    status, out, _ = run(capsys, "doctor", tmp_path / "net.msgpack")
    assert status == 0
    above, header, *rows = out.split("\n\n")[1].splitlines()
    assert header.split() == ["layer", "C", "updates", "/", "sd", *["min", "max"] * 2, "finding"]
    assert above.split() == ["|mean|", "var", "var", "scale", "scale"]
    cut = header.index("C")
    assert "".join(row[:cut].strip() for row in rows) == "cencoder/bn"
    assert [len(row.split()) for row in rows if row[cut:].strip()] == [9, 9]


def test_one_finding_in_many_layers_is_told_once(tmp_path, capsys):
    new = {"mean": np.zeros(2, np.float32), "var": np.ones(2, np.float32)}
    write_.save(tmp_path / "net.safetensors", tree_of({f"bn{i}": new for i in range(20)}))
    status, out, _ = run(capsys, "doctor", tmp_path / "net.safetensors")
    assert status == 1
    assert out.count("remedy:") == 1
    assert "never_updated in bn0, bn1, bn10, bn11 and 16 more\n" in out


def test_colour_is_for_terminals(folder, capsys, monkeypatch):
    argv = "doctor", folder / "sick" / "linen.msgpack"
    plain = run(capsys, *argv)[1]
    assert "\x1b" not in plain
    monkeypatch.setenv("FORCE_COLOR", "1")
    coloured = run(capsys, *argv)[1]
    assert "\x1b[31m" in coloured
    assert "\x1b[33m" in coloured
    bare = re.sub(r"\x1b\[\d*m", "", coloured)
    assert [line.rstrip() for line in bare.splitlines()] == plain.splitlines()


def test_options_change_the_findings(tmp_path, capsys):
    layers = {"bn": norm() | {"mean": np.full(8, 60, np.float32)}}
    tree = tree_of(layers)
    tree["bn"]["count"] = np.array(20)
    write_.save(tmp_path / "net.msgpack", tree)

    def kinds(*options):
        status, out, _ = run(capsys, "doctor", tmp_path / "net.msgpack", "--json", *options)
        findings = strict(out)["findings"]
        assert status == bool(findings)  # of warnings too
        return [finding["kind"] for finding in findings]

    assert kinds() == []
    assert kinds("--momentum", "0.99") == ["hardly_updated"]  # 0.99**20 of the start is left
    assert kinds("--momentum", "0.8") == []
    assert kinds("--dtype", "bfloat16") == ["large_mean"]
    assert kinds("--epsilon", "1000") == ["dead"]


def test_the_picture(tmp_path, capsys):
    some = {"nothing": {}, "layer": {"new/bn": SICK["new/bn"]}, "nan": {"nan/bn": SICK["nan/bn"]}}
    some["channels"] = {"head/bn": SICK["head/bn"]}
    marks = {}
    for name, sick in some.items():
        checkpoint, file = tmp_path / f"{name}.msgpack", tmp_path / f"{name}.png"
        write_.save(checkpoint, linen(HEALTHY | sick))
        plain = run(capsys, "doctor", checkpoint)
        assert run(capsys, "doctor", checkpoint, "--plot", file) == plain
        assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        picture = matplotlib.image.imread(file)[..., :3]
        assert min(picture.shape[:2]) > 500
        blue, red, pink = (
            int((np.abs(picture - matplotlib.colors.to_rgb(color)).max(-1) < 0.1).sum())
            for color in (picture_.HEALTHY, picture_.SICK, picture_.SHADES["error"])
        )
        assert blue > 500
        marks[name] = red, pink
    # Where lines are smoothed, a few pixels are pink.
    shaded = {name: pink > 1000 for name, (_, pink) in marks.items()}
    assert shaded == {"nothing": False, "layer": True, "nan": False, "channels": False}
    assert marks["nothing"][0] == marks["layer"][0] == 0
    for name, crosses in (("channels", 6), ("nan", 5)):  # of 3 panels; var's NaN and inf there
        assert marks[name][0] > 10 * crosses, name
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {f"{name}.{suffix}" for name in some for suffix in ("png", "msgpack")}


def state(count=None):
    arrays = norm()
    return jaxbn.State(arrays["mean"], arrays["var"], count)


LISTED = {
    "a list of layers": lambda: {"blocks": [state(), state()], "head": state()},
    "tuples in lists": lambda: {"blocks": [(state(),), (state(), norm())]},
    "a list": lambda: [norm(), norm(), {"bn": norm()}],
    "a tuple of states": lambda: (state(), state(), state()),
    "equal names": lambda: {"net": linen({"bn": norm()}) | {"bn": norm()}, "net/bn": norm()},
    "as equal as names can be printed": lambda: {"\n": norm(), "\\n": norm(), "\\n (2)": norm()},
}


@pytest.mark.parametrize("form", ["orbax", "msgpack"])
@pytest.mark.parametrize("tree", LISTED)
def test_the_doctor_sees_every_layer(tree, form, tmp_path, capsys):
    tree, path = LISTED[tree](), tmp_path / f"net.{form}"
    if form == "orbax":
        save_orbax(path, tree)
    else:
        path.write_bytes(serialization.to_bytes(tree))
    status, out, _ = run(capsys, "doctor", path, "--json")
    told = strict(out)
    assert (status, told["judged"]) == (0, 3)
    assert len({layer["layer"] for layer in told["layers"]}) == 3
    assert f"{path}: 3 batch norm layers, healthy\n" in run(capsys, "doctor", path)[1]


def test_lists_as_msgpack_has_them_and_layers_in_a_tree_that_was_never_in_a_file(tmp_path):
    packed = serialization.msgpack_serialize({"blocks": [norm(), [norm()]]})
    (tmp_path / "net.msgpack").write_bytes(packed)
    assert list(norm_layers.norms_in(read.read(tmp_path / "net.msgpack"))) == [
        "blocks/0",
        "blocks/1/0",
    ]
    assert list(norm_layers.norms_in({"blocks": [state(), (state(),)]})) == [
        "blocks/0",
        "blocks/1/0",
    ]


def test_scale_and_bias_without_statistics_are_a_finding(tmp_path, capsys):
    def affine():
        return {name: norm()[name] for name in ("scale", "bias")}

    params = {"bn": affine(), "late/bn": affine(), "LayerNorm_0": affine(), "fc": {"bias": ONE}}
    statistics = {"bn": {name: norm()[name] for name in ("mean", "var")}}
    copies = [{"mu": params, "nu": params}, {"count": np.array(3)}]
    for tree, bare in (
        ({"params": params}, ["bn", "late/bn"]),
        ({"params": params, "batch_stats": statistics}, ["late/bn"]),
        ({"params": params, "batch_stats": statistics, "opt_state": copies}, ["late/bn"]),
        ({"params": params, "ema_params": params}, ["bn", "late/bn"]),
        (params, ["bn", "late/bn"]),
    ):
        (tmp_path / "net.msgpack").write_bytes(serialization.to_bytes(tree))
        status, out, err = run(capsys, "doctor", tmp_path / "net.msgpack", "--json")
        told = strict(out)
        assert (status, err, told["judged"]) == (1, "", 2)
        assert [(f["layer"], f["kind"]) for f in told["findings"]] == [
            (name, "no_statistics") for name in bare
        ]
    out = run(capsys, "doctor", tmp_path / "net.msgpack", "--plot", tmp_path / "net.png")[1]
    assert (
        "error    no_statistics in bn, late/bn\n"
        "         arrays mean and var that the layer holds: 0\n"
        "         remedy: save batch_stats (nnx: nnx.state(model)) beside params;" in out
    )


def test_what_needs_a_batch_is_said_to_be_not_judged(tmp_path, capsys):
    path = tmp_path / "net.msgpack"
    write_.save(path, {"a": norm() | {"count": np.array(1)}, "b": norm()})
    both = (
        "not judged without a batch: stale, and hardly_updated in 2 layers; --momentum tells of 1"
    )
    one = "not judged without a batch: stale, and hardly_updated in 1 layer"
    for options, status, line in (([], 0, both), (["--momentum", "0.99"], 1, one)):
        got, out, _ = run(capsys, "doctor", path, *options)
        assert (got, out.splitlines()[-1]) == (status, line)
        assert strict(run(capsys, "doctor", path, "--json", *options)[1])["unjudged"] == line
    write_.save(path, {"a": norm() | {"count": np.array(1000)}})
    out = run(capsys, "doctor", path, "--momentum", "0.99")[1]
    assert out.splitlines()[-1] == "not judged without a batch: stale"


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_statistics_are_judged_in_the_dtype_of_the_file(dtype, tmp_path, capsys, monkeypatch):
    layers = {"bn": {name: v.astype(dtype) for name, v in norm().items()}}
    seen = []
    check = jaxbn.health.check
    monkeypatch.setattr(
        jaxbn.health, "check", lambda found, **how: seen.append(found) or check(found, **how)
    )
    for kind, write in WRITERS.items():
        if not kind.startswith("nnx"):
            write(tmp_path / kind, layers)
            run(capsys, "doctor", tmp_path / kind)
            assert {v.dtype for v in (*seen[-1]["bn"].params, *seen[-1]["bn"].state[:2])} == {
                np.dtype(dtype)
            }


def test_names_that_are_no_plain_text(tmp_path, capsys):
    layers = {"$\\frac{": norm(), "\x1b[31mred\n": norm(), "[bold]": norm(), "層": norm()}
    write_.save(tmp_path / "net.msgpack", tree_of(layers))
    status, out, _ = run(capsys, "doctor", tmp_path / "net.msgpack", "--plot", tmp_path / "a.png")
    assert status == 0
    for name in ("$\\frac{", "\\x1b[31mred\\n", "[bold]", "層"):
        assert f"\n{name} " in out
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_a_layer_within_a_layer_and_one_at_the_top(tmp_path, capsys):
    write_.save(tmp_path / "net.msgpack", norm() | {"inner": norm()})
    status, out, _ = run(capsys, "doctor", tmp_path / "net.msgpack", "--json")
    assert status == 0
    assert [layer["layer"] for layer in strict(out)["layers"]] == ["", "inner"]


ONE = np.ones(1, np.float32)
ODD = {  # a character → how it is printed
    "\x1b[31m": "\\x1b[31m",
    "\n": "\\n",
    "\r": "\\r",
    "\x9b": "\\x9b",
    "\x7f": "\\x7f",
    "\u202e": "\\u202e",
    "\u2028": "\\u2028",
    "\ud800": "\\ud800",
}


def error_of(call, *args, **kwargs):
    with pytest.raises(ValueError) as error:
        call(*args, **kwargs)
    return str(error.value)


def doctored(*options):
    def printed(name):
        layer = {"mean": np.zeros(2), "var": np.ones(2)}
        checkpoints_read = {f"{name}bn": layer}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(read, "read", lambda path: checkpoints_read)
            commands.main(["doctor", f"{name}bn", *options])

    return printed


PRINTERS = {
    "doctor": doctored(),
    "doctor --json": doctored("--json"),
    "a report": lambda name: str(
        jaxbn.convert.to_torch({"params": {f"{name}bn": {"bias": ONE}}})[1]
    ),
    "a report's notes": lambda name: str(
        jaxbn.convert.Report((), "names", (f"{name}bn",), (), {f"{name}bn": {}}, (f"{name}bn",))
    ),
    "what does not fit": lambda name: error_of(
        jaxbn.convert.to_torch, {"params": {f"{name}bn": {"bias": ONE}}}, {"fc.weight": ONE}
    ),
    "what is folded": lambda name: str(
        jaxbn.FoldReport(
            (jaxbn.fold.__globals__["FoldSite"](f"{name}bn", True, "", 0, 0),), 0, 0, 1
        )
    ),
    "no array": lambda name: error_of(write_.save, "net.msgpack", {f"{name}bn": "text"}),
    "no such part": lambda name: error_of(contents.part_of, {f"{name}bn": {}}, "x"),
    "several parts": lambda name: error_of(
        contents.part_of, {n: {"params": {}, "batch_stats": {}} for n in (f"{name}bn", "b")}
    ),
    "two of one name": lambda name: error_of(
        write_.save, "net.msgpack", {f"{name}bn.a": ONE, f"{name}bn": {"a": ONE}}
    ),
    "no suffix": lambda name: error_of(write_.save, f"net.{name}bn", {}),
    "an option": lambda name: cli_error("doctor", "a", f"--{name}bn"),
    "no file": lambda name: cli_error("doctor", f"{name}bn"),
}


def cli_error(*words):
    with contextlib.suppress(SystemExit):
        commands.main(list(words))


@pytest.mark.parametrize("printer", PRINTERS)
def test_nothing_that_a_terminal_obeys_is_printed_raw(printer, capsys):
    for name, printed in ODD.items():
        text = PRINTERS[printer](name)
        out, err = capsys.readouterr()
        text = out + err if text is None else text
        assert [c for c in text if not (c.isprintable() or c == "\n")] == []
        assert f"{printed}bn" in text or json.dumps(f"{printed}bn")[1:-1] in text, text


MSGPACK = "a Flax msgpack file (flax.serialization.to_bytes)"
EXPECTED = "Expected an orbax folder, a .safetensors file, or a file of flax.serialization.to_bytes"
UNREADABLE = {
    "nothing": "no checkpoint at nothing: there is no such file or folder",
    "folder": f"folder cannot be read as an orbax checkpoint: it has no _METADATA. {EXPECTED}.",
    "trap.pt": f"trap.pt cannot be read as {MSGPACK}: unpack(b) received extra data. {EXPECTED}.",
    "dense.msgpack": "dense.msgpack holds no batch norm layer, expected arrays mean and var, or "
    "PyTorch's running_mean and running_var, beside each other.",
    "shapes.msgpack": "var of layer 'bn' has shape (4,) and dtype float32, expected numbers of the "
    "mean's shape (3,).",
    "empty.msgpack": "mean of layer 'bn' has shape (0,): it holds no number.",
    "nan.msgpack": "count of layer 'bn' is nan, expected the number of its updates.",
    "negative.msgpack": "count of layer 'bn' is -1, expected the number of its updates.",
    "none.msgpack": "count of layer 'bn' has shape (0,) and dtype int64, expected the number of "
    "its updates.",
    "complex.msgpack": "var of layer 'bn' has shape (3,) and dtype complex64, expected numbers of "
    "the mean's shape (3,).",
    "mixed.msgpack": "layer 'bn' holds mean beside running_var, expected mean and var, or "
    "PyTorch's running_mean and running_var.",
    "dates.msgpack": "mean of layer 'bn' has shape (3,) and dtype bool, expected numbers of the "
    "mean's shape (3,).",
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read(name, tmp_path, capsys, monkeypatch):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("executed").touch, ())

    monkeypatch.chdir(tmp_path)
    pathlib.Path("folder").mkdir()
    pathlib.Path("trap.pt").write_bytes(pickle.dumps(Trap()))
    three, four = np.ones(3, np.float32), np.ones(4, np.float32)
    write_.save("dense.msgpack", {"fc": {"kernel": three}})
    write_.save("shapes.msgpack", {"bn": {"mean": three, "var": four}})
    write_.save("dates.msgpack", {"bn": {"mean": three > 0, "var": three}})
    write_.save("empty.msgpack", {"bn": {"mean": three[:0], "var": three[:0]}})
    both = {"mean": three, "var": three}
    write_.save("nan.msgpack", {"bn": {**both, "count": np.array(np.nan)}})
    write_.save("negative.msgpack", {"bn": {**both, "count": np.array([3, -1])}})
    write_.save("none.msgpack", {"bn": {**both, "count": np.array([], int)}})
    write_.save("complex.msgpack", {"bn": {"mean": three, "var": three.astype(np.complex64)}})
    write_.save("mixed.msgpack", {"bn": {"mean": three, "running_var": three}})
    for options in ([], ["--json"], ["--plot", "a.png"]):
        assert run(capsys, "doctor", name, *options) == (2, "", f"doctor: {UNREADABLE[name]}\n")
    assert not pathlib.Path("executed").exists()
    assert not pathlib.Path("a.png").exists()


def test_a_picture_that_cannot_be_written(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file, message in (
        ("a.jpg", "a.jpg ends in .jpg, expected .png"),
        ("no/a.png", f"no folder {tmp_path}/no to write a.png in"),
    ):
        status = run(capsys, "doctor", folder / "sick" / "linen.msgpack", "--plot", file)
        assert status == (2, "", f"doctor: {message}\n")


OPTIONS = {
    "doctor": "python -m jaxbn doctor: the following arguments are required: CHECKPOINT",
    "doctor a --jsn": "python -m jaxbn: unrecognized arguments: --jsn",
    "doctor a --momentum 1.5": "python -m jaxbn doctor: argument --momentum: '1.5', expected a "
    "number from 0 to 1",
    "doctor a --epsilon nan": "python -m jaxbn doctor: argument --epsilon: 'nan', expected a "
    "finite number of at least 0",
    "fold a": "python -m jaxbn fold: the following arguments are required: --model",
    "fold a --model m:f --batches 0": "python -m jaxbn fold: argument --batches: '0', expected a "
    "whole number of at least 1",
    "convert a b --rename c": "python -m jaxbn convert: argument --rename: 'c', expected A=B, or "
    "A= to drop A",
    "convert a b --torch --like c": "python -m jaxbn convert: argument --like: not allowed with "
    "argument --torch",
}


@pytest.mark.parametrize("words", OPTIONS)
def test_wrong_options_are_one_line(words, capsys):
    with pytest.raises(SystemExit) as end:
        commands.main(words.split())
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    message = OPTIONS[words]
    assert err == f"{message}; see {message.partition(': ')[0]} --help\n"


@pytest.mark.parametrize("command", ["", *commands.COMMANDS])
def test_help_names_every_option(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        commands.main([*command.split(), "--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert f"\n  python -m jaxbn {command}" in out
    assert ("module:function" in out.lower()) == (command not in ("", "doctor"))
    written = ("convert", "recalibrate", "export")
    assert ("exit status: 0 written, 2 not written" in out) == (command in written)
    status = {"doctor": "read", "lint": "traced"}.get(command)
    assert ("exit status: 0 healthy, 1 findings" in out) == (status is not None)
    assert f"2 could not be {status or 'read'}" in out or status is None
    gates = ("compare", "verify", "serving")
    assert ("0 within all bounds, 1 findings, 2 could not be run" in out) == (command in gates)


def test_as_a_program(folder):
    """Whole streams: no word of orbax, no traceback; nor where the reader went away."""
    argv = [sys.executable, "-m", "jaxbn", "doctor", folder / "sick" / "linen.orbax"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines()[0].endswith(": 4 batch norm layers, 2 errors, 2 warnings")
    with subprocess.Popen(argv, stdout=-1, stderr=-1, cwd=ROOT) as pipe:
        pipe.stdout.close()
        assert pipe.stderr.read() == b""
    assert pipe.returncode == 2
    closed = shlex.join(map(str, argv)) + " >&-"
    done = subprocess.run(closed, shell=True, stderr=-1, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("unbuffered", [True, False])  # as PYTHONUNBUFFERED has it
@pytest.mark.parametrize(
    "words", ["doctor {}", "doctor {} --json", "convert {} {}.new.msgpack", "--help"]
)
def test_a_full_disk_is_no_finding(tmp_path, monkeypatch, capsys, words, unbuffered):
    write_.save(source := tmp_path / "net.msgpack", tree_of(SICK))
    monkeypatch.setattr(sys, "argv", ["jaxbn", *words.format(source, source).split()])
    with stdout_to("/dev/full", unbuffered), pytest.raises(SystemExit) as end:
        __main__.run()
    said = f"the output cannot be written: {NO_SPACE}\n"
    assert (end.value.code, capsys.readouterr().err) == (2, said)


def test_a_full_disk_names_the_file(tmp_path, monkeypatch, capsys):
    write_.save(source := tmp_path / "net.msgpack", tree_of(SICK))
    monkeypatch.setattr(pathlib.Path, "write_bytes", no_space)
    dest = tmp_path / "new.msgpack"
    monkeypatch.setattr(sys, "argv", ["jaxbn", "convert", str(source), str(dest)])
    with pytest.raises(SystemExit) as end:
        __main__.run()
    said = f"convert: [Errno 28] {NO_SPACE}: '{dest}'\n"
    assert (end.value.code, *capsys.readouterr()) == (2, "", said)
    assert [*tmp_path.iterdir()] == [source]


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "main", interrupted)
    with pytest.raises(SystemExit) as end:
        __main__.run()
    assert (end.value.code, *capsys.readouterr()) == (130, "", "Stopped.\n")


def test_no_command_is_a_call_for_help(capsys):
    ends = []
    for words in ([], ["--help"]):
        with pytest.raises(SystemExit) as end:
            commands.main(words)
        ends.append((end.value.code, *capsys.readouterr()))
    assert ends[0] == ends[1]
    assert ends[0][0] == 0
    assert ends[0][1].startswith("usage: python -m jaxbn ")


def test_the_examples_of_the_help_are_command_lines():
    """One a command."""
    words = [line.split()[3:] for line in commands.EXAMPLES.splitlines() if " -m jaxbn " in line]
    parsed = [commands.parse(line).command for line in words]
    assert sorted(parsed) == sorted(commands.COMMANDS)


# Package → what needs it, and the rest of the line.
MISSING = {
    "safetensors": [
        (lambda: read.read("a.safetensors"), "read", "'jaxbn[convert]'"),
        (lambda: write_.save("b.safetensors", {"a": ONE}), "save", "'jaxbn[convert]'"),
        (
            lambda: jaxbn.convert.from_torch("a.safetensors", {"params": {}}),
            "from_torch",
            "'jaxbn[convert]'",
        ),
    ],
    "flax": [
        (lambda: read.read("a.msgpack"), "read", "flax"),
        (lambda: write_.save("b.msgpack", {"a": ONE}), "save", "flax"),
        (lambda: jaxbn.__getattr__("linen"), "jaxbn.linen", "flax"),
        (lambda: jaxbn.__getattr__("nnx"), "jaxbn.nnx", "flax"),
    ],
    "tensorstore": [(lambda: read.read("a"), "read", "orbax-checkpoint")],
    "orbax": [(lambda: write_.save("b", {"a": ONE}), "save", "orbax-checkpoint")],
    "rich": [
        (lambda: terminal.show("net", [], []), "show", "'jaxbn[doctor]'"),
        (
            lambda: jaxbn.recalibrate(lambda s, _: s, state(), [ONE], progress=True),
            "recalibrate",
            "'jaxbn[doctor]'",
        ),
    ],
    "matplotlib": [(lambda: picture_.plot("a.png", "", {}), "plot", "'jaxbn[doctor]'")],
    "prometheus_client": [(lambda: jaxbn.writers.Prometheus(0), "Prometheus", "'jaxbn[watch]'")],
    "tensorboardX": [(lambda: jaxbn.writers.TensorBoard("b"), "TensorBoard", "'jaxbn[watch]'")],
    "flatbuffers": [
        (lambda: export.stablehlo(jnp.sin, np.ones((1, 2)), "b"), "stablehlo", "'jaxbn[export]'"),
        (lambda: export.load_stablehlo("a.msgpack"), "load_stablehlo", "'jaxbn[export]'"),
    ],
    "jax2onnx": [(lambda: export.onnx(jnp.sin, np.ones((1, 2)), "b"), "onnx", "'jaxbn[export]'")],
    "onnx": [(lambda: export.onnx(jnp.sin, np.ones((1, 2)), "b"), "onnx", "'jaxbn[export]'")],
    "onnxruntime": [
        (lambda: export.session("a.msgpack"), "session", "'jaxbn[export]'"),
        (lambda: export.int8("a.msgpack", [], "b"), "int8", "'jaxbn[export]'"),
        (lambda: export.triton("b", "a.msgpack"), "triton", "'jaxbn[export]'"),
    ],
    "litert_converter": [
        (lambda: export.tflite(jnp.sin, np.ones((1, 2)), "b"), "tflite", "'jaxbn[tflite]'")
    ],
    "ai_edge_litert": [(lambda: export.load_tflite("a.msgpack"), "load_tflite", "'jaxbn[tflite]'")],
    "ai_edge_quantizer": [
        (lambda: export.tflite_int8("a.msgpack", [], "b"), "tflite_int8", "'jaxbn[tflite]'")
    ],
    "tensorflow": [
        (
            lambda: export.saved_model(jnp.sin, np.ones((1, 2)), "b"),
            "saved_model",
            "'jaxbn[saved-model]'",
        ),
        (lambda: export.load_saved_model("a"), "load_saved_model", "'jaxbn[saved-model]'"),
    ],
}


@pytest.mark.parametrize("package", MISSING)
def test_a_missing_package_ends_in_the_line_that_installs_it(package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.safetensors", "a.msgpack"):
        pathlib.Path(name).touch()
    pathlib.Path("a").mkdir()
    for name in ("_METADATA", "saved_model.pb"):
        pathlib.Path("a", name).touch()
    monkeypatch.setitem(sys.modules, package, None)
    for call, name, line in MISSING[package]:
        with pytest.raises(ModuleNotFoundError) as error:
            call()
        assert str(error.value) == (
            f"{name}: needs the package {package}, which is not installed; write pip install "
            f"{line}."
        )
    assert set(MISSING) == set(_extras.EXTRAS)
    assert sorted(os.listdir()) == ["a", "a.msgpack", "a.safetensors"]


def test_help_imports_no_more_than_the_package_does():
    code = (
        "import sys, jaxbn; before = set(sys.modules); from jaxbn._cli import commands\n"
        "try: commands.main(['--help'])\n"
        "except SystemExit: pass\n"
        "new = set(sys.modules) - before\n"
        "print(sorted(m for m in new if m.split('.')[0] not in sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    new = ast.literal_eval(done.stdout.splitlines()[-1])
    # The files of the command line, which import the tools when a command runs.
    heavy = {"comparison", "picture", "terminal", "users_model"}
    assert {name.rpartition(".")[0] for name in new} == {
        "jaxbn",
        "jaxbn._cli",
        "jaxbn._cli.commands",
    }
    assert not heavy & {name.rpartition(".")[2] for name in new}


# The commands that write


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_convert_between_formats_changes_nothing(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = read.read(folder / "sick" / "linen.msgpack")
    source["bf16"] = {"v": np.arange(3).astype(jnp.bfloat16), "step": np.array(3)}
    write_.save("a.msgpack", source)
    for a, b in (("a.msgpack", "b.safetensors"), ("b.safetensors", "c"), ("c", "d.msgpack")):
        assert run(capsys, "convert", a, b) == (0, f"wrote {b}\n", "")
        equal(read.read(b), source)
    assert run(capsys, "convert", "a.msgpack", "c") == (
        2,
        "",
        "convert: c is there already; name a new orbax folder\n",
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a.msgpack",
        "b.safetensors",
        "c",
        "d.msgpack",
    ]


def test_convert_to_pytorch_and_back(net, capsys):
    status, out, err = run(capsys, "convert", "net.msgpack", "torch.safetensors", "--torch")
    assert (status, err) == (0, "")
    assert "params/conv/kernel   conv.weight      8x3x3x3  HWIO → OIHW\n" in out
    variables = read.read("net.msgpack")["model"]
    torch = read.read("torch.safetensors")
    kernel = variables["params"]["conv"]["kernel"]
    np.testing.assert_array_equal(torch["conv"]["weight"], kernel.transpose(3, 2, 0, 1))
    for dest, target in (("a.msgpack", "--like=net.msgpack"), ("b", "--model=net:network")):
        assert run(capsys, "convert", "torch.safetensors", dest, target)[0] == 0
        equal(read.read(dest), variables)
    again = "again.safetensors"
    assert run(capsys, "convert", "a.msgpack", again, "--like", "torch.safetensors")[0] == 0
    equal(read.read(again), torch)
    renamed = ["--rename", "conv=stem", "--rename", "fc="]
    assert run(capsys, "convert", "net.msgpack", again, "--torch", *renamed)[0] == 0
    assert set(read.read(again)) == {"stem", "bn"}


def test_names_that_continue_others_are_converted_whole(tmp_path, capsys, monkeypatch):
    """Both orders, and through every format."""
    monkeypatch.chdir(tmp_path)
    tensors = {"fc.weight": np.ones((2, 3)), "fc.weight.absmax": ONE, "fc.weight.a.b": 2 * ONE}
    for n, names in enumerate((list(tensors), list(tensors)[::-1])):
        packed = serialization.msgpack_serialize({name: tensors[name] for name in names})
        pathlib.Path("a.msgpack").write_bytes(packed)
        for a, b in (("a.msgpack", "b.safetensors"), ("b.safetensors", f"c{n}")):
            assert run(capsys, "convert", a, b) == (0, f"wrote {b}\n", "")
        assert run(capsys, "convert", f"c{n}", "d.safetensors")[0] == 0
        equal(load_file("d.safetensors"), tensors)


def test_no_array_takes_another_ones_name(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    twice = {"fc.weight": ONE, "fc": {"weight": 2 * ONE}}
    pathlib.Path("a.msgpack").write_bytes(serialization.msgpack_serialize(twice))
    assert run(capsys, "convert", "a.msgpack", "b.msgpack") == (
        2,
        "",
        "convert: a.msgpack holds two arrays 'fc.weight'.\n",
    )
    assert error_of(write_.save, "b.safetensors", twice) == (
        "save: two arrays are called 'fc.weight', expected one; rename a layer."
    )
    two = {"params": {"a/b": {"bias": ONE}, "a": {"b": {"bias": ONE}}}}
    assert error_of(jaxbn.convert.to_torch, two).splitlines()[1] == (
        "  two arrays of the source become a.b.bias"
    )
    assert os.listdir() == ["a.msgpack"]


@pytest.mark.parametrize("dest", ["b", "b.msgpack", "b.safetensors"])
def test_a_destination_that_fails_leaves_nothing(dest, tmp_path, capsys, monkeypatch):
    """A full disk, as far as a limit on the size of files is one; nor does a thread speak."""
    monkeypatch.chdir(tmp_path)
    write_.save("a.msgpack", {"bn": {"mean": RANDOM.normal(size=20_000)}})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        status, out, err = run(capsys, "convert", "a.msgpack", dest)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "File too large" in err
    assert os.listdir() == ["a.msgpack"]


@pytest.mark.parametrize(
    "words",
    [
        "convert {0} {1}/a",
        "convert {0} {1}/a.msgpack",
        "recalibrate {0} {1}/a.msgpack --model none:none",
        "export {0} {1}/a.stablehlo --model none:none",
        "export {0} {1}/a --model none:none",
        "doctor {0} --plot {1}/a.png",
    ],
)
def test_a_folder_that_may_not_be_written_in_is_refused_before_any_work(
    words, tmp_path, capsys, monkeypatch
):
    write_.save(source := tmp_path / "net.msgpack", tree_of(SICK))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    status, out, err = run(capsys, *words.format(source, tmp_path).split())
    assert (status, out) == (2, "")
    assert err == (
        f"{words.split()[0]}: the folder {tmp_path} may not be written in; name a file in another\n"
    )


def test_a_folder_that_goes_meanwhile_is_told_by_the_name_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(write_, "check_destination", lambda path: None)
    with pytest.raises(FileNotFoundError) as error:
        write_.save(tmp_path / "gone" / "a.msgpack", {"a": ONE})
    assert error.value.filename == str(tmp_path / "gone" / "a.msgpack")


def test_orbax_writes_no_array_without_values(tmp_path):
    assert error_of(write_.save, tmp_path / "b", {"bn": {"mean": ONE[:0]}}) == (
        "save: 'bn.mean' has shape (0,), and orbax writes no array without values; name a "
        ".safetensors or a .msgpack file."
    )
    assert list(tmp_path.iterdir()) == []


def test_convert_into_nnx(net, capsys, tmp_path):
    (tmp_path / "nnx_net.py").write_text(
        "from flax import nnx\n"
        "class Net(nnx.Module):\n"
        "    def __init__(self, rngs):\n"
        "        self.conv = nnx.Conv(3, 8, (3, 3), use_bias=False, rngs=rngs)\n"
        "        self.bn, self.fc = nnx.BatchNorm(8, rngs=rngs), nnx.Linear(8, 5, rngs=rngs)\n"
        "        self.dropout = nnx.Dropout(0.5, rngs=rngs)\n"
        "def network():\n"
        "    return lambda model, x: model(x), nnx.eval_shape(lambda: Net(nnx.Rngs(0))), []\n"
    )
    model = "--model=nnx_net:network"
    assert run(capsys, "convert", "net.msgpack", "nnx", model)[0] == 0
    new, variables = read.read("nnx"), read.read("net.msgpack")["model"]
    assert set(new) == {"conv", "bn", "fc"}
    equal(new["conv"], variables["params"]["conv"])
    equal(new["bn"], {**variables["params"]["bn"], **variables["batch_stats"]["bn"]})
    assert run(capsys, "convert", "nnx", "back.msgpack", "--like", "net.msgpack")[0] == 0
    equal(read.read("back.msgpack"), variables)
    assert run(capsys, "convert", "back.msgpack", "again", "--like", "nnx")[0] == 0
    equal(read.read("again"), new)
    assert run(capsys, "fold", "nnx", model) == (
        2,
        "",
        "fold: nnx_net:network gives no batches, expected at least one as the example.\n",
    )


def test_recalibrate_gives_the_moments_of_all_batches(net, capsys):
    assert run(capsys, "recalibrate", "net.msgpack", "new", "--model", "net:network") == (
        0,
        "wrote new\n",
        "",
    )
    old, new = read.read("net.msgpack")["model"], read.read("new")
    equal(new["params"], old["params"])
    conv = nn.Conv(8, (3, 3), use_bias=False)
    x = np.concatenate(net.batches())
    y = np.asarray(conv.apply({"params": old["params"]["conv"]}, x), np.float64)
    stats = new["batch_stats"]["bn"]
    # float32 convolutions of other batch sizes, and the merge of four batches.
    np.testing.assert_allclose(stats["mean"], y.mean((0, 1, 2)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stats["var"], y.var((0, 1, 2)), rtol=1e-4)
    assert run(capsys, "doctor", "net.msgpack")[0] == 1
    assert run(capsys, "doctor", "new")[0] == 0
    some = ["new.safetensors", "--model", "net:network", "--batches", "1"]
    assert run(capsys, "recalibrate", "net.msgpack", *some)[0] == 0
    y = np.asarray(conv.apply({"params": old["params"]["conv"]}, net.batches()[0]), np.float64)
    mean = read.read("new.safetensors")["batch_stats"]["bn"]["mean"]
    np.testing.assert_allclose(mean, y.mean((0, 1, 2)), rtol=1e-5, atol=1e-5)


LINTED = """
import functools
import flax.linen as nn
import jax
import numpy as np
from flax import nnx


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        return nn.BatchNorm(not train, name="bn\\x1b")(nn.Dense(4)(x))


def network(shapes=False):
    make = functools.partial(jax.eval_shape, Net().init) if shapes else Net().init
    x = np.ones((8, 3), np.float32)
    variables = make(jax.random.key(0), x)
    return functools.partial(Net().apply, mutable=["batch_stats"]), variables, [x]


def shapes():
    return network(True)


def of_nnx():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(3, 4, use_bias=False, rngs=rngs), nnx.BatchNorm(4, rngs=rngs))
    model.eval()
    return lambda model, x: model(x), model, [np.ones((8, 3), np.float32)]


def nothing():
    return lambda model, x: x, {}, []
"""


def test_lint(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "linted.py").write_text(LINTED)
    lost = (
        "warning  lost_bias in bn\\x1b\n"
        "         number of biases that the mean takes away: 4, threshold 0\n"
        "         remedy: use_bias=False before the norm: the mean takes the bias away\n"
    )
    for function in ("network", "shapes"):
        status, out, err = run(capsys, "lint", "--model", f"linted:{function}", "--train")
        assert (status, out, err) == (1, f"linted:{function}: 1 warning\n\n{lost}", "")
    assert run(capsys, "lint", "--model", "linted:of_nnx", "--eval") == (
        0,
        "linted:of_nnx: healthy\n",
        "",
    )
    status, out, _ = run(capsys, "lint", "--model", "linted:of_nnx", "--train", "--json")
    found = json.loads(out)
    assert (status, found["model"], found["healthy"]) == (1, "linted:of_nnx", False)
    (finding,) = found["findings"]
    assert (finding["layer"], finding["kind"]) == ("layers/1", "eval_in_training")
    assert run(capsys, "lint", "--model", "linted:nothing") == (
        2,
        "",
        "lint: linted:nothing gives no batches, expected at least one as the example.\n",
    )


def test_fold_and_export(net, capsys):
    variables = read.read("net.msgpack")["model"]
    x = net.batches()[0]
    model = "--model=net:network"
    status, report, err = run(capsys, "fold", "net.msgpack", model)
    assert (status, err) == (0, "")
    assert report.splitlines()[1].startswith("0 conv 3x3, 3 -> 8 Net/conv  yes")
    status, out, _ = run(capsys, "export", "net.msgpack", "net.stablehlo", model)
    assert status == 0
    assert out.startswith(f"{report}wrote net.stablehlo: ")
    y = net.Net().apply(variables, x)
    served = export.load_stablehlo("net.stablehlo")(jnp.asarray(x))
    # Folded, so not bit by bit: 27 products in float32.
    np.testing.assert_allclose(served, y, rtol=1e-5, atol=1e-5)
    status, out, _ = run(capsys, "export", "net.msgpack", "net.stablehlo", model, "--no-fold")
    assert (status, out.count("\n")) == (0, 1)
    exact = export.load_stablehlo("net.stablehlo")(jnp.asarray(x))
    np.testing.assert_allclose(exact, y, rtol=1e-6, atol=1e-6)
    status, out, _ = run(capsys, "export", "net.msgpack", "net.onnx", model, "--int8")
    assert status == 0
    served = export.session("net.onnx")(x)
    error = np.abs(served - y).max() / np.abs(y).max()
    assert 0 < error < 0.1


ENDS = {
    "at import": "import sys\nsys.exit(0)\n",
    "in the function": "import sys\ndef network():\n    sys.exit()\n",
    "in a batch": "from net import *\nimport sys\nN = network\n"
    "def network():\n    def some():\n        sys.exit(0)\n        yield\n"
    "    return *N()[:2], some()\n",
    "in the model": "from net import *\nimport sys\nN = network\n"
    "def network():\n    return lambda *_, **how: sys.exit('bye'), *N()[1:]\n",
}


@pytest.mark.parametrize("where", ENDS)
def test_a_model_that_ends_the_program_has_failed(where, net, capsys, tmp_path):
    (tmp_path / f"ends{len(where)}.py").write_text(ENDS[where])
    model = f"--model=ends{len(where)}:network"
    for command in (["fold", "net.msgpack"], ["recalibrate", "net.msgpack", "new"]):
        status, out, err = run(capsys, *command, model)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert "SystemExit" in err
    assert not pathlib.Path("new").exists()


def test_a_model_of_many_lines_fails_in_one(net, capsys, tmp_path):
    (tmp_path / "lines.py").write_text(
        "from net import *\nN = network\n"
        "def model(*_, **how):\n    raise ValueError('a\\nb: c')\n"
        "def network():\n    return model, *N()[1:]\n"
        "def fails():\n    raise ValueError('a\\nb: c')\n"
    )
    for function in ("network", "fails"):
        status, out, err = run(capsys, "fold", "net.msgpack", f"--model=lines:{function}")
        assert (status, out, err.count("\n")) == (2, "", 1)


def test_fold_ends_with_1_where_nothing_is_folded_or_not_well_enough(net, capsys, tmp_path):
    (tmp_path / "folds.py").write_text(
        "from net import *\nimport jax.numpy as jnp\nN, W = network, jnp.ones((3, 3))\n"
        "def dense():\n    return lambda v, x: x @ W, *N()[1:]\n"
        "def scaled(v, y):\n    return y * v['batch_stats']['bn']['var'][None, None, None, :3]\n"
        "def stays():\n    return lambda v, x: scaled(v, jnp.tanh(x @ W)), *N()[1:]\n"
    )
    for function, last in (("dense", "fn has no norm to fold: "), ("stays", "result ")):
        status, out, err = run(capsys, "fold", "net.msgpack", f"--model=folds:{function}")
        assert (status, err) == (1, "")
        assert out.splitlines()[-1].startswith(last)
    tight = ["--model=net:network", "--tolerance", "1e-30"]
    status, out, err = run(capsys, "fold", "net.msgpack", *tight)
    assert (status, err) == (1, "")
    assert out.splitlines()[1].startswith("0 conv 3x3, 3 -> 8 Net/conv  yes")
    assert out.splitlines()[-1].startswith("folding changes fn's result by ")


def test_the_users_module_is_found_beside_where_the_command_was_started(tmp_path, monkeypatch):
    """The console command `jaxbn` begins without this folder on the path; `python -m` has it."""
    (tmp_path / "beside.py").write_text("def model():\n    return print, {}, []\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    assert users_model.network("beside:model") == (print, {}, [])


def test_errors_of_the_commands_that_write(net, capsys, tmp_path):
    (tmp_path / "other.py").write_text(
        "def broken():\n    return 1 / 0\n\ndef three():\n    return 3\n"
    )
    (tmp_path / "cut.py").write_text("def ?\n")
    expected = {
        ("fold", "net.msgpack", "--model", "other"): (
            "fold: 'other' names no function, expected module:function"
        ),
        ("fold", "net.msgpack", "--model", "other:broken"): (
            f"fold: other:broken fails: ZeroDivisionError: division by zero ({tmp_path}/other.py, "
            "line 2); expected a function of an importable module, called as broken()."
        ),
        ("fold", "net.msgpack", "--model", "other:brokn"): (
            "fold: other:brokn fails: AttributeError: module 'other' has no attribute 'brokn'; "
            "expected a function of an importable module, called as brokn()."
        ),
        ("fold", "net.msgpack", "--model", "othr:broken"): (
            "fold: othr:broken fails: ModuleNotFoundError: No module named 'othr'; expected a "
            "function of an importable module, called as broken()."
        ),
        ("fold", "net.msgpack", "--model", "cut:broken"): (
            "fold: cut:broken fails: SyntaxError: invalid syntax (cut.py, line 1); expected a "
            "function of an importable module, called as broken()."
        ),
        ("fold", "net.msgpack", "--model", "other:three"): (
            "fold: other:three returns an int, expected a tuple (apply, model, batches) with "
            "apply(model, batch), as jaxbn.recalibrate takes them."
        ),
        ("fold", "net.msgpack", "--part", "ema", "--model", "net:network"): (
            "fold: the checkpoint has no part 'ema'; at its top are model, step."
        ),
        ("export", "net.msgpack", "net.pb", "--model", "net:network"): (
            "export: net.pb ends in .pb, expected .onnx, .stablehlo or .tflite, or a name without "
            "a dot for the folder of a SavedModel"
        ),
        ("export", "net.msgpack", ".onnx", "--model", "net:network"): (
            "export: .onnx ends in nothing, expected .onnx, .stablehlo or .tflite, or a name "
            "without a dot for the folder of a SavedModel"
        ),
        ("export", "net.msgpack", str(tmp_path), "--model", "net:network"): (
            f"export: {tmp_path} is there already; name a new folder."
        ),
        ("export", "net.msgpack", "a", "--int8", "--model", "net:network"): (
            "export: --int8 is for .onnx and .tflite, and a ends in nothing"
        ),
        ("export", "net.msgpack", "a.stablehlo", "--int8", "--model", "net:network"): (
            "export: --int8 is for .onnx and .tflite, and a.stablehlo ends in .stablehlo"
        ),
        ("recalibrate", "net.msgpack", "new.pt", "--model", "net:network"): (
            "recalibrate: new.pt ends in .pt, expected .safetensors, .msgpack, or a name without a "
            "suffix for an orbax folder."
        ),
        ("convert", "net.msgpack", "no/new.msgpack"): (
            f"convert: no folder {tmp_path}/no to write new.msgpack in"
        ),
        ("convert", "net.msgpack", "a.msgpack", "--like", "dense.msgpack"): (
            "convert: the source does not fit the target; nothing was converted.\n"
            "  unknown, in the source alone: batch_stats/bn/mean (8,)\n"
            "  unknown, in the source alone: batch_stats/bn/var (8,)\n"
            "  unknown, in the source alone: params/bn/bias (8,)\n"
            "  unknown, in the source alone: params/bn/scale (8,)\n"
            "  unknown, in the source alone: params/conv/kernel (3, 3, 3, 8)\n"
            "Layers of other names: rename={source: target}, or a function; None for the target "
            "drops one. Layers of the target to leave as they are: keep=[...].\n"
            "Here: --rename A=B, --keep LAYER, --part PATH if the model is a part of the "
            "checkpoint."
        ),
        ("convert", "two.msgpack", "a.msgpack", "--torch"): (
            "convert: the checkpoint holds several models, 'ema', 'model'; name one: --part."
        ),
    }
    variables = read.read("net.msgpack")["model"]
    write_.save("dense.msgpack", {"params": {"fc": variables["params"]["fc"]}})
    write_.save("two.msgpack", {"ema": variables, "model": variables})
    before = sorted(path.name for path in tmp_path.glob("[!_]*"))
    for argv, message in expected.items():
        assert run(capsys, *argv) == (2, "", f"{message}\n")
    assert sorted(path.name for path in tmp_path.glob("[!_]*")) == before
    keep = ["--part", "ema", "--torch"]
    assert run(capsys, "convert", "two.msgpack", "a.safetensors", *keep)[0] == 0


def test_traceback_shows_where(net, capsys, tmp_path):
    (tmp_path / "broken.py").write_text("def network():\n    return 1 / 0\n")
    argv = "fold", "net.msgpack", "--model", "broken:network", "--traceback"
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "")
    assert "    return 1 / 0\n" in err
    assert err.splitlines()[-1].startswith("fold: broken:network fails: ")


def test_what_is_no_array_is_not_saved(tmp_path):
    with pytest.raises(ValueError) as error:
        write_.save(tmp_path / "a.msgpack", {"config": {"name": "net", "none": None}})
    assert str(error.value) == (
        "save: config/name is a str, expected an array of numbers; save the part of the tree that "
        "holds them."
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "dtype", "form"),
    [
        ("net.safetensors", np.complex128, "safetensors"),
        ("net.safetensors", jnp.float8_e4m3fn, "safetensors"),  # written, and never read again
        ("net", np.longdouble, "orbax"),
        ("net.msgpack", np.longdouble, None),
        ("net.safetensors", np.bool_, None),
        ("net.safetensors", jnp.bfloat16, None),
        ("net", jnp.bfloat16, None),
    ],
)
def test_a_dtype_that_a_format_does_not_hold_is_refused(name, dtype, form, tmp_path, capfd):
    v = np.ones(3).astype(dtype)
    if form is None:
        write_.save(tmp_path / name, {"a": {"b": v}})
        np.testing.assert_array_equal(read.read(tmp_path / name)["a"]["b"], v)
        return
    with pytest.raises(ValueError) as error:
        write_.save(tmp_path / name, {"a": {"b": v}})
    assert str(error.value) == (
        f"save: a/b is {v.dtype}, which {form} does not hold; name a .msgpack file."
    )
    assert [*tmp_path.iterdir()] == []
    assert capfd.readouterr() == ("", "")


def test_the_json_in_the_docs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    new = {"mean": np.zeros(8), "var": np.ones(8), "scale": np.ones(8), "bias": np.zeros(8)}
    write_.save("untrained.msgpack", {"bn": new})
    out = run(capsys, "doctor", "untrained.msgpack", "--json")[1]
    assert f"```json\n{out}```\n" in (ROOT / "docs" / "doctor.md").read_text()


def test_the_version(capsys):
    with pytest.raises(SystemExit):
        commands.main(["--version"])
    assert capsys.readouterr().out == f"jaxbn {jaxbn.__version__}\n"
