"""Damaged files of every kind that `python -m jaxbn` may be given, and what it does with them.

Case n is made from the seed n alone. `python -m tests.cli.fuzz_files --count 14000` runs many, in
processes of their own, and says what became of them; `--first n --count 1` runs case n again.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import io
import json
import os
import pathlib
import pickle
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import traceback
import zipfile

import jax
import ml_dtypes
import msgpack
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization
from safetensors.numpy import save_file

from jaxbn import export
from jaxbn._checkpoints import nesting, norm_layers
from jaxbn._checkpoints.read import read
from jaxbn._cli import commands

SECRET = "correct horse battery staple"
NAMES = [
    *("bn", "a/b", "a.b", "", ".", "..", "0", "value", "params", "batch_stats", "mean", "weight"),
    *("\x1b[31mred\x1b[0m", "bn\nmodel: healthy", "\r", "\x7f", "\x00", "\x9b31m", "\u202egnp"),
    *(
        "\u2028",
        "\ud800",
        "層",
        "x" * 5000,
        "a." * 60,
        "../../out",
        "/out",
        "[red]",
        "%s{}",
        "$\\frac{",
    ),
]
FIELDS = [
    *("mean", "var", "scale", "bias", "count"),
    *("running_mean", "running_var", "weight", "num_batches_tracked", "kernel"),
]
SHAPES = [(), (0,), (1,), (3,), (3,), (3,), (4,), (2, 3), (2, 0), (3, 3, 2, 4)]
DTYPES = ["float32"] * 8 + ["float64", "float16", ml_dtypes.bfloat16, "int32", "uint8", "bool"]
DTYPES += ["complex64", ml_dtypes.int4]
STRANGE = ["O", "U9", "V3", "f4,f4", "datetime64[s]", "m8[s]", "S0", "float128", "int4", "nothing"]
LARGE = [-1, 0, 2**31, 10**11, 2**62, 2**63, 2**64, 10**30, 3.5, "3", None, True, [], {}]


class Trap:
    """Unpickled, it makes a file."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def layer(shape=(3,)):
    """A trained norm's arrays."""
    some = np.random.default_rng(0)
    values = {name: some.uniform(0.5, 2, shape) for name in ("mean", "var", "scale", "bias")}
    return {name: v.astype(np.float32) for name, v in values.items()}


def linen():
    """Variables of a model with two norms."""
    norms = {"bn": layer(), "head": layer((4,))}
    return {
        collection: {path: {k: norm[k] for k in names} for path, norm in norms.items()}
        for collection, names in (("params", ("scale", "bias")), ("batch_stats", ("mean", "var")))
    }


def network():
    """A model that takes any inputs, for the commands that run one."""
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    return lambda variables, x: jax.tree.map(lambda v: v * v.dtype.type(1), x), linen(), [x]


def flat(tree):
    """Names with dots → arrays."""
    return {".".join(keys): np.asarray(v) for keys, v in nesting.leaves(tree)}


def make_sound(folder):
    """A sound checkpoint of every kind, by name."""
    folder.mkdir()
    tree = linen()
    torch = {f"bn.{norm_layers.NAMES[name]}": v for name, v in layer().items()}
    save_file(flat(tree), folder / "linen.safetensors")
    save_file(torch | {"fc.weight": np.ones((2, 3))}, folder / "torch.safetensors")
    (folder / "linen.msgpack").write_bytes(serialization.to_bytes(tree))
    (folder / "list.msgpack").write_bytes(serialization.msgpack_serialize([layer(), layer()]))
    np.savez(folder / "arrays.npz", **flat(tree))
    np.save(folder / "array.npy", np.ones(3))
    with zipfile.ZipFile(folder / "net.pt", "w") as file:
        file.writestr("net/data.pkl", pickle.dumps(Trap()))
    (folder / "net.pkl").write_bytes(pickle.dumps(Trap()))
    (folder / "net.json").write_text(json.dumps({"params": {"bn": [1.0]}}))
    (folder / "empty").touch()
    apply, _, (x,) = network()
    fn = lambda x: apply(None, x)  # noqa: E731
    export.manifest(export.stablehlo(fn, x, folder / "net.stablehlo", platforms=["cpu"]))
    for name, options in (
        ("ocdbt", {}),
        ("zarr", {"use_ocdbt": False}),
        ("zarr3", {"use_ocdbt": False, "use_zarr3": True}),
        ("steps", {}),
    ):
        path = folder / name / "10" if name == "steps" else folder / name
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
            checkpointer.save(path, {"blocks": [tree], "step": 3})


