"""Figures for TensorBoard."""

import os
import struct
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxbn._extras import need
from jaxbn.watch._metrics import Channels
from jaxbn.writers._writer import Figures, Writer, append, labelled, new_or_there

BINS = 16


class TensorBoard(Writer):
    """An event file with scalars `metric/layer` and, over channels, histograms `array/layer`.

    Use it to see the figures beside those of the training run in TensorBoard. It needs tensorboardX
    for the file format, but does not use tensorboardX's writer thread. On a full disk that thread
    dies, its queue fills, and training would block forever.

    Args:
      folder: of the event file; missing folders are made.

    Raises:
      ModuleNotFoundError: tensorboardX is not installed.
      OSError: the folder cannot be written.

    >>> import os, tempfile
    >>> from jaxbn import writers
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     writers.TensorBoard(folder).write(50, {"bn": {"scale_abs_min": 0.5}}, {})
    ...     print([name.split(".")[2] for name in os.listdir(folder)])
    ['tfevents']
    """

    def __init__(self, folder: str | os.PathLike[str]):
        need("TensorBoard", "tensorboardX.proto.event_pb2")
        # The time is in nanoseconds, so that two files of one second have two names.
        name = f"events.out.tfevents.{time.time_ns()}.{os.getpid()}"
        self.path = new_or_there("TensorBoard", folder, name)
        self._event(file_version="brain.Event:2")

    def __str__(self) -> str:
        return str(self.path)

    def write(self, step: int, figures: Figures, arrays: Mapping[str, Channels]) -> None:
        """Append the step's scalars and histograms as one event."""
        from tensorboardX.proto.summary_pb2 import HistogramProto, Summary

        values = [
            Summary.Value(tag=f"{metric}/{layer}", simple_value=figure)
            for layer, of_layer in labelled(figures).items()
            for metric, figure in of_layer.items()
        ]
        for layer, of_channels in labelled(arrays).items():
            for name, v in of_channels.items():
                v = np.abs(v) if np.iscomplexobj(v) else v
                if (v := v[np.isfinite(v)]).size:
                    histogram = HistogramProto(**_histogram(v))
                    values.append(Summary.Value(tag=f"{name}/{layer}", histo=histogram))
        self._event(step=step, summary=Summary(value=values))

    def rewind(self, step: int) -> None:
        """Append an event that tells TensorBoard to drop this step and later ones."""
        from tensorboardX.proto.event_pb2 import SessionLog

        self._event(step=step, session_log=SessionLog(status=SessionLog.START))

    def _event(self, **fields: Any) -> None:
        """Append an event as a TFRecord: length, its checksum, the event, its checksum."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import masked_crc32c

        event = Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(event))
        sums = (struct.pack("<I", masked_crc32c(part)) for part in (length, event))
        append(self.path, length + next(sums) + event + next(sums))


def _histogram(v: np.ndarray) -> dict[str, Any]:
    """The fields of TensorBoard's histogram: counts in BINS equal bins, and each bin's upper limit.

    `np.histogram` is not used, because it takes five times as long. With 8 arrays a layer, that
    would be most of the time of a record.
    """
    low, high = v.min(), v.max()
    width = (high - low) / BINS or 1.0
    counts = np.bincount(np.minimum((v - low) / width, BINS - 1).astype(int), minlength=BINS)
    limits = [*(low + width * np.arange(1, BINS)), high]
    moments = {"num": v.size, "sum": v.sum(), "sum_squares": v @ v}
    # TensorBoard reads a bin's lower edge from the bin before, so an empty bin comes first.
    return moments | {
        "min": low,
        "max": high,
        "bucket_limit": [low, *limits],
        "bucket": [0, *counts],
    }
