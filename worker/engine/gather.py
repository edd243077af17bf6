"""Bring blocks of a history onto the device to be read there once, a few at a time: what of them is used is copied.

They are cached under their names, as any block that nobody uses: the device has room for some of what a long
conversation recalls, and host memory for the rest. Used by the engine's thread alone.
"""

import time
from collections.abc import Callable, Mapping, Sequence

from cache_store.ids import BlockHash
from worker.calls import MissReason
from worker.engine.pool import BlockPool
from worker.ids import BlockId
from worker.tiers.claims import Claims, Restored
from worker.tiers.landing import Restore
from worker.tiers.moves import Content, Tier
from worker.tiers.restore import Restorer

_AT_ONCE = 16
"""Blocks held for one request."""

Use = Callable[[Mapping[int, BlockId]], None]
"""Reads some of the wanted blocks, by index, while they are held."""


class Gatherer:
    def __init__(
        self,
        pool: BlockPool,
        restorer: Restorer,
        *,
        timeout_s: float,
        is_distrusted: Callable[[BlockHash], bool],
        take: Callable[[int], list[BlockId] | None],
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        """`take` takes blocks of the pool, making room where it can."""
        self.pool = pool
        self.restorer = restorer
        self.timeout_s = timeout_s
        self.is_distrusted = is_distrusted
        self.take = take
        self.post = post
        self._open: list[Gathering] = []

    def gather(self, wanted: Mapping[int, Content], use: Use, done: Callable[["Gathering"], None]) -> "Gathering":
        """Have `use` read all of `wanted`, then call `done`: before this returns, where the device has them all."""
        gathering = Gathering(self, wanted, use, done)
        self._open = [other for other in self._open if not other.is_over]
        self._open.append(gathering)
        gathering.go_on()
        return gathering

    def may_have(self, content: Content) -> bool:
        """May a tier have it, as far as is known?"""
        name = content.name
        return self.pool.find(name) is not None or (
            not self.is_distrusted(name) and self.restorer.where(name) is not None
        )

    @property
    def is_busy(self) -> bool:
        return any(not gathering.is_over for gathering in self._open)

    @property
    def is_holding(self) -> bool:
        """Will blocks be let go of, whatever comes?"""
        return any(gathering.is_holding for gathering in self._open)

    def advance(self, now_s: float) -> None:
        """Wait no longer for what is late; try again for whom there was no room."""
        for gathering in list(self._open):
            gathering.expire(now_s)
            gathering.go_on()
        self._open = [gathering for gathering in self._open if not gathering.is_over]


class Gathering:
    """One request's."""

    def __init__(
        self, gatherer: Gatherer, wanted: Mapping[int, Content], use: Use, done: Callable[["Gathering"], None]
    ) -> None:
        self.missing: list[int] = []
        """Once it is over: what no tier had."""
        self.found: dict[int, Tier] = {}
        self.restored_bytes = 0
        self.has_no_room = False
        """It ended early: not one block of the device was to be had."""
        self.is_over = False
        self._gatherer = gatherer
        self._wanted = wanted
        self._use = use
        self._done = done
        self._rest = list(wanted)
        self._held: dict[int, BlockId] = {}
        self._coming: list[int] = []
        self._claims: Claims | None = None
        self._deadline_s = 0.0
        self._is_cancelled = False

    @property
    def is_holding(self) -> bool:
        return self._claims is not None

    def cancel(self) -> None:
        """Use nothing more. What is being written is let go of when that is over."""
        self._is_cancelled = True
        self._rest = []
        self._hurry()

    def expire(self, now_s: float) -> None:
        if self._claims is not None and now_s >= self._deadline_s:
            self._hurry()

    def _hurry(self) -> None:
        if self._claims is None:
            self._end()
        else:
            self._claims.take_all(MissReason.LATE)
            if self._claims.is_settled:
                self._settled(self._claims)

    def go_on(self) -> None:
        """Take batch after batch, as long as none has to be waited for."""
        while self._claims is None and not self.is_over:
            if not self._rest:
                self._end()
                return
            if self._hold(self._rest[:_AT_ONCE]):
                self._begin()
            elif self._gatherer.is_holding:
                return  # what others hold will be free in a moment
            else:
                self.has_no_room = True
                self._end()

    def _hold(self, batch: Sequence[int]) -> bool:
        """Refer to those of a batch that the device has, and to blocks for those that it may get. False where there is
        not one block to be had."""
        pool, taken = self._gatherer.pool, 0
        for index in batch:
            name = self._wanted[index].name
            block = pool.find(name)
            if block is not None:
                pool.acquire([block])
                self.found.setdefault(index, Tier.DEVICE)
            elif not self._gatherer.may_have(self._wanted[index]):
                self.missing.append(index)
                taken += 1
                continue
            else:
                fresh = self._gatherer.take(1)
                if fresh is None:
                    break
                block = fresh[0]
                pool.need(name)
                self._coming.append(index)
            self._held[index] = block
            taken += 1
        del self._rest[:taken]
        return taken > 0

    def _begin(self) -> None:
        if not self._coming:
            self._finish_batch()
            return
        coming = tuple(self._coming)
        claims = Claims(len(coming), lambda: self._gatherer.post(lambda: self._settled(claims)))
        self._claims = claims
        self._deadline_s = time.monotonic() + self._gatherer.timeout_s
        blocks = [Restore(self._wanted[index], self._held[index]) for index in coming]
        self._gatherer.restorer.restore(blocks, claims, deadline_s=self._deadline_s)

    def _settled(self, claims: Claims) -> None:
        """Nobody writes the batch's blocks any more. Harmless when said twice."""
        if self._claims is not claims:
            return
        self._claims = None
        pool = self._gatherer.pool
        for index, outcome in zip(self._coming, claims.outcomes(), strict=True):
            name, block = self._wanted[index].name, self._held[index]
            if isinstance(outcome, Restored) and not (self._is_cancelled or self._gatherer.is_distrusted(name)):
                if outcome.encoding.codec.lossy:
                    pool.mark_lossy(block)
                pool.name(block, name)
                self.found.setdefault(index, outcome.tier)
                self.restored_bytes += outcome.encoding.num_bytes
            else:
                self.missing.append(index)
                pool.release([self._held.pop(index)])
        self._finish_batch()
        self.go_on()

    def _finish_batch(self) -> None:
        self._coming = []
        if self._held and not self._is_cancelled:
            self._use(self._held)
        for block in self._held.values():
            self._gatherer.pool.release([block])
        self._held = {}

    def _end(self) -> None:
        if not self.is_over:
            self.is_over = True
            if not self._is_cancelled:
                self._done(self)
