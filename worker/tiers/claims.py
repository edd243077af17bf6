"""Who fills which block of a restore: the restorer that brings it, or the engine that computes it instead.

The one place where the two meet. A block is claimed before it is touched, and claimed again right before the device's
copy is written: so nobody writes a block that another one fills.
"""

import threading
import time
from collections.abc import Callable
from enum import Enum, auto
from typing import NamedTuple

from cache_store.store import Encoding
from worker.calls import MissReason
from worker.tiers.moves import Tier


class Restored(NamedTuple):
    """Where a block was found, and as what payload."""

    tier: Tier
    encoding: Encoding


Outcome = Restored | MissReason


class State(Enum):
    """PENDING, FETCHING, WRITING, then LANDED or MISSED: the restorer's way. The engine's: TAKEN, before WRITING."""

    PENDING = auto()
    FETCHING = auto()
    """Asked for: it lands in host memory first."""
    WRITING = auto()
    """Its device block is being written."""
    LANDED = auto()
    MISSED = auto()
    TAKEN = auto()

    @property
    def is_open(self) -> bool:
        return self in (State.PENDING, State.FETCHING, State.WRITING)


class Claims:
    """One state for each block of a restore, by index. Settled once none is open: nobody writes any of them then."""

    def __init__(self, num_blocks: int, settled: Callable[[], None]) -> None:
        """`settled` is called once, on the restorer's thread that settles the last block; not where the engine does."""
        self.progress_s = time.monotonic()
        """When the latest block came or was missed; before that, when the restore began."""
        self._settled = settled
        self._lock = threading.Lock()
        self._states = [State.PENDING] * num_blocks
        self._outcomes: list[Outcome] = [MissReason.ABSENT] * num_blocks
        self._num_open = num_blocks

    @property
    def num_open(self) -> int:
        return self._num_open

    @property
    def is_settled(self) -> bool:
        return self._num_open == 0

    def states(self) -> list[State]:
        """As they are now."""
        with self._lock:
            return list(self._states)

    def outcomes(self) -> list[Outcome]:
        """Of all blocks, once settled."""
        assert self.is_settled
        return self._outcomes

    # The restorer's

    def is_pending(self, index: int) -> bool:
        return self._states[index] is State.PENDING

    def fetch(self, index: int) -> bool:
        """Is this block to be asked for now?"""
        return self._move(index, (State.PENDING, State.FETCHING), State.FETCHING)

    def write(self, index: int) -> bool:
        """Is the block, whose payload is here, to be written to the device now?"""
        return self._move(index, (State.PENDING, State.FETCHING), State.WRITING)

    def landed(self, index: int, restored: Restored) -> None:
        assert self._states[index] is State.WRITING, f"block {index} landed, being {self._states[index].name}"
        self._close(index, State.LANDED, restored)

    def missed(self, index: int, reason: MissReason) -> None:
        """The block will not come. Nothing happens where it is settled already."""
        self._close(index, State.MISSED, reason)

    def give_up(self) -> None:
        """Nobody brings any more what is not being written: that is closed by whoever writes it."""
        for index in range(len(self._states)):
            self._close(index, State.MISSED, MissReason.ABSENT, unless=State.WRITING)

    # The engine's

    def take(self, index: int, reason: MissReason, *, in_flight: bool = False) -> bool:
        """Compute a block instead; with `in_flight` also one that is on its way. False where it is too late."""
        with self._lock:
            state = self._states[index]
            if state is not State.PENDING and not (in_flight and state is State.FETCHING):
                return False
            self._states[index], self._outcomes[index] = State.TAKEN, reason
            self._num_open -= 1
            return True

    def take_all(self, reason: MissReason) -> None:
        """All that no device block is being written for."""
        for index in range(len(self._states)):
            self.take(index, reason, in_flight=True)

    def _move(self, index: int, sources: tuple[State, ...], target: State) -> bool:
        with self._lock:
            if self._states[index] not in sources:
                return False
            self._states[index] = target
            return True

    def _close(self, index: int, state: State, outcome: Outcome, *, unless: State | None = None) -> None:
        with self._lock:
            if not self._states[index].is_open or self._states[index] is unless:
                return
            self._states[index], self._outcomes[index] = state, outcome
            self._num_open -= 1
            self.progress_s = time.monotonic()
            is_last = self._num_open == 0
        if is_last:
            self._settled()
