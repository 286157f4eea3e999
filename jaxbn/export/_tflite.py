"""TFLite, which is LiteRT's file: for phones, microcontrollers and browsers, at one batch size."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxbn._extras import need
from jaxbn._files import check_file
from jaxbn._folding.program import Op, Program, trace
from jaxbn._misuse import takes
from jaxbn._text import first_line, printable
from jaxbn.export._checked_file import (
    TO_A_FILE,
    Case,
    Exported,
    arrays_of,
    example_call,
    inference_inputs,
    written,
)
from jaxbn.export._refusal import refusal
from jaxbn.export._signature import by_name, flat_args, names_of
from jaxbn.export._transposed import results_of

SIGNATURE = "serving_default"


@takes(TO_A_FILE, example_call("tflite"))
def tflite(
    fn: Callable[..., Any],
    x: Any,
    path: str | os.PathLike[str],
    *,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    tolerance: float | None = None,
) -> Exported:
    """Writes `fn` as a TFLite file, for the batch size of x.

    For phones, microcontrollers and browsers: LiteRT, which was TensorFlow Lite, runs the file.
    TensorFlow is not needed: LiteRT's converter takes the StableHLO that JAX writes. LiteRT's
    interpreter runs the file on x, and every result is compared with fn's, before the file takes
    its place. Fold first (`jaxbn.fold`), and export with a batch of one row, if one row is served.

    Args:
      fn: an inference function, batch first.
      x: an example batch: an array, a dict of arrays for `fn(x)`, or a tuple for `fn(*x)`.
      path: the file; an older file is replaced once the new one is complete.
      inputs: names of the inputs, as of `onnx`.
      outputs: names of the results, as of `onnx`.
      tolerance: the largest error over fn's largest value. None: 1e-4 for results in float32, 4e-3
        in float16, 3e-2 in bfloat16, 0 for integers.

    Raises:
      TypeError: fn is no function, or x no array.
      ValueError: fn is in training mode or has an operation that TFLite lacks, names do not fit, a
        result is not finite, or the file differs from fn by more than tolerance. Nothing is
        written then.
      ModuleNotFoundError: litert_converter or ai_edge_litert is missing.

    >>> from jaxbn import export
    >>> export.tflite(lambda x: x, [1.0], "f.tflite")
    Traceback (most recent call last):
        ...
    TypeError: tflite: x is a list, expected an example batch, batch first; write jnp.asarray(x).
    """
    args, leaves, structure = flat_args(x)
    leaves = inference_inputs("tflite", fn, args, leaves, path)

    def flat(*leaves: Any) -> Any:
        return fn(*jax.tree.unflatten(structure, leaves))

    program = trace(flat, leaves, lambda eqn: True)
    ins = names_of("tflite", "inputs", inputs, args if len(args) > 1 else args[0])
    outs = names_of("tflite", "outputs", outputs, program.tree.unflatten(program.outputs))
    try:
        content = _content(program, leaves, ins, outs)
    except Exception as error:
        raise _refusal(program, error) from error

    def cases(file: Path) -> Iterator[Case]:
        try:
            got = load_tflite(file)(dict(zip(ins, map(np.asarray, leaves), strict=True)))
        except Exception as error:
            raise _refusal(program, error) from error
        yield Case(arrays_of(got), jax.tree.leaves(jax.jit(flat)(*leaves)))

    return written("tflite", path, lambda file: file.write_bytes(content), cases, tolerance)


def _content(
    program: Program, leaves: Sequence[Any], inputs: Sequence[str], outputs: Sequence[str]
) -> bytes:
    """A program as the content of a TFLite file."""
    ir = need("tflite", "litert_converter.mlir.ir")
    passes = need("tflite", "litert_converter.mlir.passmanager")
    stablehlo = need("tflite", "litert_converter.mlir.dialects.stablehlo")
    api = need("tflite", "litert_converter.mlir._mlir_libs.converter_api_ext")
    # No argument may go, even if fn does not read it: each has a name.
    jitted = jax.jit(lambda *leaves: results_of(program, leaves), keep_unused=True)
    exported = jax.export.export(jitted, platforms=["cpu"])(*leaves)
    context = ir.Context()
    api.prepare_mlir_context(context)
    module = stablehlo.deserialize_portable_artifact(context, exported.mlir_module_serialized)
    api.set_signature(module.operation, SIGNATURE, list(inputs), list(outputs))
    with context:
        api.run_convert_to_tfl_passes(module, passes.PassManager(), api.ConvertToTFLConfig())
    return api.export_flatbuffer_to_bytes(module.operation)


def _refusal(program: Program, error: Exception) -> ValueError:
    """The refusal of what the converter cannot convert, or LiteRT cannot run."""
    litert = need("tflite", "ai_edge_litert.interpreter")

    def attempt(op: Op) -> None:
        consts = {i: program.consts[i] for i in op.inputs if i in program.consts}
        avals: dict[int, Any] = dict(zip(op.inputs, (v.aval for v in op.eqn.invars), strict=True))
        free = {i: aval for i, aval in avals.items() if i not in consts} or avals
        alone = Program((*free,), (op,), op.outputs, consts, None)
        names = [f"x_{i}" for i in free], [f"y_{i}" for i in op.outputs]
        content = _content(alone, [*free.values()], *names)
        litert.Interpreter(model_content=content).allocate_tensors()

    expected = (
        "expected operations that TFLite has. Compute it outside fn or by other operations, or "
        "write jaxbn.export.stablehlo, which takes all but calls into Python."
    )
    return refusal("tflite", program.ops, attempt, error, expected)


def load_tflite(path: str | os.PathLike[str]) -> "Loaded":
    """Returns a TFLite file as a function of NumPy arrays; LiteRT runs the file on the CPU.

    The function takes the inputs in the file's order, or one dict of them by name. It returns the
    result; of several results, a dict by name. A file has one batch size. Of other numbers of rows
    each part of that size is a call, the last one filled up with copies of the last row.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: LiteRT cannot read the file; when called, the inputs do not fit the file.

    >>> from jaxbn import export
    >>> export.load_tflite("nothing.tflite")
    Traceback (most recent call last):
        ...
    FileNotFoundError: load_tflite: no TFLite file at nothing.tflite
    """
    return Loaded(path)


class Loaded:
    """A TFLite file as a function of NumPy arrays.

    Attributes:
      inputs: what LiteRT says of each input, in the file's order: "dtype", "shape".
      results: the same of the results.
      size: the rows of a call.
      signature: the name of the function in the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        check_file("load_tflite", path, "TFLite")
        litert = need("load_tflite", "ai_edge_litert.interpreter")
        try:
            interpreter = litert.Interpreter(os.fspath(path))
            (self.signature,) = interpreter.get_signature_list()
            self.run = interpreter.get_signature_runner(self.signature)
        except Exception as error:
            raise ValueError(
                f"load_tflite: LiteRT cannot read {printable(path)}: {first_line(error)}; expected "
                f"a file of jaxbn.export.tflite."
            ) from error
        self.path = path
        self.inputs = _in_order(self.run.get_input_details(), interpreter.get_input_details())
        self.results = _in_order(self.run.get_output_details(), interpreter.get_output_details())
        self.size = next(int(v["shape"][0]) for v in self.inputs.values())
        shapes = [v["shape"] for v in (*self.inputs.values(), *self.results.values())]
        self.by_row = all(tuple(shape[:1]) == (self.size,) for shape in shapes)

    def __call__(self, *arrays: Any) -> Any:
        """The result, or a dict of several by name."""
        given, fits = by_name(self.inputs, arrays)
        rows = {v.shape[:1] for v in given.values()}
        free = self.by_row and rows != {(self.size,)}
        if not (
            fits
            and all(_fits(given[name], v, free) for name, v in self.inputs.items())
            and (len(rows) == 1 or not free)
        ):
            got = ", ".join(
                f"{printable(name)} {v.dtype} {list(v.shape)}" for name, v in given.items()
            )
            takes = ", ".join(
                f"{printable(name)} {np.dtype(v['dtype'])} {v['shape'].tolist()}"
                for name, v in self.inputs.items()
            )
            raise ValueError(
                f"load_tflite: {printable(self.path)} cannot run on {got or 'nothing'}; "
                f"expected {takes}."
            )
        if free:
            calls = [self.run(**part) for part in in_parts(given, self.size)]
            n = len(next(iter(given.values())))
            made = {name: np.concatenate([y[name] for y in calls])[:n] for name in self.results}
        else:
            made = self.run(**given)
        ordered = {name: made[name] for name in self.results}
        return ordered if len(ordered) > 1 else next(iter(ordered.values()))


def in_parts(feed: Mapping[str, np.ndarray], size: int) -> Iterator[dict[str, np.ndarray]]:
    """The rows in batches of one size; copies of the last row fill up the last batch."""
    rows = len(next(iter(feed.values())))
    for start in range(0, rows, size):
        at = np.minimum(np.arange(start, start + size), rows - 1)
        yield {name: v[at] for name, v in feed.items()}


def _in_order(details: Mapping[str, Any], tensors: Sequence[Any]) -> dict[str, Any]:
    """What a signature says of its inputs or results, in the order of the file."""
    order = [tensor["index"] for tensor in tensors]
    return dict(sorted(details.items(), key=lambda item: order.index(item[1]["index"])))


def _fits(array: np.ndarray, takes: Mapping[str, Any], free: bool) -> bool:
    """Whether an array has the dtype and the shape of an input; the rows may be free."""
    shape, expected = array.shape[free:], tuple(takes["shape"][free:])
    return bool(array.dtype == takes["dtype"] and array.size and array.ndim and shape == expected)
