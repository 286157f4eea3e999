"""ONNX in int8: quantized by onnxruntime, calibrated on batches, compared with the float file."""

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxbn._extras import need
from jaxbn.export._checked_file import Case, Exported, written
from jaxbn.export._session import session


def int8(
    source: str | os.PathLike[str],
    batches: Iterable[Any],
    path: str | os.PathLike[str],
    *,
    per_channel: bool = True,
    tolerance: float = 0.1,
) -> Exported:
    """Writes an ONNX file with weights and activations in int8, by onnxruntime's quantizer.

    The quantizer takes the ranges of the activations from `batches`; some hundred real inputs are
    enough. The errors reported are those on the first batch, compared with the source.

    Args:
      source: the ONNX file in float32, with its norms folded.
      batches: arrays as the network takes them.
      path: the file; an older file is replaced once the new one is complete.
      per_channel: give each channel of a kernel a range of its own.
      tolerance: the largest error over the source's largest value. Rounding to 8 bits costs about
        1 %; measure the accuracy of the task too.

    Raises:
      FileNotFoundError: source does not exist.
      ValueError: source is no ONNX file, there is no batch, the batches differ in shape, or the
        error is above tolerance. Nothing is written then.
      ModuleNotFoundError: onnx or onnxruntime is missing.

    >>> from jaxbn import export
    >>> export.int8("nothing.onnx", [], "int8.onnx")
    Traceback (most recent call last):
        ...
    FileNotFoundError: session: no ONNX file at nothing.onnx
    """
    original = session(source)
    batches = [np.asarray(batch) for batch in batches]
    if not batches:
        raise ValueError(
            "int8: no batches to calibrate with, expected some real inputs; write "
            "jaxbn.export.int8(source, [x], path)."
        )
    reference = _run_or_refuse(original, batches)
    library = need("int8", "onnx")
    quantization = need("int8", "onnxruntime.quantization")
    prepare = need("int8", "onnxruntime.quantization.shape_inference").quant_pre_process

    class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined]
        def __init__(self, name: str):
            self.batches = iter({name: batch} for batch in batches)

        def get_next(self) -> Any:
            return next(self.batches, None)

    name = library.load(os.fspath(source), load_external_data=False).graph.input[0].name

    def write(file: Path) -> None:
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            prepared = Path(folder, "prepared.onnx")
            prepare(os.fspath(source), prepared, skip_symbolic_shape=True)
            quantization.quantize_static(
                prepared,
                file,
                Reader(name),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=per_channel,
                activation_type=quantization.QuantType.QInt8,
                weight_type=quantization.QuantType.QInt8,
            )

    return written(
        "int8",
        path,
        write,
        lambda file: [Case([session(file)(batches[0])], [reference])],
        tolerance,
    )


def _run_or_refuse(run: Callable[..., np.ndarray], batches: Sequence[np.ndarray]) -> np.ndarray:
    """The source's result on the first batch. Raises unless all batches have the shape of a row."""
    for i, batch in enumerate(batches):
        if batch.shape[1:] != batches[0].shape[1:]:
            raise ValueError(
                f"int8: batch {i} has shape {batch.shape} but batch 0 has {batches[0].shape}; "
                f"expected arrays alike but for the number of rows."
            )
    try:
        return run(batches[0])
    except Exception as error:
        raise ValueError(
            f"int8: source cannot run on batch 0 of shape {batches[0].shape}, dtype "
            f"{batches[0].dtype}: {str(error).splitlines()[0]}; expected inputs as the network "
            f"takes them."
        ) from error
