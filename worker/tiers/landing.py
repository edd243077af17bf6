"""The last part of a block's way up: from a slot of the host tier to the device, decoded where need be.

What must be decoded is so on threads of its own, several blocks at a time: to decode one takes longer than to fetch it.
Knows claims, codecs and the host tier. Which tier brings a block, and what is asked for, is the restorer's business.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass

from cache_store.codecs import RAW
from cache_store.disk_tier import DiskTier
from cache_store.errors import BlockCorrupt, BlockForeign
from cache_store.host_tier import HostTier, Slot
from cache_store.store import Encoding
from worker.calls import MissReason
from worker.ids import BlockId
from worker.tiers.claims import Claims, Restored
from worker.tiers.coder import BlockCoder
from worker.tiers.moves import Content, MoveCounter, Tier
from worker.tiers.transfer_costs import TransferCosts

DECODERS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True, slots=True)
class Restore:
    content: Content
    target: BlockId


@dataclass(frozen=True, slots=True)
class Job:
    blocks: Sequence[Restore]
    claims: Claims
    deadline_s: float


class Lander:
    """Any thread may call."""

    def __init__(
        self, coder: BlockCoder, host: HostTier, counter: MoveCounter, costs: TransferCosts, disk: DiskTier | None
    ) -> None:
        self._coder = coder
        self._host = host
        self._counter = counter
        self._costs = costs
        self._disk = disk
        self._decoders = ThreadPoolExecutor(DECODERS, "decode")

    def land(self, job: Job, index: int, slot: Slot) -> None:
        """Write a pinned block to the device where it is still wanted there."""
        content, encoding = job.blocks[index].content, slot.encoding
        try:
            if not job.claims.write(index):
                return
            if self._decoded(job, index, slot.payload, encoding):
                job.claims.landed(index, Restored(Tier.HOST, encoding))
            else:
                self._host.drop([content.name])
        finally:
            self._host.unpin(slot)

    def keep(self, job: Job, index: int, slot: Slot, encoding: Encoding, tier: Tier) -> None:
        """Let stay in the host tier what has landed there in a reserved slot; write it to the device where it is still
        wanted."""
        payload = slot.buffer[: encoding.num_bytes]
        try:
            is_wanted = job.claims.write(index)
            is_good = not is_wanted or self._decoded(job, index, payload, encoding)
        except BaseException:
            self._host.abort(slot)
            raise
        if not is_good:
            self._host.abort(slot)
            return
        self._host.publish(slot, encoding)
        if is_wanted:
            job.claims.landed(index, Restored(tier, encoding))

    def _decoded(self, job: Job, index: int, payload: memoryview, encoding: Encoding) -> bool:
        """Write a payload to the device. False, and a miss, where it is not what its codec writes: its checksum was
        right, so whoever wrote it meant something else."""
        block = job.blocks[index]
        began = time.perf_counter()
        try:
            self._coder.decode(encoding, payload, block.content, block.target)
        except (BlockCorrupt, BlockForeign) as error:
            is_corrupt = isinstance(error, BlockCorrupt)
            job.claims.missed(index, MissReason.CORRUPT if is_corrupt else MissReason.FOREIGN)
            if self._disk is not None:
                self._disk.drop([block.content.name])
            return False
        except BaseException:
            job.claims.missed(index, MissReason.ABSENT)
            raise
        seconds = time.perf_counter() - began
        self._counter.add(Tier.HOST, Tier.DEVICE, [encoding], seconds)
        at_once = 1 if encoding.codec is RAW else DECODERS
        self._costs.decoded(block.content.codec, encoding.num_bytes, seconds / at_once)
        return True

    def soon(self, encoding: Encoding, land: Callable[[], None], landing: list[Future[None]]) -> None:
        """Land now what is only copied; hand over what must be decoded."""
        if encoding.codec is RAW:
            land()
        else:
            landing.append(self._decoders.submit(land))

    def close(self) -> None:
        self._decoders.shutdown(wait=True)


@contextmanager
def gathered() -> Iterator[list[Future[None]]]:
    """On leaving, all that was handed to decoders and readers has landed: nobody writes the targets any more."""
    landing: list[Future[None]] = []
    try:
        yield landing
    finally:
        wait(landing)
    for future in landing:
        future.result()
