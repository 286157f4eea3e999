"""What the batch norm layers of a training run see and learn.

A jitted step returns a `Record` for each layer, O(C) numbers, as an auxiliary result. On the host,
`metrics` turns each record into a few figures, which `jaxbn.writers` write.
"""

from jaxbn.watch._kernels import kernels
from jaxbn.watch._metrics import METRICS, Metric, channels, metrics
from jaxbn.watch._observe import Observed, linen, nnx
from jaxbn.watch._records import Kernel, Record, records

__all__ = [
    "METRICS",
    "Kernel",
    "Metric",
    "Observed",
    "Record",
    "channels",
    "kernels",
    "linen",
    "metrics",
    "nnx",
    "records",
]
