"""Move blocks between the device, the host tier and the shared store, off the engine's thread.

It is told which device block holds what and never chooses: the engine keeps every block it hands over referenced until
it is told that the move is done. It knows neither requests nor tokens.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import structlog

from cache_store.errors import StoreError
from cache_store.host_tier import HostTier, Slot
from cache_store.ids import BlockHash
from cache_store.store import BlockStore, Fetch, Fetched, Store
from worker.calls import MissReason
from worker.ids import BlockId

log = structlog.get_logger(__name__)

_BATCH_BLOCKS = 16
_RESTORE_THREADS = 2

_MISS = {
    Fetched.ABSENT: MissReason.ABSENT,
    Fetched.CORRUPT: MissReason.CORRUPT,
    Fetched.FOREIGN: MissReason.FOREIGN,
    Fetched.LATE: MissReason.LATE,
    Fetched.UNAVAILABLE: MissReason.UNAVAILABLE,
}


class Tier(Enum):
    """Values are protos' Tier."""

    DEVICE = 1
    HOST = 2
    REDIS = 3


class DeviceMemory(Protocol):
    """The device's blocks as bytes, in the layout's order. Called from the mover's threads."""

    def read_block(self, block: BlockId, into: memoryview) -> None: ...

    def write_block(self, block: BlockId, payload: memoryview) -> None: ...


@dataclass(frozen=True, slots=True)
class Offload:
    """A block that is full (or parked) and will not change."""

    block: BlockId
    name: BlockHash
    num_tokens: int
    ttl_s: int
    to_store: bool
    done: Callable[[], None]
    """Called on a thread of the mover, whatever came of it."""


@dataclass(frozen=True, slots=True)
class Restore:
    name: BlockHash
    num_tokens: int
    target: BlockId


