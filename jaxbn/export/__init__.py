"""A trained network as a file to serve: StableHLO, ONNX, ONNX in int8."""

from jaxbn.export._checked_file import Exported
from jaxbn.export._int8 import Quantized, int8
from jaxbn.export._manifest import manifest, read_manifest
from jaxbn.export._onnx import onnx
from jaxbn.export._session import session
from jaxbn.export._stablehlo import PLATFORMS, load_stablehlo, stablehlo
from jaxbn.export._triton import triton

__all__ = [
    "PLATFORMS",
    "Exported",
    "Quantized",
    "int8",
    "load_stablehlo",
    "manifest",
    "onnx",
    "read_manifest",
    "session",
    "stablehlo",
    "triton",
]
