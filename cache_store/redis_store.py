"""The shared cold tier in Redis: one value per block, found by its hash.

Knows keys, frames and commands. Which node, which socket and whether it is worth a try is `redis_lanes`' business.
"""

import time
from collections.abc import Sequence
from typing import Any

from cache_store.counters import Counters
from cache_store.errors import BlockCorrupt, BlockForeign, StoreUnavailable
from cache_store.frame import Framer
from cache_store.ids import DIGEST_BYTES, BlockHash, TenantMark, mark_of
from cache_store.redis_ageing import RedisAgeing
from cache_store.redis_errors import DeadlinePassed, StoreStalled, ours
from cache_store.redis_keeper import Keeper, KeyCommands
from cache_store.redis_lanes import Batch, Lanes
from cache_store.redis_link import RedisLink
from cache_store.resp import Buffer, ErrorReply, Wire, command, set_command
from cache_store.store import DELETIONS_KNOWN_S, Encoding, Fetch, Fetched, Landed, ServerInfo, Store, StoreStats

_IN_FLIGHT = 2
"""Blocks asked for, or sent, ahead of the one being read: the server copies one while we check another. More only
makes it hold more copies at once."""
_PAGE_KEYS = 1024
"""Looked at together when a tenant is erased: well below a millisecond of the server's time."""
_ABSURD_BYTES = 64 * 1024 * 1024
"""A value longer than this is no block of anybody's: not even worth reading to its end."""
_PROLONG = b"""
local left = redis.call('TTL', KEYS[1])
if left < 0 or left >= tonumber(ARGV[1]) then return 0 end
return redis.call('EXPIRE', KEYS[1], ARGV[1])"""
"""Never shortens a TTL, and gives none to a block that is pinned. Sent whole each time: it is short, and a server that
has restarted knows no script by its digest."""

_NOTE = b"redis.call('DEL', KEYS[1]) redis.call('SET', KEYS[1], '', 'EX', ARGV[1]) return 1"
"""A full server refuses a script's first write, but no DEL, and no later one: deleting never fails for want of room."""


