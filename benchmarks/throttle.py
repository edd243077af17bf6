"""A TCP proxy with a limited rate, in a process of its own: what it forwards never enters Python's memory."""

import os
import socket
import subprocess
import sys
import threading
import time
from fcntl import F_SETPIPE_SZ, fcntl
from types import TracebackType
from typing import Self

_HOST = "127.0.0.1"
_MOST_BYTES = 1 << 20
_TICK_S = 2e-3
"""Of its bytes at a time: what is forwarded at once."""


class Throttle:
    """Forwards a port of its own to `port`; `rate` limits what comes back from there. Ended with its owner."""

    def __init__(self, port: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.throttle", str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def rate(self, bytes_per_s: float) -> None:
        """From now on, for all connections together."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{bytes_per_s}\n")
        self._process.stdin.flush()
        self._process.stdout.readline()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()  # closes its input: it ends
        self._process.wait()


class _Bucket:
    """What the rate allows, shared by all connections."""

    def __init__(self) -> None:
        self.bytes_per_s = float("inf")
        self._lock = threading.Lock()
        self._free_s = 0.0

    @property
    def chunk_bytes(self) -> int:
        return int(min(max(self.bytes_per_s * _TICK_S, 16 << 10), _MOST_BYTES))

    def pay(self, num_bytes: int) -> None:
        """Return when so many bytes have had the time that they take."""
        with self._lock:
            self._free_s = max(self._free_s, time.monotonic() - _TICK_S) + num_bytes / self.bytes_per_s
            wait_s = self._free_s - time.monotonic()
        if wait_s > 0:
            time.sleep(wait_s)


def _forward(source: socket.socket, target: socket.socket, bucket: _Bucket | None) -> None:
    """Until either end closes: from one socket through a pipe to the other, inside the kernel."""
    out_of, into = os.pipe()
    fcntl(into, F_SETPIPE_SZ, _MOST_BYTES)
    try:
        while got := os.splice(source.fileno(), into, bucket.chunk_bytes if bucket else _MOST_BYTES):
            if bucket:
                bucket.pay(got)
            while got:
                got -= os.splice(out_of, target.fileno(), got)
    except OSError:
        pass  # one end is gone: so is the other, below
    finally:
        os.close(out_of)
        os.close(into)
        for end in (source, target):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # closed already


def _accept(listener: socket.socket, port: int, bucket: _Bucket) -> None:
    while True:
        client, _ = listener.accept()
        server = socket.create_connection((_HOST, port))
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_forward, args=(client, server, None), daemon=True).start()
        threading.Thread(target=_forward, args=(server, client, bucket), daemon=True).start()


def _main() -> None:
    bucket = _Bucket()
    with socket.create_server((_HOST, 0)) as listener:
        accepting = threading.Thread(target=_accept, args=(listener, int(sys.argv[1]), bucket), daemon=True)
        accepting.start()
        print(listener.getsockname()[1], flush=True)
        for line in sys.stdin:
            bucket.bytes_per_s = float(line)
            print("set", flush=True)


if __name__ == "__main__":
    _main()
