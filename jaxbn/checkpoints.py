"""Checkpoints as data: orbax folders, safetensors, Flax msgpack → arrays and norm layers."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxbn.layers import Layer
from jaxbn.state import Params, State

# PyTorch's names of what a layer holds, beside ours.
NAMES = {
    "mean": "running_mean",
    "var": "running_var",
    "scale": "weight",
    "bias": "bias",
    "count": "num_batches_tracked",
}


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The arrays of a checkpoint, as nested dicts; nothing in it is executed.

    Args:
      path: an orbax folder (one checkpoint, or a manager's folder of steps: the latest), a
        `.safetensors` file, or a file that `flax.serialization.to_bytes` made.

    Returns:
      Nested dicts of NumPy arrays. Names with dots in a flat tree become nesting.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: it is none of these, or broken.

    >>> import pathlib, tempfile, numpy as np
    >>> from flax import serialization
    >>> from jaxbn import checkpoints
    >>> tree = {"batch_stats": {"bn": {"mean": np.zeros(2), "var": np.ones(2)}}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder, "model.msgpack")
    ...     _ = file.write_bytes(serialization.to_bytes(tree))
    ...     checkpoints.read(file)["batch_stats"]["bn"]["var"].tolist()
    [1.0, 1.0]
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"read: no checkpoint at {path}: there is no such file or folder")
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
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(
            f"read: {path} cannot be read as {kind}: {reason}. Expected an orbax folder, a "
            f".safetensors file, or a file of flax.serialization.to_bytes."
        ) from error
    if not isinstance(tree, Mapping) or not tree:
        raise ValueError(
            f"read: {path} holds no tree of arrays but {type(tree).__name__}; expected the "
            f"variables of a model, as {kind}."
        )
    return _nested(tree)


def find(tree: Mapping[str, Any]) -> dict[str, Layer]:
    """Path → what the batch norm layer there holds, wherever in a checkpoint's tree it stands.

    Layers are what holds `mean` and `var`, or PyTorch's `running_mean` and `running_var`; linen's
    scale and bias are looked up in `params` beside `batch_stats`. Scalar counts only.

    >>> import numpy as np
    >>> from jaxbn import checkpoints
    >>> stats, params = {"mean": np.zeros(2), "var": np.ones(2)}, {"scale": np.ones(2)}
    >>> tree = {"model": {"batch_stats": {"bn": stats}, "params": {"bn": params}}}
    >>> found = checkpoints.find(tree)
    >>> list(found), found["model/bn"].params.scale.tolist()
    (['model/bn'], [1.0, 1.0])
    """
    found = {}
    for path, node in _stats(tree, ()):
        beside: Any = tree
        for key in (("params" if key == "batch_stats" else key) for key in path):
            beside = beside.get(key, {}) if isinstance(beside, Mapping) else {}
        held = {**(beside if isinstance(beside, Mapping) else {}), **node}
        values = {name: _array(held.get(name, held.get(other))) for name, other in NAMES.items()}
        name = "/".join(key for key in path if key != "batch_stats")
        state = State(*(values[field] for field in State._fields))
        found[name] = Layer(Params(values["scale"], values["bias"]), state)
    return found


def nested(arrays: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """The dicts whose values stand at these keys.

    >>> from jaxbn import checkpoints
    >>> checkpoints.nested({("bn", "mean"): 0, ("bn", "var"): 1})
    {'bn': {'mean': 0, 'var': 1}}
    """
    tree: dict[str, Any] = {}
    for (*folders, last), v in arrays.items():
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = v
    return tree


def _stats(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    if not isinstance(tree, Mapping):
        return
    if any(
        _array(tree.get(mean)) is not None and _array(tree.get(var)) is not None
        for mean, var in (("mean", "var"), ("running_mean", "running_var"))
    ):
        yield path, tree
    for key, node in tree.items():
        yield from _stats(node, (*path, key))


def _array(value: Any) -> Any:
    """The array itself, or the one in an nnx variable's box."""
    if isinstance(value, Mapping) and set(value) == {"value"}:
        value = value["value"]
    return value if isinstance(value, np.ndarray) else None


def _nested(tree: Any) -> Any:
    if not isinstance(tree, Mapping):
        return np.asarray(tree) if hasattr(tree, "dtype") else tree
    nested: dict[str, Any] = {}
    for name, node in tree.items():
        *folders, last = str(name).split(".")
        place = nested
        for folder in folders:
            place = place.setdefault(folder, {})
        value = _nested(node)
        if isinstance(value, dict) and isinstance(place.get(last), dict):
            place[last].update(value)
        else:
            place[last] = value
    return nested


def _safetensors(path: Path) -> Any:
    from safetensors import numpy

    return numpy.load_file(path)


def _msgpack(path: Path) -> Any:
    from flax import serialization

    return serialization.msgpack_restore(path.read_bytes())


def _orbax(path: Path) -> Any:
    import jax
    import orbax.checkpoint as ocp  # type: ignore[import-untyped]

    steps = [child for child in path.iterdir() if child.is_dir() and child.name.isdigit()]
    if steps:
        path = max(steps, key=lambda step: int(step.name))
    if (path / "default").is_dir():
        path = path / "default"
    if not (path / "_METADATA").exists():
        raise ValueError("it has no _METADATA")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        path = path.absolute()
        tree = checkpointer.metadata(path).item_metadata.tree
        # As NumPy arrays, whatever devices they were saved from.
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
