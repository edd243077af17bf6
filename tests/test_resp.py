"""The wire: whatever way the bytes are cut up, they arrive, and a broken connection is never used again."""

import itertools
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache_store.errors import StoreUnavailable
from cache_store.redis_errors import DeadlinePassed, StoreStalled
from cache_store.resp import Buffer, ErrorReply, Wire, command, set_command

STALL_S = 0.2


class Pair:
    """A wire, and the socket at its other end, where a test plays the server."""

    def __init__(self) -> None:
        ours, self.server = socket.socketpair()
        self.server.settimeout(10)
        self.wire = Wire(ours, stall_s=STALL_S, disconnect=ours.close)

    def close(self) -> None:
        self.wire.close()
        self.server.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


def received(server: socket.socket, num_bytes: int) -> bytes:
    data = bytearray()
    while len(data) < num_bytes:
        data += server.recv(num_bytes - len(data))
    return bytes(data)


def test_commands_are_written_as_resp() -> None:
    assert command(b"GET", b"k") == b"*2\r\n$3\r\nGET\r\n$1\r\nk\r\n"
    value: list[Buffer] = [b"head", memoryview(b"payload")]
    forever = b"".join(set_command(b"k", value, ttl_s=0))
    assert forever == b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$11\r\nheadpayload\r\n"
    for_a_minute = b"".join(set_command(b"k", value, ttl_s=60))
    assert for_a_minute == b"*5\r\n$3\r\nSET\r\n$1\r\nk\r\n$11\r\nheadpayload\r\n$2\r\nEX\r\n$2\r\n60\r\n"


def test_a_payload_larger_than_the_sockets_buffers_arrives_whole(pair: Pair) -> None:
    payload = bytes(range(256)) * 20_000
    parts = set_command(b"k", [b"h" * 64, memoryview(payload)], ttl_s=9)
    whole = b"".join(parts)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(received(pair.server, len(whole))))
    reader.start()
    pair.wire.send(parts)
    reader.join()
    assert got == [whole]


def test_empty_parts_are_nothing(pair: Pair) -> None:
    pair.wire.send([b"", memoryview(b""), b"x"])
    assert pair.server.recv(10) == b"x"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(cuts=st.lists(st.integers(1, 60_000), max_size=8), payload_bytes=st.integers(0, 50_000))
def test_replies_are_read_however_they_are_cut(cuts: list[int], payload_bytes: int) -> None:
    payload = bytes(i % 249 for i in range(payload_bytes))
    stream = b"+OK\r\n$%d\r\n%b\r\n:-42\r\n$-1\r\n-ERR no\r\n$3\r\nabc\r\n+END\r\n" % (len(payload), payload)
    edges = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    pair = Pair()

    def serve() -> None:
        for start, end in itertools.pairwise(edges):
            pair.server.sendall(stream[start:end])
            time.sleep(0.0005)

    server = threading.Thread(target=serve)
    server.start()
    into = bytearray(b"\xa5" * len(payload))
    seen = bytearray()
    assert pair.wire.reply() == b"OK"
    assert pair.wire.bulk_bytes() == len(payload)
    pair.wire.read_into(memoryview(into), seen.extend)
    pair.wire.end_bulk()
    assert into == seen == payload
    assert pair.wire.reply() == -42
    assert pair.wire.bulk_bytes() is None
    assert pair.wire.bulk_bytes() == ErrorReply("ERR no")
    assert pair.wire.bulk_bytes() == 3
    pair.wire.skip(3)
    pair.wire.end_bulk()
    assert pair.wire.reply() == b"END"
    server.join()
    assert pair.wire.reusable
    pair.close()


@pytest.mark.parametrize("reply", [b"*1\r\n:1\r\n", b"junk\r\n", b"\r\n", b"$x\r\n", b"x" * 20_000])
def test_what_is_not_a_reply_closes_the_wire(pair: Pair, reply: bytes) -> None:
    pair.server.sendall(reply)
    with pytest.raises(StoreUnavailable):
        pair.wire.bulk_bytes()
    with pytest.raises(StoreUnavailable, match="closed"):
        pair.wire.send([b"x"])
    assert not pair.wire.reusable


def test_a_bulk_longer_than_announced_closes_the_wire(pair: Pair) -> None:
    pair.server.sendall(b"$3\r\nabcdef\r\n")
    assert pair.wire.bulk_bytes() == 3
    pair.wire.skip(3)
    with pytest.raises(StoreUnavailable, match="longer"):
        pair.wire.end_bulk()


def test_silence_is_a_stall_and_closes_the_wire(pair: Pair) -> None:
    start = time.monotonic()
    with pytest.raises(StoreStalled):
        pair.wire.reply()
    assert STALL_S * 0.9 < time.monotonic() - start < STALL_S + 0.3
    assert not pair.wire.reusable


def test_a_server_that_takes_nothing_is_a_stall(pair: Pair) -> None:
    with pytest.raises(StoreStalled):
        pair.wire.send([bytes(50 << 20)])


def test_the_deadline_comes_before_the_stall(pair: Pair) -> None:
    pair.wire.deadline_s = time.monotonic() + 0.05
    start = time.monotonic()
    with pytest.raises(DeadlinePassed):
        pair.wire.reply()
    assert time.monotonic() - start < STALL_S


def test_a_trickle_does_not_outlive_the_deadline(pair: Pair) -> None:
    stop = threading.Event()

    def trickle() -> None:
        pair.server.sendall(b"$1000\r\n")
        while not stop.wait(0.02):
            try:
                pair.server.sendall(b"x")
            except OSError:
                return

    server = threading.Thread(target=trickle)
    server.start()
    pair.wire.deadline_s = time.monotonic() + 0.3
    assert pair.wire.bulk_bytes() == 1000
    with pytest.raises(DeadlinePassed):
        pair.wire.read_into(memoryview(bytearray(1000)))
    stop.set()
    server.join()


def test_a_connection_closed_by_the_server_is_lost(pair: Pair) -> None:
    pair.server.sendall(b"$10\r\nabc")
    pair.server.close()
    assert pair.wire.bulk_bytes() == 10
    with pytest.raises(StoreUnavailable, match="closed by the server"):
        pair.wire.skip(10)


def test_an_idle_wire_is_reusable_until_the_server_says_something(pair: Pair) -> None:
    assert pair.wire.reusable
    pair.server.sendall(b"+unasked\r\n")
    assert not pair.wire.reusable


def test_an_idle_wire_whose_server_has_gone_is_not_reusable(pair: Pair) -> None:
    pair.server.close()
    assert not pair.wire.reusable


def test_a_wire_with_an_unread_reply_is_not_reusable(pair: Pair) -> None:
    pair.server.sendall(b"+one\r\n+two\r\n")
    pair.wire.reply()
    assert not pair.wire.reusable
    pair.wire.reply()
    assert pair.wire.reusable
