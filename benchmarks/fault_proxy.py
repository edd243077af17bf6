"""A TCP proxy that can be slow, narrow, silent or broken, in a process of its own.

What it forwards never enters Python's memory. Knows sockets; nothing of what is said over them.
"""

import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from fcntl import F_SETPIPE_SZ, fcntl
from types import TracebackType
from typing import Any, Self

_HOST = "127.0.0.1"
_MOST_BYTES = 1 << 20
_TICK_S = 2e-3
"""Of its bytes at a time: what is forwarded at once."""
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True)
class Weather:
    """What the proxy does to its connections."""

    bytes_per_s: float = float("inf")
    """Of answers, for all connections together."""
    delay_s: float = 0.0
    """Each piece of an answer is held for so long."""
    stalled: bool = False
    """Nothing passes; it is held, and passes when this ends."""
    swallowed: bool = False
    """Whatever is said vanishes: the connections that lost something break when this ends."""
    reset_within_bytes: int = 0
    """Each connection is reset after 1 to so many bytes of answers; 0: none is."""
    refused: bool = False
    """Connections break, and no new ones are taken."""


class FaultProxy:
    """Forwards a port of its own to `port`, both on loopback. Ends with its owner. `seed` chooses where resets fall."""

    def __init__(self, port: int, *, seed: int = 0) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.fault_proxy", str(port), str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.port = int(self._answer())

    def set(self, **changes: Any) -> None:
        """From now on, for all connections: the fields of `Weather` that are named; the others are as they were new."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(changes) + "\n")
        self._process.stdin.flush()
        self._answer()

    def heal(self) -> None:
        """Forward as if nothing had been."""
        self.set()

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()  # closes its input: it ends

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the fault proxy ended: exit status {self._process.wait()}")
        return line


class _Faults:
    """The weather of now, shared by all connections."""

    def __init__(self) -> None:
        self.weather = Weather()
        self._changed = threading.Condition()
        self._paying = threading.Lock()
        self._free_s = 0.0

    @property
    def chunk_bytes(self) -> int:
        return int(min(max(self.weather.bytes_per_s * _TICK_S, 16 << 10), _MOST_BYTES))

    def change(self, weather: Weather) -> None:
        with self._changed:
            self.weather = weather
            self._changed.notify_all()

    def wait_out_stall(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self.weather.stalled)

    def hold(self, num_bytes: int) -> None:
        """Return when so many bytes of an answer have had the time that they take."""
        weather = self.weather
        with self._paying:
            self._free_s = max(self._free_s, time.monotonic() - _TICK_S) + num_bytes / weather.bytes_per_s
            wait_s = self._free_s - time.monotonic()
        if weather.delay_s or wait_s > 0:
            with self._changed:  # whatever is held by a delay passes when that ends
                self._changed.wait_for(lambda: self.weather is not weather, max(wait_s, weather.delay_s))


class _Pair:
    """A client's connection and ours to the server, forwarded by a thread each way. Closed by the last of the two."""

    def __init__(self, client: socket.socket, server: socket.socket, faults: _Faults, reset_draw: float) -> None:
        self._client, self._server, self._faults, self._reset_draw = client, server, faults, reset_draw
        self._lock = threading.Lock()
        self._forwarding = 2
        self._lossy = False
        self._broken = False
        self._answered_bytes = 0
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def start(self) -> None:
        for source, target in ((self._client, self._server), (self._server, self._client)):
            threading.Thread(target=self._forward, args=(source, target), daemon=True).start()

    def break_off(self) -> None:
        """Both ends hear RST: reading ends now, and closing without a word of goodbye resets."""
        with self._lock:
            self._broken = True
            if not self._forwarding:
                return
            for end in (self._client, self._server):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                _shut(end, socket.SHUT_RD)

    def break_off_if_lossy(self) -> None:
        if self._lossy:
            self.break_off()

    @property
    def is_over(self) -> bool:
        return not self._forwarding

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        """Until either end closes: from one socket through a pipe to the other, inside the kernel."""
        out_of, into = os.pipe()
        fcntl(into, F_SETPIPE_SZ, _MOST_BYTES)
        answers = source is self._server
        try:
            while not self._broken and (got := os.splice(source.fileno(), into, self._chunk(answers))):
                self._faults.wait_out_stall()
                if self._faults.weather.swallowed:
                    self._lossy = True
                    os.read(out_of, got)
                    continue
                if answers:
                    self._faults.hold(got)
                    self._answered_bytes += got
                while got and not self._broken:
                    got -= os.splice(out_of, target.fileno(), got)
                if answers and self._reset_is_due():
                    self.break_off()
        except OSError:
            pass  # one end is gone: so is the other, below
        finally:
            os.close(out_of)
            os.close(into)
            self._end()

    def _chunk(self, answers: bool) -> int:
        """How much to take at once; up to a reset, so that it falls where it should."""
        if not answers:
            return _MOST_BYTES
        within = self._faults.weather.reset_within_bytes
        left = int(self._reset_draw * within) - self._answered_bytes
        return min(self._faults.chunk_bytes, left) if left > 0 else self._faults.chunk_bytes

    def _reset_is_due(self) -> bool:
        within = self._faults.weather.reset_within_bytes
        return within > 0 and self._answered_bytes >= int(self._reset_draw * within)

    def _end(self) -> None:
        with self._lock:
            self._forwarding -= 1
            for end in (self._client, self._server):
                if self._forwarding:
                    _shut(end, socket.SHUT_RD if self._broken else socket.SHUT_RDWR)
                else:
                    end.close()


def _shut(end: socket.socket, how: int) -> None:
    try:
        end.shutdown(how)
    except OSError:
        return  # closed by its peer already


class _Proxy:
    """Takes connections, and does as it is told to them."""

    def __init__(self, port: int, seed: int) -> None:
        self._target = port
        self._random = random.Random(seed)
        self._faults = _Faults()
        self._pairs: list[_Pair] = []
        self._lock = threading.Lock()
        self._listener = socket.create_server((_HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self._accept()

    def change(self, weather: Weather) -> None:
        before = self._faults.weather
        self._faults.change(weather)
        with self._lock:
            for pair in self._pairs:
                pair.break_off() if weather.refused else pair.break_off_if_lossy()
        if weather.refused and not before.refused:
            _shut(self._listener, socket.SHUT_RDWR)  # wakes who accepts, who then closes it
            self._accepting.join()
        elif before.refused and not weather.refused:
            self._listener = socket.create_server((_HOST, self.port))
            self._accept()

    def _accept(self) -> None:
        self._accepting = threading.Thread(target=self._keep_accepting, args=(self._listener,), daemon=True)
        self._accepting.start()

    def _keep_accepting(self, listener: socket.socket) -> None:
        with listener:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return  # shut, to refuse
                self._connect(client)

    def _connect(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection((_HOST, self._target))
        except OSError:  # nobody is there: that is what the client shall see
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            client.close()
            return
        pair = _Pair(client, server, self._faults, self._random.random())
        with self._lock:
            self._pairs = [*(old for old in self._pairs if not old.is_over), pair]
        pair.start()


def _main() -> None:
    proxy = _Proxy(int(sys.argv[1]), int(sys.argv[2]))
    print(proxy.port, flush=True)
    for line in sys.stdin:
        proxy.change(replace(Weather(), **json.loads(line)))
        print("set", flush=True)


if __name__ == "__main__":
    _main()
