"""Which worker to give a prompt to: who holds how much of it, what the rest would cost there, and who is busy.

Built from plain events that workers publish; knows no network and no clock. One index for each model's fingerprint:
names of another model's blocks never match. What it says may be late or wrong: that costs a miss, never a token.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import NamedTuple

from server.block_holders import BlockHolders, Segment, Tier
from server.slot_costs import WORK_WEIGHT, Costs, SlotCosts

_MAX_LOOKUPS = 64
_SAME_S = 1e-3
"""Workers whose cost differs by less are equally good."""
_FEW = 8
"""Of so many, who holds most is looked for."""


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
    """What a worker last measured of itself. Raises ValueError where one is negative or not a number."""

    queue_s: float
    """Work in front of a new turn. Infinite where it can't be reached: it is not chosen."""
    token_s: float
    """To compute a token. Infinite where it has not measured any: every turn computes one, so it is not chosen."""
    host_byte_s: float
    """To restore a byte from its host tier."""
    shared_byte_s: float = math.inf
    """To restore one from the tier that all workers share. Infinite where there is none."""

    def __post_init__(self) -> None:
        if not all(value >= 0 for value in astuple(self)):
            raise ValueError(f"costs are seconds, 0 or more: {self}")


class Choice(NamedTuple):
    worker_id: str
    expected_s: float
    """Queue, restore and compute, to the end of the prompt."""
    work_s: float
    """Of these, what the prompt itself adds."""
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
        self._costs = SlotCosts()

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
            self._costs.copy(old, slot)
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
        if math.isinf(costs.queue_s) or math.isinf(costs.token_s):
            self._costs.forbid(slot)
            return
        missing_s = min(costs.token_s * self._block_tokens, costs.shared_byte_s * self._block_bytes)
        host_s = min(missing_s, costs.host_byte_s * self._block_bytes)
        self._costs.set(slot, costs.queue_s, missing_s=missing_s, host_s=host_s)

    def choose(self, chain: Sequence[bytes], *, key: str, last_worker_id: str = "") -> Choice | None:
        """The worker where a prompt of these blocks costs least, queue and work, or None where none has reported.

        Among equally good ones the least busy, of these who holds most, then always the same one for the same `key`.
        """
        if not self._workers:
            return None
        segments = self._holders.segments(chain, _MAX_LOOKUPS)
        costs_s = self._costs.of_prompt(len(chain), segments)
        slot = self._cheapest(costs_s, segments, key, self._slots.get(last_worker_id))
        if slot is None:
            return None
        queue_s = self._costs.queue_s.item(slot)
        work_s = (costs_s.item(slot) - queue_s) / WORK_WEIGHT
        return Choice(self._workers[slot], queue_s + work_s, work_s, *_blocks_at(slot, segments))

    def give(self, worker_id: str, work_s: float) -> None:
        """It has so much more to do than it last reported."""
        self._costs.queue_s[self._slots[worker_id]] += work_s

    def queue_s(self, worker_id: str) -> float:
        """What a worker has to do, infinite where nothing may go; 0 for one that has not reported."""
        slot = self._slots.get(worker_id)
        return self._costs.queue_s.item(slot) if slot is not None else 0.0

    def pass_time(self, seconds: float) -> None:
        """Workers work off what they have to do. (Knows no clock: call it before reports and choices.)"""
        self._costs.work_off(seconds)

    def knows(self, worker_id: str) -> bool:
        """Has it told, without a gap, what it holds?"""
        return worker_id in self._next_number

    def held(self, chain: Sequence[bytes]) -> Mapping[str, tuple[int, int]]:
        """How many of the blocks each worker has on its device, and on its host tier alone; those that have any."""
        segments = self._holders.segments(chain, 2 * len(chain) + 2)
        counts = {worker_id: _blocks_at(slot, segments) for worker_id, slot in self._slots.items()}
        return {worker_id: count for worker_id, count in counts.items() if any(count)}

    def sweep(self) -> bool:
        """Do some milliseconds of tidying up. True if more is to be done."""
        return self._holders.sweep()

    def _cheapest(self, costs_s: Costs, segments: Sequence[Segment], key: str, last: int | None) -> int | None:
        least = int(costs_s.argmin())
        least_s = costs_s.item(least)
        if least_s == math.inf:
            return None
        if last is not None and costs_s.item(last) <= least_s + self._sticky_s:
            return last
        good = (costs_s <= least_s + _SAME_S).nonzero()[0]
        if len(good) == 1:
            return least
        queue_s = self._costs.queue_s[good]
        slots: list[int] = good[queue_s == queue_s.min()].tolist()
        if len(slots) <= _FEW:
            held = [sum(_blocks_at(slot, segments)) for slot in slots]
            slots = [slot for slot, num_blocks in zip(slots, held, strict=True) if num_blocks == max(held)]
        return slots[zlib.crc32(key.encode()) % len(slots)]

    def _slot_of(self, worker_id: str) -> int:
        slot = self._slots.get(worker_id)
        if slot is None:
            slot = self._slots[worker_id] = self._holders.take_slot()
            if slot == len(self._workers):
                self._workers.append(worker_id)
                self._costs.add_slot()
            self._workers[slot] = worker_id
        return slot

    def _retire(self, slot: int) -> None:
        self._costs.forbid(slot)
        self._holders.retire(slot)


def _blocks_at(slot: int, segments: Sequence[Segment]) -> tuple[int, int]:
    """On a worker's device, and on its host tier alone."""
    on_device = on_host = 0
    for num_blocks, held in segments:
        here = held >> 2 * slot
        if here >> Tier.DEVICE & 1:
            on_device += num_blocks
        elif here >> Tier.HOST & 1:
            on_host += num_blocks
    return on_device, on_host
