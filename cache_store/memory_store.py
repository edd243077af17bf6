"""A block store in a dict: for tests, and for one worker without Redis. Blocks last as long as it does."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from cache_store.codecs import allowed
from cache_store.counters import Counters
from cache_store.ids import BlockHash, TenantMark, mark_of
from cache_store.store import DELETIONS_KNOWN_S, Encoding, Fetch, Fetched, Landed, ServerInfo, Store, StoreStats


class _Kept(NamedTuple):
    store: Store
    dies_at_s: float | None
    """None: never."""


class MemoryBlockStore:
    """`cache_store.store.BlockStore` for one process. `now` is its clock; deadlines are of `time.monotonic()`."""

    def __init__(self, *, refresh_ttl_s: int = 0, now: Callable[[], float] = time.monotonic) -> None:
        self._refresh_ttl_s = refresh_ttl_s
        self._now = now
        self._lock = threading.Lock()
        self._blocks: dict[BlockHash, _Kept] = {}
        self._deleted_s: dict[bytes, float] = {}
        """When blocks were deleted, and tenants erased."""
        self._counters = Counters()

    def get(self, wanted: Sequence[Fetch], landed: Landed, *, deadline_s: float) -> None:
        start_s = time.monotonic()
        outcomes, num_bytes = [], 0
        for index, fetch in enumerate(wanted):
            found = self._fetch(fetch, deadline_s)
            if isinstance(found, Encoding):
                num_bytes += found.num_bytes
                outcomes.append(Fetched.HIT)
                landed(index, Fetched.HIT, found)
            else:
                outcomes.append(found)
                landed(index, found, None)
        self._counters.got(outcomes, num_bytes, time.monotonic() - start_s)

    def put(self, blocks: Sequence[Store]) -> None:
        start_s = time.monotonic()
        kept = {
            store.block: _Kept(replace(store, payload=memoryview(bytes(store.payload))), self._dies_at_s(store.ttl_s))
            for store in blocks
        }
        with self._lock:
            self._blocks.update(kept)
        num_bytes = sum(store.payload.nbytes for store in blocks)
        self._counters.put(len(blocks), num_bytes, time.monotonic() - start_s)

    def which(self, blocks: Sequence[BlockHash]) -> list[bool]:
        with self._lock:
            return [self._alive(block) is not None for block in blocks]

    def delete(self, blocks: Sequence[BlockHash]) -> int:
        with self._lock:
            alive = [block for block in dict.fromkeys(blocks) if self._alive(block) is not None]
            for block in alive:
                del self._blocks[block]
            self._note(blocks)
        return len(alive)

    def deleted(self, blocks: Sequence[BlockHash]) -> list[bool]:
        with self._lock:
            long_ago_s = self._now() - DELETIONS_KNOWN_S
            noted = {name for name, at_s in self._deleted_s.items() if at_s > long_ago_s}
        return [not noted.isdisjoint((block, mark_of(block))) for block in blocks]

    def erase(self, tenant: TenantMark) -> int:
        with self._lock:
            alive = [block for block in list(self._blocks) if mark_of(block) == tenant and self._alive(block)]
            for block in alive:
                del self._blocks[block]
            self._note([tenant])
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

    def ageing(self) -> None:
        return None

    def available(self) -> bool:
        return True

    def info(self) -> ServerInfo:
        with self._lock:
            alive = [kept for block in list(self._blocks) if (kept := self._alive(block))]
        return ServerInfo(
            used_bytes=sum(kept.store.payload.nbytes for kept in alive),
            max_bytes=0,
            evicted_keys=0,
            eviction_policy="noeviction",
        )

    def stats(self) -> StoreStats:
        return self._counters.read()

    def close(self) -> None:
        with self._lock:
            self._blocks.clear()

    def _fetch(self, fetch: Fetch, deadline_s: float) -> Encoding | Fetched:
        """How to read what is in the fetch's buffer now, or why nothing is."""
        if fetch.wanted is not None and not fetch.wanted():
            return Fetched.SKIPPED
        if time.monotonic() > deadline_s:
            return Fetched.LATE
        with self._lock:
            kept = self._alive(fetch.block)
            if kept is None:
                return Fetched.ABSENT
            store = kept.store
            if store.fidelity != fetch.fidelity or store.codec not in allowed(fetch.fidelity):
                return Fetched.FOREIGN
            if (store.num_tokens, store.first_position) != (fetch.num_tokens, fetch.first_position):
                del self._blocks[fetch.block]
                return Fetched.CORRUPT
            if kept.dies_at_s is not None and self._refresh_ttl_s:
                longer = max(kept.dies_at_s, self._now() + self._refresh_ttl_s)
                self._blocks[fetch.block] = kept._replace(dies_at_s=longer)
        fetch.into.cast("B")[: store.payload.nbytes] = store.payload
        return Encoding(store.codec, store.payload.nbytes, store.checksum)

    def _note(self, deleted: Sequence[bytes]) -> None:
        """Under the lock."""
        now_s = self._now()
        known = ((name, at_s) for name, at_s in self._deleted_s.items() if now_s - at_s < DELETIONS_KNOWN_S)
        self._deleted_s = {**dict(known), **dict.fromkeys(deleted, now_s)}

    def _dies_at_s(self, ttl_s: int) -> float | None:
        return self._now() + ttl_s if ttl_s else None

    def _alive(self, block: BlockHash) -> _Kept | None:
        kept = self._blocks.get(block)
        if kept is not None and kept.dies_at_s is not None and kept.dies_at_s <= self._now():
            del self._blocks[block]
            return None
        return kept
