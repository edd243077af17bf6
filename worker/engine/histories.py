"""What is asked of a conversation between its turns: park, warm, flush, locate, drop, retain; and of all of a tenant's.

Every call comes in on the engine's thread,
leaves the waiting to a thread of its own, and answers through a future.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from cache_store.errors import StoreUnavailable
from cache_store.ids import BlockHash, TenantMark, mark_of, tenant_mark
from cache_store.store import BlockStore
from worker.calls import DropReport, Located, MissReason, ParkReport, WarmReport
from worker.engine.block_tables import BlockTables
from worker.engine.history import History
from worker.engine.pool import BlockPool
from worker.engine.prefix import Wanted
from worker.engine.representatives import Representatives
from worker.engine.scheduler import Scheduler
from worker.errors import Draining
from worker.ids import BlockId
from worker.tiers.claims import Claims, Restored
from worker.tiers.landing import Restore
from worker.tiers.restore import Restorer
from worker.tiers.write_behind import WriteBehind

T = TypeVar("T")
R = TypeVar("R")

_FLUSH_S = 30.0


class Histories:
    def __init__(
        self,
        pool: BlockPool,
        tables: BlockTables,
        scheduler: Scheduler,
        write_behind: WriteBehind,
        restorer: Restorer,
        representatives: Representatives,
        *,
        marks_from: bytes,
        restore_timeout_s: float,
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        self._pool = pool
        self._tables = tables
        self._scheduler = scheduler
        self._write_behind = write_behind
        self._restorer = restorer
        self._representatives = representatives
        self._marks_from = marks_from
        self._restore_timeout_s = restore_timeout_s
        self._post = post
        self._warming: list[set[BlockHash]] = []
        """Of each warm under way, what it may keep of what it brings."""
        self._threads = ThreadPoolExecutor(4, "histories")

    def park(self, history: History, drop_host: bool, ttl_s: int, future: Future[ParkReport]) -> None:
        """Have it all in the store, then leave the device (and host memory, and the disk). Drops nothing if the store
        fails."""
        self._store()
        wanted = history.wanted()
        found = [(want, self._pool.find(want.name)) for want in wanted]
        held = [block for _, block in found if block is not None]
        self._pool.acquire(held)
        blocks = [(history.content(want), self._encodable(block)) for want, block in found]

        def parked(result: tuple[set[BlockHash], int]) -> None:
            present, num_bytes = result
            names = [want.name for want in wanted if want.name in present]
            self._pool.release(held)
            future.set_result(
                ParkReport(
                    redis_tokens=_tokens(wanted, [want.name in present for want in wanted]),
                    device_blocks_dropped=self._pool.drop(names),
                    host_blocks_dropped=self._write_behind.host.drop(names) if drop_host else 0,
                    bytes_stored=num_bytes,
                )
            )

        def park() -> tuple[set[BlockHash], int]:
            present, num_bytes = self._write_behind.park(blocks, ttl_s=ttl_s)
            if drop_host and self._write_behind.disk is not None:
                self._write_behind.disk.drop(present)
            return present, num_bytes

        self._later(park, future, parked, lambda: self._pool.release(held))

    def warm(self, history: History, future: Future[WarmReport]) -> None:
        """Restore what the device lacks, as far as blocks are free, and leave it cached."""
        wanted = history.needed()
        held = [block for want in wanted if (block := self._pool.find(want.name)) is not None]
        self._pool.acquire(held)
        missing = [want for want in wanted if self._pool.find(want.name) is None and self._may_restore(want.name)]
        targets = self._pool.take(min(len(missing), self._pool.available)) or []
        missing = missing[: len(targets)]
        wanted_still = {want.name for want in missing}
        self._warming.append(wanted_still)

        def landed() -> None:
            self._warming = [others for others in self._warming if others is not wanted_still]
            gone = [want.name for want in missing if want.name not in wanted_still]
            self._write_behind.forget(gone)
            outcomes = [
                outcome if want.name in wanted_still else MissReason.ABSENT
                for want, outcome in zip(missing, claims.outcomes(), strict=True)
            ]
            for want, target, outcome in zip(missing, targets, outcomes, strict=True):
                if isinstance(outcome, Restored):
                    if outcome.encoding.codec.lossy:
                        self._pool.mark_lossy(target)
                    self._pool.name(target, want.name)
            restored = sum(w.offers for w, o in zip(missing, outcomes, strict=True) if isinstance(o, Restored))
            self._pool.release([*held, *targets])
            on_device = _tokens(wanted, [self._pool.find(want.name) is not None for want in wanted])
            future.set_result(WarmReport(device_tokens=on_device, restored_tokens=restored))

        claims = Claims(len(missing), lambda: self._post(landed))
        blocks = [Restore(history.content(want), target) for want, target in zip(missing, targets, strict=True)]
        if blocks:
            self._restorer.restore(blocks, claims, deadline_s=time.monotonic() + self._restore_timeout_s)
        else:
            landed()

    def flush(self, history: History, future: Future[None]) -> None:
        names = history.names()
        self._later(
            lambda: self._write_behind.flush(names, timeout_s=_FLUSH_S), future, lambda _: future.set_result(None)
        )

    def locate(self, history: History, with_redis: bool, future: Future[Located]) -> None:
        wanted = history.wanted()
        device = _tokens(wanted, [self._pool.find(want.name) is not None for want in wanted])
        host = _tokens(wanted, [self._write_behind.host.contains(want.name) for want in wanted])
        on_disk = self._write_behind.disk.contains if self._write_behind.disk is not None else lambda _: False
        disk = _tokens(wanted, [on_disk(want.name) for want in wanted])
        if not with_redis or self._write_behind.store is None:
            future.set_result(Located(device, host, 0, disk))
            return
        store, names = self._store(), [want.name for want in wanted]
        self._later(
            lambda: store.which(names),
            future,
            lambda there: future.set_result(Located(device, host, _tokens(wanted, there), disk)),
        )

    def drop(self, history: History, with_redis: bool, future: Future[DropReport]) -> None:
        """Forget a history here. What is on its way to the store arrives first, or it would come back later."""
        names = history.names()

        def gone(counts: tuple[int, int, int]) -> None:
            future.set_result(DropReport(device + self._drop_here(names), *counts))

        device = self._drop_here(names)
        store = self._write_behind.store if with_redis else None
        delete = partial(store.delete, names) if store is not None else lambda: 0
        self._later(lambda: self._delete_below(lambda: names, delete), future, gone)

    def erase(self, tenant: str, with_redis: bool, future: Future[DropReport]) -> None:
        """Forget all that a tenant has here, of any history, and end its requests. Raises StoreUnavailable.

        What comes while this runs may stay: asked again until nothing was there any more, nothing is.
        """
        mark = tenant_mark(tenant, self._marks_from)

        def gone(counts: tuple[int, int, int]) -> None:
            self._tables.trust(names)
            future.set_result(DropReport(len(names) + len(self._drop_tenant(mark)), *counts))

        self._scheduler.evict(tenant)
        names = self._drop_tenant(mark)
        self._tables.distrust(names)  # nothing of it is restored or offloaded meanwhile
        store = self._write_behind.store if with_redis else None
        marks = {mark, tenant_mark(tenant)}  # also what was written before blocks were sealed
        delete = partial(_erase, store, marks) if store is not None else lambda: 0
        self._later(
            lambda: self._delete_below(lambda: [*self._write_behind.of_tenant(mark)], delete),
            future,
            gone,
            lambda: self._tables.trust(names),
        )

    def _drop_tenant(self, mark: TenantMark) -> list[BlockHash]:
        """Forget a tenant's contents on the device, and those that a warm is bringing there. Returns the former."""
        names = [name for name in self._pool.names() if mark_of(name) == mark]
        coming = [name for wanted_still in self._warming for name in wanted_still if mark_of(name) == mark]
        self._drop_here([*names, *coming])
        self._representatives.forget_tenant(mark)
        return names

    def _delete_below(
        self, names: Callable[[], Sequence[BlockHash]], delete: Callable[[], int]
    ) -> tuple[int, int, int]:
        """Forget blocks in host memory, on disk, and with `delete` in the store; say how many were in each.

        Blocks its caller. Raises StoreUnavailable where some are still on their way to the store: they would be there
        again.
        """
        if not self._write_behind.flush(names(), timeout_s=_FLUSH_S):
            raise StoreUnavailable("blocks are still on their way to the shared tier")
        before = self._write_behind.forget(names())
        num_deleted = delete()
        after = self._write_behind.forget(names())  # what came up from there meanwhile
        return before.host + after.host, before.disk + after.disk, num_deleted

    def _drop_here(self, names: Sequence[BlockHash]) -> int:
        """Forget contents on the device, and those that a warm is bringing there."""
        for wanted_still in self._warming:
            wanted_still.difference_update(names)
        self._representatives.forget(names)
        return self._pool.drop(names)

    def discard(self, names: Sequence[BlockHash], future: Future[None]) -> None:
        """Forget contents that were found wrong, and what was computed on them: at once here, then in the store.

        Other workers' copies stay until they are evicted. Raises StoreUnavailable where the store could not be asked:
        it is not asked again, its copies stay, and this worker distrusts the names for as long as it lives.
        """
        for wanted_still in self._warming:
            wanted_still.clear()  # what is on its way may be computed on what is wrong
        wrong = list(self._scheduler.distrust(names))
        self._representatives.forget(wrong)
        store = self._write_behind.store
        self._write_behind.forget(wrong)

        def delete() -> None:
            self._write_behind.flush(wrong, timeout_s=_FLUSH_S)
            self._write_behind.forget(wrong)  # what was on its way there
            if store is not None:
                store.delete(wrong)
                self._write_behind.forget(wrong)  # what came up from there meanwhile

        def gone(_: None) -> None:
            self._tables.trust(wrong)
            future.set_result(None)

        self._later(delete, future, gone)

    def retain(self, history: History, ttl_s: int, future: Future[int]) -> None:
        names, store = history.names(), self._store()

        def retain() -> int:
            self._write_behind.flush(names, timeout_s=_FLUSH_S)
            return store.retain(names, ttl_s=ttl_s)

        self._later(retain, future, future.set_result)

    def close(self) -> None:
        self._threads.shutdown(wait=True)

    def _may_restore(self, name: BlockHash) -> bool:
        return name not in self._tables.distrusted and self._restorer.where(name) is not None

    def _encodable(self, block: BlockId | None) -> BlockId | None:
        """The block, unless what it holds came from a lossy payload: that is not encoded again."""
        return None if block is None or self._pool.is_lossy(block) else block

    def _store(self) -> BlockStore:
        if self._write_behind.store is None:
            raise StoreUnavailable("this worker has no shared tier (redis_url is empty)")
        return self._write_behind.store

    def _later(
        self,
        wait: Callable[[], T],
        future: Future[R],
        then: Callable[[T], None],
        otherwise: Callable[[], None] = lambda: None,
    ) -> None:
        """Run `wait` on a thread, then `then` with its result on the engine's; or `otherwise`, and fail the future."""

        def run() -> None:
            try:
                result = wait()
            except Exception as error:
                self._post(partial(fail, error))
            else:
                self._post(lambda: then(result))

        def fail(error: Exception) -> None:
            otherwise()
            future.set_exception(error)

        try:
            self._threads.submit(run)
        except RuntimeError:  # its way to say that it is closed
            fail(Draining("this worker is gone"))


def _erase(store: BlockStore, tenants: Iterable[TenantMark]) -> int:
    return sum(store.erase(tenant) for tenant in tenants)


def _tokens(wanted: Sequence[Wanted], there: Sequence[bool]) -> int:
    return sum(want.offers for want, is_there in zip(wanted, there, strict=True) if is_there)
