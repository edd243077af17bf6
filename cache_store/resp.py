"""RESP2 on a connected socket, for the byte path: payloads go out by `sendmsg` and come in by `recv_into`, uncopied.

Knows what GET, SET and commands with small answers need of the protocol. Knows no keys, no blocks and no redis-py.
"""

import math
import select
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from cache_store.errors import StoreUnavailable
from cache_store.redis_errors import DeadlinePassed, StoreStalled

Buffer = bytes | memoryview

_LINE_BUFFER_BYTES = 16 * 1024
_PIECE_BYTES = 256 * 1024
"""Received at once: small enough to be still in the core's cache when it is looked at."""


class ErrorReply(NamedTuple):
    """The server understood and refused. The connection is as good as before."""

    text: str


Reply = bytes | int | ErrorReply


def command(*words: bytes) -> bytes:
    """A whole command."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


def set_command(key: bytes, value: Sequence[Buffer], *, ttl_s: int) -> list[Buffer]:
    """SET `key` to the parts of `value`, one after the other, which are not copied. `ttl_s` 0 sets no TTL."""
    value_bytes = sum(memoryview(part).nbytes for part in value)
    expiry = b"$2\r\nEX\r\n$%d\r\n%d\r\n" % (len(str(ttl_s)), ttl_s) if ttl_s else b""
    prefix = b"*%d\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (5 if ttl_s else 3, len(key), key, value_bytes)
    return [prefix, *value, b"\r\n" + expiry]


class Wire:
    """One connection, for one thread at a time. Any error but an ErrorReply closes it for good.

    An operation raises StoreStalled when nothing moves for `stall_s`, DeadlinePassed when `deadline_s` (of
    `time.monotonic()`, set by whoever borrows the wire) comes first, and StoreUnavailable when the connection is lost.
    """

    def __init__(self, sock: socket.socket, *, stall_s: float, disconnect: Callable[[], object]) -> None:
        self.deadline_s = math.inf
        self._sock = sock
        self._stall_s = stall_s
        self._disconnect = disconnect
        self._open = True
        self._buffer = bytearray(_LINE_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0  # received and not yet read: _buffer[_start:_end]
        self._send_some = _send_first if isinstance(sock, ssl.SSLSocket) else _send_all_parts

    @property
    def reusable(self) -> bool:
        """False once closed, by us or by the server, or with a reply that nobody waits for."""
        if not self._open or self._start != self._end:
            return False
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return not poll.poll(0)

    def close(self) -> None:
        if self._open:
            self._open = False
            self._disconnect()

    def send(self, parts: Sequence[Buffer]) -> None:
        left = [memoryview(part) for part in parts if len(part)]
        while left:
            sent = self._moved(lambda: self._send_some(self._sock, left))
            while left and sent >= left[0].nbytes:
                sent -= left.pop(0).nbytes
            if sent:
                left[0] = left[0][sent:]

    def reply(self) -> Reply:
        """Read a status, an integer or an error."""
        line = self._line()
        match line[:1]:
            case b"+":
                return line[1:]
            case b":":
                return int(line[1:])
            case b"-":
                return ErrorReply(line[1:].decode(errors="replace"))
        raise self._lost(f"unexpected reply {line[:32]!r}")

    def bulk_bytes(self) -> int | ErrorReply | None:
        """Read the head of a bulk reply: its length, None for nil. Then `read_into` or `skip` all, and `end_bulk`."""
        line = self._line()
        if line[:1] == b"-":
            return ErrorReply(line[1:].decode(errors="replace"))
        if line[:1] != b"$" or not line[1:].removeprefix(b"-").isdigit():
            raise self._lost(f"unexpected reply {line[:32]!r}")
        length = int(line[1:])
        return None if length < 0 else length

    def read_into(self, into: memoryview, seen: Callable[[memoryview], object] | None = None) -> None:
        """Fill `into` (bytes), showing each piece to `seen` while the core still has it in its cache."""
        filled = min(self._end - self._start, len(into))
        into[:filled] = self._view[self._start : self._start + filled]
        self._start += filled
        if seen is not None and filled:
            seen(into[:filled])
        while filled < len(into):
            piece = self._received(into[filled : filled + _PIECE_BYTES])
            filled += len(piece)
            if seen is not None:
                seen(piece)

    def skip(self, num_bytes: int) -> None:
        while num_bytes:
            if self._start == self._end:
                self._start, self._end = 0, len(self._received(self._view))
            taken = min(self._end - self._start, num_bytes)
            self._start += taken
            num_bytes -= taken

    def end_bulk(self) -> None:
        if self._line():
            raise self._lost("a bulk reply longer than it said")

    def _line(self) -> bytes:
        while (end := self._buffer.find(b"\r\n", self._start, self._end)) < 0:
            unread = self._end - self._start
            self._view[:unread] = self._view[self._start : self._end]
            self._start, self._end = 0, unread
            if unread == _LINE_BUFFER_BYTES:
                raise self._lost("a line without an end")
            self._end += len(self._received(self._view[unread:]))
        line = bytes(self._view[self._start : end])
        self._start = end + 2
        return line

    def _received(self, into: memoryview) -> memoryview:
        """Whatever is there, at least a byte."""
        received = self._moved(lambda: self._sock.recv_into(into))
        if not received:
            raise self._lost("closed by the server")
        return into[:received]

    def _moved(self, move: Callable[[], int]) -> int:
        if not self._open:
            raise StoreUnavailable("the connection is closed")
        left_s = self.deadline_s - time.monotonic()
        if left_s <= 0:
            self.close()
            raise DeadlinePassed("no time left")
        try:
            self._sock.settimeout(min(self._stall_s, left_s))
            return move()
        except TimeoutError as error:
            self.close()
            if left_s < self._stall_s:
                raise DeadlinePassed("no answer before the deadline") from error
            raise StoreStalled(f"nothing moved for {self._stall_s:g} s") from error
        except OSError as error:
            raise self._lost(str(error)) from error

    def _lost(self, why: str) -> StoreUnavailable:
        self.close()
        return StoreUnavailable(f"connection lost: {why}")


def _send_all_parts(sock: socket.socket, parts: list[memoryview]) -> int:
    return sock.sendmsg(parts)


def _send_first(sock: socket.socket, parts: list[memoryview]) -> int:
    return sock.send(parts[0])  # TLS has no sendmsg
