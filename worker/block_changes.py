"""What came to this worker's device and host memory and what left them, since somebody last looked. Names only."""

import threading
from collections.abc import Callable
from typing import NamedTuple

from cache_store.ids import BlockHash

Told = Callable[[BlockHash, bool], None]
"""A block is here from now on (True), or no more."""


class TierChanges(NamedTuple):
    stored: list[BlockHash]
    removed: list[BlockHash]


class BlockChanges:
    """Of one tier. Any thread may tell and ask; nothing is kept while nobody listens."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_here: dict[BlockHash, bool] | None = None

    def listen(self, wanted: bool) -> None:
        """Begin to keep what is told, or stop."""
        with self._lock:
            self._is_here = {} if wanted else None

    def tell(self, name: BlockHash, is_here: bool) -> None:
        with self._lock:
            if self._is_here is not None:
                self._is_here[name] = is_here

    def take(self) -> TierChanges:
        """What was told since the last time, each block once, as it is now."""
        with self._lock:
            told, self._is_here = self._is_here or {}, None if self._is_here is None else {}
        return TierChanges(
            [name for name, is_here in told.items() if is_here], [name for name, is_here in told.items() if not is_here]
        )
