"""What both directions of moving blocks share: the tiers, what is known of a block, and the count of what moved."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import structlog

from cache_store.codecs import CodecInfo, fidelity_of
from cache_store.ids import BlockHash
from cache_store.store import Encoding, Fetch
from worker.engine.epochs import Beyond
from worker.engine.prefix import Wanted
from worker.figures import Moved

log = structlog.get_logger(__name__)

BATCH_BLOCKS = 16
"""Blocks asked of the store, or sent to it, in one call."""


class Tier(Enum):
    """Values are protos' Tier."""

    DEVICE = 1
    HOST = 2
    REDIS = 3
    DISK = 4


@dataclass(frozen=True, slots=True)
class Content:
    """What a block holds, wherever it lies."""

    name: BlockHash
    num_tokens: int
    first_position: int
    """Where its first token stands for the model: up to the window's end its index in the conversation."""
    codec: str
    """The session's: which codec the block itself is in is said by its payload's `Encoding`."""
    tenant: str

    @property
    def fidelity(self) -> str:
        return fidelity_of(self.codec)


def content_of(want: Wanted, block_tokens: int, codec: str, tenant: str, beyond: Beyond | None = None) -> Content:
    position = want.index * block_tokens
    place = position if beyond is None else beyond.epochs.place_of(position)
    return Content(want.name, want.content_tokens, place, codec, tenant)


def fetch_of(content: Content, into: memoryview, wanted: Callable[[], bool] | None = None) -> Fetch:
    """What disk or store is asked for this block."""
    return Fetch(
        content.name,
        content.num_tokens,
        into,
        first_position=content.first_position,
        fidelity=content.fidelity,
        tenant=content.tenant,
        wanted=wanted,
    )


class MoveCounter:
    """Blocks, bytes and seconds of each way between tiers, by codec. Any thread may call."""

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._lock = threading.Lock()
        self._moved: dict[tuple[Tier, Tier, CodecInfo], Moved] = {}

    @contextmanager
    def timed(self, source: Tier, target: Tier, *encodings: Encoding) -> Iterator[None]:
        """Count blocks whose move takes as long as the block of code, unless that fails."""
        began = time.perf_counter()
        yield
        self.add(source, target, encodings, time.perf_counter() - began)

    def add(self, source: Tier, target: Tier, encodings: Sequence[Encoding], seconds: float) -> None:
        """Count blocks that moved together; of the time each codec has the share that it has of the bytes."""
        all_bytes = sum(encoding.num_bytes for encoding in encodings)
        with self._lock:
            for codec, num_bytes, _ in encodings:
                key = (source, target, codec)
                was = self._moved.get(key) or Moved(source.name.lower(), target.name.lower(), codec.name)
                self._moved[key] = replace(
                    was,
                    blocks=was.blocks + 1,
                    bytes=was.bytes + num_bytes,
                    raw_bytes=was.raw_bytes + self._block_bytes,
                    seconds=was.seconds + seconds * num_bytes / all_bytes,
                )

    def read(self) -> tuple[Moved, ...]:
        with self._lock:
            return tuple(self._moved.values())


def stand_back() -> None:
    """Give this thread the lowest priority: what it does can wait, and a step of the model should not."""
    if sys.platform == "linux":  # where a thread has a priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def log_bug(future: Future[Any]) -> None:
    """A move's thread has nobody to raise to."""
    error = future.exception()
    if error is not None:
        log.error("a move failed by a bug", exc_info=error)
