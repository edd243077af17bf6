"""The limit of what Redis and a socket can do: ready-made commands, no checksum, no error but an assertion."""

import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

IN_FLIGHT = 2
PIECE_BYTES = 256 * 1024


def connect(url: str) -> socket.socket:
    """A connected socket for a redis:// or unix:// URL without credentials."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(parts.path)
        return sock
    assert parts.port is not None
    sock = socket.create_connection(("127.0.0.1", parts.port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


class RawGets:
    """Reads the values of known keys, each as long as its buffer, again and again."""

    def __init__(self, sock: socket.socket, keys: Sequence[bytes], buffers: Sequence[memoryview]) -> None:
        self._sock, self._buffers = sock, buffers
        self._gets = [b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(key), key) for key in keys]
        self._heads = [memoryview(bytearray(len(b"$%d\r\n" % len(buffer)))) for buffer in buffers]
        self._tail = memoryview(bytearray(2))

    def get(self) -> None:
        for command in self._gets[: IN_FLIGHT - 1]:
            self._sock.sendall(command)
        for number, (head, into) in enumerate(zip(self._heads, self._buffers, strict=True)):
            for command in self._gets[number + IN_FLIGHT - 1 : number + IN_FLIGHT]:
                self._sock.sendall(command)
            for part in (head, into, self._tail):
                receive(self._sock, part)
        assert bytes(self._tail) == b"\r\n"


def receive(sock: socket.socket, into: memoryview) -> None:
    """Fill `into`."""
    filled = 0
    while filled < len(into):
        filled += sock.recv_into(into[filled : filled + PIECE_BYTES])
