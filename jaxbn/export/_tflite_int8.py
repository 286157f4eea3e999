"""TFLite in int8: quantized by LiteRT's quantizer, compared with the float file."""

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxbn._extras import need
from jaxbn._files import check_file, check_place
from jaxbn._misuse import check_batches, takes
from jaxbn.export._checked_file import Case, arrays_of, written
from jaxbn.export._int8 import Quantized, feed_of, fitting, quantized, run_or_refuse, times_of
from jaxbn.export._tflite import in_parts, load_tflite

MOVES = {"RESHAPE", "TRANSPOSE", "SQUEEZE", "EXPAND_DIMS", "QUANTIZE", "DEQUANTIZE"}


WRITE = "export.tflite_int8(source, [x], path)"


@takes("a TFLite file, batches and a path", WRITE)
def tflite_int8(
    source: str | os.PathLike[str],
    batches: Iterable[Any],
    path: str | os.PathLike[str],
    *,
    leave_out: Sequence[str] = (),
    dynamic: bool = False,
    tolerance: float = 0.1,
) -> Quantized:
    """Writes a TFLite file with weights and activations in 8 bits, by LiteRT's quantizer.

    Each channel of a kernel has a range of its own. The quantizer takes the ranges of the
    activations from `batches`; some hundred real inputs are enough. Inputs and results keep their
    dtypes. The errors reported are those on the first batch, compared with the source.

    Args:
      source: a file of `tflite`, with its norms folded.
      batches: arrays as the network takes them, of any number of rows; a tuple or a dict by name
        for several inputs.
      path: the file; an older file is replaced once the new one is complete.
      leave_out: names of nodes that stay float, with wildcards: ("*/Conv_0/*", "*Dense*"). A node
        that makes a result of the network has the name of the result alone: "*output*".
      dynamic: weights alone are stored in 8 bits, and the ranges of activations are taken while
        serving. `batches` are for the comparison alone.
      tolerance: the largest error over the source's largest value. Rounding to 8 bits costs about
        1 %; measure the accuracy of the task too.

    Raises:
      TypeError: batches is no iterable of batches, or path no path.
      FileNotFoundError: source does not exist.
      ValueError: source is no TFLite file, there is no batch, the batches do not fit, a name in
        `leave_out` fits no node, or the error is above tolerance. Nothing is written then.
      ModuleNotFoundError: ai_edge_litert or ai_edge_quantizer is missing.

    >>> from jaxbn import export
    >>> export.tflite_int8("nothing.tflite", [], "int8.tflite")
    Traceback (most recent call last):
        ...
    FileNotFoundError: tflite_int8: no TFLite file at nothing.tflite
    """
    check_place("tflite_int8", path)
    check_batches("tflite_int8", batches, WRITE)
    check_file("tflite_int8", source, "TFLite")
    quantizer = need("tflite_int8", "ai_edge_quantizer.quantizer")
    recipe = need("tflite_int8", "ai_edge_quantizer.recipe")
    original = load_tflite(source)
    names = [*original.inputs]
    feeds = [feed_of("tflite_int8", i, batch, names) for i, batch in enumerate(batches)]
    reference = run_or_refuse("tflite_int8", original, feeds)
    nodes = [*_operators(Path(source).read_bytes())]
    if any("INT8" in dtypes for _, _, dtypes in nodes):
        raise quantized("tflite_int8", source)
    left = fitting("tflite_int8", [name for name, _, _ in nodes], leave_out)

    def write(file: Path) -> None:
        small, ranges = quantizer.Quantizer(os.fspath(source)), None
        if dynamic:
            small.load_quantization_recipe(recipe.dynamic_wi8_afp32())
        else:
            small.load_quantization_recipe(recipe.static_wi8_ai8())
            for end in ("INPUT", "OUTPUT"):  # they keep their dtypes
                small.update_quantization_recipe(".*", end, algorithm_key="no_quantize")
        for name in left:  # the quantizer ends a name with a semicolon
            own = f"^{re.escape(name)};$"
            small.update_quantization_recipe(own, "*", algorithm_key="no_quantize")
        with warnings.catch_warnings(action="ignore"):  # LiteRT's own: all values are kept
            if not dynamic:
                whole = [part for feed in feeds for part in in_parts(feed, original.size)]
                ranges = small.calibrate({original.signature: whole}, num_threads=os.cpu_count())
            done = small.quantize(ranges, enable_progress_report=False)
        file.write_bytes(done.quantized_model)

    report: dict[str, Any] = {}

    def cases(file: Path) -> Iterator[Case]:
        small = load_tflite(file)
        got = small(feeds[0])
        report["milliseconds"] = times_of({"float32": original, "int8": small}, feeds[0])
        report["in_float"] = _in_float(file.read_bytes())
        yield Case(arrays_of(got), arrays_of(reference))

    return Quantized(*written("tflite_int8", path, write, cases, tolerance), **report)


def _in_float(content: bytes) -> tuple[str, ...]:
    """The operators that compute on no 8-bit value, by the names of their results."""
    return tuple(
        name or kind
        for name, kind, dtypes in _operators(content)
        if kind not in MOVES and not dtypes & {"INT8", "UINT8"}
    )


def _operators(content: bytes) -> Iterator[tuple[str, str, set[str]]]:
    """Each operator of a file: the names of its results, its kind, the dtypes of its operands."""
    schema = need("tflite_int8", "ai_edge_litert.schema_py_generated")
    model = schema.Model.GetRootAs(content)
    kinds, dtypes = (
        {value: name for name, value in vars(enum).items()}
        for enum in (schema.BuiltinOperator, schema.TensorType)
    )
    graph = model.Subgraphs(0)
    for k in range(graph.OperatorsLength()):
        op = graph.Operators(k)
        name = ";".join(graph.Tensors(i).Name().decode() for i in op.OutputsAsNumpy())
        operands = {dtypes[graph.Tensors(i).Type()] for i in op.InputsAsNumpy() if i >= 0}
        yield name, kinds[model.OperatorCodes(op.OpcodeIndex()).BuiltinCode()], operands
