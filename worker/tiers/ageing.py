"""Move the blocks of ladder sessions to smaller codecs as they get colder in the shared tier: one thread, behind.

Knows a ladder, and when to ask for which codec. That a block did not change meanwhile, and stays as idle as it was, is
the store's business.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import structlog

from cache_store.codecs import CODECS, CodecInfo
from cache_store.errors import BlockCorrupt, BlockForeign, StoreError
from cache_store.ids import BlockHash
from cache_store.ladder import Ladder
from cache_store.store import AgeingStore, Held, Idle, Payload
from worker.figures import Aged, AgeingStats
from worker.tiers.moves import stand_back

log = structlog.get_logger(__name__)

Shrink = Callable[[Held, CodecInfo], memoryview]
"""A block's payload in a smaller codec: the bytes that its original would have given."""

_LEAD_SWEEPS = 3
_LEAST_LEAD_S = 30.0
"""A leader stays one from sweep to sweep; nobody ages blocks for so long after it has died."""
_CLOCK_S = 2.0
"""Idle times are whole seconds of the server's, and rounded again when they are given back."""


class _Known(NamedTuple):
    codec: CodecInfo
    """The block need not be read unless it is due for a smaller one."""
    used_at_s: float
    """It may be another since it was used again, later than that (of `time.monotonic()`)."""


class Ager:
    """Sweeps over all blocks from `start` until `close`, while no other worker of the same model does."""

    def __init__(
        self, store: AgeingStore, ladder: Ladder, shrink: Shrink, *, block_tokens: int, sweep_every_s: float = 60.0
    ) -> None:
        self._store = store
        self._ladder = ladder
        self._shrink = shrink
        self._block_tokens = block_tokens
        self._sweep_every_s = sweep_every_s
        self._lead_s = max(_LEAST_LEAD_S, _LEAD_SWEEPS * sweep_every_s)
        self._known: dict[BlockHash, _Known] = {}
        self._lead_until_s = 0.0
        self._blocks: Counter[tuple[str, str]] = Counter()
        self._saved_bytes: Counter[tuple[str, str]] = Counter()
        self._held_back = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ageing", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop after the block in hand, and let another worker lead."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def stats(self) -> AgeingStats:
        """Any thread may call."""
        aged = tuple(Aged(*move, blocks, self._saved_bytes[move]) for move, blocks in self._blocks.copy().items())
        return AgeingStats(aged, self._held_back)

    def _run(self) -> None:
        stand_back()
        while not self._stop.is_set():
            try:
                self._sweep()
                self._note("")
            except StoreError as error:
                self._note(str(error))
            except Exception as error:  # our bug, on one block perhaps: others may age at the next sweep
                log.error("a sweep failed", exc_info=error)
                self._note(repr(error))
            self._stop.wait(self._sweep_every_s)
        if time.monotonic() < self._lead_until_s:
            try:
                self._store.resign()
            except StoreError as error:
                log.debug("nobody ages blocks until the lease has ended", why=str(error))

    def _note(self, why: str) -> None:
        if why and not self._held_back:
            log.warning("blocks do not age", why=why)
        elif self._held_back and not why:
            log.info("blocks age again")
        self._held_back = why

    def _sweep(self) -> None:
        """Look at every block once, as long as this worker leads, and move what is due, half of the time at most."""
        known: dict[BlockHash, _Known] = {}
        if not self._leads():
            return
        for page in self._store.idle():
            for idle in page:
                if self._stop.is_set() or not self._leads():
                    return
                seen = self._seen(idle)
                due = self._ladder.due(idle.idle_s)
                if _is_below(due, seen.codec):
                    began_s = time.monotonic()
                    seen = seen._replace(codec=self._move(idle, due))
                    self._stop.wait(time.monotonic() - began_s)
                known[idle.block] = seen
        self._known = known  # and no more what is gone

    def _leads(self) -> bool:
        now_s = time.monotonic()
        if now_s > self._lead_until_s - self._lead_s / 2:
            if not self._store.lead(for_s=self._lead_s):
                return False
            self._lead_until_s = now_s + self._lead_s
        return True

    def _seen(self, idle: Idle) -> _Known:
        used_at_s = idle.at_s - idle.idle_s
        known = self._known.get(idle.block)
        if known is None or used_at_s > known.used_at_s + _CLOCK_S:
            return _Known(self._ladder.first, used_at_s)
        return known

    def _move(self, idle: Idle, due: CodecInfo) -> CodecInfo:
        """Move a block to `due`, if it is full and not yet there. Returns the codec that it is now to be taken for."""
        settled = self._ladder.rungs[-1].codec
        try:
            exchanged = self._store.exchange(idle, lambda held: self._smaller(held, due))
        except (BlockCorrupt, BlockForeign) as error:
            log.debug("a block that can't be read does not age", block=idle.block.hex(), why=str(error))
            return settled
        if exchanged is None:
            return self._ladder.first
        held, now = exchanged
        if now.codec != held.codec:
            move = held.codec.name, now.codec.name
            self._saved_bytes[move] += held.payload.nbytes - now.content.nbytes
            self._blocks[move] += 1
        return now.codec if self._is_full(held) else settled

    def _smaller(self, held: Held, due: CodecInfo) -> Payload:
        if self._is_full(held) and _is_below(due, held.codec):
            return Payload(due, self._shrink(held, due))
        return Payload(held.codec, held.payload)

    def _is_full(self, held: Held) -> bool:
        """An unfull block will be filled and encoded then: it stays exact."""
        return held.num_tokens == self._block_tokens


def _is_below(codec: CodecInfo, other: CodecInfo) -> bool:
    return CODECS.index(codec) > CODECS.index(other)
