"""ONNX in float: `onnx` writes a file for a function of any number of arrays."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxbn._extras import need
from jaxbn._folding.program import Op, run, trace
from jaxbn._misuse import takes
from jaxbn.export._beside import WEIGHTS
from jaxbn.export._checked_file import (
    TO_A_FILE,
    TOLERANCES,
    Case,
    Exported,
    arrays_of,
    example_call,
    inference_inputs,
    written,
)
from jaxbn.export._float32 import without_bfloat16
from jaxbn.export._nodes import register
from jaxbn.export._operators import Operators, Value, plain
from jaxbn.export._refusal import operands_of, refusal
from jaxbn.export._rules import RULES
from jaxbn.export._session import session
from jaxbn.export._signature import examples_of, flat_args, names_of, shapes_of, untraceable

OPSETS = range(17, 24)  # what the converter writes and onnxruntime reads
LIMIT = 2**31 - 2**20  # of a protobuf file, in bytes, with room for the graph


@takes(TO_A_FILE, example_call("onnx"))
def onnx(
    fn: Callable[..., Any],
    x: Any,
    path: str | os.PathLike[str],
    *,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    sizes: str | Sequence[str] | None = None,
    channels_first: bool = False,
    opset: int = 21,
    tolerance: float | None = None,
) -> Exported:
    """Writes `fn` as ONNX, for any batch size.

    Convolutions, pools, means, activations and padding leave as the operators that runtimes have
    kernels for, with channels first; jax2onnx converts the rest. ONNX's own checker checks the
    file. Before the file takes its place, onnxruntime runs it without optimizations on x, on one
    row and on another number of rows, and every result is compared with fn's. Fold first
    (`jaxbn.fold`), so that a convolution and its norm become one node.

    bfloat16 is float32 inside the file, because onnxruntime computes in no bfloat16 on CPUs; inputs
    and results stay bfloat16. Weights of more than 2 GB go into `path` + ".data" beside the file.

    Args:
      fn: an inference function, batch first.
      x: an example batch: an array, a dict of arrays for `fn(x)`, or a tuple for `fn(*x)`. Any
        dtype: uint8 images, int32 tokens.
      path: the file; an older file, with the weights beside it that it refers to and its manifest,
        is replaced once the new one is complete.
      inputs: names of the inputs, in the order of `jax.tree.leaves(x)`. None: the keys of a dict,
        else "input", or "input_0" and so on.
      outputs: names of the results, in the order of `jax.tree.leaves`. None: as for inputs, with
        "output".
      sizes: the sizes of x, as of `jax.export.symbolic_shape`, such as "B, 32*h, 32*w, 3": letters
        are free. One string, or one for each input. None: the batch is free.
      channels_first: inputs of rank 4 and 5 become [B, C, ...] in the file.
      opset: version of ONNX's operators.
      tolerance: the largest error over fn's largest value. None: 1e-4 for results in float32, 4e-3
        in float16, 3e-2 in bfloat16, 0 for integers.

    Raises:
      TypeError: fn is no function, or x no array.
      ValueError: fn is in training mode or has an operation that ONNX lacks, names, sizes or opset
        do not fit, a result is not finite, or the file differs from fn by more than tolerance.
        Nothing is written then.
      ModuleNotFoundError: jax2onnx, onnx or onnxruntime is missing.

    >>> from jaxbn import export
    >>> export.onnx(lambda x: x, [1.0], "f.onnx")
    Traceback (most recent call last):
        ...
    TypeError: onnx: x is a list, expected an example batch, batch first; write jnp.asarray(x).
    """
    args, leaves, structure = flat_args(x)
    leaves = inference_inputs("onnx", fn, args, leaves, path)
    if opset not in OPSETS:
        raise ValueError(
            f"onnx: opset is {opset!r}, expected {OPSETS[0]} to {OPSETS[-1]}; write opset=21."
        )

    def flat(*leaves: Any) -> Any:
        return fn(*jax.tree.unflatten(structure, leaves))

    shapes = shapes_of("onnx", leaves, sizes)
    try:
        program = trace(flat, shapes, lambda eqn: True)
    except Exception as error:
        raise untraceable("onnx", leaves, shapes, error) from error
    names = (
        names_of("onnx", "inputs", inputs, args if len(args) > 1 else args[0]),
        names_of("onnx", "outputs", outputs, program.tree.unflatten(program.outputs)),
    )
    first = [k for k, v in enumerate(leaves) if channels_first and v.ndim in (4, 5)]
    operators = Operators(program, opset, RULES)
    model = _converted(operators, shapes, names, first)

    def write(file: Path) -> None:
        library = need("onnx", "onnx")
        weights = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
        apart = {"save_as_external_data": True, "location": f"{file.name}{WEIGHTS}"}
        library.save_model(model, os.fspath(file), **(apart if weights > LIMIT else {}))
        try:
            library.checker.check_model(os.fspath(file), full_check=True)
            session(file, optimize=False)
        except Exception as error:
            raise _refusal(operators, error) from error

    def cases(file: Path) -> Iterator[Case]:
        call = session(file, optimize=False)
        expected = _results(flat, leaves)
        for example, rows in examples_of(leaves, shapes):
            fed = (np.moveaxis(v, -1, 1) if k in first else v for k, v in enumerate(example))
            got = arrays_of(call(*fed))
            same = [y[rows] for y in expected] if _stacked(expected, rows, len(leaves[0])) else None
            if same is None or not _alike(got, same, tolerance):
                same = _results(flat, example)  # what fn makes of a row may depend on others
            yield Case(got, same)

    return written("onnx", path, write, cases, tolerance)


def _results(flat: Callable[..., Any], leaves: Sequence[Any]) -> list[np.ndarray]:
    return [np.asarray(y) for y in jax.tree.leaves(jax.jit(flat)(*leaves))]


def _stacked(results: Sequence[np.ndarray], rows: np.ndarray | None, count: int) -> bool:
    """Whether the results on these rows of the example are rows of its results."""
    return rows is not None and all(y.ndim and len(y) == count for y in results)


def _alike(got: Sequence[np.ndarray], rows: Sequence[np.ndarray], tolerance: float | None) -> bool:
    """Whether arrays differ by tolerance at most."""
    for a, b in zip(got, rows, strict=True):
        limit = TOLERANCES.get(str(b.dtype), 0.0) if tolerance is None else tolerance
        wide = a.astype(np.float64), b.astype(np.float64)
        if a.shape != b.shape or not np.isfinite(wide).all():
            return False
        if np.abs(wide[0] - wide[1]).max(initial=0) > limit * np.abs(wide[1]).max(initial=0):
            return False
    return True


def _converted(
    operators: Operators, shapes: Sequence[Any], names: Sequence[list[str]], first: Sequence[int]
) -> Any:
    """The program as ONNX; the inputs numbered in `first` come with channels first."""
    jax2onnx = need("onnx", "jax2onnx")
    register()

    def replay(*arrays: Any) -> list[Any]:
        return operators(
            [
                Value(v, (0, v.ndim - 1, *range(1, v.ndim - 1))) if k in first else plain(v)
                for k, v in enumerate(arrays)
            ]
        )

    given = [
        jax.ShapeDtypeStruct((s.shape[0], s.shape[-1], *s.shape[1:-1]), s.dtype)
        if k in first
        else s
        for k, s in enumerate(shapes)
    ]
    try:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            model = jax2onnx.to_onnx(
                replay,
                given,
                opset=operators.opset,
                model_name="jaxbn",
                input_names=names[0],
                output_names=names[1],
            )
    except Exception as error:
        raise _refusal(operators, error) from error
    without_bfloat16(model)
    seen: Counter[str] = Counter()
    for node in model.graph.node:
        seen[node.name] += 1
        if seen[node.name] > 1:
            node.name = f"{node.name}_{seen[node.name] - 1}"
    return model


def _refusal(operators: Operators, error: Exception) -> ValueError:
    """The refusal of what jax2onnx cannot convert."""
    jax2onnx, check = need("onnx", "jax2onnx"), need("onnx", "onnx").checker

    def attempt(op: Op) -> None:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            model = jax2onnx.to_onnx(lambda *v: run(op, *v), operands_of(op), opset=operators.opset)
        check.check_model(model, full_check=True)

    expected = (
        "expected operations that ONNX has. Compute it outside fn or by other operations, or write "
        "jaxbn.export.stablehlo, which takes all but calls into Python."
    )
    return refusal("onnx", operators.left, attempt, error, expected)
