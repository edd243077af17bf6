"""TLS for gRPC, from PEM files: what a server shows and asks for, and what a client does.

The one place that knows gRPC's credentials, for clients, front ends and workers alike.
"""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import structlog

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Tls:
    """A client's side, as paths of PEM files."""

    ca: str = ""
    """The authorities that the server's certificate must come from; empty: gRPC's list of public ones."""

    cert: str = ""
    key: str = ""
    """What the client proves itself with, where the server asks for it. Both or neither."""

    server_name: str = ""
    """The name in the server's certificate, where it is not the one that it is called by."""

    def __post_init__(self) -> None:
        if bool(self.cert) != bool(self.key):
            raise ValueError(f"cert and key go together, got cert={self.cert!r} and key={self.key!r}")

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files, as they are now. Raises OSError."""
        return grpc.ssl_channel_credentials(_read(self.ca), _read(self.key), _read(self.cert))


@dataclass(frozen=True, slots=True)
class ServerTls:
    """A server's side, as paths of PEM files. All empty: plain text."""

    cert: str = ""
    key: str = ""
    client_ca: str = ""
    """Clients must show a certificate of these authorities; empty asks for none."""

    def check(self) -> None:
        """Raise OSError where a file can't be read."""
        for path in (self.cert, self.key, self.client_ca):
            _read(path)

    def stamps(self) -> list[tuple[int, int]]:
        """What changes when a file does. Raises OSError."""
        found = [Path(path).stat() for path in (self.cert, self.key, self.client_ca) if path]
        return [(stat.st_mtime_ns, stat.st_ino) for stat in found]


PLAIN_TEXT = ServerTls()


def open_channel(target: str, tls: Tls | None, options: Sequence[tuple[str, Any]]) -> grpc.aio.Channel:
    """A channel to `target`, in plain text without `tls`. Raises OSError where a file can't be read."""
    if tls is None:
        return grpc.aio.insecure_channel(target, options)
    named = (("grpc.ssl_target_name_override", tls.server_name),) if tls.server_name else ()
    return grpc.aio.secure_channel(target, tls.credentials(), (*options, *named))


def listen(server: grpc.aio.Server, host: str, port: int, tls: ServerTls, *, setting: str) -> int:
    """Bind the server; return the port. Raises OSError where it is taken, or a file can't be read.

    `setting` is what plain text on a network is warned of by.
    """
    address = f"{host}:{port}"
    try:
        if tls.cert:
            return server.add_secure_port(address, _Certificate(tls).credentials)
        if not is_loopback(host):
            _log.warning("calls travel in plain text", address=address, setting=setting)
        return server.add_insecure_port(address)
    except RuntimeError as error:  # gRPC's way to say that the port is taken
        raise OSError(f"cannot listen on {address}: {error}") from error


class _Certificate:
    """What a server shows. A renewed certificate serves the connections that come after it; others stay."""

    def __init__(self, tls: ServerTls) -> None:
        self._tls = tls
        self._stamps = self._tls.stamps()
        self.credentials = grpc.dynamic_ssl_server_credentials(  # type: ignore[attr-defined]  # not in the stubs
            self._load(), self._renewed, require_client_authentication=bool(tls.client_ca)
        )

    def _renewed(self) -> Any:
        """What to show from now on, None for what was shown before. gRPC asks before every handshake."""
        try:
            stamps = self._tls.stamps()
            if stamps == self._stamps:
                return None
            loaded, self._stamps = self._load(), stamps
        except OSError as error:
            _log.error("the old certificate stays", error=str(error))
            return None
        _log.info("certificate read again", cert=self._tls.cert)
        return loaded

    def _load(self) -> Any:
        key, cert = _read(self._tls.key), _read(self._tls.cert)
        return grpc.ssl_server_certificate_configuration(  # type: ignore[attr-defined]
            [(key, cert)], root_certificates=_read(self._tls.client_ca)
        )


def _read(path: str) -> bytes | None:
    return Path(path).read_bytes() if path else None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
