"""Batch normalization for JAX and Flax.

    params, state = jaxbn.init(64)
    y, state = jaxbn.batch_norm(x, params, state, train=True)

`jaxbn.linen.BatchNorm` and `jaxbn.nnx.BatchNorm` are the Flax modules; they are imported on
first use, so the functional core needs jax alone.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from jaxbn import calls, layers
from jaxbn.fold import FoldReport, fold
from jaxbn.freeze import decay_mask, freeze, labels, unfreeze
from jaxbn.functional import batch_norm
from jaxbn.moments import merge, moments
from jaxbn.one_value import OneValueWarning
from jaxbn.policy import checkpoint_policy
from jaxbn.recalibrate import recalibrate, reset
from jaxbn.replicas import assert_replicated, merge_updates, sync_state
from jaxbn.state import Moments, Params, State, init
from jaxbn.swap import swap

__version__ = "0.1.0"

__all__ = [
    "FoldReport",
    "Moments",
    "OneValueWarning",
    "Params",
    "State",
    "assert_replicated",
    "batch_norm",
    "calls",
    "checkpoint_policy",
    "convert",
    "decay_mask",
    "export",
    "fold",
    "freeze",
    "health",
    "init",
    "labels",
    "layers",
    "linen",
    "merge",
    "merge_updates",
    "moments",
    "nnx",
    "recalibrate",
    "reset",
    "swap",
    "sync_state",
    "unfreeze",
    "watch",
    "writers",
]

_LAZY = ("convert", "export", "health", "linen", "nnx", "watch", "writers")

if TYPE_CHECKING:
    # What type checkers see; any name would pass them were they to see `__getattr__`.
    from jaxbn import convert, export, health, linen, nnx, watch, writers
else:

    def __getattr__(name: str) -> ModuleType:
        if name in _LAZY:
            return importlib.import_module(f"jaxbn.{name}")
        from jaxbn.elsewhere import attribute

        raise AttributeError(attribute(name), name=name, obj=sys.modules[__name__])


def __dir__() -> list[str]:
    return list(__all__)
