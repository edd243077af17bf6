"""A block store in a dict: for tests, and for one worker without Redis. Blocks last as long as it does."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from cache_store.counters import Counters
from cache_store.ids import BlockHash
from cache_store.store import Fetch, Fetched, ServerInfo, Store, StoreStats


class _Kept(NamedTuple):
    num_tokens: int
    payload: bytes
    dies_at_s: float | None
    """None: never."""


class MemoryBlockStore:
    """`cache_store.store.BlockStore` for one process. `now` is its clock; deadlines are of `time.monotonic()`."""

    def __init__(self, *, refresh_ttl_s: int = 0, now: Callable[[], float] = time.monotonic) -> None:
        self._refresh_ttl_s = refresh_ttl_s
        self._now = now
        self._lock = threading.Lock()
        self._blocks: dict[BlockHash, _Kept] = {}
        self._counters = Counters()

    def get(self, wanted: Sequence[Fetch], landed: Callable[[int, Fetched], None], *, deadline_s: float) -> None:
        start_s = time.monotonic()
        outcomes = []
        for index, fetch in enumerate(wanted):
            outcomes.append(Fetched.LATE if time.monotonic() > deadline_s else self._fetch(fetch))
            landed(index, outcomes[-1])
        block_bytes = wanted[0].into.nbytes if wanted else 0
        self._counters.got(outcomes, block_bytes, time.monotonic() - start_s)

    def put(self, blocks: Sequence[Store]) -> None:
        start_s = time.monotonic()
        kept = {
            store.block: _Kept(store.num_tokens, store.payload.tobytes(), self._dies_at_s(store.ttl_s))
            for store in blocks
        }
        with self._lock:
            self._blocks.update(kept)
        block_bytes = blocks[0].payload.nbytes if blocks else 0
        self._counters.put(len(blocks), block_bytes, time.monotonic() - start_s)

    def which(self, blocks: Sequence[BlockHash]) -> list[bool]:
        with self._lock:
            return [self._alive(block) is not None for block in blocks]

    def delete(self, blocks: Sequence[BlockHash]) -> int:
        with self._lock:
            alive = [block for block in dict.fromkeys(blocks) if self._alive(block) is not None]
            for block in alive:
                del self._blocks[block]
        return len(alive)

    def retain(self, blocks: Sequence[BlockHash], *, ttl_s: int) -> int:
        there = 0
        with self._lock:
            for block in blocks:
                kept = self._alive(block)
                if kept is not None:
                    self._blocks[block] = kept._replace(dies_at_s=self._dies_at_s(ttl_s))
                    there += 1
        return there

    def available(self) -> bool:
        return True

    def info(self) -> ServerInfo:
        with self._lock:
            used_bytes = sum(len(kept.payload) for block in list(self._blocks) if (kept := self._alive(block)))
        return ServerInfo(used_bytes=used_bytes, max_bytes=0, evicted_keys=0, eviction_policy="noeviction")

    def stats(self) -> StoreStats:
        return self._counters.read()

    def close(self) -> None:
        with self._lock:
            self._blocks.clear()

    def _fetch(self, fetch: Fetch) -> Fetched:
        with self._lock:
            kept = self._alive(fetch.block)
            if kept is None:
                return Fetched.ABSENT
            if kept.num_tokens != fetch.num_tokens:
                del self._blocks[fetch.block]
                return Fetched.CORRUPT
            if kept.dies_at_s is not None and self._refresh_ttl_s:
                longer = max(kept.dies_at_s, self._now() + self._refresh_ttl_s)
                self._blocks[fetch.block] = kept._replace(dies_at_s=longer)
        fetch.into.cast("B")[:] = kept.payload
        return Fetched.HIT

    def _dies_at_s(self, ttl_s: int) -> float | None:
        return self._now() + ttl_s if ttl_s else None

    def _alive(self, block: BlockHash) -> _Kept | None:
        kept = self._blocks.get(block)
        if kept is not None and kept.dies_at_s is not None and kept.dies_at_s <= self._now():
            del self._blocks[block]
            return None
        return kept
