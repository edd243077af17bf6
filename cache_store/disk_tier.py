"""KV blocks on this machine's disk: a bounded LRU under the host tier, written behind, found again by the next worker.

A disk that is full or fails costs nobody a turn: what it does not take is dropped, what it does not give is a miss, and
after some failures in a row the tier leaves it alone. Any thread may call.
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from errno import ENOSPC
from pathlib import Path
from typing import NamedTuple

import structlog

from cache_store.disk_files import BlockFiles
from cache_store.errors import BlockCorrupt, BlockForeign
from cache_store.frame import Framer
from cache_store.host_claim import Claim, claim_folder, forget_abandoned
from cache_store.ids import BlockHash, TenantMark, mark_of
from cache_store.store import DELETIONS_KNOWN_S, Encoding, Fetch, Fetched, Store

log = structlog.get_logger(__name__)

_NAME = "rekindle-blocks-"
_STALE_S = 86_400.0
"""A folder that no worker has held or written for so long is deleted by the next one that starts beside it."""
_FAILURES_IN_A_ROW = 3


class DiskStats(NamedTuple):
    blocks: int
    used_bytes: int
    """Headers included, and what was to be deleted and could not be."""
    capacity_bytes: int
    dropped: int
    """Blocks not written: the queue was full, or the disk failed."""
    corrupt: int
    failures: int
    """Reads and writes that the disk refused, or that failed otherwise."""


class DiskTier:
    """Blocks in files of one folder, at most `capacity_bytes` of them. Who made the folder ours is `open_disk_tier`."""

    def __init__(
        self,
        claim: Claim,
        framer: Framer,
        *,
        capacity_bytes: int,
        max_queued: int,
        prepare_thread: Callable[[], None],
    ) -> None:
        """Finds what is there (headers only). Raises OSError. `prepare_thread` runs first on the thread that writes."""
        self._claim = claim
        self._files = BlockFiles(claim.path, framer)
        self._overhead_bytes = framer.overhead_bytes
        self._capacity_bytes = capacity_bytes
        self._max_queued = max_queued
        self._changed = threading.Condition()
        found = self._files.scan()
        self._kept = OrderedDict((kept.block, kept.num_bytes) for kept in found)  # least recently used first
        self._kept_bytes = sum(self._kept.values())
        self._make_room(0)
        self._queue: deque[tuple[Store, Callable[[], None]]] = deque()
        self._writing: BlockHash | None = None
        self._failed_in_a_row = self._dropped = self._corrupt = self._failures = 0
        self._closed = False
        self._prepare_thread = prepare_thread
        self._writer = threading.Thread(target=self._write_loop, name="disk", daemon=True)
        self._writer.start()

    @property
    def works(self) -> bool:
        """False once the disk has failed too often."""
        return self._failed_in_a_row < _FAILURES_IN_A_ROW

    def contains(self, block: BlockHash) -> bool:
        return block in self._kept and self.works

    def blocks(self) -> list[BlockHash]:
        """All that are here, least recently used first."""
        with self._changed:
            return list(self._kept)

    def of_tenant(self, tenant: TenantMark) -> list[BlockHash]:
        """Its blocks that are here, and those on their way here."""
        with self._changed:
            coming = [store.block for store, _ in self._queue] + ([self._writing] if self._writing else [])
            return [block for block in (*self._kept, *coming) if mark_of(block) == tenant]

    def offer(self, store: Store, done: Callable[[], None]) -> None:
        """Write a block, in time. Never blocks, never fails: `done`, called once on any thread, says only that the
        payload is read no more. Nothing happens where the block is here already."""
        with self._changed:
            is_here = store.block in self._kept or self._writing == store.block
            is_here = is_here or any(queued.block == store.block for queued, _ in self._queue)
            takes_it = not is_here and self.works and not self._closed and len(self._queue) < self._max_queued
            if takes_it:
                self._queue.append((store, done))
                self._changed.notify_all()
            elif not is_here:
                self._dropped += 1
        if not takes_it:
            done()

    def read(self, fetch: Fetch) -> Encoding | Fetched:
        """How to read what is in the fetch's buffer now, or why nothing is to be believed. Counts as use."""
        if fetch.wanted is not None and not fetch.wanted():
            return Fetched.SKIPPED
        with self._changed:
            if not self.contains(fetch.block):
                return Fetched.ABSENT
            self._kept.move_to_end(fetch.block)
        try:
            encoding = self._files.read(fetch)
        except FileNotFoundError:  # evicted meanwhile, or somebody else's doing
            self._forget([fetch.block])
            return Fetched.ABSENT
        except (BlockCorrupt, BlockForeign) as error:
            self._forget([fetch.block])
            with self._changed:
                self._corrupt += 1
            log.warning("a block on disk is not what it should be", block=fetch.block.hex(), error=str(error))
            return Fetched.CORRUPT if isinstance(error, BlockCorrupt) else Fetched.FOREIGN
        except OSError as error:
            self._note_failure("read", error)
            return Fetched.UNAVAILABLE
        self._failed_in_a_row = 0
        return encoding

    def drop(self, blocks: Iterable[BlockHash]) -> int:
        """Forget blocks, also those on their way here; say how many were here."""
        gone = set(blocks)
        with self._changed:
            unwritten = [done for store, done in self._queue if store.block in gone]
            self._queue = deque((store, done) for store, done in self._queue if store.block not in gone)
            if self._writing in gone:
                self._writing = None  # and so not published
        for done in unwritten:
            done()
        return self._forget(gone)

    def stats(self) -> DiskStats:
        return DiskStats(
            len(self._kept), self._used_bytes, self._capacity_bytes, self._dropped, self._corrupt, self._failures
        )

    def settled(self, *, timeout_s: float) -> bool:
        """Wait until nothing is on its way. False if that took longer. Blocks its caller."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and self._writing is None, timeout_s)

    def check(self) -> None:
        """Prove that the accounts balance and stay within their bounds."""
        with self._changed:
            assert self._kept_bytes == sum(self._kept.values())
            assert self._used_bytes <= self._capacity_bytes
            assert len(self._queue) <= self._max_queued

    def close(self, *, flush_s: float) -> None:
        """Write what is queued within `flush_s`, drop the rest (counted), and leave the folder to the next worker."""
        self.settled(timeout_s=flush_s)
        with self._changed:
            self._closed = True
            left, self._queue = self._queue, deque()
            self._dropped += len(left)
            self._changed.notify_all()
        for _, done in left:
            done()
        self._writer.join()
        self._files.delete_left()
        self._kept.clear()
        self._kept_bytes = 0
        self._claim.release()

    # On the thread that writes

    def _write_loop(self) -> None:
        self._prepare_thread()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return
                store, done = self._queue.popleft()
                self._writing = store.block
            try:
                self._write(store)
            except Exception as error:  # else nobody would write, and give back, what is queued behind this one
                self._note_failure("write", error)
                with self._changed:
                    self._dropped += 1
            finally:
                done()
                with self._changed:
                    self._writing = None
                    self._changed.notify_all()

    def _write(self, store: Store) -> None:
        num_bytes = self._overhead_bytes + store.payload.nbytes
        if num_bytes > self._capacity_bytes:
            with self._changed:
                self._dropped += 1
            return
        with self._changed:
            self._make_room(num_bytes)
        try:
            self._files.write(store)
            with self._changed:
                if self._writing == store.block:  # else it was dropped meanwhile
                    self._files.publish(store.block)
                    self._kept[store.block] = num_bytes
                    self._kept_bytes += num_bytes
                    self._failed_in_a_row = 0
        finally:
            with self._changed:
                self._files.tidy(store.block, num_bytes)

    # Under the lock, or before anybody else is there

    @property
    def _used_bytes(self) -> int:
        return self._kept_bytes + self._files.left_bytes

    def _make_room(self, num_bytes: int) -> None:
        """Delete what is to go already, then what was least recently used, until there is room. Raises OSError."""
        self._files.delete_left()
        while self._used_bytes + num_bytes > self._capacity_bytes:
            if not self._kept:
                raise OSError(ENOSPC, "files that can't be deleted take all the room")
            block, freed = self._kept.popitem(last=False)
            self._kept_bytes -= freed
            self._files.delete(block, freed)

    # Anywhere

    def _forget(self, blocks: Iterable[BlockHash]) -> int:
        forgotten = 0
        with self._changed:
            for block in blocks:
                num_bytes = self._kept.pop(block, None)
                if num_bytes is None:
                    continue
                forgotten += 1
                self._kept_bytes -= num_bytes
                try:
                    self._files.delete(block, num_bytes)
                except OSError as error:  # tried again; the next worker may find it
                    self._note_failure("delete", error)
        return forgotten

    def _note_failure(self, what: str, error: Exception) -> None:
        with self._changed:
            self._failures += 1
            self._failed_in_a_row += 1
        log.warning(f"the disk cache could not {what}", error=repr(error))
        if self._failed_in_a_row == _FAILURES_IN_A_ROW:
            log.error("the disk cache is off until the worker is started again", folder=str(self._claim.path))


def open_disk_tier(
    folder: Path,
    framer: Framer,
    *,
    capacity_bytes: int,
    max_queued: int,
    prepare_thread: Callable[[], None] = lambda: None,
) -> DiskTier | None:
    """A disk tier in a folder in `folder` that was a worker's of the same model, or is new.

    None, and a word in the log, where the disk does not let us.
    """
    try:
        forget_abandoned(folder, f"{_NAME}*", older_than_s=DELETIONS_KNOWN_S)  # whoever claims one uses what is in it
        claim = claim_folder(folder, f"{_NAME}{framer.model.hex()}")
        forget_abandoned(folder, f"{_NAME}*", older_than_s=_STALE_S)
        try:
            return DiskTier(
                claim, framer, capacity_bytes=capacity_bytes, max_queued=max_queued, prepare_thread=prepare_thread
            )
        except BaseException:
            claim.release()
            raise
    except OSError as error:
        log.error("no disk cache", folder=str(folder), error=str(error))
        return None
