"""Bring blocks up to the device, off the engine's thread: from the host tier, the disk, or in one pipelined read from
the store.

It is told which blocks and never chooses. The last are brought first: whoever asked may compute the first ones
meanwhile, and says so in the claims. What comes from disk or store lands and is checked in a slot of the host tier,
where it stays; what another restore is bringing there already is waited for without a thread.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from cache_store.disk_tier import DiskTier
from cache_store.host_tier import HostTier, Slot
from cache_store.ids import BlockHash
from cache_store.store import BlockStore, Encoding, Fetched
from worker.calls import MissReason
from worker.tiers.claims import Claims
from worker.tiers.coder import BlockCoder
from worker.tiers.landing import DECODERS, Job, Lander, Restore, gathered
from worker.tiers.moves import MoveCounter, Tier, fetch_of, log_bug
from worker.tiers.transfer_costs import TransferCosts

_THREADS = 2
_PROBE_BLOCKS = 4
"""Enough to tell a tier's rate from its latency."""

_MISS = {
    Fetched.ABSENT: MissReason.ABSENT,
    Fetched.CORRUPT: MissReason.CORRUPT,
    Fetched.FOREIGN: MissReason.FOREIGN,
    Fetched.LATE: MissReason.LATE,
    Fetched.UNAVAILABLE: MissReason.UNAVAILABLE,
    Fetched.SKIPPED: MissReason.FASTER,
}


