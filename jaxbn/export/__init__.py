"""A trained network as a file that others serve: StableHLO, ONNX, ONNX in int8."""

from jaxbn.export._stablehlo import (
    PLATFORMS,
    Exported,
    int8,
    load_stablehlo,
    onnx,
    session,
    stablehlo,
)

__all__ = ["PLATFORMS", "Exported", "int8", "load_stablehlo", "onnx", "session", "stablehlo"]
