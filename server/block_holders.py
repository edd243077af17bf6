"""Which workers hold a block, and at which tier, for millions of blocks and a thousand workers.

Knows slots (a worker's number here, until it leaves), not workers; nothing of load or cost.

All that is known of a block is one int, two bits for each slot. Equal ones are one object: one worker's sessions share
theirs, and along a prefix they change a few times only, so that a chain is read by bisecting it. A block is looked up
by 56 bits of its name: one in billions is taken for another, which costs a miss and no more.
"""

from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple

_KEY_BYTES = 7  # an int of 56 bits takes 32 bytes, one of 64 takes 48
_SHARD_SHIFT = 44
_NUM_SHARDS = 1 << (8 * _KEY_BYTES - _SHARD_SHIFT)
_SPARE_SETS = 4096


class Tier(IntEnum):
    """Where a worker has a block. Values are bits' places."""

    DEVICE = 0
    HOST = 1


class Segment(NamedTuple):
    """Neighbouring blocks of a chain that the same workers hold."""

    num_blocks: int
    held: int
    """Bit 2 * slot + tier. 0: nobody has them."""


class BlockHolders:
    """Used by one thread. No call but `sweep` takes time that grows with the number of blocks."""

    def __init__(self) -> None:
        self._shards: list[dict[int, int]] = [{} for _ in range(_NUM_SHARDS)]  # none so large that growing it is felt
        self._sets: dict[int, int] = {}
        self._free: list[int] = []
        self._num_slots = 0
        self._retired: list[int] = []
        self._sweep: _Sweep | None = None
        self._sets_after_sweep = 0

    @property
    def num_blocks(self) -> int:
        return sum(map(len, self._shards))

    @property
    def num_sets(self) -> int:
        """Different sets of holders that are kept."""
        return len(self._sets)

    def take_slot(self) -> int:
        if self._free:
            return self._free.pop()
        self._num_slots += 1
        return self._num_slots - 1

    def retire(self, slot: int) -> None:
        """Nobody asks for the slot any more. It is taken again when a sweep has cleared it."""
        self._retired.append(slot)

    def add(self, slot: int, tier: Tier, names: Iterable[bytes]) -> None:
        """The slot's worker has these blocks at `tier`."""
        only, shards, sets = self._bit(slot, tier), self._shards, self._sets
        for name in names:
            key = int.from_bytes(name[:_KEY_BYTES])
            shard = shards[key >> _SHARD_SHIFT]
            held = shard.get(key)
            if held is None:
                shard[key] = only
            elif not held & only:
                held |= only
                shard[key] = sets.setdefault(held, held)

    def remove(self, slot: int, tier: Tier, names: Iterable[bytes]) -> None:
        """It no longer has these."""
        only, shards, sets = self._bit(slot, tier), self._shards, self._sets
        for name in names:
            key = int.from_bytes(name[:_KEY_BYTES])
            shard = shards[key >> _SHARD_SHIFT]
            held = shard.get(key, 0)
            if held == only:
                del shard[key]
            elif held & only:
                held ^= only
                shard[key] = sets.setdefault(held, held)

    def held(self, name: bytes) -> int:
        """Bit 2 * slot + tier for each worker and tier that has the block, retired slots among them."""
        key = int.from_bytes(name[:_KEY_BYTES])
        return self._shards[key >> _SHARD_SHIFT].get(key, 0)

    def segments(self, chain: Sequence[bytes], max_lookups: int) -> list[Segment]:
        """Cut a chain where its holders change, front first.

        Takes a run between two blocks of equal holders for held by the same: workers evict a conversation's last block
        first. What `max_lookups` leave unclear counts as held by those only that hold its far end.
        """
        if not chain:
            return []
        last = len(chain) - 1
        first_held, last_held = self.held(chain[0]), self.held(chain[last])
        changes: list[tuple[int, int]] = [(0, first_held)]
        unclear = [(0, first_held, last, last_held)]
        step = 1
        for low, low_held, high, high_held in unclear:  # grows while it is read
            if low_held == high_held:
                continue
            if high - low == 1 or max_lookups <= 2:
                changes.append((low + 1, high_held))
                continue
            max_lookups -= 1
            middle = (low + high) // 2
            if not high_held and high - step > middle:  # what nobody has is new, and mostly short: search from the end
                middle, step = high - step, 2 * step
            held = self.held(chain[middle])
            unclear.append((low, low_held, middle, held))
            unclear.append((middle, held, high, high_held))
        changes.sort()
        ends = [*(start for start, _ in changes[1:]), len(chain)]
        return [Segment(end - start, held) for (start, held), end in zip(changes, ends, strict=True)]

    def sweep(self) -> bool:
        """Clear retired slots, and sets that nobody holds any more, in one of 4096 parts of the table: a millisecond.

        Returns whether more is to be done. Call it when there is nothing better to do.
        """
        if self._sweep is None:
            if not self._retired and len(self._sets) <= 2 * self._sets_after_sweep + _SPARE_SETS:
                return False
            self._sweep, self._retired = _Sweep(self._retired), []
        self._sweep.clear(self._shards[self._sweep.num_done])
        if self._sweep.num_done == _NUM_SHARDS:
            self._sets, self._sets_after_sweep = self._sweep.sets, len(self._sweep.sets)
            self._free += self._sweep.slots
            self._sweep = None
        return True

    def _bit(self, slot: int, tier: Tier) -> int:
        assert 0 <= slot < self._num_slots, f"slot {slot} of {self._num_slots}"
        bit = 1 << (2 * slot + tier)
        return self._sets.setdefault(bit, bit)


class _Sweep:
    """One pass over the table. What is added meanwhile holds no retired slot, and may be one int twice: no harm."""

    def __init__(self, slots: list[int]) -> None:
        self.slots = slots
        self.sets: dict[int, int] = {}
        self.num_done = 0
        self._living = ~sum(0b11 << (2 * slot) for slot in slots)

    def clear(self, shard: dict[int, int]) -> None:
        gone = []
        for key, held in shard.items():
            living = held & self._living
            if living:
                shard[key] = self.sets.setdefault(living, living)
            else:
                gone.append(key)
        for key in gone:
            del shard[key]
        self.num_done += 1