class RedisBlockStore:
    """`cache_store.store.BlockStore` on any Redis that `RedisLink` reaches."""

    def __init__(self, link: RedisLink, framer: Framer, *, refresh_ttl_s: int, namespace: str) -> None:
        """A block used has at least `refresh_ttl_s` seconds left (0: as many as it had)."""
        self._link = link
        self._framer = framer
        self._refresh_ttl_s = refresh_ttl_s
        self._namespace = namespace
        self._prefix = namespace.encode() + b":b:"
        self._deleted_prefix = namespace.encode() + b":deleted:"
        self._counters = Counters()
        self._lanes = Lanes(link)
        self._keeper = Keeper(link, self._lanes)

    def get(self, wanted: Sequence[Fetch], landed: Landed, *, deadline_s: float) -> None:
        keys = [self._key(fetch.block) for fetch in wanted]
        batch = _Get(self._framer, keys, wanted, landed)
        start_s = time.monotonic()
        for index, error in self._lanes.run(keys, batch, deadline_s=deadline_s):
            late = isinstance(error, DeadlinePassed | StoreStalled)
            batch.land(index, Fetched.LATE if late else Fetched.UNAVAILABLE)
        if batch.broken:
            broken = [keys[index] for index in batch.broken]
            self._lanes.run(broken, KeyCommands([(b"UNLINK", key) for key in broken]), deadline_s=deadline_s)
        for index in batch.broken:
            batch.land(index, Fetched.CORRUPT)
        outcomes = batch.outcomes
        self._counters.got(outcomes, batch.num_bytes, time.monotonic() - start_s)
        self._look_after(keys, outcomes)

    def put(self, blocks: Sequence[Store]) -> None:
        keys = [self._key(store.block) for store in blocks]
        start_s = time.monotonic()
        self._run(keys, _Put(self._framer, keys, blocks))
        num_bytes = sum(store.payload.nbytes for store in blocks)
        self._counters.put(len(blocks), num_bytes, time.monotonic() - start_s)

    def which(self, blocks: Sequence[BlockHash]) -> list[bool]:
        return [answer == 1 for answer in self._ask(blocks, b"EXISTS")]

    def delete(self, blocks: Sequence[BlockHash]) -> int:
        num_deleted = sum(self._ask(blocks, b"UNLINK"))
        self._note(blocks)
        return num_deleted

    def deleted(self, blocks: Sequence[BlockHash]) -> list[bool]:
        noted = self._are_noted([*blocks, *{mark_of(block) for block in blocks}])
        return [noted[block] or noted[mark_of(block)] for block in blocks]

    def erase(self, tenant: TenantMark) -> int:
        self._note([tenant])
        pattern = self._prefix + b"?" * (2 * DIGEST_BYTES) + tenant.hex().encode() + b"*"
        servers: list[Any] = self._link.servers()  # redis-py's own types don't agree with what its methods return
        return sum(self._erase_from(server, pattern) for server in servers)

    def _erase_from(self, server: Any, pattern: bytes) -> int:
        cursor, num_erased = 0, 0
        while True:
            with ours("look for a tenant's blocks"):
                cursor, keys = server.scan(cursor, match=pattern, count=_PAGE_KEYS)
            batch = KeyCommands([(b"UNLINK", key) for key in keys])
            self._run(keys, batch)
            num_erased += sum(batch.answers)
            if cursor == 0:
                return num_erased

    def retain(self, blocks: Sequence[BlockHash], *, ttl_s: int) -> int:
        if ttl_s:
            return sum(self._ask(blocks, b"EXPIRE", b"%d" % ttl_s))
        self._ask(blocks, b"PERSIST")  # answers 0 for a block that is there and has no TTL
        return sum(self.which(blocks))

    def ageing(self) -> RedisAgeing:
        return RedisAgeing(self._link, self._framer, namespace=self._namespace, prefix=self._prefix)

    def available(self) -> bool:
        return self._lanes.available()

    def info(self) -> ServerInfo:
        if not self.available():
            raise StoreUnavailable("the breaker is open")
        with ours("ask redis about itself"):
            memory, stats = zip(
                *((server.info("memory"), server.info("stats")) for server in self._link.servers()), strict=True
            )
        return ServerInfo(
            used_bytes=sum(int(part["used_memory"]) for part in memory),
            max_bytes=sum(int(part["maxmemory"]) for part in memory),
            evicted_keys=sum(int(part["evicted_keys"]) for part in stats),
            eviction_policy=str(memory[0]["maxmemory_policy"]),
        )

    def stats(self) -> StoreStats:
        return self._counters.read()

    def close(self) -> None:
        self._keeper.close()
        self._lanes.close()
        self._link.close()

    def _key(self, block: BlockHash) -> bytes:
        return self._prefix + block.hex().encode()

    def _note(self, deleted: Sequence[bytes]) -> None:
        """Names of blocks, and marks of tenants."""
        keys = [self._note_key(name) for name in deleted]
        self._run(keys, KeyCommands([(b"EVAL", _NOTE, b"1", key, b"%d" % DELETIONS_KNOWN_S) for key in keys]))

    def _are_noted(self, names: Sequence[bytes]) -> dict[bytes, bool]:
        keys = [self._note_key(name) for name in names]
        batch = KeyCommands([(b"EXISTS", key) for key in keys])
        self._run(keys, batch)
        return {name: answer == 1 for name, answer in zip(names, batch.answers, strict=True)}

    def _note_key(self, name: bytes) -> bytes:
        return self._deleted_prefix + name.hex().encode()

    def _ask(self, blocks: Sequence[BlockHash], verb: bytes, *words: bytes) -> list[int]:
        keys = [self._key(block) for block in blocks]
        batch = KeyCommands([(verb, key, *words) for key in keys])
        self._run(keys, batch)
        return batch.answers

    def _run(self, keys: Sequence[bytes], batch: Batch) -> None:
        """All of the batch, or an error. A server that trickles is given up as one that stalls at each command."""
        refused = self._lanes.run(
            keys, batch, deadline_s=time.monotonic() + self._link.timeout_s * (1 + len(keys) / batch.in_flight)
        )
        if refused:
            self._keeper.wake()
            raise refused[0].error

    def _look_after(self, keys: Sequence[bytes], outcomes: Sequence[Fetched]) -> None:
        """Prolong what was used, behind."""
        used = [key for key, outcome in zip(keys, outcomes, strict=True) if outcome is Fetched.HIT]
        if self._refresh_ttl_s:
            ttl = b"%d" % self._refresh_ttl_s
            self._keeper.later(used, [(b"EVAL", _PROLONG, b"1", key, ttl) for key in used])
        if Fetched.UNAVAILABLE in outcomes or Fetched.LATE in outcomes:
            self._keeper.wake()


