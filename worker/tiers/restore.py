"""Bring blocks up to the device, off the engine's thread: from the host tier, or in one pipelined read from the store.

It is told what goes where and never chooses. Targets are blocks that nobody can see yet; whoever asked keeps them until
it hears what came. What comes from the store lands and is checked in a slot of the host tier, where it stays. What must
be decoded is so beside the reading, several blocks at a time: to decode one takes longer than to fetch it.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from cache_store.codecs import RAW
from cache_store.errors import BlockCorrupt, BlockForeign
from cache_store.host_tier import HostTier, Slot
from cache_store.ids import BlockHash
from cache_store.store import BlockStore, Encoding, Fetch, Fetched
from worker.calls import MissReason
from worker.ids import BlockId
from worker.tiers.coder import BlockCoder
from worker.tiers.moves import BATCH_BLOCKS, Content, MoveCounter, Tier, log_bug

_THREADS = 2
_DECODERS = min(4, os.cpu_count() or 1)

_MISS = {
    Fetched.ABSENT: MissReason.ABSENT,
    Fetched.CORRUPT: MissReason.CORRUPT,
    Fetched.FOREIGN: MissReason.FOREIGN,
    Fetched.LATE: MissReason.LATE,
    Fetched.UNAVAILABLE: MissReason.UNAVAILABLE,
}


@dataclass(frozen=True, slots=True)
class Restore:
    content: Content
    target: BlockId


class Restored(NamedTuple):
    """Where a block was found, and as what payload."""

    tier: Tier
    encoding: Encoding


Outcome = Restored | MissReason


class Restorer:
    def __init__(self, coder: BlockCoder, host: HostTier, store: BlockStore | None, counter: MoveCounter) -> None:
        self._coder = coder
        self._host = host
        self._store = store
        self._counter = counter
        self._threads = ThreadPoolExecutor(_THREADS, "restore")
        self._decoders = ThreadPoolExecutor(_DECODERS, "decode")

    def restore(
        self,
        blocks: Sequence[Restore],
        done: Callable[[list[Outcome]], None],
        *,
        deadline_s: float,
        cancelled: Callable[[], bool],
    ) -> None:
        """Bring blocks to their targets on the device; `done` hears, on another thread, what became of each."""

        def run() -> None:
            found: list[Outcome] = [MissReason.ABSENT] * len(blocks)
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
        found: list[Outcome],
        deadline_s: float,
        cancelled: Callable[[], bool],
    ) -> None:
        with self._decoding() as landing:
            rest = [index for index, block in enumerate(blocks) if not self._from_host(block, found, index, landing)]
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

    def _from_host(self, block: Restore, found: list[Outcome], index: int, landing: list[Future[None]]) -> bool:
        slot = self._host.pin(block.content.name)
        if slot is None:
            return False
        encoding = slot.encoding

        def land() -> None:
            try:
                self._decode(slot.payload, encoding, block)
                found[index] = Restored(Tier.HOST, encoding)
            finally:
                self._host.unpin(slot)

        self._soon(encoding, land, landing)
        return True

    def _from_store(
        self, blocks: Sequence[Restore], found: list[Outcome], batch: Sequence[int], deadline_s: float
    ) -> None:
        assert self._store is not None
        asked: list[tuple[int, Slot]] = []
        with self._decoding() as landing:
            for index in batch:
                slot = self._host.reserve(blocks[index].content.name, blocks[index].content.num_tokens)
                if slot is not None:
                    asked.append((index, slot))
                elif not self._from_host(blocks[index], found, index, landing):  # another restore may have brought it
                    found[index] = MissReason.NO_ROOM
            hits: list[Encoding] = []

            def landed(number: int, outcome: Fetched, encoding: Encoding | None) -> None:
                index, slot = asked[number]
                if encoding is None:
                    self._host.abort(slot)
                    found[index] = _MISS[outcome]
                    return
                hits.append(encoding)
                self._soon(encoding, lambda: self._keep(slot, encoding, blocks[index], found, index), landing)

            began = time.perf_counter()
            wanted = [_fetch(blocks[index].content, slot) for index, slot in asked]
            self._store.get(wanted, landed, deadline_s=deadline_s)
            self._counter.add(Tier.REDIS, Tier.HOST, hits, time.perf_counter() - began)

    def _keep(self, slot: Slot, encoding: Encoding, block: Restore, found: list[Outcome], index: int) -> None:
        """Decode what has landed in a reserved slot, and let it stay there."""
        try:
            self._decode(slot.buffer[: encoding.num_bytes], encoding, block)
        except (BlockCorrupt, BlockForeign) as error:  # its checksum is right: whoever wrote it meant something else
            self._host.abort(slot)
            found[index] = MissReason.CORRUPT if isinstance(error, BlockCorrupt) else MissReason.FOREIGN
        except BaseException:
            self._host.abort(slot)
            raise
        else:
            self._host.publish(slot, encoding)
            found[index] = Restored(Tier.REDIS, encoding)

    def _decode(self, payload: memoryview, encoding: Encoding, block: Restore) -> None:
        with self._counter.timed(Tier.HOST, Tier.DEVICE, encoding):
            self._coder.decode(encoding, payload, block.content, block.target)

    @contextmanager
    def _decoding(self) -> Iterator[list[Future[None]]]:
        """On leaving, all that was handed to the decoders has landed: nobody writes the targets any more."""
        landing: list[Future[None]] = []
        try:
            yield landing
        finally:
            wait(landing)
        for future in landing:
            future.result()

    def _soon(self, encoding: Encoding, land: Callable[[], None], landing: list[Future[None]]) -> None:
        """Land now what is only copied; hand over what must be decoded."""
        if encoding.codec is RAW:
            land()
        else:
            landing.append(self._decoders.submit(land))

    def close(self) -> None:
        self._threads.shutdown(wait=True)
        self._decoders.shutdown(wait=True)


def _fetch(content: Content, slot: Slot) -> Fetch:
    return Fetch(
        content.name,
        content.num_tokens,
        slot.buffer,
        first_position=content.first_position,
        fidelity=content.fidelity,
    )
