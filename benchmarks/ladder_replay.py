"""Replay a trace against a real Redis of a fixed size: what is missing is stored, as a worker would, and blocks age.

Knows sessions' codecs and their blocks' payloads, which come ready-made.
"""

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing

import redis

from benchmarks.ladder_kv import EncodedKV
from benchmarks.ladder_trace import Read
from cache_store.codecs import LADDER, codec_for, fidelity_of
from cache_store.embedded_redis import RedisServer
from cache_store.ids import BlockHash, chain, root_hash
from cache_store.ladder import Ladder
from cache_store.open_store import open_block_store
from cache_store.store import BlockStore, Encoding, Fetch, Fetched, Store
from worker.tiers.ageing import Ager

_TIMEOUT_S = 30.0
_TTL_S = 3600
_SWEEP_EVERY_S = 0.1
_FINGERPRINT = b"trace"


class Replay:
    """A Redis of its own, in which all blocks are of one session codec. Each stands for one of the model's."""

    def __init__(self, codec: str, capacity_bytes: int, *, kv: EncodedKV, ladder: Ladder) -> None:
        self.hits: Counter[str] = Counter()
        """By the codec that the block was found in."""
        self.late_s = 0.0
        """How far the replay fell behind at most."""
        self._codec = codec
        self._capacity_bytes = capacity_bytes
        self._kv = kv
        self._layout = kv.layout
        self._ladder = ladder
        self._fidelity = fidelity_of(codec)
        self._root = root_hash(_FINGERPRINT, "", self._fidelity)
        self._born = codec_for(codec, is_full=True, first_rung=ladder.first.name)
        self._buffers: list[memoryview] = []

    def run(self, trace: Sequence[Read], *, start_s: float, speed: float) -> None:
        """Read as the trace says, `speed` times as fast, from `start_s` (of `time.monotonic()`) on."""
        with ExitStack() as stack:
            server = stack.enter_context(RedisServer(eviction_policy="volatile-lru"))
            store = open_block_store(server.url, self._layout, _FINGERPRINT, timeout_s=_TIMEOUT_S, refresh_ttl_s=0)
            assert store is not None
            stack.enter_context(closing(store))
            store.which([self._root])  # connected: what a connection takes of the server's memory is not the blocks'
            with redis.Redis.from_url(server.url) as client:
                client.config_set("maxmemory", store.info().used_bytes + self._capacity_bytes)
            if self._codec == LADDER:
                stack.enter_context(closing(self._ager(store)))
            for at_s, blocks in trace:
                early_s = start_s + at_s / speed - time.monotonic()
                time.sleep(max(0.0, early_s))
                self.late_s = max(self.late_s, -early_s)
                self._read(store, list(dict.fromkeys(blocks)))

    def _ager(self, store: BlockStore) -> Ager:
        shelf = store.ageing()
        assert shelf is not None
        ager = Ager(
            shelf,
            self._ladder,
            self._kv.shrink,
            block_tokens=self._layout.block_tokens,
            sweep_every_s=_SWEEP_EVERY_S,
        )
        ager.start()
        return ager

    def _read(self, store: BlockStore, blocks: Sequence[int]) -> None:
        missing: list[int] = []

        def landed(index: int, outcome: Fetched, encoding: Encoding | None) -> None:
            if outcome is Fetched.ABSENT:
                missing.append(blocks[index])
            elif encoding is None:
                raise RuntimeError(f"block {blocks[index]} is {outcome.name}")
            else:
                self._hit(blocks[index], encoding, self._buffers[index])

        while len(self._buffers) < len(blocks):
            self._buffers.append(memoryview(bytearray(self._layout.block_bytes)))
        tokens, fidelity = self._layout.block_tokens, self._fidelity
        fetches = [
            Fetch(self._name(block), tokens, into, self._position(block), fidelity)
            for block, into in zip(blocks, self._buffers, strict=False)
        ]
        store.get(fetches, landed, deadline_s=time.monotonic() + _TIMEOUT_S)
        born = self._kv.payloads[self._born]
        store.put(
            [
                Store(
                    self._name(block),
                    tokens,
                    born[block % len(born)],
                    _TTL_S,
                    self._born,
                    self._position(block),
                    fidelity,
                )
                for block in missing
            ]
        )

    def _hit(self, block: int, encoding: Encoding, into: memoryview) -> None:
        originals = self._kv.payloads[encoding.codec]
        if into[: encoding.num_bytes] != originals[block % len(originals)]:
            raise RuntimeError(f"block {block} in {encoding.codec.name} is not what its original gives")
        self.hits[encoding.codec.name] += 1

    def _name(self, block: int) -> BlockHash:
        return chain(self._root, [block])

    def _position(self, block: int) -> int:
        return block % len(self._kv.payloads[self._born]) * self._layout.block_tokens
