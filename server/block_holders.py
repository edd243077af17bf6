"""Which workers hold a block, and at which tier, for millions of blocks and a thousand workers.

Knows slots (a worker's number here, until it leaves), not workers; nothing of load or cost.

All that is known of a block is one int, two bits for each slot. Equal ones are kept once: one worker's sessions share
theirs, and along a prefix they change a few times only, so that a chain is read by bisecting it. A block is looked up
by 45 bits of its name: of ten million, one or two are taken for another, which costs a miss and no more.
"""

from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from server.block_table import MAX_NUMBER, BlockTable

_NUM_TABLES = 32
"""So many that rebuilding or sweeping one takes some milliseconds, and so few that at ten million blocks each has the 4
MiB from which on numpy asks for huge pages: without them a look-up costs a miss of the TLB besides."""
_TABLE_MASK = _NUM_TABLES - 1
"""Of a name's first byte."""
_TAG = slice(1, 6)
"""Of a name, what its table looks it up by."""
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
    """Used by one thread. No call takes time that grows with the number of blocks, but rebuilding a 32nd of them."""

    def __init__(self, *, max_sets: int = MAX_NUMBER) -> None:
        """Holders that would make more than `max_sets` different sets are forgotten: they cost a miss."""
        self._max_sets = max_sets
        self._tables = [BlockTable() for _ in range(_NUM_TABLES)]
        self._sets = [0]
        """By number: who holds a block. 0 is nobody's, and everywhere."""
        self._numbers = {0: 0}
        self._free_numbers: list[int] = []
        self._num_slots = 0
        self._free_slots: list[int] = []
        self._used_slots: set[int] = set()
        self._retired: list[int] = []
        self._sweep: _Sweep | None = None
        self._sets_after_sweep = 0
        self._ends_of_shared: dict[int, int] = {}
        """By the number of a chain's first block's holders, if they are many: how long the prefix was that they all
        have. A hint: wrong ones cost lookups."""

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
        """Nobody asks for the slot any more. It is taken again when a sweep has cleared it, if it ever had a block."""
        (self._retired if slot in self._used_slots else self._free_slots).append(slot)

    def add(self, slot: int, tier: Tier, names: Sequence[bytes]) -> None:
        """The slot's worker has these blocks at `tier`."""
        assert 0 <= slot < self._num_slots, f"slot {slot} of {self._num_slots}"
        if not names:
            return
        self._used_slots.add(slot)
        only, tables, sets = 1 << (2 * slot + tier), self._tables, self._sets
        number_of_only = self._number(only)
        for name in names:
            table, tag = tables[name[0] & _TABLE_MASK], int.from_bytes(name[_TAG]) or 1
            number = table.get(tag)
            held = sets[number]
            if not held & only:
                table.put(tag, (self._number(held | only) or number) if number else number_of_only)

    def remove(self, slot: int, tier: Tier, names: Iterable[bytes]) -> None:
        """It no longer has these."""
        only, tables, sets = 1 << (2 * slot + tier), self._tables, self._sets
        for name in names:
            table, tag = tables[name[0] & _TABLE_MASK], int.from_bytes(name[_TAG]) or 1
            held = sets[table.get(tag)]
            if held & only:
                table.put(tag, self._number(held ^ only))

    def held(self, name: bytes) -> int:
        """Bit 2 * slot + tier for each worker and tier that has the block, retired slots among them."""
        return self._sets[self._find(name)]

    def segments(self, chain: Sequence[bytes], max_lookups: int) -> list[Segment]:
        """Cut a chain where its holders change, front first.

        Takes a run between two blocks of equal holders for held by the same: workers evict a conversation's last block
        first. Looks from the end: it is who holds most that matters. What `max_lookups` leave unclear, at the front,
        counts as held by those only that hold its far end.
        """
        if not chain:
            return []
        find, sets, high = self._find, self._sets, len(chain) - 1  # equal sets have equal numbers: compare these
        first_number, high_number = find(chain[0]), find(chain[high])
        known, end, step = [(0, first_number)], high + 1, 1  # known: blocks before `high`, the last of them on top
        end_of_shared = self._ends_of_shared.get(first_number, 0)
        segments = []
        while known:
            low, low_number = known[-1]
            if low_number == high_number:
                high = low
                known.pop()
            elif high - low == 1 or max_lookups <= 2:
                segments.append(Segment(end - low - 1, sets[high_number]))
                end, high, high_number = low + 1, low, low_number
                known.pop()
            else:
                max_lookups -= 1
                middle = (low + high) // 2
                if not high_number and high - step > middle:  # what nobody has is new, mostly short
                    middle, step = high - step, 2 * step
                elif not low and 0 < end_of_shared <= high:  # where the last such chain left its shared prefix
                    middle = end_of_shared - (end_of_shared == high)
                known.append((middle, find(chain[middle])))
        segments.append(Segment(end, sets[first_number]))
        segments.reverse()
        if end != end_of_shared and end < len(chain) and segments[0].held.bit_count() > _FEW:
            if len(self._ends_of_shared) >= _MAX_PREFIXES:
                self._ends_of_shared.clear()
            self._ends_of_shared[first_number] = end
        return segments

    def _find(self, name: bytes) -> int:
        """The number of the set that holds a block."""
        return self._tables[name[0] & _TABLE_MASK].get(int.from_bytes(name[_TAG]) or 1)

    def sweep(self) -> bool:
        """Clear retired slots, and sets that nobody holds any more, in one of the tables: some milliseconds.

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
            new = np.zeros(len(self._sets), np.uint64)
            new[found] = living
            table.map_numbers(new)
        sweep.num_done += 1
        if sweep.num_done == _NUM_TABLES:
            self._end_sweep(sweep)
        return True

    def _end_sweep(self, sweep: "_Sweep") -> None:
        self._sweep = None
        self._free_slots += sweep.slots
        self._used_slots.difference_update(sweep.slots)
        for held, number in list(self._numbers.items()):
            if number not in sweep.in_use:
                del self._numbers[held]
                self._sets[number] = 0
                self._free_numbers.append(number)
        self._sets_after_sweep = len(self._numbers)

    def _number(self, held: int) -> int:
        """Of a set of holders, a new one if need be; 0 while there are too many."""
        number = self._numbers.get(held)
        if number is None:
            if self._free_numbers:
                number = self._free_numbers.pop()
                self._sets[number] = held
            elif len(self._sets) > self._max_sets:
                return 0
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
