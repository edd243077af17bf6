"""Count what a block store moved, from any thread."""

import threading
from collections.abc import Sequence

from cache_store.store import Fetched, StoreStats


class Counters:
    """The sums that StoreStats reports."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stats = StoreStats(0, 0, 0.0, 0, 0, 0.0, 0, 0)

    def put(self, num_blocks: int, num_bytes: int, took_s: float) -> None:
        with self._lock:
            was = self._stats
            self._stats = was._replace(
                blocks_put=was.blocks_put + num_blocks,
                bytes_put=was.bytes_put + num_bytes,
                put_s=was.put_s + took_s,
            )

    def got(self, outcomes: Sequence[Fetched], num_bytes: int, took_s: float) -> None:
        """`num_bytes` are the hits' payloads."""
        with self._lock:
            was = self._stats
            self._stats = was._replace(
                blocks_got=was.blocks_got + outcomes.count(Fetched.HIT),
                bytes_got=was.bytes_got + num_bytes,
                get_s=was.get_s + took_s,
                corrupt=was.corrupt + outcomes.count(Fetched.CORRUPT),
                foreign=was.foreign + outcomes.count(Fetched.FOREIGN),
            )

    def read(self) -> StoreStats:
        return self._stats