# What is done to them


def damaged(some, data):
    """Bytes cut off, turned, doubled, put in, written over."""
    for _ in range(some.choice([1, 1, 1, 2, 5])):
        a, b = sorted(some.randrange(len(data) + 1) for _ in range(2))
        noise = some.randbytes(some.choice([1, 4, 100]))
        n = some.randrange(len(data)) if data else 0
        turned = bytes([data[n] ^ 1 << some.randrange(8)]) if data else b""
        data = some.choice(
            [
                data[:a],
                data[b:],
                *[data[:n] + turned + data[n + 1 :]] * 6,
                data[:a] + noise + data[a:],
                data[:a] + noise + data[a + len(noise) :],
                data[:b] + data[a:],
                data[:a] + bytes(b - a) + data[b:],
                data + noise,
            ]
        )
    return data


def array(some, shape=None):
    """Numbers of some shape and dtype, one of which may be none."""
    shape, dtype = shape or some.choice(SHAPES), np.dtype(some.choice(DTYPES))
    v = np.full(shape, some.choice([0.0, 1.0, 0.5, 2.0, 3.0, 100.0]))
    if v.size and some.random() < 0.3:
        v.flat[some.randrange(v.size)] = some.choice([np.nan, np.inf, -np.inf, -1.0, 3e38, 1e-30])
    with np.errstate(all="ignore"):
        return v.astype(dtype)


def tree_of(some, depth=0):
    """Norms and other things, in dicts and lists, by odd names."""
    kind = some.random()
    if kind < 0.08 or depth > 3:
        fields = some.sample(FIELDS, some.randrange(1, 6))
        return {
            name: array(some) if some.random() < 0.9 else {"value": array(some)} for name in fields
        }
    if kind < 0.35:
        shape = some.choice(SHAPES)
        norm = {name: array(some, shape) for name in layer() if some.random() < 0.9}
        if some.random() < 0.3:
            norm["count"] = np.array(some.choice([0, 1, 500]))
        return norm
    if kind < 0.4:
        return some.choice([None, 3, -1.5, "text", b"bytes", array(some), [], {}, 2**63, True])
    inner = [tree_of(some, depth + 1) for _ in range(some.randrange(1, 5))]
    if kind < 0.6:
        return inner
    names = some.sample(NAMES + FIELDS, len(inner))
    if some.random() < 0.2:
        names[0] = some.choice([0, b"bn", 2**40, None])
    return dict(zip(names, inner, strict=True))


