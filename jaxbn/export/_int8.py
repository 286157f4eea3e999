"""ONNX in int8: quantized by onnxruntime, calibrated on batches, compared with the float file."""

import fnmatch
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxbn._extras import need
from jaxbn._files import check_file, check_place
from jaxbn._misuse import check_batches, takes
from jaxbn._text import first_line, printable, short
from jaxbn.export._beside import weights_of
from jaxbn.export._checked_file import Case, arrays_of, written
from jaxbn.export._session import session
from jaxbn.export._signature import by_name

Calibration = Literal["minmax", "entropy", "percentile"]
METHODS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
KINDS = {"uint8": "QUInt8", "int8": "QInt8"}
# Operators of onnxruntime that take 8 bits and return more, and operators that compute nothing.
TO_FLOAT = ("ToFloat", "Integer", "DynamicQuantizeMatMul")
MOVES = {"Cast", "DynamicQuantizeLinear", "Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
PERCENTILE = 99.99  # of an activation's values, which its range holds
CALLS = 5  # timed, of which the fastest counts


class Quantized(NamedTuple):
    """A written int8 file: its errors against the float file, what stayed float, and the speeds.

    >>> from pathlib import Path
    >>> from jaxbn import export
    >>> ms = {"float32": 2.0, "int8": 0.8}
    >>> print(export.Quantized(Path("n.onnx"), 3_500, 0.1, 0.01, ("Net/Softmax",), ms))
    n.onnx: 4 kB, error 1.0e-02 of the largest value
    float32  2.00 ms
    int8     0.80 ms, 2.50 times as fast
    in float: Net/Softmax
    """

    path: Path
    bytes: int
    absolute: float  # largest error on the first batch
    relative: float  # largest error over the source's largest value
    in_float: tuple[str, ...]  # nodes that compute on no int8 value
    milliseconds: Mapping[str, float]  # "float32", "int8": a call on the first batch, here

    def __str__(self) -> str:
        slow, fast = self.milliseconds["float32"], self.milliseconds["int8"]
        return (
            f"{printable(self.path)}: {self.bytes / 1000:.0f} kB, error {self.relative:.1e} of the "
            f"largest value\nfloat32  {slow:.2f} ms\nint8     {fast:.2f} ms, {slow / fast:.2f} "
            f"times as fast\nin float: {short(self.in_float) or 'nothing'}"
        )


WRITE = "export.int8(source, [x], path)"


@takes("an ONNX file, batches and a path", WRITE)
def int8(
    source: str | os.PathLike[str],
    batches: Iterable[Any],
    path: str | os.PathLike[str],
    *,
    per_channel: bool = True,
    calibration: Calibration = "minmax",
    activations: Literal["uint8", "int8"] = "uint8",
    leave_out: Sequence[str] = (),
    dynamic: bool = False,
    tolerance: float = 0.1,
) -> Quantized:
    """Writes an ONNX file with weights and activations in 8 bits, by onnxruntime's quantizer.

    The quantizer takes the ranges of the activations from `batches`; some hundred real inputs are
    enough. The errors reported are those on the first batch, compared with the source. Whether 8
    bits are faster depends on the processor and the network: the result has both times.

    Args:
      source: the ONNX file in float32, with its norms folded.
      batches: arrays as the network takes them; a tuple or a dict by name for several inputs.
      path: the file; an older file is replaced once the new one is complete.
      per_channel: give each channel of a kernel a range of its own.
      calibration: an activation's range. "minmax" holds all values seen; "percentile" holds
        99.99 % of them; "entropy" leaves out what keeps the distribution closest. The last two help
        where a few values are far beyond the others.
      activations: "uint8" is what x86 processors multiply fastest; "int8" is for Arm and GPUs.
      leave_out: names of nodes that stay float, with wildcards: ("*/Conv_0/*", "*Dense*").
      dynamic: take the ranges while serving, batch by batch, for dense layers: no calibration, but
        slower for convolutions. `batches` are for the comparison alone.
      tolerance: the largest error over the source's largest value. Rounding to 8 bits costs about
        1 %; measure the accuracy of the task too.

    Raises:
      TypeError: batches is no iterable of batches, or path no path.
      FileNotFoundError: source does not exist.
      ValueError: source is no ONNX file, there is no batch, the batches differ in shape or do not
        fit, a name in `leave_out` fits no node, or the error is above tolerance. Nothing is
        written then.
      ModuleNotFoundError: onnx or onnxruntime is missing.

    >>> from jaxbn import export
    >>> export.int8("nothing.onnx", [], "int8.onnx")
    Traceback (most recent call last):
        ...
    FileNotFoundError: int8: no ONNX file at nothing.onnx
    """
    check_place("int8", path)
    check_batches("int8", batches, WRITE)
    check_file("int8", source, "ONNX")
    need("int8", "onnxruntime")
    original = session(source)
    for name, value, known in (
        ("calibration", calibration, METHODS),
        ("activations", activations, KINDS),
    ):
        if value not in known:
            raise ValueError(
                f"int8: {name} is {value!r}, expected {' or '.join(map(repr, known))}; write "
                f"{name}={next(iter(known))!r}."
            )
    graph = need("int8", "onnx").load(os.fspath(source), load_external_data=False).graph
    if any(node.op_type == "DequantizeLinear" for node in graph.node):
        raise quantized("int8", source)
    weights = {tensor.name for tensor in graph.initializer}
    names = [value.name for value in graph.input if value.name not in weights]
    feeds = [feed_of("int8", i, batch, names) for i, batch in enumerate(batches)]
    reference = run_or_refuse("int8", original, feeds)
    quantization = need("int8", "onnxruntime.quantization")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined]
        def __init__(self) -> None:
            self.feeds = iter(_alike(feeds))

        def get_next(self) -> Any:
            return next(self.feeds, None)

    def write(file: Path) -> None:
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            prepared = Path(folder, "prepared.onnx")
            common = {
                "per_channel": per_channel,
                "weight_type": quantization.QuantType.QInt8,
                "nodes_to_exclude": _left_out(source, prepared, leave_out),
                "use_external_data_format": weights_of(Path(source)) is not None,
            }
            if dynamic:
                quantization.quantize_dynamic(prepared, file, **common)
                return
            quantization.quantize_static(
                prepared,
                file,
                Reader(),
                quant_format=quantization.QuantFormat.QDQ,
                activation_type=quantization.QuantType[KINDS[activations]],
                extra_options={"CalibPercentile": PERCENTILE},
                calibrate_method=quantization.CalibrationMethod[METHODS[calibration]],
                **common,
            )

    report: dict[str, Any] = {}

    def cases(file: Path) -> Iterator[Case]:
        try:
            small = session(file)
        except ValueError as error:
            other = next(kind for kind in KINDS if kind != activations)
            raise ValueError(
                f"int8: onnxruntime cannot run what its quantizer wrote: "
                f"{first_line(error.__cause__ or error)}; write activations={other!r}, or "
                f"leave_out=(...) with the node that it names."
            ) from error
        got = small(feeds[0])
        report["milliseconds"] = times_of({"float32": original, "int8": small}, feeds[0])
        report["in_float"] = _in_float(file)
        yield Case(arrays_of(got), arrays_of(reference))

    return Quantized(*written("int8", path, write, cases, tolerance), **report)


