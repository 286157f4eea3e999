"""An ONNX file as a function of NumPy arrays, run by onnxruntime on the CPU."""

import ctypes
import math
import os
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxbn._extras import need
from jaxbn._files import check_file
from jaxbn._text import first_line, printable
from jaxbn.export._signature import by_name

BFLOAT16 = 16  # the number of the dtype in ONNX


def session(path: str | os.PathLike[str], *, optimize: bool = True) -> Callable[..., Any]:
    """Returns an ONNX file as a function of NumPy arrays; onnxruntime runs it on the CPU.

    The function takes the inputs in the file's order, or one dict of them by name. It returns the
    result; of several results, a dict by name in the file's order.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: onnxruntime cannot read the file; when called, the inputs do not fit the file.

    >>> from jaxbn import export
    >>> export.session("nothing.onnx")
    Traceback (most recent call last):
        ...
    FileNotFoundError: session: no ONNX file at nothing.onnx
    """
    check_file("session", path, "ONNX")
    onnxruntime = need("session", "onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    try:
        runner = onnxruntime.InferenceSession(
            os.fspath(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        raise ValueError(
            f"session: onnxruntime cannot read {printable(path)}: {first_line(error)}; expected a "
            f"file of jaxbn.export.onnx or jaxbn.export.int8."
        ) from error
    names = [value.name for value in runner.get_inputs()]
    results = [value.name for value in runner.get_outputs()]

    def value(array: Any) -> Any:
        make = onnxruntime.OrtValue
        if array.dtype == jnp.bfloat16:
            return make.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), BFLOAT16)
        return make.ortvalue_from_numpy(array)

    def call(*arrays: Any) -> Any:
        given, fits = by_name(names, arrays)
        try:
            if not fits:
                raise ValueError("the inputs are others")
            feed = {name: value(np.ascontiguousarray(array)) for name, array in given.items()}
            made = dict(zip(results, runner.run_with_ort_values(None, feed), strict=True))
        except Exception as error:
            got = ", ".join(
                f"{printable(name)} {v.dtype} {list(v.shape)}" for name, v in given.items()
            )
            raise ValueError(
                f"session: {printable(path)} cannot run on {got or 'nothing'}: "
                f"{first_line(error)}; expected {signature(runner)}."
            ) from error
        arrays_made = {name: _array(v) for name, v in made.items()}
        return arrays_made if len(results) > 1 else arrays_made[results[0]]

    return call


def signature(runner: Any) -> str:
    """The inputs of an onnxruntime session: name, dtype, sizes."""
    kinds = {"tensor(float)": "float32", "tensor(double)": "float64"}
    return ", ".join(
        f"{printable(v.name)} {kinds.get(v.type, v.type[7:-1])} "
        f"[{', '.join(map(printable, v.shape))}]"
        for v in runner.get_inputs()
    )


def _array(value: Any) -> np.ndarray:
    """A result in NumPy. For bfloat16 onnxruntime offers the memory alone."""
    if value.element_type() != BFLOAT16:
        return value.numpy()
    size = math.prod(value.shape())
    memory = (ctypes.c_uint16 * size).from_address(value.data_ptr())
    return np.array(memory, np.uint16).view(jnp.bfloat16).reshape(value.shape())
