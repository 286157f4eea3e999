"""Where the figures of a watched training run go, when, from which process, and if that fails."""

from jaxbn.writers._log import NAMES, Log, open
from jaxbn.writers._writer import JSONLines, Prometheus, TensorBoard, Writer

__all__ = ["NAMES", "JSONLines", "Log", "Prometheus", "TensorBoard", "Writer", "open"]
