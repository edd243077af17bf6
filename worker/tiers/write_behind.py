"""Move blocks down, off the engine's thread: from the device to the host tier, and from there to disk and the store.

A block is encoded on its way off the device, once: below, it is the same bytes wherever it lies.

It is told which device block holds what and never chooses: whoever hands a block over keeps it referenced until it is
told that the copy is done. Both queues are bounded: what does not fit is dropped and counted, and no caller waits.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import structlog

from cache_store.disk_tier import DiskTier
from cache_store.errors import StoreError
from cache_store.host_tier import HostTier, Slot
from cache_store.ids import BlockHash, TenantMark, mark_of
from cache_store.store import BlockStore, Store
from worker.ids import BlockId
from worker.tiers.coder import BlockCoder
from worker.tiers.moves import BATCH_BLOCKS, Content, MoveCounter, Tier, log_bug, stand_back

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Offload:
    """A block that is full, or ends a turn, and will not change until `done`."""

    block: BlockId
    content: Content
    ttl_s: int
    to_store: bool
    done: Callable[[], None]
    """Called on another thread, whatever came of it."""


class Forgotten(NamedTuple):
    """How many blocks were dropped from each tier of this machine."""

    host: int
    disk: int


class WriteBehind:
    def __init__(
        self,
        coder: BlockCoder,
        host: HostTier,
        store: BlockStore | None,
        counter: MoveCounter,
        *,
        max_pinned_blocks: int,
        max_queued_stores: int,
        enabled: bool = True,
        disk: DiskTier | None = None,
    ) -> None:
        """Holds at most `max_pinned_blocks` device blocks and `max_queued_stores` host slots at a time.

        Where there is no tier below the device it is not `enabled`, and drops everything uncounted.
        """
        self.host = host
        self.disk = disk
        self.store = store
        self._coder = coder
        self._counter = counter
        self._max_pinned = max_pinned_blocks
        self._max_stores = max_queued_stores
        self._enabled = enabled
        self._changed = threading.Condition()
        self._copying = 0
        self._to_store: list[tuple[Slot, Content, int]] = []
        self._pending: Counter[BlockHash] = Counter()
        self._tails: dict[BlockHash, tuple[Content, int]] = {}
        self._takes_offloads = True
        self._closed = False
        self.stores_dropped = 0
        self._copier = ThreadPoolExecutor(1, "offload", initializer=stand_back)
        self._storer = threading.Thread(target=self._store_loop, name="store", daemon=True)
        self._storer.start()

    def offload(self, job: Offload) -> None:
        """Copy a block to the host tier, and from there to the store, in time. Never blocks, never fails."""
        if not self._enabled:
            job.done()
            return
        with self._changed:
            is_taken = self._takes_offloads and self._copying < self._max_pinned
            if is_taken:
                self._copying += 1
                self._pending[job.content.name] += 1
                self._copier.submit(self._copy_down, job).add_done_callback(log_bug)
            else:
                self.stores_dropped += 1
        if not is_taken:
            job.done()

    def _copy_down(self, job: Offload) -> None:
        try:
            self._fill_host(job.content, job.block)
        finally:
            with self._changed:
                self._copying -= 1
            job.done()
            if job.to_store:
                self._offer_to_disk(job.content)
            if job.to_store and self.store is not None:
                self._queue_store(job.content, job.ttl_s)
            elif not job.to_store:
                self._note_tail(job)
            self._settle(job.content.name)

    def _offer_to_disk(self, content: Content) -> None:
        """Full blocks only: an unfull one would be written anew after each turn."""
        slot = self.host.pin(content.name) if self.disk is not None else None
        if self.disk is not None and slot is not None:
            self.disk.offer(_stored(slot, content, 0), partial(self.host.unpin, slot))

    def forget(self, names: Collection[BlockHash]) -> Forgotten:
        """Drop blocks from host memory and disk; say how many were there."""
        on_disk = self.disk.drop(names) if self.disk is not None else 0  # first: from there a block may come up
        return Forgotten(self.host.drop(names), on_disk)

    def of_tenant(self, tenant: TenantMark) -> set[BlockHash]:
        """Its blocks that are in host memory or on disk, and those on their way down."""
        with self._changed:
            names = {name for name in self._pending if mark_of(name) == tenant}
        names.update(self.host.of_tenant(tenant))
        return names.union(self.disk.of_tenant(tenant)) if self.disk is not None else names

    def _note_tail(self, job: Offload) -> None:
        with self._changed:
            self._tails[job.content.name] = (job.content, job.ttl_s)
            if len(self._tails) > self.host.use().capacity:  # the host tier has not kept all of them
                del self._tails[next(iter(self._tails))]

    def _queue_store(self, content: Content, ttl_s: int) -> None:
        assert self.store is not None
        with self._changed:
            room = len(self._to_store) < self._max_stores and not self._closed and self.store.available()
            slot = self.host.pin(content.name) if room else None
            if slot is None:
                self.stores_dropped += 1
                return
            self._pending[content.name] += 1
            self._to_store.append((slot, content, ttl_s))
            self._changed.notify_all()

    def _store_loop(self) -> None:
        stand_back()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._to_store or self._closed)
                batch, self._to_store = self._to_store[:BATCH_BLOCKS], self._to_store[BATCH_BLOCKS:]
            if not batch:
                return
            assert self.store is not None
            try:
                with self._counter.timed(Tier.HOST, Tier.REDIS, *(slot.encoding for slot, _, _ in batch)):
                    self.store.put([_stored(*job) for job in batch])
            except StoreError as error:
                self._drop(len(batch))
                log.warning("stores dropped", blocks=len(batch), error=str(error))
            finally:
                for slot, content, _ in batch:
                    self.host.unpin(slot)
                    self._settle(content.name)

    def _drop(self, blocks: int) -> None:
        with self._changed:
            self.stores_dropped += blocks

    def _settle(self, name: BlockHash) -> None:
        with self._changed:
            self._pending[name] -= 1
            if not self._pending[name]:
                del self._pending[name]
            self._changed.notify_all()

    def flush(self, names: Sequence[BlockHash], *, timeout_s: float) -> bool:
        """Wait until none of these blocks is on its way. False if that took longer. Blocks its caller."""
        with self._changed:
            return self._wait_for(names, timeout_s)

    def _wait_for(self, names: Sequence[BlockHash], timeout_s: float) -> bool:
        return self._changed.wait_for(lambda: not any(name in self._pending for name in names), timeout_s)

    def outgrown(self, name: BlockHash) -> None:
        """The conversation has gone on from this unfull block, or the store has it: no need to store it at the end."""
        with self._changed:
            self._tails.pop(name, None)

    def store_tails(self) -> None:
        """Write the unfull last blocks, which no turn has taken up yet, to the store. Blocks its caller."""
        with self._changed:
            tails, self._tails = self._tails, {}
        if self.store is None:
            return
        by_ttl: dict[int, list[tuple[Content, BlockId | None]]] = {}
        for content, ttl_s in tails.values():
            by_ttl.setdefault(ttl_s, []).append((content, None))
        try:
            for ttl_s, blocks in by_ttl.items():
                self.park(blocks, ttl_s=ttl_s)
        except StoreError as error:
            self._drop(len(tails))
            log.warning("unfull blocks not stored", blocks=len(tails), error=str(error))

    def settled(self, *, timeout_s: float) -> bool:
        """Wait until nothing is on its way down. False if that took longer. Blocks its caller."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._pending, timeout_s)

    def park(self, blocks: Sequence[tuple[Content, BlockId | None]], *, ttl_s: int) -> tuple[set[BlockHash], int]:
        """Make sure the store has these (each with the device block to encode it from, if any). Blocks its caller.

        Returns the names that the store has now, and the bytes written for it. Raises StoreError.
        """
        assert self.store is not None
        names = [content.name for content, _ in blocks]
        num_bytes = 0
        with self._on_the_way(names, timeout_s=30.0):
            present = {name for name, there in zip(names, self.store.which(names), strict=True) if there}
            missing = [(content, block) for content, block in blocks if content.name not in present]
            for start in range(0, len(missing), BATCH_BLOCKS):
                written = self._write(self.store, missing[start : start + BATCH_BLOCKS], ttl_s)
                present.update(written)
                num_bytes += sum(written.values())
        return present, num_bytes

    @contextmanager
    def _on_the_way(self, names: Sequence[BlockHash], *, timeout_s: float) -> Iterator[None]:
        """Wait until none of these blocks is on its way, then count them so: whoever deletes them waits in turn, or
        they would be written again behind it."""
        with self._changed:
            self._wait_for(names, timeout_s)
            self._pending.update(names)
        try:
            yield
        finally:
            for name in names:
                self._settle(name)

    def _write(
        self, store: BlockStore, blocks: Sequence[tuple[Content, BlockId | None]], ttl_s: int
    ) -> dict[BlockHash, int]:
        """Write a batch by way of the host tier. Returns the payload bytes of those that could be."""
        jobs: list[tuple[Slot, Content, int]] = []
        try:
            for content, block in blocks:
                slot = self._host_copy(content, block)
                if slot is not None:
                    jobs.append((slot, content, ttl_s))
            with self._counter.timed(Tier.HOST, Tier.REDIS, *(slot.encoding for slot, _, _ in jobs)):
                store.put([_stored(*job) for job in jobs])
            for _, content, _ in jobs:
                self.outgrown(content.name)  # the store has it
            return {content.name: slot.encoding.num_bytes for slot, content, _ in jobs}
        finally:
            for slot, _, _ in jobs:
                self.host.unpin(slot)

    def _host_copy(self, content: Content, block: BlockId | None) -> Slot | None:
        """The block in the host tier, pinned, encoded there from the device if need be."""
        slot = self.host.pin(content.name)
        if slot is None and block is not None:
            self._fill_host(content, block)
            slot = self.host.pin(content.name)
        return slot

    def _fill_host(self, content: Content, block: BlockId) -> None:
        """Encode a device block into the host tier, unless it is there already or there is no room."""
        slot = self.host.reserve(content.name, content.num_tokens)
        if slot is None:
            return
        began = time.perf_counter()
        try:
            encoding = self._coder.encode(block, content, slot.buffer)
        except BaseException:
            self.host.abort(slot)
            raise
        self.host.publish(slot, encoding)
        self._counter.add(Tier.DEVICE, Tier.HOST, [encoding], time.perf_counter() - began)

    def close(self, *, flush_s: float) -> None:
        """Write out what is queued, within `flush_s`; drop the rest (counted)."""
        with self._changed:
            self._takes_offloads = False  # the engine's step may still run
        self._copier.shutdown(wait=True)
        deadline = time.monotonic() + flush_s
        with self._changed:
            self._changed.wait_for(lambda: not self._to_store, max(0.0, deadline - time.monotonic()))
            self.stores_dropped += len(self._to_store)
            dropped, self._to_store = self._to_store, []
            for slot, content, _ in dropped:
                self.host.unpin(slot)
                self._settle(content.name)
            self._closed = True
            self._changed.notify_all()
        self._storer.join()


def _stored(slot: Slot, content: Content, ttl_s: int) -> Store:
    """What the store is asked to keep of a slot: the slot's payload, as it is."""
    return Store(
        content.name,
        content.num_tokens,
        slot.payload,
        ttl_s,
        codec=slot.encoding.codec,
        first_position=content.first_position,
        fidelity=content.fidelity,
        checksum=slot.encoding.checksum,
        tenant=content.tenant,
    )
