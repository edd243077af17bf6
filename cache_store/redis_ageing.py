"""What ageing asks of Redis: how long nobody has read a block, and to put a smaller one in its place.

Whoever reads or writes a key makes it recent, and LRU eviction would then keep the coldest blocks longest. So blocks
that may age are told from others by their names, and one that was read is written back with the idle time that it had.
"""

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cache_store.codecs import LADDER
from cache_store.errors import BlockCorrupt, BlockForeign
from cache_store.frame import Framer
from cache_store.ids import DIGEST_BYTES, LADDER_MARK, MARK_BYTES, BlockHash
from cache_store.redis_errors import ours
from cache_store.redis_link import RedisLink
from cache_store.store import Exchanged, Held, Idle, Payload, Store

_PAGE_KEYS = 512
_LEAD = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1"""
_RESIGN = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end"
_READ = "return {redis.call('OBJECT', 'IDLETIME', KEYS[1]), redis.call('GET', KEYS[1])}"
_EXCHANGE = """
if redis.call('GETRANGE', KEYS[1], 0, #ARGV[1] - 1) ~= ARGV[1] then return 0 end
local ttl_ms = redis.call('PTTL', KEYS[1])
if ttl_ms == -1 then ttl_ms = 0 else ttl_ms = math.max(ttl_ms, 1) end
redis.call('SET', KEYS[1], ARGV[2], 'KEEPTTL')
redis.call('RESTORE', KEYS[1], ttl_ms, redis.call('DUMP', KEYS[1]), 'REPLACE', 'IDLETIME', ARGV[3])
return 1"""
"""A header's checksum covers name and payload, and a seal's nonce comes once: equal headers are equal blocks. Only
RESTORE sets an idle time; for it a TTL of 0 is none. All in one command of the server's, so that no turn finds the
block gone or half done."""


class RedisAgeing:
    """`cache_store.store.AgeingStore` on one server or a cluster. A leader leads for one model."""

    def __init__(self, link: RedisLink, framer: Framer, *, namespace: str, prefix: bytes) -> None:
        """Blocks' keys begin with `prefix`."""
        self._link = link
        self._framer = framer
        self._prefix = prefix
        self._lease = f"{namespace}:ageing:{framer.model.hex()}".encode()
        self._holder = uuid.uuid4().bytes

    def lead(self, *, for_s: float) -> bool:
        return bool(self._eval(_LEAD, self._lease, self._holder, int(for_s * 1000)))

    def resign(self) -> None:
        self._eval(_RESIGN, self._lease, self._holder)

    def idle(self) -> Iterator[Sequence[Idle]]:
        pattern = self._prefix + b"[0-9a-f]" * (2 * (DIGEST_BYTES + MARK_BYTES)) + LADDER_MARK.hex().encode()
        servers: list[Any] = self._link.servers()  # redis-py's own types don't agree with what its methods return
        for server in servers:
            cursor = 0
            while True:
                with ours("look for idle blocks"):
                    cursor, keys = server.scan(cursor, match=pattern, count=_PAGE_KEYS, _type="string")
                    with server.pipeline(transaction=False) as pipeline:
                        for key in keys:
                            pipeline.object("IDLETIME", key)
                        answers = pipeline.execute(raise_on_error=True)
                at_s = time.monotonic()
                yield [
                    Idle(BlockHash(bytes.fromhex(key[len(self._prefix) :].decode())), float(idle_s), at_s)
                    for key, idle_s in zip(keys, answers, strict=True)
                    if idle_s is not None  # gone since
                ]
                if cursor == 0:
                    break

    def exchange(self, idle: Idle, smaller: Callable[[Held], Payload]) -> Exchanged | None:
        key = self._prefix + idle.block.hex().encode()
        idle_s, value = self._eval(_READ, key)
        read_s = time.monotonic()
        if value is None or idle_s < idle.idle_s:
            return None
        header = value[: self._framer.header_bytes]
        try:
            held = self._held(idle.block, value)
            now = smaller(held)
            frame = Store(held.block, held.num_tokens, now.content, 0, now.codec, held.first_position, LADDER)
            new_value = b"".join(self._framer.value(frame, like=header))
        except (BlockCorrupt, BlockForeign):
            self._write(key, header, value, idle_s + time.monotonic() - read_s)
            raise
        written = self._write(key, header, new_value, idle_s + time.monotonic() - read_s)
        return Exchanged(held, now) if written else None

    def _held(self, block: BlockHash, value: bytes) -> Held:
        frame, payload = self._framer.whole(value, block=block)
        return Held(block, frame.codec, frame.num_tokens, frame.first_position, payload)

    def _write(self, key: bytes, header: bytes, value: bytes, idle_s: float) -> bool:
        """Give `key` a value and an idle time, if its block still has this header."""
        return bool(self._eval(_EXCHANGE, key, header, value, int(idle_s)))

    def _eval(self, script: str, key: bytes, *args: bytes | int) -> Any:
        with ours("age blocks"):
            return self._client().eval(script, 1, key, *args)

    def _client(self) -> Any:
        return self._link.client()
