"""Blocks into and out of Redis, from and to real tensors: our store, plain and sealed, a bare socket (the limit) and
redis-py.

All speak to the same server and overwrite values that are there. A payload's checksum is known before it is put, as
the host tier keeps it. TTLs are not refreshed after a get: that happens behind the caller, and would only disturb the
side that is measured next. With `--lmcache`, LMCache's C++ client beside ours, if it is installed.
"""

import itertools
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing

import redis
import torch
import xxhash

from benchmarks.harness import at_least, finish, interleaved, medians
from benchmarks.lmcache_redis import LMCacheRedis, LMCacheUnavailable
from benchmarks.raw_socket import IN_FLIGHT, RawGets, connect, receive
from cache_store.embedded_redis import RedisServer
from cache_store.frame import HEADER_BYTES, Framer, check_payload
from cache_store.ids import BlockHash, full_block_hashes, root_hash
from cache_store.layout import KVLayout
from cache_store.open_store import open_block_store
from cache_store.sealing import KEY_BYTES, Keyring, MasterKey, Purpose
from cache_store.store import BlockStore, Encoding, Fetch, Fetched, Store

_TOKENS = 16
_TTL_S = 3600
_TIMEOUT_S = 10.0

Buffers = Sequence[memoryview]
Side = Callable[[], None]


def run(
    *,
    block_bytes: int = 1_835_008,
    blocks: int = 64,
    rounds: int = 7,
    lmcache: bool = False,
    lmcache_threads: int = 4,
    as_json: bool = False,
) -> int:
    """Measure GB/s; return 0 when every bar holds.

    Args:
        block_bytes: Of one block, a multiple of 4096.
        blocks: In one batch.
        rounds: Counted rounds.
        lmcache: Beside LMCache's C++ client (`pip install --no-deps lmcache`), over TCP: it knows no unix sockets.
        lmcache_threads: Of that client, a connection each.
        as_json: Print one JSON object.
    """
    layout = KVLayout(
        num_layers=block_bytes // 4096, num_kv_heads=1, head_dim=32, block_tokens=_TOKENS, dtype="float32"
    )
    if layout.block_bytes != block_bytes:
        raise ValueError(f"block_bytes must be a multiple of 4096, got {block_bytes}")
    source = torch.randn(blocks, *layout.block_shape)
    target = torch.full_like(source, torch.nan)  # touches every page
    outgoing, incoming = _views(source), _views(target)
    with ExitStack() as stack:
        server = stack.enter_context(RedisServer())
        sides: dict[str, Side] = {}
        for transport, url in (("unix", server.unix_url), ("tcp", server.url)):
            ours = _Ours(stack.enter_context(closing(_open(url, layout))), outgoing, incoming)
            sealed = _Ours(stack.enter_context(closing(_open(url, layout, _keyring()))), outgoing, incoming)
            raw = _Raw(stack.enter_context(connect(url)), outgoing, incoming)
            client = stack.enter_context(redis.Redis.from_url(url))
            theirs = _RedisPy(client, Framer(layout, b"benchmark"), outgoing, incoming)
            bare = _RedisPyBare(client, outgoing, incoming)
            both = (("rekindle", ours), ("sealed", sealed))
            for name, side in (("raw", raw), *both, ("redis-py", theirs), ("bare redis-py", bare)):
                sides[f"{transport} put {name}"] = side.put
                sides[f"{transport} get {name}"] = side.get
        lmcache_says = (
            _add_lmcache(stack, server, sides, outgoing, incoming, lmcache_threads) if lmcache else "not asked"
        )
        timed = {name: _gb_per_s(side, blocks * block_bytes) for name, side in sides.items()}
        speeds = medians(interleaved(timed, rounds=rounds, quiet=as_json, title="store"))
        for name, side in both:
            target.fill_(torch.nan)
            side.get()
            if not torch.equal(source, target):
                raise RuntimeError(f"the blocks that came back ({name}) are not those that were stored")
    bars = [
        at_least(f"{transport} {verb} against {what}", _ratio(speeds, f"{transport} {verb}", side), least)
        for side, what, least in (("raw", "a raw socket", 0.9), ("redis-py", "redis-py", 1.5))
        for transport, verb in itertools.product(("unix", "tcp"), ("put", "get"))
    ]
    bars += [
        at_least(f"{transport} {verb} sealed against plain", speeds[f"{transport} {verb} sealed"] / plain, 0.5)
        for transport, verb in itertools.product(("unix", "tcp"), ("put", "get"))
        for plain in [speeds[f"{transport} {verb} rekindle"]]
    ]
    if "tcp put lmcache" in speeds:
        bars += [
            at_least(f"{transport} {verb} against LMCache over TCP", ratio, 1)
            for transport, verb in itertools.product(("unix", "tcp"), ("put", "get"))
            for ratio in [speeds[f"{transport} {verb} rekindle"] / speeds[f"tcp {verb} lmcache"]]
        ]
    figures = {"block_bytes": block_bytes, "blocks": blocks, "lmcache": lmcache_says} | {
        f"{name} GB/s": gb for name, gb in speeds.items()
    }
    return finish("store", figures, bars, as_json=as_json)


def _open(url: str, layout: KVLayout, keyring: Keyring | None = None) -> BlockStore:
    """A store of ours; those that seal have names of their own."""
    store = open_block_store(
        url,
        layout,
        b"benchmark",
        timeout_s=_TIMEOUT_S,
        refresh_ttl_s=0,
        namespace="plain" if keyring is None else "sealed",
        sealer=keyring.sealer(Purpose.BLOCKS) if keyring is not None else None,
    )
    assert store is not None
    return store