class Restorer:
    def __init__(
        self,
        coder: BlockCoder,
        host: HostTier,
        store: BlockStore | None,
        counter: MoveCounter,
        costs: TransferCosts,
        disk: DiskTier | None = None,
    ) -> None:
        self._lander = Lander(coder, host, counter, costs, disk)
        self._host = host
        self._disk = disk
        self._store = store
        self._counter = counter
        self._costs = costs
        self._open: list[Claims] = []  # the engine's thread's
        self._threads = ThreadPoolExecutor(_THREADS, "restore")
        self._readers = ThreadPoolExecutor(DECODERS, "disk-read")  # a disk that hangs holds up no block in memory
        self._closed = False

    # Asked by the engine's thread

    def restore(self, blocks: Sequence[Restore], claims: Claims, *, deadline_s: float) -> None:
        """Bring blocks to their targets on the device, each one as far as `claims` lets it."""
        self._open = [*self._still_open(), claims]
        job = Job(blocks, claims, deadline_s)
        self._submit(job, range(len(blocks) - 1, -1, -1))

    def where(self, name: BlockHash) -> Tier | None:
        """The tier below the device that this block may be in, the fastest that it is known to be in. None: nowhere."""
        if self._host.contains(name):
            return Tier.HOST
        if self._disk is not None and self._disk.contains(name):
            return Tier.DISK
        return Tier.REDIS if self._store is not None else None

    def num_queued(self, claims: Claims) -> int:
        """Blocks that are to come before those of `claims`, which need not be queued yet."""
        ahead = self._still_open()
        if claims in ahead:
            ahead = ahead[: ahead.index(claims)]
        return sum(other.num_open for other in ahead)

    def _still_open(self) -> list[Claims]:
        return [claims for claims in self._open if not claims.is_settled]

    # On the restorer's threads

    def _submit(self, job: Job, order: Sequence[int]) -> None:
        if self._closed:
            job.claims.give_up()
        else:
            self._threads.submit(self._run, job, order).add_done_callback(log_bug)

    def _run(self, job: Job, order: Sequence[int]) -> None:
        try:
            with gathered() as landing:
                rest = [index for index in order if not self._from_host(job, index, landing)]
                self._from_below(job, self._from_disk(job, rest, landing), landing)
        except BaseException:
            job.claims.give_up()
            raise

    def _from_host(self, job: Job, index: int, landing: list[Future[None]]) -> bool:
        """False if the block is not here."""
        name = job.blocks[index].content.name
        if not job.claims.is_pending(index):  # computed instead: its payload need not be verified
            return self._host.contains(name)
        slot = self._host.pin(name)
        if slot is None:
            return False
        self._lander.soon(slot.encoding, lambda: self._lander.land(job, index, slot), landing)
        return True

    def _from_disk(self, job: Job, order: Sequence[int], landing: list[Future[None]]) -> list[int]:
        """Hand the blocks that the disk has to the readers, several at a time. Returns the others."""
        if self._disk is None:
            return list(order)
        here = [index for index in order if self._disk.contains(job.blocks[index].content.name)]
        pending = [index for index in here if job.claims.is_pending(index)]
        is_probe = bool(here) and not pending and self._costs.is_due_for_probe(Tier.DISK)
        wanted = here[:1] if is_probe else pending
        landing += [self._readers.submit(self._read, job, index, self._disk, is_probe) for index in wanted]
        rest = set(order).difference(here)
        return [index for index in order if index in rest]

    def _read(self, job: Job, index: int, disk: DiskTier, is_probe: bool) -> None:
        """Bring a block from the disk. What it can't give is asked for elsewhere."""
        if not is_probe and not job.claims.is_pending(index):
            return
        content = job.blocks[index].content
        if time.monotonic() >= job.deadline_s:
            job.claims.missed(index, MissReason.LATE)
            return
        slot = self._host.reserve(content.name, content.num_tokens)
        if slot is None:
            if self._host.contains(content.name):
                self._submit(job, [index])
            elif not self._wait_for(job, index):
                job.claims.missed(index, MissReason.NO_ROOM)
            return
        self._costs.asked(Tier.DISK)
        began = time.perf_counter()
        try:
            found = disk.read(fetch_of(content, slot.buffer))
        except BaseException:
            self._costs.ended(Tier.DISK, None)
            self._host.abort(slot)
            raise
        if isinstance(found, Encoding):
            self._costs.ended(Tier.DISK, found.num_bytes)
            self._counter.add(Tier.DISK, Tier.HOST, [found], time.perf_counter() - began)
            self._lander.keep(job, index, slot, found, Tier.DISK)
        else:
            self._costs.ended(Tier.DISK, None)
            self._host.abort(slot)
            self._submit(job, [index])

    def _from_below(self, job: Job, rest: Sequence[int], landing: list[Future[None]]) -> None:
        if self._store is None or not self._store.available():
            reason = MissReason.ABSENT if self._store is None else MissReason.UNAVAILABLE
            for index in rest:
                if not self._wait_for(job, index):
                    job.claims.missed(index, reason)
            return
        size = max(1, self._host.use().capacity // 2)
        for start in range(0, len(rest), size):
            batch = rest[start : start + size]
            if time.monotonic() >= job.deadline_s:
                for index in batch:
                    job.claims.missed(index, MissReason.LATE)
            else:
                self._from_store(job, batch, landing)

    def _from_store(self, job: Job, batch: Sequence[int], landing: list[Future[None]]) -> None:
        assert self._store is not None
        claims, costs = job.claims, self._costs
        pending = [index for index in batch if claims.is_pending(index)]
        is_probe = not pending and costs.is_due_for_probe(Tier.REDIS)
        asked = self._reserve(job, batch[:_PROBE_BLOCKS] if is_probe else pending, landing)
        begun: set[int] = set()
        ended: set[int] = set()
        hits: list[Encoding] = []

        def is_wanted(number: int) -> bool:
            if not claims.fetch(asked[number][0]) and not is_probe:
                return False
            if number not in begun:  # else it is asked for again, elsewhere
                begun.add(number)
                costs.asked(Tier.REDIS)
            return True

        def landed(number: int, outcome: Fetched, encoding: Encoding | None) -> None:
            index, slot = asked[number]
            ended.add(number)
            if number in begun:
                costs.ended(Tier.REDIS, _num_bytes(outcome, encoding))
            if encoding is None:
                self._host.abort(slot)
                claims.missed(index, _MISS[outcome])
            else:
                hits.append(encoding)
                self._lander.soon(encoding, lambda: self._lander.keep(job, index, slot, encoding, Tier.REDIS), landing)

        began = time.perf_counter()
        fetches = [
            fetch_of(job.blocks[index].content, slot.buffer, partial(is_wanted, number))
            for number, (index, slot) in enumerate(asked)
        ]
        try:
            self._store.get(fetches, landed, deadline_s=job.deadline_s)
        except BaseException:
            for number in set(range(len(asked))) - ended:
                landed(number, Fetched.UNAVAILABLE, None)
            raise
        self._counter.add(Tier.REDIS, Tier.HOST, hits, time.perf_counter() - began)

    def _reserve(self, job: Job, batch: Sequence[int], landing: list[Future[None]]) -> list[tuple[int, Slot]]:
        """A slot of the host tier for each block that is neither there nor on its way there."""
        reserved: list[tuple[int, Slot]] = []
        try:
            for index in batch:
                content = job.blocks[index].content
                slot = self._host.reserve(content.name, content.num_tokens)
                if slot is None:
                    if self._wait_for(job, index) or self._from_host(job, index, landing):
                        continue
                    slot = self._host.reserve(content.name, content.num_tokens)  # who brought it may have given up
                if slot is not None:
                    reserved.append((index, slot))
                else:
                    job.claims.missed(index, MissReason.NO_ROOM)
        except BaseException:
            for _, slot in reserved:
                self._host.abort(slot)
            raise
        return reserved

    def _wait_for(self, job: Job, index: int) -> bool:
        """Take a block that somebody else is bringing to the host tier as soon as it is there. False if nobody is."""
        arrival = self._host.awaited(job.blocks[index].content.name)
        if arrival is None:
            return False
        arrival.add_done_callback(lambda _: self._submit(job, [index]))
        return True

    def close(self) -> None:
        self._closed = True
        self._threads.shutdown(wait=True)
        self._readers.shutdown(wait=True)
        self._lander.close()


def _num_bytes(outcome: Fetched, encoding: Encoding | None) -> int | None:
    """What an answer brought: nothing where the block is absent, None where there was no answer to learn from."""
    if encoding is not None:
        return encoding.num_bytes
    return 0 if outcome is Fetched.ABSENT else None
