"""Packages that only some calls need, and the line that installs them."""

import importlib
from typing import Any

EXTRAS = {  # module → the argument of pip install
    "ai_edge_litert": "'jaxbn[tflite]'",
    "ai_edge_quantizer": "'jaxbn[tflite]'",
    "flatbuffers": "'jaxbn[export]'",
    "flax": "flax",
    "jax2onnx": "'jaxbn[export]'",
    "litert_converter": "'jaxbn[tflite]'",
    "matplotlib": "'jaxbn[doctor]'",
    "onnx": "'jaxbn[export]'",
    "onnxruntime": "'jaxbn[export]'",
    "orbax": "orbax-checkpoint",
    "prometheus_client": "'jaxbn[watch]'",
    "rich": "'jaxbn[doctor]'",
    "safetensors": "'jaxbn[convert]'",
    "tensorboardX": "'jaxbn[watch]'",
    "tensorflow": "'jaxbn[saved-model]'",
    "tensorstore": "orbax-checkpoint",
}


def need(call: str, module: str) -> Any:
    """Imports a module; if that fails, the error has the line that installs its package.

    Args:
      call: the public call that needs the module, for the error.
      module: the name of the module; the part before the first dot is a key of EXTRAS.

    Raises:
      ModuleNotFoundError: the module cannot be imported.

    >>> from jaxbn import _extras
    >>> _extras.need("plot", "matplotlib.figure").__name__
    'matplotlib.figure'
    """
    package = module.partition(".")[0]
    try:
        # First the package: a part of it may still be loaded where the package is missing.
        importlib.import_module(package)
        return importlib.import_module(module)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{call}: needs the package {package}, which is not installed; write "
            f"pip install {EXTRAS[package]}.",
            name=package,
        ) from error