def forged_msgpack(some):
    """Trees by odd names, extension types that lie, containers that declare what is not there."""
    kind = some.randrange(5)
    if kind == 0:
        return b"\x81\xa2bn" * some.choice([5, 200, 2000]) + b"\x01"
    if kind == 1:
        head = some.choice([b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9"])
        return b"\x81\xa2bn" + head + b"\xff\xff\xff\xf0" + some.randbytes(20)
    try:
        if kind == 2:
            shape = [some.choice([3, 3, *LARGE]) for _ in range(some.choice([1, 1, 2]))]
            dtype = some.choice([*STRANGE, "float32", "bfloat16", "float16", "complex64", 3])
            data = [shape, dtype, some.randbytes(some.choice([0, 12, 13, 24]))]
            data = msgpack.packb(data[: some.choice([3, 3, 2])])
            v = msgpack.ExtType(some.choice([1, 1, 1, 2, 3, 99]), data)
            return msgpack.packb({"bn": {"mean": v, "var": v}})
        if kind == 3:
            part = {"__msgpack_chunked_array__": True, "shape": {"0": some.choice([3, *LARGE])}}
            part["chunks"] = {"0": msgpack.ExtType(1, msgpack.packb([[3], "float32", bytes(12)]))}
            return msgpack.packb({"bn": {"mean": part, "var": part}})
        return serialization.msgpack_serialize(tree_of(some))
    except Exception:  # a surrogate, a number too large: nobody can have written such a file
        return msgpack.packb({"bn": 1})


def forged_safetensors(some):
    """Headers of tensors by odd names, with shapes, dtypes and places that lie."""
    data, header = b"", {}
    for _ in range(some.randrange(1, 6)):
        name = ".".join(some.choices(NAMES + FIELDS + ["bn"] * 9, k=some.randrange(1, 4)))
        name = name.replace("\ud800", some.choice(["", "", "\ud800"]))
        v = array(some)
        dtypes = {"float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16"}
        dtypes |= {"int32": "I32", "uint8": "U8", "bool": "BOOL", "complex64": "C64", "int4": "I4"}
        raw = v.tobytes()
        entry = {"dtype": dtypes[v.dtype.name], "shape": list(v.shape)}
        entry["data_offsets"] = [len(data), len(data) + len(raw)]
        if some.random() < 0.1:
            entry[some.choice(list(entry))] = some.choice(
                [*LARGE, "F8_E4M3", "F4", "F6_E2M3", "O", [0, 10**11], [10**11], [2**63, 2], [-3]]
            )
        header[name], data = entry, data + raw
    text = json.dumps(header, ensure_ascii=some.random() < 0.5).encode(errors="replace")
    size = len(text) if some.random() < 0.9 else some.choice([0, 7, 2**31, 2**40, 2**64 - 1])
    return struct.pack("<Q", size) + text + data[: some.choice([len(data)] * 4 + [3])]


def forged_inputs(some):
    """Arrays by odd names, of odd dtypes, that lie on what they hold; an object that is a trap."""
    file = io.BytesIO()
    names = [n for n in NAMES if n not in ("\x00", "\ud800")]
    names = some.sample(names, some.choice([1, 1, 1, 2, 3]))
    with zipfile.ZipFile(
        file, "w", some.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    ) as zip_:
        for name in names:
            shape = some.choice([some.choice(SHAPES), (3, 2), (3, 2), (3,), (3,)])
            v = array(some, shape) if some.random() < 0.9 else np.array([Trap()], object)
            content = io.BytesIO()
            np.save(content, v, allow_pickle=True)
            raw = content.getvalue()
            if some.random() < 0.2:
                raw = raw.replace(b"(3,", some.choice([b"(9,", b"(-1", b"(1e", b"((,", b"(9**9,"]))
            zip_.writestr(f"{name}.npy", damaged(some, raw) if some.random() < 0.1 else raw)
    data = file.getvalue()
    return damaged(some, data) if some.random() < 0.3 else data


def forged_json(some, text):
    """Another value at a place of a JSON document."""
    try:
        document = json.loads(text)
    except ValueError:
        return text
    places = []

    def walk(node):
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(document)
    if places:
        node, key = some.choice(places)
        value = some.choice([*LARGE, *NAMES, [10**11], [4, 10**11], [-4], ["x"]])
        if isinstance(node, dict) and some.random() < 0.3:
            node[some.choice(NAMES)] = node.pop(key)
        else:
            node[key] = value
    return json.dumps(document, ensure_ascii=True)


def damage_folder(some, folder, outside):
    """Files of an orbax folder damaged, forged, lost, or links that lead out of it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for _ in range(some.choice([1, 1, 1, 3])):
        path = some.choice(files)
        if path.is_symlink() or not path.is_file():
            continue
        documents = [
            f for f in files if f.name in ("_METADATA", ".zarray", "zarr.json") and f.is_file()
        ]
        kind = some.random()
        if kind < 0.4 and documents:
            path = some.choice(documents)
            path.write_text(forged_json(some, path.read_text(errors="replace")))
        elif kind < 0.7:
            path.write_bytes(damaged(some, path.read_bytes()))
        elif kind < 0.8:
            path.unlink()
        elif kind < 0.9:
            path.unlink()
            path.symlink_to(some.choice([outside, outside.parent / "nothing", path]))
        else:
            path.unlink()
            some.choice([path.mkdir, lambda path=path: os.mkfifo(path)])()


def make(number, sound, folder):
    """Case `number`: the path in `folder`, and a word on its kind."""
    some = random.Random(number)
    kinds = ["damaged", "folder", "odd", "inputs", "manifest"]
    kind = some.choice([*kinds, "folder", *["msgpack", "safetensors"] * 2])
    stem = some.choice([*(["net"] * 9), *(n for n in NAMES if "\0" not in n and "\ud800" not in n)])
    stem = stem.replace("/", "_")[:60].strip(".") or "net"
    if some.random() < 0.03:
        stem = os.fsdecode(b"net\xff")
    if kind == "damaged":
        # A StableHLO file is a program for XLA, whose own reader may hang on a damaged one; the
        # checksum in its manifest is what guards it.
        files = (path for path in sound.iterdir() if path.is_file() and "hlo" not in path.name)
        source = some.choice(sorted(files))
        path = (
            folder / f"{stem}{some.choice([source.suffix] * 6 + ['.safetensors', '.msgpack', ''])}"
        )
        path.write_bytes(damaged(some, source.read_bytes()))
        return path, f"damaged {source.name}"
    if kind == "inputs":
        path = folder / f"{stem}.npz"
        path.write_bytes(forged_inputs(some))
        return path, "inputs"
    if kind == "manifest":
        path = folder / f"{stem}.stablehlo"
        shutil.copy(sound / "net.stablehlo", path)
        text = forged_json(some, (sound / "net.stablehlo.manifest.json").read_text())
        if some.random() < 0.3:
            text = damaged(some, text.encode()).decode(errors="replace")
        path.with_name(f"{path.name}.manifest.json").write_text(text)
        return path, "manifest"
    if kind in ("msgpack", "safetensors"):
        path = folder / f"{stem}.{kind}"
        data = {"msgpack": forged_msgpack, "safetensors": forged_safetensors}[kind](some)
        path.write_bytes(damaged(some, data) if some.random() < 0.1 else data)
        return path, f"forged {kind}"
    if kind == "folder":
        source = some.choice(sorted(path for path in sound.iterdir() if path.is_dir()))
        path = folder / stem
        shutil.copytree(source, path)
        damage_folder(some, path, sound.parent / "secret")
        return path, f"damaged {source.name}"
    path = folder / stem
    what = some.choice(["nothing", "folder", "link", "loop", "noise", "files", "sick"])
    if what == "folder":
        path.mkdir()
    elif what == "link":
        path.symlink_to(sound.parent / "secret")
    elif what == "loop":
        path.symlink_to(path)
    elif what == "sick":
        sick = {"bn": layer() | {"var": -layer()["var"]}}
        path.write_bytes(serialization.msgpack_serialize(sick))
    elif what == "noise":
        path.write_bytes(some.randbytes(some.choice([1, 10, 1000])))
    elif what == "files":
        path.mkdir()
        (path / some.choice(["_METADATA", "default", "7", "manifest.ocdbt"])).write_bytes(
            some.randbytes(9)
        )
    return path, f"odd: {what}"


def command(number, path, sound):
    """The words of case `number` after `python -m jaxbn`, and what they would write, or None."""
    some = random.Random(f"command {number}")
    dest = path.parent / some.choice(["dest.msgpack", "dest.msgpack", "dest.safetensors", "dest"])
    good = str(sound / some.choice(["linen.msgpack", "torch.safetensors"]))
    name, dest_name = str(path), str(dest)
    model = ["--model", "tests.cli.fuzz_files:network"]
    linen = str(sound / "linen.msgpack")
    if path.suffix == ".npz":
        return ["serving", linen, *model, "--inputs", name, "--json"], None
    if path.suffix == ".stablehlo":
        return ["verify", name, "--against", linen, *model], None
    kind = some.choices(range(10), [9, 6, 0.1, 4, 3, 2, 2, 1, 2, 2])[0]
    return [
        (["doctor", name], None),
        (["doctor", name, "--json", "--momentum", "0.99"], None),
        (["doctor", name, "--plot", str(path.parent / "dest.png")], path.parent / "dest.png"),
        (["convert", name, dest_name], dest),
        (["convert", name, dest_name, "--torch"], dest),
        (["convert", name, dest_name, "--like", good], dest),
        (["convert", good, dest_name, "--like", name], dest),
        (["convert", name, dest_name, "--part", some.choice(NAMES)], dest),
        (["compare", name, good], None),
        (["compare", good, name, "--json"], None),
    ][kind]


def run(words):
    """Status, stdout and stderr of the command line, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = commands.main(words)
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), err.getvalue()


LISTS = ("  ", "Layers of other names: ", "Here: --rename")  # what does not fit, each in its line


def faults(words, folder, dest, before, status, out, err):
    """What is wrong with how the command ended; nothing, if all is well."""
    if status not in (0, 1, 2):
        yield f"status {status}"
    first, *others = err.splitlines() or [""]
    if others and not ("fit" in first and all(line.startswith(LISTS) for line in others)):
        yield f"{len(others) + 1} lines on stderr"
    if "Traceback" in out + err:
        yield "a traceback"
    if SECRET in out + err:
        yield "a file from outside is shown"
    if odd := {c for c in out + err if not c.isprintable() and c != "\n"}:
        yield f"raw characters {sorted(map(ascii, odd))}"
    if (status == 2) != bool(err) or (status == 2 and out):
        yield "status and streams disagree"
    if words[0] == "doctor" and status != 2:
        if "--json" in words and not json.loads(out)["judged"]:
            yield "healthy without a layer"
        if "without a batch" not in out:
            yield "no word on what was not judged"
    new = set(os.listdir(folder)) - before
    if new != ({dest.name} if dest and status != 2 else set()):
        yield f"left behind: {sorted(map(ascii, new))}"
    elif new and dest.suffix != ".png":
        try:
            read(dest)
        except ValueError as error:
            yield f"what was written cannot be read: {error}"


def case(number, top):
    """What became of case `number`: its kind, its status, and its faults."""
    sound, folder = top / "sound", top / "case"
    folder.mkdir()
    path, kind = make(number, sound, folder)
    words, dest = command(number, path, sound)
    before = set(os.listdir(folder))
    try:
        status, out, err = run(words)
        found = list(faults(words, folder, dest, before, status, out, err))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        status, found = None, [f"raised: {''.join(traceback.format_exception(error)[-3:])}"]
    shutil.rmtree(folder)
    return kind, status, found


@contextlib.contextmanager
def workplace():
    """A folder with sound checkpoints, and a secret outside of them."""
    with tempfile.TemporaryDirectory() as name:
        top = pathlib.Path(name).resolve()
        (top / "secret").write_text(SECRET)
        make_sound(top / "sound")
        here = os.getcwd()
        os.chdir(top)
        try:
            yield top
        finally:
            os.chdir(here)
        assert not (top / "executed").exists(), "a pickle was executed"


def part(first, count):
    """Runs these cases here and prints a JSON line of each, its number before it is run."""
    with workplace() as top:
        for number in range(first, first + count):
            print(json.dumps(number), flush=True)
            print(json.dumps(case(number, top)), flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--part", action="store_true", help="in this process, as JSON lines")
    args = parser.parse_args(argv)
    if args.part:
        part(args.first, args.count)
        return 0
    seen, wrong = collections.Counter(), 0
    todo = [
        (n, min(250, args.first + args.count - n))
        for n in range(args.first, args.first + args.count, 250)
    ]

    def child(first, count):
        words = ["--part", "--first", str(first), "--count", str(count)]
        command = [sys.executable, "-m", "tests.cli.fuzz_files", *words]
        return subprocess.run(command, capture_output=True, text=True, errors="replace")

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        while todo:
            again = []
            for (first, count), done in zip(todo, pool.map(lambda t: child(*t), todo), strict=True):
                lines = [json.loads(line) for line in done.stdout.splitlines()]
                numbers = lines[0::2]
                for number, (kind, status, found) in zip(numbers, lines[1::2], strict=False):
                    seen[kind, status] += 1
                    if found:
                        wrong += 1
                        print(f"case {number} ({kind}): {'; '.join(found)}", flush=True)
                if done.returncode:  # the case that ended the process is the last one named
                    last = numbers[-1] if numbers else first
                    wrong += 1
                    print(
                        f"case {last}: the process ended, {done.returncode}: {done.stderr[-2000:]}"
                    )
                    if first + count > last + 1:
                        again.append((last + 1, first + count - last - 1))
            todo = again
    kinds = sorted({kind for kind, _ in seen})
    width = max(map(len, kinds), default=4)
    print(f"{'kind':{width}} {'0':>6} {'1':>6} {'2':>6}")
    for kind in kinds:
        print(f"{kind:{width}} " + " ".join(f"{seen[kind, status]:6}" for status in (0, 1, 2)))
    print(f"{sum(seen.values())} files, {wrong} with faults")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
