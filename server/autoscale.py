"""How many workers a load needs: from the queues and the pools, with patience in both directions. Pure numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, field

_QUEUE = 4
"""Requests that may wait for each worker before it counts as too few,"""
_FULL = 0.9
"""and the share of their pools that running requests may hold."""
_ROOMY = 0.6
"""The share that they may hold at most once there is a worker less."""


@dataclass(frozen=True, slots=True)
class Load:
    """One worker's."""

    waiting: int
    running: int
    pool_share: float
    """Of its device blocks, those that running requests hold."""


@dataclass(slots=True)
class Autoscaler:
    """`decide` at regular times. Up by as many as the queues need (at most twice as many), down by one at a time."""

    min_workers: int
    max_workers: int
    up_after_s: float
    """It must have been too much for so long,"""
    down_after_s: float
    """and so little that one fewer could do it for so long."""
    _too_much_s: float | None = field(default=None, init=False)
    _too_little_s: float | None = field(default=None, init=False)

    def decide(self, num_workers: int, loads: Sequence[Load], now_s: float) -> int:
        """How many there are to be. `loads` are of those that accept work: while others start, nothing is decided."""
        bounded = min(max(num_workers, self.min_workers), self.max_workers)
        if bounded != num_workers or len(loads) != num_workers:
            self._too_much_s = self._too_little_s = None
            return bounded
        waiting = sum(load.waiting for load in loads)
        held = sum(load.pool_share for load in loads)
        is_too_much = waiting > _QUEUE * num_workers or held > _FULL * num_workers
        is_too_little = not waiting and num_workers > 1 and held <= _ROOMY * (num_workers - 1)
        self._too_much_s = _since(self._too_much_s, now_s) if is_too_much else None
        self._too_little_s = _since(self._too_little_s, now_s) if is_too_little else None
        if self._too_much_s is not None and now_s - self._too_much_s >= self.up_after_s:
            self._too_much_s = None
            return min(num_workers + max(1, min(num_workers, waiting // _QUEUE - num_workers)), self.max_workers)
        if self._too_little_s is not None and now_s - self._too_little_s >= self.down_after_s:
            self._too_little_s = None
            return max(num_workers - 1, self.min_workers)
        return num_workers


def _since(began_s: float | None, now_s: float) -> float:
    return now_s if began_s is None else began_s
