"""Packages that only some calls need, and the line that installs them."""

import importlib
from typing import Any

EXTRAS = {  # module → what pip is given
    "flatbuffers": "'jaxbn[export]'",
    "flax": "flax",
    "jax2onnx": "'jaxbn[export]'",
    "matplotlib": "'jaxbn[doctor]'",
    "onnx": "'jaxbn[export]'",
    "onnxruntime": "'jaxbn[export]'",
    "orbax": "orbax-checkpoint",
    "prometheus_client": "'jaxbn[watch]'",
    "rich": "'jaxbn[doctor]'",
    "safetensors": "'jaxbn[convert]'",
    "tensorboardX": "'jaxbn[watch]'",
    "tensorstore": "orbax-checkpoint",
}


def need(call: str, module: str) -> Any:
    """The module, imported; an error with the line that installs its package, if it is not there.

    Args:
      call: the public call that needs it, for the error.
      module: its name; the part before the first dot is one of EXTRAS.

    Raises:
      ModuleNotFoundError: it cannot be imported.

    >>> from jaxbn import _extras
    >>> _extras.need("plot", "matplotlib.figure").__name__
    'matplotlib.figure'
    """
    package = module.partition(".")[0]
    try:
        importlib.import_module(package)  # else a part that was imported before would do
        return importlib.import_module(module)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{call}: needs the package {package}, which is not installed; write "
            f"pip install {EXTRAS[package]}.",
            name=package,
        ) from error
