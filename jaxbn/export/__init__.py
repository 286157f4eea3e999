"""A trained network as a file to serve: StableHLO, ONNX, TFLite, int8, SavedModel."""

from jaxbn.export._checked_file import Exported
from jaxbn.export._int8 import Quantized, int8
from jaxbn.export._manifest import manifest, read_manifest
from jaxbn.export._onnx import onnx
from jaxbn.export._saved_model import load_saved_model, saved_model
from jaxbn.export._session import session
from jaxbn.export._stablehlo import PLATFORMS, load_stablehlo, stablehlo
from jaxbn.export._tflite import load_tflite, tflite
from jaxbn.export._tflite_int8 import tflite_int8
from jaxbn.export._triton import triton

__all__ = [
    "PLATFORMS",
    "Exported",
    "Quantized",
    "int8",
    "load_saved_model",
    "load_stablehlo",
    "load_tflite",
    "manifest",
    "onnx",
    "read_manifest",
    "saved_model",
    "session",
    "stablehlo",
    "tflite",
    "tflite_int8",
    "triton",
]
