"""Figures for Prometheus, over HTTP."""

import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from jaxbn._extras import need
from jaxbn.watch import METRICS
from jaxbn.watch._metrics import Channels
from jaxbn.writers._writer import Figures, Writer, labelled, reason

DRIFT = {  # metric → its help; each is a field of `jaxbn.health.LayerDrift`
    "drift_alarm": "1 if the layer's input has drifted, else 0.",
    "drift_figure": "Shift beyond the tolerance, in standard errors.",
    "drift_threshold": "Figure above which there is an alarm.",
    "drift_shift": "Shift of the mean in sd, RMS over channels.",
    "drift_spread": "Change of the variance as a share of it, RMS over channels.",
    "drift_rows": "Independent rows seen.",
    "drift_values": "Independent values of a channel that these rows are worth.",
}
HELP = {**{name: metric.help for name, metric in METRICS.items()}, **DRIFT}
PATIENCE = 10.0  # seconds that a scrape may take; one that never ended would hold a thread forever


class Prometheus(Writer):
    """An HTTP server of the latest figures, at `http://127.0.0.1:PORT/metrics`.

    Use it to watch a long run, or a served model, on a dashboard. The figures are the gauges
    `jaxbn_layer_<metric>{layer="…"}` and `jaxbn_step`, in a registry of their own. A scrape sees
    the figures of one step, never parts of two. A scrape that takes longer than PATIENCE seconds
    is cut off.

    Args:
      port: 0 for any free port.
      address: an address of this machine. By default only this machine can read the figures. With
        an address that other machines reach, or "0.0.0.0" or "::", they can too. There is no
        password, so use such an address only in a network that you trust.

    Attributes:
      url: where the figures are.

    Raises:
      OSError: the port is taken, or this machine does not have the address or port.
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
        host = f"[{address}]" if ":" in str(address) else address
        try:
            self._server = _served(client.make_wsgi_app(registry), address, port)
        except (OSError, OverflowError, TypeError) as error:
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
        """Serve these figures from the next scrape on."""
        self._latest = step, labelled(figures)

    def rewind(self, step: int) -> None:
        """Serve no figures until the next `write`."""
        self._latest = None

    def collect(self) -> Iterator[Any]:
        """Give a scrape its figures; prometheus_client calls this method."""
        from prometheus_client.core import GaugeMetricFamily

        if self._latest is None:
            return
        step, figures = self._latest
        yield GaugeMetricFamily("jaxbn_step", "Training step of these figures.", value=step)
        for name, help in HELP.items():
            family = GaugeMetricFamily(f"jaxbn_layer_{name}", help, labels=["layer"])
            for layer, of_layer in figures.items():
                if name in of_layer:
                    family.add_metric([layer], of_layer[name])
            if family.samples:
                yield family

    def close(self) -> None:
        """Stop the server, which frees the port."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _served(app: Any, address: str, port: int) -> Any:
    """A server of the WSGI app at the address, IPv4 or IPv6, with a thread for each request."""
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

        def service_actions(self) -> None:  # `serve_forever` calls this twice a second
            for request, start in list(since.items()):
                if time.monotonic() - start > PATIENCE:
                    with suppress(OSError):
                        request.shutdown(socket.SHUT_RDWR)

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Ignore a scrape that was broken off."""

    class Silent(WSGIRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            """Write no line for each scrape."""

    since: dict[Any, float] = {}  # connection → when it was accepted
    return make_server(str(where[0]), port, app, Server, Silent)
