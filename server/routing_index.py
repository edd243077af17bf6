"""Which worker to give a prompt to: who holds how much of it, what the rest would cost there, and who is busy.

Built from plain events that workers publish; knows no network and no clock. One index for each model's fingerprint:
names of another model's blocks never match. What it says may be late or wrong: that costs a miss, never a token.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from server.block_holders import BlockHolders, Segment, Tier

_Floats = npt.NDArray[np.float32]

_MAX_LOOKUPS = 64
_WORK_WEIGHT = 2.0
"""What a second of work counts in seconds of queue: it keeps those waiting who come behind. At 1, a fleet under load
computes again elsewhere what it should have queued for, and all wait longer (`rekindle bench scale`)."""
_SAME_S = 1e-3
"""Workers whose cost differs by less are equally good."""
_FEW = 8
"""So many holders are counted one by one; more, all workers at once."""
_ROWS = 256
"""Of sets with more, as arrays: those of prefixes that many share, and ask for all the time."""


@dataclass(frozen=True, slots=True)
class BlocksChanged:
    """What came to one of a worker's tiers, and what left it; no block does both."""

    worker_id: str
    number: int
    """Counts a worker's events, without gaps."""
    tier: Tier
    stored: Sequence[bytes] = ()
    removed: Sequence[bytes] = ()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that a worker has. Its next event is `number` + 1; those up to `number` are in it."""

    worker_id: str
    number: int
    device: Sequence[bytes] = ()
    host: Sequence[bytes] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerCosts:
    """What a worker last measured of itself."""

    queue_s: float
    """Work in front of a new turn."""
    token_s: float
    """To compute a token."""
    host_byte_s: float
    """To restore a byte from its host tier."""
    shared_byte_s: float = math.inf
    """To restore one from the tier that all workers share. Infinite where there is none."""


class Choice(NamedTuple):
    worker_id: str
    expected_s: float
    """Queue, restore and compute, to the end of the prompt."""
    device_blocks: int
    host_blocks: int
    """On its host tier alone."""


class RoutingIndex:
    """Used by one thread."""

    def __init__(self, *, block_tokens: int, block_bytes: int, sticky_s: float = 0.05) -> None:
        """A session stays where it was unless another worker is cheaper by more than `sticky_s`: what its last turn
        stored may not be known here yet."""
        self._block_tokens, self._block_bytes, self._sticky_s = block_tokens, block_bytes, sticky_s
        self._holders = BlockHolders()
        self._slots: dict[str, int] = {}
        self._workers: list[str] = []  # by slot
        self._next_number: dict[str, int] = {}  # of workers whose blocks are known without a gap
        self._device_bits = 0
        self._row = lru_cache(_ROWS)(self._row_of)
        self._queue_s = np.zeros(0, np.float32)  # by slot
        self._missing_s = np.zeros(0, np.float32)  # what a block costs, weighted,
        self._saved_s = np.zeros((2, 0), np.float32)  # and by tier and slot, what of that is saved where it lies there

    @property
    def num_blocks(self) -> int:
        return self._holders.num_blocks

    def changed(self, event: BlocksChanged) -> bool:
        """Take up an event. False: some are missing, and the worker's `Snapshot` is needed; until then its blocks are
        known as well as they can be. An event that came before is passed over."""
        expected = self._next_number.get(event.worker_id)
        if expected is not None and event.number < expected:
            return True
        slot = self._slot_of(event.worker_id)
        self._holders.add(slot, event.tier, event.stored)
        self._holders.remove(slot, event.tier, event.removed)
        if event.number != expected:
            self._next_number.pop(event.worker_id, None)
            return False
        self._next_number[event.worker_id] = event.number + 1
        return True

    def resync(self, snapshot: Snapshot) -> None:
        """Forget what was known of a worker's blocks and begin anew."""
        old = self._slots.pop(snapshot.worker_id, None)
        slot = self._slot_of(snapshot.worker_id)  # a new one: the old one's blocks are swept out in time
        if old is not None:
            self._queue_s[slot], self._missing_s[slot] = self._queue_s[old], self._missing_s[old]
            self._saved_s[:, slot] = self._saved_s[:, old]
            self._retire(old)
        self._holders.add(slot, Tier.DEVICE, snapshot.device)
        self._holders.add(slot, Tier.HOST, snapshot.host)
        self._next_number[snapshot.worker_id] = snapshot.number + 1

    def leave(self, worker_id: str) -> None:
        """The worker is gone, and all that it had."""
        self._next_number.pop(worker_id, None)
        if worker_id in self._slots:
            self._retire(self._slots.pop(worker_id))

    def report(self, worker_id: str, costs: WorkerCosts) -> None:
        """What is asked of the worker from now on costs this. Before its first report it is not chosen."""
        slot = self._slot_of(worker_id)
        missing_s = min(costs.token_s * self._block_tokens, costs.shared_byte_s * self._block_bytes)
        self._queue_s[slot] = costs.queue_s
        self._missing_s[slot] = _WORK_WEIGHT * missing_s
        host_saves_s = max(0.0, missing_s - costs.host_byte_s * self._block_bytes)
        self._saved_s[:, slot] = _WORK_WEIGHT * missing_s, _WORK_WEIGHT * host_saves_s

    def choose(self, chain: Sequence[bytes], *, key: str, last_worker_id: str = "") -> Choice | None:
        """The worker where a prompt of these blocks costs least, queue and work, or None where none has reported.

        Among equally good ones the least busy, then always the same one for the same `key`.
        """
        if not self._workers:
            return None
        counts = self._counts(self._holders.segments(chain, _MAX_LOOKUPS))
        costs_s = len(chain) * self._missing_s
        costs_s += self._queue_s
        for saved_s in counts * self._saved_s:
            costs_s -= saved_s
        slot = self._cheapest(costs_s, key, self._slots.get(last_worker_id))
        if slot is None:
            return None
        queue_s = float(self._queue_s[slot])
        expected_s = queue_s + (float(costs_s[slot]) - queue_s) / _WORK_WEIGHT
        return Choice(self._workers[slot], expected_s, int(counts[Tier.DEVICE, slot]), int(counts[Tier.HOST, slot]))

    def held(self, chain: Sequence[bytes]) -> Mapping[str, tuple[int, int]]:
        """How many of the blocks each worker has on its device, and on its host tier alone; those that have any."""
        on_device, on_host = self._counts(self._holders.segments(chain, 2 * len(chain) + 2)).astype(int).tolist()
        counts = {worker_id: (on_device[slot], on_host[slot]) for worker_id, slot in self._slots.items()}
        return {worker_id: count for worker_id, count in counts.items() if any(count)}

    def sweep(self) -> bool:
        """Do some milliseconds of tidying up. True if more is to be done."""
        return self._holders.sweep()

    def _counts(self, segments: Sequence[Segment]) -> _Floats:
        """[2, slots]: blocks on each one's device, and on its host tier alone."""
        counts: _Floats | None = None
        few: list[Segment] = []
        for segment in segments:
            if segment.held.bit_count() <= _FEW:
                few.append(segment)
            elif counts is None:
                counts = self._row(segment.held) * segment.num_blocks
            else:
                counts += self._row(segment.held) * segment.num_blocks
        if counts is None:
            counts = np.zeros((2, len(self._workers)), np.float32)
        for num_blocks, held in few:
            nearest = self._nearest(held)
            while nearest:
                bit = nearest.bit_length() - 1
                counts[bit & 1, bit >> 1] += num_blocks
                nearest ^= 1 << bit
        return counts

    def _row_of(self, held: int) -> _Floats:
        """[2, slots]: 1 where a set of holders has a block at its nearest tier, else 0."""
        num_bits = 2 * len(self._workers)
        packed = np.frombuffer(self._nearest(held).to_bytes(-(-num_bits // 8), "little"), np.uint8)
        bits = np.unpackbits(packed, count=num_bits, bitorder="little").reshape(-1, 2)
        return np.ascontiguousarray(bits.T, np.float32)

    def _nearest(self, held: int) -> int:
        """Without the host tier's bits of those that have it on the device."""
        return held & ~((held & self._device_bits) << 1)

    def _cheapest(self, costs_s: _Floats, key: str, last: int | None) -> int | None:
        least_s = costs_s[costs_s.argmin()]
        if least_s == math.inf:
            return None
        if last is not None and costs_s[last] <= least_s + self._sticky_s:
            return last
        good = (costs_s <= least_s + _SAME_S).nonzero()[0]
        if len(good) == 1:
            return int(good[0])
        queue_s = self._queue_s[good]
        good = good[queue_s == queue_s.min()]
        return int(good[zlib.crc32(key.encode()) % len(good)])

    def _slot_of(self, worker_id: str) -> int:
        slot = self._slots.get(worker_id)
        if slot is None:
            slot = self._slots[worker_id] = self._holders.take_slot()
            if slot == len(self._workers):
                self._workers.append(worker_id)
                self._device_bits |= 1 << (2 * slot + Tier.DEVICE)
                self._queue_s = np.append(self._queue_s, np.float32(math.inf))
                self._missing_s = np.append(self._missing_s, np.float32(0))
                self._saved_s = np.append(self._saved_s, np.zeros((2, 1), np.float32), axis=1)
                self._row.cache_clear()  # rows are as long as there are slots
            self._workers[slot] = worker_id
        return slot

    def _retire(self, slot: int) -> None:
        self._queue_s[slot] = math.inf
        self._holders.retire(slot)
