"""The front end over HTTP: a socket, TLS, and which paths there are. Knows no banks and no JSON."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator, Sequence

import structlog
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from protos.tls import ServerTls, is_loopback

_UNWIND_S = 1
_log = structlog.get_logger(__name__)


class HttpServer:
    """Lives on the event loop that it is started on."""

    def __init__(self, routes: Sequence[Route], tls: ServerTls) -> None:
        self._tls = tls
        app = Starlette(routes=routes, exception_handlers={HTTPException: _no_such_path})
        config = uvicorn.Config(
            app,
            ssl_context_factory=(lambda config, default: server_context(tls)) if tls.cert else None,
            timeout_graceful_shutdown=_UNWIND_S,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
        )
        self._server = _Server(config)
        self._serving: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; return the port. Raises OSError where it is taken, or a file of TLS can't be read."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host.strip("[]"), port), family=family)
        try:
            self._server.config.load()
        except OSError:  # ssl's errors too
            listening.close()
            raise
        if not (self._tls.cert or is_loopback(host)):
            _log.warning("calls travel in plain text", address=f"{host}:{port}", setting="tls_cert")
        self._serving = asyncio.create_task(self._server.serve([listening]), name="http")
        return int(listening.getsockname()[1])

    async def aclose(self) -> None:
        """Stop at once; what still runs is cancelled."""
        if self._serving is not None:
            self._server.should_exit = True
            await self._serving
            self._serving = None


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the process's own business."""
        yield


def server_context(tls: ServerTls) -> ssl.SSLContext:
    """What connections are shown and asked. A renewed certificate serves those that come after it. Raises OSError."""
    current, stamps = _load(tls), tls.stamps()

    def show(connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        nonlocal current, stamps
        try:
            if tls.stamps() != stamps:
                current, stamps = _load(tls), tls.stamps()
                _log.info("certificate read again", cert=tls.cert)
        except OSError as error:
            _log.error("the old certificate stays", error=str(error))
        connection.context = current

    first = _load(tls)
    first.sni_callback = show
    return first


def _load(tls: ServerTls) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=tls.client_ca or None)
    context.load_cert_chain(tls.cert, tls.key)
    if tls.client_ca:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


async def _no_such_path(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = "NOT_FOUND" if error.status_code == 404 else "UNIMPLEMENTED"
    answer = {"error": {"status": status, "message": f"{request.method} {request.url.path}: {error.detail}"}}
    return JSONResponse(answer, status_code=error.status_code, headers=error.headers)
