"""Bring queued requests' blocks from the store into the host tier, before there is room for them on the device.

A few blocks at a time: a request that is let in meanwhile waits for those at most, and asks for the rest itself. Takes
no more than half of the host tier, and there nothing that anybody has pinned.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cache_store.host_tier import HostTier
from cache_store.store import BlockStore, Encoding, Fetched
from worker.tiers.moves import Content, MoveCounter, Tier, fetch_of, log_bug

_BATCH_BLOCKS = 8


@dataclass(frozen=True, slots=True)
class _Job:
    contents: Sequence[Content]
    is_waiting: Callable[[], bool]
    epoch: int


class Prefetcher:
    """`fetch`, `room` and `disown` are the engine's thread's; the bringing is done on one of its own."""

    def __init__(self, host: HostTier, store: BlockStore, counter: MoveCounter, *, timeout_s: float) -> None:
        """No batch takes longer than `timeout_s`."""
        self._host = host
        self._store = store
        self._counter = counter
        self._timeout_s = timeout_s
        self._jobs: list[_Job] = []
        self._epoch = 0
        self._closed = False
        self._closing = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "prefetch")

    def fetch(self, contents: Sequence[Content], is_waiting: Callable[[], bool]) -> bool:
        """Begin to bring blocks, the last first as a restore does, for as long as `is_waiting` (asked on any thread).

        False where those of others that wait already take all the room there is: ask again later.
        """
        if not contents or not self._store.available():
            return True
        room = self.room
        if room <= 0:
            return False
        job = _Job(contents[: -room - 1 : -1], is_waiting, self._epoch)
        self._jobs.append(job)
        with self._closing:
            if not self._closed:
                self._thread.submit(self._run, job).add_done_callback(log_bug)
        return True

    @property
    def room(self) -> int:
        """Blocks that may be brought beside those of others that wait; less than 1 where there is none."""
        self._jobs = [job for job in self._jobs if job.is_waiting()]
        return self._host.use().capacity // 2 - sum(len(job.contents) for job in self._jobs)

    def disown(self) -> None:
        """Something in the store was found wrong: of what is on its way now, nothing is kept."""
        self._epoch += 1

    def close(self) -> None:
        with self._closing:
            self._closed = True
        self._thread.shutdown(wait=True)

    def _run(self, job: _Job) -> None:
        for start in range(0, len(job.contents), _BATCH_BLOCKS):
            if self._closed or not job.is_waiting() or not self._is_trusted(job) or not self._store.available():
                return
            self._bring(job, job.contents[start : start + _BATCH_BLOCKS])

    def _bring(self, job: _Job, contents: Sequence[Content]) -> None:
        """Fill a slot of the host tier with each block that is neither there nor on its way there."""
        slots = [slot for content in contents if (slot := self._host.reserve(content.name, content.num_tokens))]
        by_name = {content.name: content for content in contents}
        hits: list[Encoding] = []
        coming = set(range(len(slots)))

        def landed(number: int, outcome: Fetched, encoding: Encoding | None) -> None:
            slot = slots[number]
            coming.discard(number)
            if encoding is None or not self._is_trusted(job):
                self._host.abort(slot)
                return
            hits.append(encoding)
            name = slot.block
            self._host.publish(slot, encoding)
            if not self._is_trusted(job):  # since: whoever dropped it from the host tier may have come too early
                self._host.drop([name])

        began = time.perf_counter()
        fetches = [fetch_of(by_name[slot.block], slot.buffer) for slot in slots]
        try:
            self._store.get(fetches, landed, deadline_s=time.monotonic() + self._timeout_s)
        finally:
            for number in coming:  # the store failed by a bug: whoever waits for these blocks must not wait for ever
                self._host.abort(slots[number])
        self._counter.add(Tier.REDIS, Tier.HOST, hits, time.perf_counter() - began)

    def _is_trusted(self, job: _Job) -> bool:
        return job.epoch == self._epoch