class Mover:
    """Write-behind in one direction, pipelined reads in the other. All queues are bounded: what does not fit is dropped
    and counted (`stores_dropped`), and no caller waits. Without `write_behind` there are no tiers below the device."""

    def __init__(
        self,
        device: DeviceMemory,
        host: HostTier,
        store: BlockStore | None,
        *,
        max_pinned_blocks: int,
        max_queued_stores: int,
        write_behind: bool = True,
    ) -> None:
        self.host = host
        self.store = store
        self._device = device
        self._max_pinned = max_pinned_blocks
        self._max_stores = max_queued_stores
        self._write_behind = write_behind
        self._changed = threading.Condition()
        self._copying = 0
        self._to_store: list[tuple[Slot, BlockHash, int, int]] = []
        self._pending: Counter[BlockHash] = Counter()
        self._tails: dict[BlockHash, tuple[int, int]] = {}
        self._closed = False
        self.stores_dropped = 0
        self._copier = ThreadPoolExecutor(1, "offload")
        self._restorers = ThreadPoolExecutor(_RESTORE_THREADS, "restore")
        self._storer = threading.Thread(target=self._store_loop, name="store", daemon=True)
        self._storer.start()

    # Down: device -> host -> store

    def offload(self, job: Offload) -> None:
        """Copy a block to the host tier, and from there to the store, in time. Never blocks, never fails."""
        if not self._write_behind:
            job.done()
            return
        with self._changed:
            if self._closed or self._copying >= self._max_pinned:
                self.stores_dropped += 1
                full = True
            else:
                full = False
                self._copying += 1
                self._pending[job.name] += 1
        if full:
            job.done()
        else:
            self._copier.submit(self._copy_down, job).add_done_callback(_log_bug)

    def _copy_down(self, job: Offload) -> None:
        try:
            self._fill_host(job.name, job.num_tokens, job.block)
        finally:
            with self._changed:
                self._copying -= 1
            job.done()
            if job.to_store and self.store is not None:
                self._queue_store(job.name, job.num_tokens, job.ttl_s)
            elif not job.to_store:
                self._tails[job.name] = (job.num_tokens, job.ttl_s)
                if len(self._tails) > self.host.use().capacity:  # the host tier has not kept all of them
                    self._tails.pop(next(iter(self._tails)))
            self._settle(job.name)

    def _queue_store(self, name: BlockHash, num_tokens: int, ttl_s: int) -> None:
        assert self.store is not None
        with self._changed:
            room = len(self._to_store) < self._max_stores and not self._closed and self.store.available()
            slot = self.host.pin(name) if room else None
            if slot is None:
                self.stores_dropped += 1
                return
            self._pending[name] += 1
            self._to_store.append((slot, name, num_tokens, ttl_s))
            self._changed.notify_all()

    def _store_loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._to_store or self._closed)
                batch, self._to_store = self._to_store[:_BATCH_BLOCKS], self._to_store[_BATCH_BLOCKS:]
            if not batch:
                return
            assert self.store is not None
            try:
                self.store.put([Store(name, count, slot.buffer, ttl_s) for slot, name, count, ttl_s in batch])
            except StoreError as error:
                self.stores_dropped += len(batch)
                log.warning("stores dropped", blocks=len(batch), error=str(error))
            finally:
                for slot, name, _, _ in batch:
                    self.host.unpin(slot)
                    self._settle(name)

    def _settle(self, name: BlockHash) -> None:
        with self._changed:
            self._pending[name] -= 1
            if not self._pending[name]:
                del self._pending[name]
            self._changed.notify_all()

    def flush(self, names: Sequence[BlockHash], *, timeout_s: float) -> bool:
        """Wait until none of these blocks is on its way. False if that took longer. Blocks its caller."""
        with self._changed:
            return self._changed.wait_for(lambda: not any(name in self._pending for name in names), timeout_s)

    def outgrown(self, name: BlockHash) -> None:
        """The conversation has gone on from this unfull block: nobody will miss it in the store."""
        self._tails.pop(name, None)

    def store_tails(self) -> None:
        """Write the unfull last blocks, which no turn has taken up yet, to the store. Blocks its caller."""
        tails, self._tails = self._tails, {}
        if self.store is None:
            return
        by_ttl: dict[int, list[tuple[BlockHash, int, BlockId | None]]] = {}
        for name, (num_tokens, ttl_s) in tails.items():
            by_ttl.setdefault(ttl_s, []).append((name, num_tokens, None))
        try:
            for ttl_s, blocks in by_ttl.items():
                self.park(blocks, ttl_s=ttl_s)
        except StoreError as error:
            self.stores_dropped += len(tails)
            log.warning("unfull blocks not stored", blocks=len(tails), error=str(error))

    def settled(self, *, timeout_s: float) -> bool:
        """Wait until nothing is on its way down. False if that took longer. Blocks its caller."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._pending, timeout_s)

    def park(
        self, blocks: Sequence[tuple[BlockHash, int, BlockId | None]], *, ttl_s: int
    ) -> tuple[set[BlockHash], int]:
        """Make sure the store has these (name, tokens, device block if any). Blocks its caller.

        Returns the names that the store has now, and the bytes written for it. Raises StoreError.
        """
        assert self.store is not None
        names = [name for name, _, _ in blocks]
        self.flush(names, timeout_s=30.0)
        present = {name for name, there in zip(names, self.store.which(names), strict=True) if there}
        missing = [block for block in blocks if block[0] not in present]
        num_bytes = 0
        for start in range(0, len(missing), _BATCH_BLOCKS):
            slots: list[tuple[Slot, BlockHash, int]] = []
            try:
                for name, num_tokens, block in missing[start : start + _BATCH_BLOCKS]:
                    slot = self._host_copy(name, num_tokens, block)
                    if slot is not None:
                        slots.append((slot, name, num_tokens))
                self.store.put([Store(name, count, slot.buffer, ttl_s) for slot, name, count in slots])
                present |= {name for _, name, _ in slots}
                for _, name, _ in slots:
                    self._tails.pop(name, None)
                num_bytes += sum(len(slot.buffer) for slot, _, _ in slots)
            finally:
                for slot, _, _ in slots:
                    self.host.unpin(slot)
        return present, num_bytes

    def _host_copy(self, name: BlockHash, num_tokens: int, block: BlockId | None) -> Slot | None:
        """The block in the host tier, pinned, copied there from the device if need be."""
        slot = self.host.pin(name)
        if slot is None and block is not None:
            self._fill_host(name, num_tokens, block)
            slot = self.host.pin(name)
        return slot

    def _fill_host(self, name: BlockHash, num_tokens: int, block: BlockId) -> None:
        """Copy a device block to the host tier, unless it is there already or there is no room."""
        slot = self.host.reserve(name, num_tokens)
        if slot is None:
            return
        try:
            self._device.read_block(block, slot.buffer)
        except BaseException:
            self.host.abort(slot)
            raise
        self.host.publish(slot)

    # Up: host or store -> device

    def restore(
        self,
        blocks: Sequence[Restore],
        done: Callable[[list[Tier | MissReason]], None],
        *,
        deadline_s: float,
        cancelled: Callable[[], bool],
    ) -> None:
        """Bring blocks to their targets on the device; `done` hears, on a thread of the mover, where each came from."""

        def run() -> None:
            found: list[Tier | MissReason] = [MissReason.ABSENT] * len(blocks)
            try:
                self._restore(blocks, found, deadline_s, cancelled)
            finally:
                done(found)

        self._restorers.submit(run).add_done_callback(_log_bug)

    def may_have(self, name: BlockHash) -> bool:
        """Is it worth asking for this block below the device?"""
        return self.store is not None or self.host.contains(name)

    def _restore(
        self,
        blocks: Sequence[Restore],
        found: list[Tier | MissReason],
        deadline_s: float,
        cancelled: Callable[[], bool],
    ) -> None:
        rest = [index for index, block in enumerate(blocks) if not self._from_host(block, found, index)]
        if self.store is None or not rest:
            return
        if not self.store.available():
            for index in rest:
                found[index] = MissReason.UNAVAILABLE
            return
        size = max(_BATCH_BLOCKS, self.host.use().capacity // 2)
        for start in range(0, len(rest), size):
            batch = rest[start : start + size]
            if cancelled() or time.monotonic() >= deadline_s:
                for index in batch:
                    found[index] = MissReason.LATE
            else:
                self._from_store(blocks, found, batch, deadline_s)

    def _from_host(self, block: Restore, found: list[Tier | MissReason], index: int) -> bool:
        slot = self.host.pin(block.name)
        if slot is None:
            return False
        try:
            self._device.write_block(block.target, slot.buffer)
        finally:
            self.host.unpin(slot)
        found[index] = Tier.HOST
        return True

    def _from_store(
        self, blocks: Sequence[Restore], found: list[Tier | MissReason], batch: Sequence[int], deadline_s: float
    ) -> None:
        assert self.store is not None
        asked: list[tuple[int, Slot]] = []
        for index in batch:
            slot = self.host.reserve(blocks[index].name, blocks[index].num_tokens)
            if slot is not None:
                asked.append((index, slot))
            elif not self._from_host(blocks[index], found, index):  # another restore may have brought it meanwhile
                found[index] = MissReason.NO_ROOM

        def landed(number: int, outcome: Fetched) -> None:
            index, slot = asked[number]
            if outcome is Fetched.HIT:
                self._device.write_block(blocks[index].target, slot.buffer)
                self.host.publish(slot)
                found[index] = Tier.REDIS
            else:
                self.host.abort(slot)
                found[index] = _MISS[outcome]

        wanted = [Fetch(blocks[index].name, blocks[index].num_tokens, slot.buffer) for index, slot in asked]
        self.store.get(wanted, landed, deadline_s=deadline_s)

    # Ends

    def close(self, *, flush_s: float) -> None:
        """Write out what is queued, within `flush_s`; drop the rest (counted). The store is closed too."""
        self._copier.shutdown(wait=True)
        deadline = time.monotonic() + flush_s
        with self._changed:
            self._changed.wait_for(lambda: not self._to_store, max(0.0, deadline - time.monotonic()))
            self.stores_dropped += len(self._to_store)
            dropped, self._to_store = self._to_store, []
            for slot, name, _, _ in dropped:
                self.host.unpin(slot)
                self._settle(name)
            self._closed = True
            self._changed.notify_all()
        self._restorers.shutdown(wait=True)
        self._storer.join()
        if self.store is not None:
            self.store.close()


def _log_bug(future: "Future[None]") -> None:
    error = future.exception()
    if error is not None:
        log.error("a move failed by a bug", exc_info=error)
