"""Bring blocks up to the device, off the engine's thread: from the host tier, or in one pipelined read from the store.

It is told what goes where and never chooses. Targets are blocks that nobody can see yet; whoever asked keeps them until
it hears what came. What comes from the store lands and is checked in a slot of the host tier, where it stays.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cache_store.host_tier import HostTier, Slot
from cache_store.ids import BlockHash
from cache_store.store import BlockStore, Encoding, Fetch, Fetched
from worker.calls import MissReason
from worker.ids import BlockId
from worker.moves import BATCH_BLOCKS, DeviceMemory, MoveCounter, Tier, log_bug

_THREADS = 2

_MISS = {
    Fetched.ABSENT: MissReason.ABSENT,
    Fetched.CORRUPT: MissReason.CORRUPT,
    Fetched.FOREIGN: MissReason.FOREIGN,
    Fetched.LATE: MissReason.LATE,
    Fetched.UNAVAILABLE: MissReason.UNAVAILABLE,
}


@dataclass(frozen=True, slots=True)
class Restore:
    name: BlockHash
    num_tokens: int
    target: BlockId


class Restorer:
    def __init__(self, device: DeviceMemory, host: HostTier, store: BlockStore | None, counter: MoveCounter) -> None:
        self._device = device
        self._host = host
        self._store = store
        self._counter = counter
        self._threads = ThreadPoolExecutor(_THREADS, "restore")

    def restore(
        self,
        blocks: Sequence[Restore],
        done: Callable[[list[Tier | MissReason]], None],
        *,
        deadline_s: float,
        cancelled: Callable[[], bool],
    ) -> None:
        """Bring blocks to their targets on the device; `done` hears, on another thread, where each came from."""

        def run() -> None:
            found: list[Tier | MissReason] = [MissReason.ABSENT] * len(blocks)
            try:
                self._restore(blocks, found, deadline_s, cancelled)
            finally:
                done(found)

        self._threads.submit(run).add_done_callback(log_bug)

    def may_have(self, name: BlockHash) -> bool:
        """Is it worth asking for this block below the device?"""
        return self._store is not None or self._host.contains(name)

    def _restore(
        self,
        blocks: Sequence[Restore],
        found: list[Tier | MissReason],
        deadline_s: float,
        cancelled: Callable[[], bool],
    ) -> None:
        rest = [index for index, block in enumerate(blocks) if not self._from_host(block, found, index)]
        if self._store is None or not rest:
            return
        if not self._store.available():
            for index in rest:
                found[index] = MissReason.UNAVAILABLE
            return
        size = max(BATCH_BLOCKS, self._host.use().capacity // 2)
        for start in range(0, len(rest), size):
            batch = rest[start : start + size]
            if cancelled() or time.monotonic() >= deadline_s:
                for index in batch:
                    found[index] = MissReason.LATE
            else:
                self._from_store(blocks, found, batch, deadline_s)

    def _from_host(self, block: Restore, found: list[Tier | MissReason], index: int) -> bool:
        slot = self._host.pin(block.name)
        if slot is None:
            return False
        try:
            with self._counter.timed(Tier.HOST, Tier.DEVICE):
                self._device.write_block(block.target, slot.buffer)
        finally:
            self._host.unpin(slot)
        found[index] = Tier.HOST
        return True

    def _from_store(
        self, blocks: Sequence[Restore], found: list[Tier | MissReason], batch: Sequence[int], deadline_s: float
    ) -> None:
        assert self._store is not None
        asked: list[tuple[int, Slot]] = []
        for index in batch:
            slot = self._host.reserve(blocks[index].name, blocks[index].num_tokens)
            if slot is not None:
                asked.append((index, slot))
            elif not self._from_host(blocks[index], found, index):  # another restore may have brought it meanwhile
                found[index] = MissReason.NO_ROOM

        def landed(number: int, outcome: Fetched, encoding: Encoding | None) -> None:
            index, slot = asked[number]
            if outcome is Fetched.HIT:
                with self._counter.timed(Tier.HOST, Tier.DEVICE):
                    self._device.write_block(blocks[index].target, slot.buffer)
                self._host.publish(slot)
                found[index] = Tier.REDIS
            else:
                self._host.abort(slot)
                found[index] = _MISS[outcome]

        wanted = [Fetch(blocks[index].name, blocks[index].num_tokens, slot.buffer) for index, slot in asked]
        began = time.perf_counter()
        self._store.get(wanted, landed, deadline_s=deadline_s)
        hits = sum(found[index] is Tier.REDIS for index, _ in asked)
        self._counter.add(Tier.REDIS, Tier.HOST, hits, time.perf_counter() - began)

    def close(self) -> None:
        self._threads.shutdown(wait=True)