def quantized(call: str, source: Any) -> ValueError:
    """The refusal of a source in 8 bits."""
    return ValueError(
        f"{call}: {printable(source)} is in 8 bits already, expected a file in float of "
        f"jaxbn.export.{'onnx' if call == 'int8' else 'tflite'}."
    )


def feed_of(call: str, i: int, batch: Any, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Batch i by the names of the inputs. Raises unless the batch has these inputs and no other."""
    feed, fits = by_name(names, batch if isinstance(batch, tuple) else (batch,))
    if not fits:
        raise ValueError(
            f"{call}: batch {i} has other arrays than the file, expected {short(names)}; write a "
            f"tuple in this order, or a dict by name."
        )
    return feed


def _alike(feeds: Sequence[dict[str, np.ndarray]]) -> Sequence[dict[str, np.ndarray]]:
    """The same rows in batches of one size, as histograms need them. Some rows may come twice."""
    counts = [len(next(iter(feed.values()))) for feed in feeds]
    if len({*counts}) == 1:
        return feeds
    rows = {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}
    size, total = min(counts), sum(counts)
    starts = range(0, total, size)
    return [
        {name: v[np.arange(at, at + size) % total] for name, v in rows.items()} for at in starts
    ]


def run_or_refuse(
    call: str, run: Callable[..., Any], feeds: Sequence[dict[str, np.ndarray]]
) -> Any:
    """The source's result on the first batch. Raises unless all batches have the shape of a row."""
    if not feeds:
        raise ValueError(
            f"{call}: no batches to calibrate with, expected some real inputs; write "
            f"jaxbn.export.{call}(source, [x], path)."
        )
    for i, feed in enumerate(feeds):
        for name, first in feeds[0].items():
            batch = feed.get(name, np.empty(0))
            if batch.shape[1:] != first.shape[1:]:
                raise ValueError(
                    f"{call}: batch {i} has shape {batch.shape} but batch 0 has {first.shape}; "
                    f"expected arrays alike but for the number of rows."
                )
            if batch.dtype.kind in "OSU" or not batch.size:
                raise ValueError(
                    f"{call}: batch {i} has shape {batch.shape} and dtype {batch.dtype}: it holds "
                    f"no number, expected real inputs."
                )
            if wrong := int((~np.isfinite(batch)).sum()):
                raise ValueError(
                    f"{call}: {wrong} of {batch.size} values of batch {i} are not finite, expected "
                    f"real inputs, whose range can be taken."
                )
    try:
        return run(feeds[0])
    except Exception as error:
        arrays = list(feeds[0].values())
        shapes, dtypes = (
            ", ".join(map(str, values))
            for values in ([v.shape for v in arrays], [v.dtype for v in arrays])
        )
        raise ValueError(
            f"{call}: source cannot run on batch 0 of shape {shapes}, dtype {dtypes}: "
            f"{first_line(error.__cause__ or error)}; expected inputs as the network takes them."
        ) from error


def _left_out(source: Any, prepared: Path, patterns: Sequence[str]) -> list[str]:
    """Prepares the source for the quantizer; returns the nodes whose names fit a pattern."""
    library = need("int8", "onnx")
    prepare = need("int8", "onnxruntime.quantization.shape_inference").quant_pre_process
    prepare(
        os.fspath(source),
        prepared,
        skip_symbolic_shape=True,
        save_as_external_data=weights_of(Path(source)) is not None,
    )
    nodes = library.load(prepared, load_external_data=False).graph.node
    return fitting("int8", [node.name for node in nodes], patterns)


def fitting(call: str, names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The names of nodes that fit a pattern of `leave_out`. Raises if a pattern fits none."""
    patterns = [patterns] if isinstance(patterns, str) else patterns
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(
                f"{call}: leave_out has {pattern!r}, which fits no node; expected names such as "
                f"{short(names)}."
            )
    return sorted({name for p in patterns for name in fnmatch.filter(names, p)})


def times_of(runs: Mapping[str, Callable[..., Any]], feed: Any) -> dict[str, float]:
    """The fastest call of each, in milliseconds, called in turns."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(CALLS):
        for name, run in runs.items():
            start = time.perf_counter()
            run(feed)
            best[name] = min(best[name], 1000 * (time.perf_counter() - start))
    return best


def _in_float(file: Path) -> tuple[str, ...]:
    """The nodes that onnxruntime runs on float values alone, once it has fused what it can."""
    onnxruntime, library = need("int8", "onnxruntime"), need("int8", "onnx")
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = os.fspath(Path(folder, "fused.onnx"))
        onnxruntime.InferenceSession(os.fspath(file), options, providers=["CPUExecutionProvider"])
        graph = library.load(Path(folder, "fused.onnx"), load_external_data=False).graph
    eight = {library.TensorProto.INT8, library.TensorProto.UINT8}
    small = {tensor.name for tensor in graph.initializer if tensor.data_type in eight}
    floats = []
    for node in graph.node:
        if node.op_type == "DequantizeLinear":
            continue
        # QuantizeLinear has a zero point of 8 bits, as the nodes that compute have one of each
        # operand and of the result; what moves values keeps their dtype.
        if small & {*node.input}:
            small |= {*node.output} if not node.op_type.endswith(TO_FLOAT) else set()
        elif node.op_type not in MOVES and "_quant" not in node.name:
            floats.append(node.name or node.op_type)
    return tuple(floats)