def _keyring() -> Keyring:
    return Keyring([MasterKey("benchmark", secrets.token_bytes(KEY_BYTES))], names=secrets.token_bytes(KEY_BYTES))


class _Ours:
    def __init__(self, store: BlockStore, outgoing: Buffers, incoming: Buffers) -> None:
        pairs = list(zip(_names(len(outgoing)), outgoing, incoming, strict=True))
        self._store = store
        self._stores = [_stored(name, payload) for name, payload, _ in pairs]
        self._fetches = [Fetch(name, _TOKENS, into) for name, _, into in pairs]

    def put(self) -> None:
        self._store.put(self._stores)

    def get(self) -> None:
        self._store.get(self._fetches, _must_hit, deadline_s=time.monotonic() + _TIMEOUT_S)


class _Raw:
    """The least that a client can do: commands ready-made, no checksum, no error but an assertion."""

    def __init__(self, sock: socket.socket, outgoing: Buffers, incoming: Buffers) -> None:
        self._sock, self._outgoing = sock, outgoing
        block_bytes = outgoing[0].nbytes
        keys = [b"raw:%04d" % number for number in range(len(outgoing))]
        self._sets = [b"*3\r\n$3\r\nSET\r\n$8\r\n%b\r\n$%d\r\n" % (key, block_bytes) for key in keys]
        self.get = RawGets(sock, keys, incoming).get
        self._ok = memoryview(bytearray(5))

    def put(self) -> None:
        for number, payload in enumerate(self._outgoing):
            parts = [memoryview(self._sets[number]), payload, memoryview(b"\r\n")]
            while parts:
                sent = self._sock.sendmsg(parts)
                while parts and sent >= parts[0].nbytes:
                    sent -= parts.pop(0).nbytes
                if sent:
                    parts[0] = parts[0][sent:]
            if number >= IN_FLIGHT - 1:
                receive(self._sock, self._ok)
        for _ in range(IN_FLIGHT - 1):
            receive(self._sock, self._ok)
        assert bytes(self._ok) == b"+OK\r\n"


class _RedisPy:
    """redis-py's client and default parser doing the same: one value of header and payload, checked when it is back."""

    def __init__(self, client: redis.Redis, framer: Framer, outgoing: Buffers, incoming: Buffers) -> None:
        self._client, self._framer = client, framer
        triples = list(zip(_names(len(outgoing)), outgoing, incoming, strict=True))
        self._stores = [_stored(name, payload) for name, payload, _ in triples]
        self._fetches = [Fetch(name, _TOKENS, into) for name, _, into in triples]

    def put(self) -> None:
        for store in self._stores:
            self._client.set(store.block, b"".join((self._framer.header(store), store.payload)), ex=store.ttl_s)

    def get(self) -> None:
        for fetch in self._fetches:
            value = self._client.get(fetch.block)
            assert isinstance(value, bytes)
            frame = self._framer.expect(value[:HEADER_BYTES], fetch, value_bytes=len(value))
            payload = memoryview(value)[HEADER_BYTES:]
            check_payload(xxhash.xxh3_64_intdigest(payload), frame.checksum)
            fetch.into[:] = payload


class _RedisPyBare:
    """redis-py handed one buffer, which it sends uncopied: no header, no checksum. Not a block, but its best."""

    def __init__(self, client: redis.Redis, outgoing: Buffers, incoming: Buffers) -> None:
        self._client, self._outgoing, self._incoming = client, outgoing, incoming

    def put(self) -> None:
        for number, payload in enumerate(self._outgoing):
            self._client.set(f"bare:{number}", payload)

    def get(self) -> None:
        for number, into in enumerate(self._incoming):
            value = self._client.get(f"bare:{number}")
            assert isinstance(value, bytes)
            into[:] = value


def _add_lmcache(
    stack: ExitStack,
    server: RedisServer,
    sides: dict[str, Side],
    outgoing: Buffers,
    incoming: Buffers,
    threads: int,
) -> str:
    """Add LMCache's client to the sides, or say why not."""
    try:
        client = stack.enter_context(LMCacheRedis("127.0.0.1", server.port, threads=threads))
    except LMCacheUnavailable as error:
        return str(error)
    keys = [f"lmcache:{number:04d}" for number in range(len(outgoing))]
    sides["tcp put lmcache"] = lambda: client.put(keys, outgoing)
    sides["tcp get lmcache"] = lambda: client.get(keys, incoming)
    return f"{threads} threads"


def _stored(name: BlockHash, payload: memoryview) -> Store:
    return Store(name, _TOKENS, payload, _TTL_S, checksum=xxhash.xxh3_64_intdigest(payload))


def _names(blocks: int) -> list[BlockHash]:
    return list(full_block_hashes(root_hash(b"benchmark", ""), range(_TOKENS * blocks), _TOKENS))


def _views(tensor: torch.Tensor) -> list[memoryview]:
    return [memoryview(block.reshape(-1).view(torch.uint8).numpy()) for block in tensor]


def _must_hit(index: int, outcome: Fetched, encoding: Encoding | None) -> None:
    if outcome is not Fetched.HIT:
        raise RuntimeError(f"block {index} is {outcome.name}")


def _gb_per_s(side: Side, num_bytes: int) -> Callable[[], float]:
    def measure() -> float:
        start_s = time.perf_counter()
        side()
        return num_bytes / (time.perf_counter() - start_s) / 1e9

    return measure


def _ratio(speeds: dict[str, float], what: str, against: str) -> float:
    return speeds[f"{what} rekindle"] / speeds[f"{what} {against}"]
