"""Batch normalization for JAX and Flax.

    params, state = jaxbn.init(64)
    y, state = jaxbn.batch_norm(x, params, state, train=True)

A map of the package; `help(jaxbn.NAME)` has arguments and an example of each name:

    one norm          batch_norm, init, Params, State; moments, merge, Moments; OneValueWarning
    in a Flax model   linen.BatchNorm, nnx.BatchNorm
    several devices   assert_replicated, sync_state, merge_updates
    less memory       checkpoint_policy
    a trained model   recalibrate, reset, freeze, unfreeze, swap
    other kernels     standardize
    the optimizer     labels, decay_mask
    serving           fold, FoldReport, FoldError; export.stablehlo, export.onnx, export.int8
    other libraries   convert.from_torch, from_keras, from_haiku, from_equinox, to_torch
    what is wrong     health.check, health.gap, health.drift, health.lint; health.advise: which norm
    a training run    watch.linen, watch.nnx; writers.open
    tools of your own calls (hooks on norm layers), layers (norm layers in a tree)

`python -m jaxbn` works on checkpoints. `linen` and `nnx` are imported on first use, so that the
functional core needs jax alone.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from jaxbn._adapt.freeze import freeze, unfreeze
from jaxbn._adapt.parameter_labels import decay_mask, labels
from jaxbn._adapt.recalibrate import recalibrate, reset
from jaxbn._adapt.replicas import assert_replicated, merge_updates, sync_state
from jaxbn._folding.fold import FoldError, FoldReport, fold
from jaxbn._inspection import hooks as calls
from jaxbn._inspection import layers
from jaxbn._op.batch_norm import batch_norm
from jaxbn._op.checkpoint_policy import checkpoint_policy
from jaxbn._op.moments import moments
from jaxbn._op.one_value import OneValueWarning
from jaxbn._op.pooling import merge
from jaxbn._op.standardize import standardize
from jaxbn._op.state import Moments, Params, State, init
from jaxbn._swapping.swap import swap

__version__ = "0.2.0"

__all__ = [
    "FoldError",
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
    "standardize",
    "swap",
    "sync_state",
    "unfreeze",
    "watch",
    "writers",
]

_LAZY = ("convert", "export", "health", "linen", "nnx", "watch", "writers")

if TYPE_CHECKING:
    # For type checkers. They do not see `__getattr__`, with which any name would pass.
    from jaxbn import convert, export, health, linen, nnx, watch, writers
else:

    def __getattr__(name: str) -> ModuleType:
        if name in _LAZY:
            if name in ("linen", "nnx"):
                from jaxbn._extras import need

                need(f"jaxbn.{name}", "flax")
            return importlib.import_module(f"jaxbn.{name}")
        from jaxbn._elsewhere import missing

        raise missing(name, sys.modules[__name__], sys._getframe(1))


def __dir__() -> list[str]:
    return list(__all__)
