"""How the figures of a watched run are written: as JSON lines, for TensorBoard, for Prometheus."""

import json
import math
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from jaxbn._extras import need
from jaxbn._files import replacing
from jaxbn._text import distinct, printable
from jaxbn.watch import METRICS, Channels

Figures = Mapping[str, Mapping[str, float]]  # layer → metric → figure

HELP = {name: metric.help for name, metric in METRICS.items()}
DRIFT = {  # metric → what it is; each a field of `jaxbn.health.LayerDrift`
    "drift_alarm": "1 where what comes to the layer has drifted, else 0.",
    "drift_figure": "Shift beyond the tolerance, in standard errors.",
    "drift_threshold": "Figure above which there is an alarm.",
    "drift_shift": "Shift of the mean in sd, RMS over channels.",
    "drift_spread": "Change of the variance as a share of it, RMS over channels.",
    "drift_rows": "Independent rows seen.",
    "drift_values": "Independent values of a channel that these rows are worth.",
}


class Writer:
    """Where figures go; a class of your own with `write` does for `Log` as well.

    >>> from jaxbn import writers
    >>> class Print(writers.Writer):
    ...     def write(self, step, figures, arrays):
    ...         print(step, figures["bn"]["scale_abs_min"])
    >>> Print().write(50, {"bn": {"scale_abs_min": 0.5}}, {})
    50 0.5
    """

    def write(self, step: int, figures: Figures, arrays: Mapping[str, Channels]) -> None:
        """All of a step or nothing: layer → metric → figure, and layer → name → [C]."""
        raise NotImplementedError

    def rewind(self, step: int) -> None:
        """Training goes on from this step: what was written of it and of later ones is void."""

    def close(self) -> None:
        """Nothing more will be written."""

    def __str__(self) -> str:
        """Where to look."""
        return type(self).__name__


class JSONLines(Writer):
    """A line a step, `{"step": 50, "layers": {"bn1": {"batch_var_min": 0.25, …}, …}}`.

    NaN and infinity, which JSON has not, are null. A file that is there is continued; half a
    line, which a kill may leave at its end, is cut off.

    Raises:
      OSError: the file cannot be written.

    >>> import pathlib, tempfile
    >>> from jaxbn import writers
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "watch.jsonl")
    ...     writers.JSONLines(path).write(50, {"bn": {"scale_abs_min": 0.5}}, {})
    ...     print(path.read_text(), end="")
    {"step": 50, "layers": {"bn": {"scale_abs_min": 0.5}}}
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = _new_or_there("JSONLines", Path(path))
        whole = self.path.read_bytes().rfind(b"\n") + 1
        os.truncate(self.path, whole)

    def __str__(self) -> str:
        return str(self.path)

    def write(self, step: int, figures: Figures, arrays: Mapping[str, Channels]) -> None:
        """Append the step's line."""
        layers = {
            layer: {k: v if math.isfinite(v) else None for k, v in of_layer.items()}
            for layer, of_layer in figures.items()
        }
        line = json.dumps({"step": step, "layers": layers}, allow_nan=False) + "\n"
        _append(self.path, line.encode())

    def rewind(self, step: int) -> None:
        """Drop the lines of this step and of later ones."""
        lines = self.path.read_text().splitlines(keepends=True)
        with replacing(self.path) as file:
            file.write_text("".join(x for x in lines if json.loads(x)["step"] < step))