class _Get:
    """A batch of GETs, each received into its buffer."""

    in_flight = _IN_FLIGHT

    def __init__(
        self,
        framer: Framer,
        keys: Sequence[bytes],
        wanted: Sequence[Fetch],
        landed: Landed,
    ) -> None:
        self._framer, self._keys, self._wanted, self._landed = framer, keys, wanted, landed
        self.broken: list[int] = []
        """Told only when they are deleted: else what is computed and put in their stead could be what is deleted."""
        self._encodings: dict[int, Encoding] = {}
        self._outcomes: dict[int, Fetched] = {}

    @property
    def outcomes(self) -> list[Fetched]:
        """By index; every block has landed."""
        return [self._outcomes[index] for index in range(len(self._wanted))]

    @property
    def num_bytes(self) -> int:
        """Of the payloads that landed."""
        return sum(encoding.num_bytes for encoding in self._encodings.values())

    def land(self, index: int, outcome: Fetched) -> None:
        assert index not in self._outcomes, f"block {index} landed twice"
        self._outcomes[index] = outcome
        self._landed(index, outcome, self._encodings.get(index))

    def request(self, index: int) -> Sequence[Buffer] | None:
        wanted = self._wanted[index].wanted
        if wanted is not None and not wanted():
            self.land(index, Fetched.SKIPPED)
            return None
        return [command(b"GET", self._keys[index])]

    def receive(self, index: int, wire: Wire) -> ErrorReply | None:
        length = wire.bulk_bytes()
        if isinstance(length, ErrorReply):
            return length
        if length is None:
            self.land(index, Fetched.ABSENT)
        elif length > _ABSURD_BYTES:
            wire.close()
            self.broken.append(index)
        else:
            found = self._receive_value(self._wanted[index], length, wire)
            if isinstance(found, Encoding):
                self._encodings[index] = found
                self.land(index, Fetched.HIT)
            elif found is Fetched.CORRUPT:
                self.broken.append(index)
            else:
                self.land(index, found)
        return None

    def _receive_value(self, fetch: Fetch, length: int, wire: Wire) -> Encoding | Fetched:
        """How to read what is in the fetch's buffer now, or why nothing is to be believed."""
        header = bytearray(min(length, self._framer.header_bytes))
        wire.read_into(memoryview(header))
        left = length - len(header)
        found: Encoding | Fetched
        try:
            body = self._framer.body(bytes(header), fetch, value_bytes=length)
            wire.read_into(body.target, body.seen)
            trailer = bytearray(body.trailer_bytes)
            wire.read_into(memoryview(trailer))
            left = 0
            found = body.finish(bytes(trailer))
        except BlockCorrupt:
            found = Fetched.CORRUPT
        except BlockForeign:
            found = Fetched.FOREIGN
        wire.skip(left)
        wire.end_bulk()
        return found


class _Put:
    """A batch of SETs; a block is sealed, or its checksum computed where need be, while the server takes another."""

    in_flight = _IN_FLIGHT

    def __init__(self, framer: Framer, keys: Sequence[bytes], blocks: Sequence[Store]) -> None:
        self._framer, self._keys, self._blocks = framer, keys, blocks

    def request(self, index: int) -> Sequence[Buffer]:
        store = self._blocks[index]
        return set_command(self._keys[index], self._framer.value(store), ttl_s=store.ttl_s)

    def receive(self, index: int, wire: Wire) -> ErrorReply | None:
        reply = wire.reply()
        return reply if isinstance(reply, ErrorReply) else None
