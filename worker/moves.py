"""What both directions of moving blocks share: the tiers, the device's memory as bytes, and the count of what moved."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from enum import Enum
from typing import Any, Protocol

import structlog

from worker.calls import Moved
from worker.ids import BlockId

log = structlog.get_logger(__name__)

BATCH_BLOCKS = 16
"""Blocks asked of the store, or sent to it, in one call."""


class Tier(Enum):
    """Values are protos' Tier."""

    DEVICE = 1
    HOST = 2
    REDIS = 3


class DeviceMemory(Protocol):
    """The device's blocks as bytes, in the layout's order. Called from the threads that move."""

    def read_block(self, block: BlockId, into: memoryview) -> None: ...

    def write_block(self, block: BlockId, payload: memoryview) -> None: ...


class MoveCounter:
    """Blocks and seconds spent by each way between tiers. Any thread may call."""

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._lock = threading.Lock()
        self._moved: dict[tuple[Tier, Tier], tuple[int, float]] = {}

    @contextmanager
    def timed(self, source: Tier, target: Tier, blocks: int = 1) -> Iterator[None]:
        """Count a move that takes as long as the block of code, unless that fails."""
        began = time.perf_counter()
        yield
        self.add(source, target, blocks, time.perf_counter() - began)

    def add(self, source: Tier, target: Tier, blocks: int, seconds: float) -> None:
        with self._lock:
            count, total_s = self._moved.get((source, target), (0, 0.0))
            self._moved[source, target] = (count + blocks, total_s + seconds)

    def read(self) -> tuple[Moved, ...]:
        with self._lock:
            return tuple(
                Moved(source.name.lower(), target.name.lower(), blocks, blocks * self._block_bytes, seconds)
                for (source, target), (blocks, seconds) in self._moved.items()
            )


def stand_back() -> None:
    """Give this thread the lowest priority: what it does can wait, and a step of the model should not."""
    if sys.platform == "linux":  # where a thread has a priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def log_bug(future: Future[Any]) -> None:
    """A move's thread has nobody to raise to."""
    error = future.exception()
    if error is not None:
        log.error("a move failed by a bug", exc_info=error)
