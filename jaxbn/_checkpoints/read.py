"""Checkpoints as data: orbax folders, safetensors, Flax msgpack → arrays and norm layers."""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxbn._extras import need
from jaxbn._inspection.layers import Layer
from jaxbn._op.state import Params, State
from jaxbn._text import distinct, first_line, printable

# PyTorch's names of what a layer holds, beside ours.
NAMES = {
    "mean": "running_mean",
    "var": "running_var",
    "scale": "weight",
    "bias": "bias",
    "count": "num_batches_tracked",
}

# No byte of a file stands for more values than this many bytes: the best that zstd, which orbax
# writes, can do (blocks of 128 KiB in 4 bytes).
COMPRESSION = 2**15
# What orbax' _METADATA lists beside arrays.
NO_ARRAYS = ("None", "Dict", "List", "Tuple", "NamedTuple", "string", "placeholder")
DEEPEST = 100  # levels of names; no model comes near, and what recurses ends at 1000

# Trees beside a model that hold its scales and biases a second time, and norms without statistics.
COPIES = re.compile(r"opt|opt_.*|optimizer.*|(.*_)?ema(_.*)?|mu|nu|trace|grads?", re.IGNORECASE)
NO_BATCH = re.compile(r".*(layer|group|rms|instance)_?norm.*|(ln|gn)(_|\d|$).*", re.IGNORECASE)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The arrays of a checkpoint, as nested dicts; nothing in it is executed.

    Args:
      path: an orbax folder (one checkpoint, or a manager's folder of steps: the latest), a
        `.safetensors` file, or a file that `flax.serialization.to_bytes` made.

    Returns:
      Nested dicts of NumPy arrays. Names with dots in a flat tree become nesting, and lists and
      tuples dicts of "0", "1", …; a name that continues an array's (`fc.weight.absmax` beside
      `fc.weight`) keeps the dot after which it does.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: it is none of these, or broken, or declares more than it can hold, or a link in
        the folder leads out of it.
      ModuleNotFoundError: the package that reads such files is missing.

    >>> import pathlib, tempfile, numpy as np
    >>> from flax import serialization
    >>> from jaxbn._checkpoints.read import read
    >>> tree = {"batch_stats": {"bn": {"mean": np.zeros(2), "var": np.ones(2)}}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder, "model.msgpack")
    ...     _ = file.write_bytes(serialization.to_bytes(tree))
    ...     read(file)["batch_stats"]["bn"]["var"].tolist()
    [1.0, 1.0]
    """
    path = Path(path)
    name = printable(path)
    if not path.exists():
        raise FileNotFoundError(f"read: no checkpoint at {name}: there is no such file or folder")
    if path.is_dir():
        kind, reader = "an orbax checkpoint", _orbax
    elif path.suffix == ".safetensors":
        kind, reader = "a safetensors file", _safetensors
    else:
        kind, reader = "a Flax msgpack file (flax.serialization.to_bytes)", _msgpack
    try:
        tree = reader(path)
    except ModuleNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"read: {name} cannot be read as {kind}: {_reason(error)}. Expected an orbax "
            f"folder, a .safetensors file, or a file of flax.serialization.to_bytes."
        ) from error
    if not _children(tree):
        raise ValueError(
            f"read: {name} holds no tree of arrays but {type(tree).__name__}; expected the "
            f"variables of a model, as {kind}."
        )
    return _nested(tree, name)


def find(tree: Any) -> dict[str, Layer]:
    """Path → what the batch norm layer there holds, wherever in a checkpoint's tree it stands.

    Layers are what holds `mean` and `var`, or PyTorch's `running_mean` and `running_var`; linen's
    scale and bias are looked up in `params` beside `batch_stats`. So are scale and bias alone, with
    a state of None, unless they have the name of another norm or are an optimizer's. Of layers
    with one path the later ones have a number behind it.

    Raises:
      ValueError: statistics are half Flax's and half PyTorch's.

    >>> import numpy as np
    >>> from jaxbn._checkpoints import read
    >>> stats, params = {"mean": np.zeros(2), "var": np.ones(2)}, {"scale": np.ones(2)}
    >>> tree = {"model": {"batch_stats": {"bn": stats}, "params": {"bn": params}}}
    >>> found = read.find(tree)
    >>> list(found), found["model/bn"].params.scale.tolist()
    (['model/bn'], [1.0, 1.0])
    """
    names, layers, used = [], [], set()
    for path, node in _nodes(tree, ()):
        if (fields := _fields(path, node)) is None:
            continue
        place = tuple("params" if key == "batch_stats" else key for key in path)
        used |= {path, place}
        held = {**(_at(tree, place) or {}), **node}
        values = {name: _array(held.get(other)) for name, other in fields.items()}
        names.append("/".join(key for key in path if key != "batch_stats"))
        state = State(*(values[field] for field in State._fields))
        layers.append(Layer(Params(values["scale"], values["bias"]), state))
    nothing: Any = State(None, None, None)  # type: ignore[arg-type]
    for path, node in _nodes(tree, ()):
        params = Params(_array(node.get("scale")), _array(node.get("bias")))
        if (
            path not in used
            and _shape(params.scale) is not None
            and _shape(params.scale) == _shape(params.bias)
            and not any(map(COPIES.fullmatch, path))
            and not (path and NO_BATCH.fullmatch(path[-1]))
        ):
            names.append("/".join(key for key in path if key != "params"))
            layers.append(Layer(params, nothing))
    return dict(zip(distinct(names), layers, strict=True))


def nested(arrays: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """The dicts whose values stand at these keys.

    >>> from jaxbn._checkpoints import read
    >>> read.nested({("bn", "mean"): 0, ("bn", "var"): 1})
    {'bn': {'mean': 0, 'var': 1}}
    """
    tree: dict[str, Any] = {}
    for (*folders, last), v in arrays.items():
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = v
    return tree


def _children(tree: Any) -> dict[str, Any] | None:
    """What a node of a tree holds, by name: a dict's items, a list's, a named tuple's."""
    if isinstance(tree, Mapping):
        return {str(key): node for key, node in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_asdict"):
        return tree._asdict()
    if isinstance(tree, (list, tuple)):
        return {str(i): node for i, node in enumerate(tree)}
    return None


def _nodes(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Every dict of the tree and where it stands, the outer before the inner."""
    if (node := _children(tree)) is not None:
        yield path, node
        for key, inner in node.items():
            yield from _nodes(inner, (*path, key))


def _at(tree: Any, path: tuple[str, ...]) -> dict[str, Any] | None:
    for key in path:
        tree = (_children(tree) or {}).get(key)
    return _children(tree)


def _fields(path: tuple[str, ...], node: Mapping[str, Any]) -> Mapping[str, str] | None:
    """Whose names the statistics have that a node holds: our field → its name there."""
    for fields in ({field: field for field in NAMES}, NAMES):
        if None not in [_shape(_array(node.get(fields[name]))) for name in ("mean", "var")]:
            return fields
    for mean, var in (("mean", "running_var"), ("running_mean", "var")):
        if None not in [_shape(_array(node.get(name))) for name in (mean, var)]:
            raise ValueError(
                f"find: layer {'/'.join(path)!r} holds {mean} beside {var}, expected "
                f"mean and var, or PyTorch's running_mean and running_var."
            )
    return None


def _array(value: Any) -> Any:
    """The array itself, or the one in an nnx variable's box."""
    if isinstance(value, Mapping) and set(value) == {"value"}:
        value = value["value"]
    return value if isinstance(value, (np.ndarray, jax.Array)) else None


def _shape(array: Any) -> Any:
    return None if array is None else array.shape


def _nested(tree: Any, source: str) -> dict[str, Any]:
    """The tree as dicts alone, every array where its names say."""
    flat: dict[tuple[str, ...], Any] = {}
    for keys, v in _leaves(tree, (), source):
        if keys in flat and not (flat[keys] == {} == v):
            raise ValueError(f"read: {source} holds two arrays {'.'.join(keys)!r}.")
        flat[keys] = v
    arrays = {keys for keys, v in flat.items() if not isinstance(v, dict)}
    placed: dict[tuple[str, ...], Any] = {}
    # Empty dicts first: what others put into them stays.
    for keys in sorted(flat, key=lambda keys: keys in arrays):
        cut = next((n for n in range(1, len(keys)) if keys[:n] in arrays), len(keys))
        placed[(*keys[: cut - 1], ".".join(keys[cut - 1 :]))] = flat[keys]
    return nested(placed)


def _leaves(tree: Any, path: tuple[str, ...], source: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """What is no dict, or an empty one, and its names, split at dots."""
    if len(path) > DEEPEST:
        raise ValueError(f"read: {source} nests names more than {DEEPEST} deep.")
    nodes = _children(tree)
    if path and not nodes:
        yield path, {} if nodes == {} else np.asarray(tree) if hasattr(tree, "dtype") else tree
        return
    for name, node in (nodes or {}).items():
        yield from _leaves(node, (*path, *name.split(".", DEEPEST + 1)), source)


def _reason(error: Exception) -> str:
    """What an error says, without tensorstore's list of all its settings."""
    return first_line(error).partition(" [tensorstore_spec")[0]


def _safetensors(path: Path) -> Any:
    return need("read", "safetensors.numpy").load_file(path)


def _msgpack(path: Path) -> Any:
    return need("read", "flax.serialization").msgpack_restore(path.read_bytes())


def _orbax(path: Path) -> Any:
    """The arrays of a folder that orbax wrote, read by tensorstore, which it writes with.

    Not by orbax: where a file is damaged, its threads go on printing after it has raised.
    """
    root = path = path.resolve()
    steps = [child for child in path.iterdir() if child.is_dir() and child.name.isdecimal()]
    if steps:
        path = max(steps, key=lambda step: int(step.name))
    if (path / "default").is_dir():
        path = path / "default"
    if not (path / "_METADATA").exists():
        raise ValueError("it has no _METADATA")
    size = _size(path, root)
    tensorstore = need("read", "tensorstore")
    try:
        listed = json.loads((path / "_METADATA").read_text())
        kinds = {
            ".".join(str(part["key"]) for part in entry["key_metadata"]): str(
                entry["value_metadata"]["value_type"]
            )
            for entry in listed["tree_metadata"].values()
        }
        driver = "zarr3" if listed.get("use_zarr3") else "zarr"
        # Where this is noted, a chunk that is not there is lost; before it was, one of zeros.
        fill = not listed.get("store_array_data_equal_to_fill_value")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"its _METADATA is not as orbax writes it ({first_line(error)})"
        ) from error
    base = {"driver": "file", "path": f"{path}/"}
    ocdbt = (path / "manifest.ocdbt").exists()
    context = tensorstore.Context()

    def opened(name: str) -> Any:
        # tensorstore takes no `..` in a path.
        inner = {"path": f"{name}/"} if ocdbt else {"path": f"{path}/{name}/"}
        store = {"driver": "ocdbt", "base": base, **inner} if ocdbt else {**base, **inner}
        spec = {"driver": driver, "kvstore": store, "fill_missing_data_reads": fill}
        return tensorstore.open(spec, read=True, open=True, context=context)

    opening = {name: opened(name) for name, kind in kinds.items() if kind not in NO_ARRAYS}
    stores = {name: store.result() for name, store in opening.items()}
    _check_declared(stores.values(), size)
    reading = {name: store.read() for name, store in stores.items()}
    return {
        **{name: kind for name, kind in kinds.items() if kind == "string"},  # no array: by its kind
        **{name: v.result() for name, v in reading.items()},
    }


def _size(folder: Path, root: Path) -> int:
    """Bytes of the files in a folder; no link leads out of root, and nothing else is in it."""
    size = 0
    for child in [folder, *folder.rglob("*")]:
        if not child.resolve().is_relative_to(root):
            raise ValueError(f"{printable(child.name)} is a link that leaves the folder")
        if not child.is_dir():
            if not child.is_file():
                raise ValueError(f"{printable(child.name)} is neither a file nor a folder")
            size += child.stat().st_size
    return size


def _check_declared(stores: Iterable[Any], size: int) -> None:
    """Whether files of so many bytes, and this machine, can hold the arrays that are declared."""
    declared = sum(
        max(math.prod(store.shape), math.prod(store.chunk_layout.read_chunk.shape or ()))
        * store.dtype.numpy_dtype.itemsize
        for store in stores
    )
    if declared > size * COMPRESSION:
        raise ValueError(
            f"it declares arrays of {declared:.3g} bytes, which its {size} bytes cannot hold"
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if declared > memory:
        raise ValueError(
            f"it declares arrays of {declared:.3g} bytes, and this machine has {memory:.3g}"
        )
