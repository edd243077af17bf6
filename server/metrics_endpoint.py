"""The HTTP endpoint that shows metrics, on a thread of its own."""

import socket
from socketserver import ThreadingMixIn
from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

_LOOK_S = 0.05


class MetricsEndpoint:
    """prometheus_client's own endpoint, but for the half second that it takes to close: it blocks the event loop."""

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        """Answers until `close`. Raises OSError where the port is taken."""

        class Server(_Server):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        app: Any = make_wsgi_app(registry)
        self._server = make_server(host.strip("[]"), port, app, Server, _Silent)
        self.port = int(self._server.server_port)
        self._thread = Thread(target=self._server.serve_forever, args=(_LOOK_S,), name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Silent(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Nobody wants to read of each scrape."""
