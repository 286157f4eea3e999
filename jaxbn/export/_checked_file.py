"""A file is written beside its place, run, compared with the function, and then renamed."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._extras import need
from jaxbn._files import check_place, replacing
from jaxbn._folding.training_mode import batch_statistics
from jaxbn._misuse import check_function
from jaxbn._op.arguments.values import check_tolerance
from jaxbn._text import a_kind
from jaxbn.export._beside import remove_older_manifest, weights_of

PACKAGES = {  # that a call needs
    "int8": ("onnx", "onnxruntime"),
    "onnx": ("onnx", "onnxruntime", "jax2onnx"),
    "saved_model": ("tensorflow",),
    "stablehlo": ("flatbuffers",),
    "tflite": ("litert_converter", "ai_edge_litert", "flatbuffers"),
    "tflite_int8": ("ai_edge_litert", "ai_edge_quantizer"),
}
# The largest error over the largest value, by the result's dtype: some rounding steps.
TOLERANCES = {"float64": 1e-4, "float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}


TO_A_FILE = "an inference function, an example batch and a path"


class Exported(NamedTuple):
    """A written file, and how far its results are from those of the function.

    >>> from pathlib import Path
    >>> from jaxbn import export
    >>> done = export.Exported(Path("net.onnx"), 13_001, absolute=7e-7, relative=2e-7)
    >>> f"{done.path}: {done.bytes / 1000:.0f} kB, {done.relative:.0e}"
    'net.onnx: 13 kB, 2e-07'
    """

    path: Path
    bytes: int  # with the weights beside it, if there are any
    absolute: float  # largest error on the examples
    relative: float  # largest error of a result over the largest value of that result


class Case(NamedTuple):
    """The results of the file and of the function for one input."""

    got: Sequence[Any]
    expected: Sequence[Any]


def arrays_of(results: Any) -> list[np.ndarray]:
    """The results of a file, one array or several by name, as a list."""
    return list(results.values()) if isinstance(results, dict) else [results]


def example_call(call: str) -> str:
    """The line to write for a call that writes a function as a file."""
    return f"export.{call}(lambda x: net.apply(variables, x), x, path)"


def inference_inputs(
    call: str, fn: Any, args: tuple[Any, ...], leaves: Sequence[Any], path: Any
) -> list[jax.Array]:
    """Returns the arrays in args.

    Raises if args hold something else or no row, fn is no function or in training mode, no file can
    be written to path, or a package that the call needs is missing.
    """
    check_function(call, fn, example_call(call))
    if not leaves:
        raise TypeError(f"{call}: x holds no array, expected an example batch, batch first.")
    for x in leaves:
        if not isinstance(x, jax.Array | np.ndarray) or not x.ndim:
            what = a_kind(x) if not hasattr(x, "shape") else "a scalar"
            several = isinstance(x, list) and any(getattr(v, "ndim", 0) for v in x)
            raise TypeError(
                f"{call}: x is {what}, expected an example batch, batch first; write "
                f"{'tuple' if several else 'jnp.asarray'}(x)."
            )
        if not x.size:
            raise ValueError(
                f"{call}: x has shape {x.shape}: it holds no number, expected an example batch."
            )
    check_place(call, path)
    for package in PACKAGES[call]:
        need(call, package)
    where = batch_statistics(fn, args)
    if where is not None:
        raise ValueError(
            f"{call}: {where} normalizes by statistics of the batch, expected a function in "
            f"inference mode: train=False, use_running_average=True, or model.eval()."
        )
    return [jnp.asarray(x) for x in leaves]


def written(
    call: str,
    path: str | os.PathLike[str],
    write: Callable[[Path], Any],
    cases: Callable[[Path], Iterable[Case]],
    tolerance: float | None,
    tolerances: Mapping[str, float] = TOLERANCES,
) -> Exported:
    """Writes a file beside `path`, compares its results, and renames it to `path`.

    An older file goes as a whole: with the weights that it referred to, and its manifest.

    Args:
      call: the public call, for errors.
      path: where the file goes.
      write: writes the file.
      cases: runs the written file; yields its results beside those of the function.
      tolerance: the largest error over a result's largest value; None for `tolerances`.
      tolerances: the tolerance for each dtype; 0 for others.
    """
    check_tolerance(call, tolerance)
    path = Path(path)
    older = weights_of(path)
    absolute = relative = 0.0
    with replacing(path) as file:
        write(file)
        for case in cases(file):
            for got, expected in zip(case.got, case.expected, strict=True):
                dtype = str(jnp.asarray(expected).dtype)
                limit = tolerances.get(dtype, 0.0) if tolerance is None else tolerance
                errors = difference(call, got, expected)
                if not errors[1] <= limit:
                    raise ValueError(
                        f"{call}: the file's result differs from the function's by "
                        f"{errors[1]:.1e} of its largest value, expected {limit:.1e} at most; "
                        f"nothing was written. If that is enough, write "
                        f"tolerance={errors[1] * 2:.0e}."
                    )
                absolute, relative = max(absolute, errors[0]), max(relative, errors[1])
        size = sum(part.stat().st_size for part in file.parent.rglob("*") if part.is_file())
    if older is not None and weights_of(path) is None:
        older.unlink(missing_ok=True)
    remove_older_manifest(path)
    return Exported(path, size, absolute, relative)


def difference(call: str, got: Any, expected: Any) -> tuple[float, float]:
    """The largest error, and that error over the largest value. Raises if not all is finite."""
    got, expected = np.asarray(got), np.asarray(expected)
    if got.shape != expected.shape:
        raise ValueError(
            f"{call}: the file's result has shape {got.shape} but the function's has "
            f"{expected.shape}; nothing was written."
        )
    wide = [v.astype(np.complex128 if np.iscomplexobj(v) else np.float64) for v in (got, expected)]
    for whose, v in zip(("function", "file"), wide[::-1], strict=True):
        if wrong := int((~np.isfinite(v)).sum()):
            raise ValueError(
                f"{call}: {wrong} of {v.size} values of the {whose}'s result are not finite, "
                f"expected numbers that can be compared; nothing was written. Look for NaN and inf "
                f"in the weights and in x, or for values beyond what {expected.dtype} holds."
            )
    if not expected.size:
        return 0.0, 0.0
    error = np.abs(wide[0] - wide[1]).max()
    return float(error), float(error / max(np.abs(wide[1]).max(), np.finfo(np.float32).tiny))
