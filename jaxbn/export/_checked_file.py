"""A file is written beside its place, run, compared with the function, and then renamed."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._extras import need
from jaxbn._files import replacing
from jaxbn._folding.training_mode import batch_statistics


class Exported(NamedTuple):
    """A written file, and how far its results are from those of the function.

    >>> from pathlib import Path
    >>> from jaxbn import export
    >>> done = export.Exported(Path("net.onnx"), 13_001, absolute=7e-7, relative=2e-7)
    >>> f"{done.path}: {done.bytes / 1000:.0f} kB, {done.relative:.0e}"
    'net.onnx: 13 kB, 2e-07'
    """

    path: Path
    bytes: int
    absolute: float  # largest error on the example batch
    relative: float  # absolute over the function's largest value


def inference_input(call: str, fn: Any, x: Any, *packages: str) -> jax.Array:
    """Returns x as a jax array. Raises if fn is in training mode or a package is missing."""
    for package in packages:
        need(call, package)
    if not isinstance(x, jax.Array | np.ndarray) or not x.ndim:
        what = f"a {type(x).__name__}" if not hasattr(x, "shape") else "a scalar"
        raise TypeError(
            f"{call}: x is {what}, expected an example batch, batch first; write jnp.asarray(x)."
        )
    x = jnp.asarray(x)
    where = batch_statistics(fn, (x,))
    if where is not None:
        raise ValueError(
            f"{call}: {where} normalizes by statistics of the batch, expected a function in "
            f"inference mode: train=False, use_running_average=True, or model.eval()."
        )
    return x


def written(
    call: str,
    path: str | os.PathLike[str],
    write: Callable[[Path], Any],
    run: Callable[[Path], Any],
    fn: Callable[..., Any],
    x: Any,
    tolerance: float,
) -> Exported:
    """Writes a file beside `path`, compares it with fn on x, and renames it to `path`.

    `run` returns the file's result on x, or None if this machine cannot run the file.
    """
    path = Path(path)
    with replacing(path) as file:
        write(file)
        reference = np.asarray(fn(x)).astype(np.float64)
        y = run(file)
        error = 0.0 if y is None else np.abs(np.asarray(y).astype(np.float64) - reference).max()
        relative = float(error / max(np.abs(reference).max(), np.finfo(np.float32).tiny))
        if not relative <= tolerance:
            raise ValueError(
                f"{call}: the file's result differs from the function's by {relative:.1e} of its "
                f"largest value, expected {tolerance:.1e} at most; nothing was written. If that "
                f"is enough, write tolerance={relative * 2:.0e}."
            )
        size = file.stat().st_size
    return Exported(path, size, float(error), relative)