class TensorBoard(Writer):
    """An event file in the folder: scalars `metric/layer`, histograms `array/layer` of channels.

    Needs tensorboardX, whose formats it takes and whose thread it does not: after a full disk
    that thread would be dead, its queue full, and the training run waiting on it for good.

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
        # To the nanosecond: a second file of the same second must not be the first one.
        name = f"events.out.tfevents.{time.time_ns()}.{os.getpid()}"
        self.path = _new_or_there("TensorBoard", Path(folder) / name)
        self._event(file_version="brain.Event:2")

    def __str__(self) -> str:
        return str(self.path)

    def write(self, step: int, figures: Figures, arrays: Mapping[str, Channels]) -> None:
        """Append the step's scalars and histograms, in one event."""
        from tensorboardX.proto.summary_pb2 import HistogramProto, Summary

        values = [
            Summary.Value(tag=f"{metric}/{layer}", simple_value=figure)
            for layer, of_layer in _labelled(figures).items()
            for metric, figure in of_layer.items()
        ]
        for layer, of_channels in _labelled(arrays).items():
            for name, v in of_channels.items():
                v = np.abs(v) if np.iscomplexobj(v) else v
                if (v := v[np.isfinite(v)]).size:
                    histogram = HistogramProto(**_histogram(v))
                    values.append(Summary.Value(tag=f"{name}/{layer}", histo=histogram))
        self._event(step=step, summary=Summary(value=values))

    def rewind(self, step: int) -> None:
        """Tell the reader to drop the events of this step and of later ones."""
        from tensorboardX.proto.event_pb2 import SessionLog

        self._event(step=step, session_log=SessionLog(status=SessionLog.START))

    def _event(self, **fields: Any) -> None:
        """Append an event as a TFRecord: length, its checksum, the event, its checksum."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import masked_crc32c

        event = Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(event))
        sums = (struct.pack("<I", masked_crc32c(part)) for part in (length, event))
        _append(self.path, length + next(sums) + event + next(sums))


BINS = 16


def _histogram(v: np.ndarray) -> dict[str, Any]:
    """The fields of TensorBoard's histogram: counts of BINS equal bins, each up to its limit.

    `np.histogram` takes five times as long, which at 8 arrays a layer is most of a record.
    """
    low, high = v.min(), v.max()
    width = (high - low) / BINS or 1.0
    counts = np.bincount(np.minimum((v - low) / width, BINS - 1).astype(int), minlength=BINS)
    limits = [*(low + width * np.arange(1, BINS)), high]
    moments = {"num": v.size, "sum": v.sum(), "sum_squares": v @ v}
    # The first, empty bin is where TensorBoard takes the lower edge of the second from.
    return moments | {
        "min": low,
        "max": high,
        "bucket_limit": [low, *limits],
        "bucket": [0, *counts],
    }


class Prometheus(Writer):
    """The latest figures at `http://127.0.0.1:PORT/metrics`, from a registry of their own.

    Gauges `jaxbn_layer_<metric>{layer="…"}` and `jaxbn_step`. A scrape sees one step's figures,
    never parts of two, and has PATIENCE seconds from its first byte to its last. Other machines
    are served where `address` is one of this machine's that they reach, or "0.0.0.0" or "::"; there
    is no password, so that is for a network you trust.

    Attributes:
      url: where the figures are.

    Raises:
      OSError: the port is taken, or address and port are none.
      ModuleNotFoundError: prometheus-client is not installed.

    >>> import urllib.request
    >>> from jaxbn import writers
    >>> writer = writers.Prometheus(port=0)  # any that is free
    >>> writer.write(50, {"bn": {"scale_abs_min": 0.5}}, {})
    >>> text = urllib.request.urlopen(writer.url).read().decode()
    >>> writer.close()
    >>> [line for line in text.splitlines() if line.startswith("jaxbn_layer")]
    ['jaxbn_layer_scale_abs_min{layer="bn"} 0.5']
    """

    def __init__(self, port: int = 9464, address: str = "127.0.0.1"):
        client = need("Prometheus", "prometheus_client")
        self._latest: tuple[int, Figures] | None = None
        registry = client.CollectorRegistry()
        registry.register(self)
        host = f"[{address}]" if ":" in address else address
        try:
            self._server = _served(client.make_wsgi_app(registry), address, port)
        except (OSError, OverflowError) as error:
            raise OSError(
                f"Prometheus: cannot listen at {host}:{port} ({reason(error)}), expected an "
                f"address of this machine and a port that is free; write port=0 for any free one."
            ) from None
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://{host}:{self._server.server_port}/metrics"

    def __str__(self) -> str:
        return self.url

    def write(self, step: int, figures: Figures, arrays: Mapping[str, Channels]) -> None:
        """Show these figures from the next scrape on."""
        self._latest = step, _labelled(figures)

    def rewind(self, step: int) -> None:
        """Show nothing until the next `write`."""
        self._latest = None

    def collect(self) -> Iterator[Any]:
        """What a scrape gets; prometheus_client calls it."""
        from prometheus_client.core import GaugeMetricFamily

        if self._latest is None:
            return
        step, figures = self._latest
        yield GaugeMetricFamily("jaxbn_step", "Training step of these figures.", value=step)
        drift = any(of_layer.keys() & DRIFT.keys() for of_layer in figures.values())
        for name, help in (DRIFT if drift else HELP).items():
            family = GaugeMetricFamily(f"jaxbn_layer_{name}", help, labels=["layer"])
            for layer, of_layer in figures.items():
                if name in of_layer:
                    family.add_metric([layer], of_layer[name])
            yield family

    def close(self) -> None:
        """End the server; the port is free again."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


PATIENCE = 10.0  # seconds that a scrape may take: one that never ends would hold a thread for good


def _served(app: Any, address: str, port: int) -> Any:
    """A server of the WSGI app at the address, IPv4 or IPv6, a thread a request."""
    from socketserver import ThreadingMixIn
    from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

    kind = socket.SOCK_STREAM
    family, *_, where = socket.getaddrinfo(address, port, type=kind, flags=socket.AI_PASSIVE)[0]

    class Server(ThreadingMixIn, WSGIServer):
        daemon_threads = True
        address_family = family

        def process_request(self, request: Any, client_address: Any) -> None:
            since[request] = time.monotonic()
            super().process_request(request, client_address)

        def shutdown_request(self, request: Any) -> None:
            since.pop(request, None)
            super().shutdown_request(request)

        def service_actions(self) -> None:  # twice a second
            for request, start in list(since.items()):
                if time.monotonic() - start > PATIENCE:
                    with suppress(OSError):
                        request.shutdown(socket.SHUT_RDWR)

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A scrape that breaks off is no news."""

    class Silent(WSGIRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            """Of a scrape no line is written."""

    since: dict[Any, float] = {}  # connection → when it was accepted
    return make_server(str(where[0]), port, app, Server, Silent)


def _labelled(of_layers: Mapping[str, Any]) -> dict[str, Any]:
    """The layers by names that any encoding and any terminal takes."""
    names = distinct(printable(layer) or "." for layer in of_layers)
    return dict(zip(names, of_layers.values(), strict=True))


def _new_or_there(call: str, path: Path) -> Path:
    """The path of a file that can be appended to, made if it was not there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise OSError(
            f"{call}: cannot write {path} ({reason(error)}), expected a folder that this process "
            f"may write in."
        ) from None
    return path


def _append(path: Path, data: bytes) -> None:
    """All of data at the end of the file, or none of it."""
    size = path.stat().st_size
    try:
        with path.open("ab") as file:
            file.write(data)
    except OSError:
        with suppress(OSError):
            os.truncate(path, size)
        raise


def reason(error: BaseException) -> str:
    """What an error says, without its number."""
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
