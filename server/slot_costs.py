"""What a prompt would cost at every worker at once, in arrays by slot.

Knows slots and who holds how many of a prompt's blocks; neither names of blocks nor of workers.
"""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from server.block_holders import Segment, Tier

Costs = npt.NDArray[np.float64]

WORK_WEIGHT: Final = 2.0
"""What a second of work counts in seconds of queue: it keeps those waiting who come behind. At 1, a fleet under load
computes again elsewhere what it should have queued for, and all wait longer (`rekindle bench scale`)."""
_FEW = 8
"""So many holders are looked at one by one; more, as a row of all workers."""
_NEVER_S = 1e30
_ROWS = 256
"""Of sets with more, as arrays: those of prefixes that many share, and ask for all the time."""


class SlotCosts:
    """Used by one thread. A report changes a column of what is kept, a decision reads a few rows."""

    def __init__(self) -> None:
        self.queue_s: Costs = np.zeros(0)
        """By slot. Infinite where nothing may go."""
        self._missing_s: Costs = np.zeros(0)  # what a block costs, weighted,
        self._saved_s: Costs = np.zeros((0, 3))  # and by slot and place, what of that is saved if it lies there
        self._device_bits = 0
        self._make_rows()

    def add_slot(self) -> None:
        """The next one, forbidden until it is set."""
        slot = len(self.queue_s)
        self.queue_s = np.append(self.queue_s, math.inf)
        self._missing_s = np.append(self._missing_s, 0.0)
        self._saved_s = np.append(self._saved_s, np.zeros((1, 3)), axis=0)
        self._device_bits |= 1 << (2 * slot + Tier.DEVICE)
        self._make_rows()
        self.forbid(slot)

    def set(self, slot: int, queue_s: float, *, missing_s: float, host_s: float) -> None:
        """What a block costs there that it lacks, and one that it has on its host tier alone. All are finite."""
        self.queue_s[slot] = queue_s
        saved_s = 0.0, WORK_WEIGHT * missing_s, WORK_WEIGHT * (missing_s - host_s)
        if saved_s == tuple(self._saved_s[slot].tolist()):
            return
        self._missing_s[slot], self._saved_s[slot] = WORK_WEIGHT * missing_s, saved_s
        num_rows = len(self._row_of)
        self._rows_s[:num_rows, slot] = self._saved_s[slot][self._places[slot, :num_rows]]

    def work_off(self, seconds: float) -> None:
        """Time passes: every queue is so much shorter."""
        self.queue_s -= seconds
        np.maximum(self.queue_s, 0.0, out=self.queue_s)

    def forbid(self, slot: int) -> None:
        """Whatever goes there costs infinitely much. A block's cost stays finite: infinite ones have no difference."""
        self.set(slot, math.inf, missing_s=_NEVER_S, host_s=_NEVER_S)

    def copy(self, source: int, target: int) -> None:
        _, missing_s, host_saves_s = (value / WORK_WEIGHT for value in self._saved_s[source].tolist())
        self.set(target, self.queue_s.item(source), missing_s=missing_s, host_s=missing_s - host_saves_s)

    def of_prompt(self, num_blocks: int, segments: Sequence[Segment]) -> Costs:
        """[slots]: queue and weighted work, in seconds, of a prompt of `num_blocks`, all of them in `segments`. Holds
        until the next call."""
        costs_s = np.multiply(self._missing_s, float(num_blocks), out=self._prompt_s)
        costs_s += self.queue_s
        for num_held, held in segments:
            if held.bit_count() > _FEW:
                costs_s -= np.multiply(self._row(held), float(num_held), out=self._run_s)
                continue
            nearest = held and self._nearest(held)
            while nearest:
                bit = nearest.bit_length() - 1
                slot = bit >> 1
                costs_s[slot] -= num_held * self._saved_s.item(slot, 1 + (bit & 1))
                nearest ^= 1 << bit
        return costs_s

    def _row(self, held: int) -> Costs:
        """[slots]: what of a block's cost these holders save."""
        number = self._row_of.get(held)
        if number is None:
            if len(self._row_of) == _ROWS:
                self._row_of.clear()
            number = self._row_of[held] = len(self._row_of)
            places = self._places_of(held)
            self._places[:, number] = places
            self._rows_s[number] = np.take_along_axis(self._saved_s, places[:, None], axis=1)[:, 0]
        row_s: Costs = self._rows_s[number]
        return row_s

    def _places_of(self, held: int) -> npt.NDArray[np.uint8]:
        """[slots]: 0 where a worker lacks the block, 1 where it has it on its device, 2 on its host tier alone."""
        num_bits = 2 * len(self.queue_s)
        packed = np.frombuffer(self._nearest(held).to_bytes(-(-num_bits // 8), "little"), np.uint8)
        bits = np.unpackbits(packed, count=num_bits, bitorder="little").reshape(-1, 2)
        return bits @ np.array([1, 2], np.uint8)

    def _nearest(self, held: int) -> int:
        """Without the host tier's bits of those that have it on the device."""
        return held & ~((held & self._device_bits) << 1)

    def _make_rows(self) -> None:
        """Empty ones, as long as there are slots; and where results are made: fresh memory is slow memory."""
        num_slots = len(self.queue_s)
        self._row_of: dict[int, int] = {}
        self._rows_s = np.zeros((_ROWS, num_slots))
        self._places = np.zeros((num_slots, _ROWS), np.uint8)  # of each row; what a report changes lies together
        self._prompt_s, self._run_s = np.empty(num_slots), np.empty(num_slots)
