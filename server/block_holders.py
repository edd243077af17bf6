"""Which workers hold a block, and at which tier, for millions of blocks and a thousand workers.

Knows slots (a worker's number here, until it leaves), not workers; nothing of load or cost.

All that is known of a block is one int, two bits for each slot. Equal ones are kept once: one worker's sessions share
theirs, and along a prefix they change a few times only, so that a chain is read by bisecting it. A block is looked up
by 64 bits of its name: among ten million, one in a trillion is taken for another, which costs a miss and no more.
"""

from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from server.block_table import BlockTable

_KEY_BYTES = 8
_TABLE_SHIFT = 58
_NUM_TABLES = 64  # so many that rebuilding one is hardly felt, and so few that all are in the processor's caches
_SPARE_SETS = 4096
_FEW = 8
_MAX_PREFIXES = 1024


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
    """Used by one thread. No call takes time that grows with the number of blocks, but rebuilding a 64th of them."""

    def __init__(self) -> None:
        self._tables = [BlockTable() for _ in range(_NUM_TABLES)]
        self._sets = [0]
        """By number: who holds a block. 0 is nobody's, and everywhere."""
        self._numbers = {0: 0}
        self._free_numbers: list[int] = []
        self._num_slots = 0
        self._free_slots: list[int] = []
        self._retired: list[int] = []
        self._sweep: _Sweep | None = None
        self._sets_after_sweep = 0
        self._ends_of_shared: dict[int, int] = {}
        """By the holders of a chain's first block, if they are many: how long the prefix was that they all have."""

    @property
    def num_blocks(self) -> int:
        return sum(map(len, self._tables))

    @property
    def num_sets(self) -> int:
        """Different sets of holders that are kept."""
        return len(self._numbers)

    def take_slot(self) -> int:
        if self._free_slots:
            return self._free_slots.pop()
        self._num_slots += 1
        return self._num_slots - 1

    def retire(self, slot: int) -> None:
        """Nobody asks for the slot any more. It is taken again when a sweep has cleared it."""
        self._retired.append(slot)

    def add(self, slot: int, tier: Tier, names: Iterable[bytes]) -> None:
        """The slot's worker has these blocks at `tier`."""
        assert 0 <= slot < self._num_slots, f"slot {slot} of {self._num_slots}"
        only, tables, sets = 1 << (2 * slot + tier), self._tables, self._sets
        number_of_only = self._number(only)
        for name in names:
            key = int.from_bytes(name[:_KEY_BYTES]) or 1
            table = tables[key >> _TABLE_SHIFT]
            number = table.get(key)
            held = sets[number]
            if not held & only:
                table.put(key, self._number(held | only) if number else number_of_only)

    def remove(self, slot: int, tier: Tier, names: Iterable[bytes]) -> None:
        """It no longer has these."""
        only, tables, sets = 1 << (2 * slot + tier), self._tables, self._sets
        for name in names:
            key = int.from_bytes(name[:_KEY_BYTES]) or 1
            table = tables[key >> _TABLE_SHIFT]
            held = sets[table.get(key)]
            if held & only:
                table.put(key, self._number(held ^ only))

    def held(self, name: bytes) -> int:
        """Bit 2 * slot + tier for each worker and tier that has the block, retired slots among them."""
        key = int.from_bytes(name[:_KEY_BYTES]) or 1
        return self._sets[self._tables[key >> _TABLE_SHIFT].get(key)]

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
        step, end_of_shared = 1, self._ends_of_shared.get(first_held, 0)
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
            elif low < end_of_shared <= high and not low:  # where the last such chain left its shared prefix
                middle = end_of_shared - (end_of_shared == high)
            held = self.held(chain[middle])
            unclear.append((low, low_held, middle, held))
            unclear.append((middle, held, high, high_held))
        changes.sort()
        if len(changes) > 1 and first_held.bit_count() > _FEW:
            if len(self._ends_of_shared) >= _MAX_PREFIXES:
                self._ends_of_shared.clear()
            self._ends_of_shared[first_held] = changes[1][0]
        ends = [*(start for start, _ in changes[1:]), len(chain)]
        return [Segment(end - start, held) for (start, held), end in zip(changes, ends, strict=True)]

    def sweep(self) -> bool:
        """Clear retired slots, and sets that nobody holds any more, in one of 64 parts of the table: some milliseconds.

        Returns whether more is to be done. Call it when there is nothing better to do.
        """
        if self._sweep is None:
            if not self._retired and len(self._numbers) <= 2 * self._sets_after_sweep + _SPARE_SETS:
                return False
            self._sweep, self._retired = _Sweep(self._retired), []
        sweep, table = self._sweep, self._tables[self._sweep.num_done]
        found = table.numbers()
        living = [self._number(self._sets[number] & sweep.living) for number in found]
        if living != found:
            new = np.zeros(len(self._sets), np.uint32)
            new[found] = living
            table.map_numbers(new)
        sweep.num_done += 1
        if sweep.num_done == _NUM_TABLES:
            self._end_sweep(sweep)
        return True

    def _end_sweep(self, sweep: "_Sweep") -> None:
        self._sweep = None
        self._free_slots += sweep.slots
        for held, number in list(self._numbers.items()):
            if number not in sweep.in_use:
                del self._numbers[held]
                self._sets[number] = 0
                self._free_numbers.append(number)
        self._sets_after_sweep = len(self._numbers)

    def _number(self, held: int) -> int:
        """Of a set of holders, a new one if need be."""
        number = self._numbers.get(held)
        if number is None:
            if self._free_numbers:
                number = self._free_numbers.pop()
                self._sets[number] = held
            else:
                number = len(self._sets)
                self._sets.append(held)
            self._numbers[held] = number
        if self._sweep is not None:
            self._sweep.in_use.add(number)
        return number


class _Sweep:
    """One pass over the tables. A set that is asked for meanwhile is in use, wherever its blocks lie."""

    def __init__(self, slots: list[int]) -> None:
        self.slots = slots
        self.living = ~sum(0b11 << (2 * slot) for slot in slots)
        self.in_use = {0}
        self.num_done = 0
