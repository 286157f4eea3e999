"""Writers of the figures of a watched training run: JSON lines, TensorBoard, Prometheus."""

from jaxbn.writers._json_lines import JSONLines
from jaxbn.writers._log import NAMES, Log, open
from jaxbn.writers._prometheus import Prometheus
from jaxbn.writers._tensorboard import TensorBoard
from jaxbn.writers._writer import Writer

__all__ = ["NAMES", "JSONLines", "Log", "Prometheus", "TensorBoard", "Writer", "open"]
