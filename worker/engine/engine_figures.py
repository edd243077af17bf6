"""What an engine tells of itself: counters and levels, gathered from whoever counts."""

import math

from cache_store.codecs import RAW
from cache_store.disk_tier import DiskStats
from worker.engine.admission import Admission
from worker.engine.auditor import Auditor
from worker.engine.pool import BlockPool
from worker.engine.scheduler import Scheduler
from worker.engine.stepper import Stepper
from worker.figures import AgeingStats, EngineStats, TierUse, WorkerLoad
from worker.tiers.moves import Tier
from worker.tiers.open_tiers import Tiers


class EngineFigures:
    def __init__(
        self,
        scheduler: Scheduler,
        stepper: Stepper,
        auditor: Auditor,
        admission: Admission,
        pool: BlockPool,
        tiers: Tiers,
        *,
        block_bytes: int,
        max_running: int,
    ) -> None:
        self._scheduler = scheduler
        self._stepper = stepper
        self._auditor = auditor
        self._admission = admission
        self._pool = pool
        self._tiers = tiers
        self._block_bytes = block_bytes
        self._max_running = max_running

    def stats(self) -> EngineStats:
        """Counters and levels; safe from any thread (each figure is read at once, all of them nearly)."""
        scheduler, block_bytes = self._scheduler, self._block_bytes
        used = self._pool.stats()
        host = self._tiers.host.use()
        held = used.used + used.cached
        sources = scheduler.tokens_by_source
        disk = self._tiers.disk.stats() if self._tiers.disk is not None else DiskStats(0, 0, 0, 0, 0, 0)
        return EngineStats(
            device_tokens=sources["device"],
            host_tokens=sources["host"],
            disk_tokens=sources["disk"],
            redis_tokens=sources["redis"],
            computed_tokens=sources["computed"],
            device=TierUse(held, self._pool.num_blocks, held * block_bytes, self._pool.num_blocks * block_bytes),
            host=TierUse(host.blocks, host.capacity, host.blocks * block_bytes, host.capacity * block_bytes),
            disk=TierUse(disk.blocks, disk.capacity_bytes // block_bytes, disk.used_bytes, disk.capacity_bytes),
            local_faults={
                "host_corrupt": self._tiers.host.corrupt,
                "disk_corrupt": disk.corrupt,
                "disk_failed": disk.failures,
                "disk_dropped": disk.dropped,
            },
            stores_dropped=self._tiers.write_behind.stores_dropped,
            evicted_then_needed=self._pool.evicted_then_needed,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            waiting_tokens=self._admission.waiting_tokens,
            turned_away={f"overload_{bound}": number for bound, number in self._admission.refused.items()}
            | scheduler.dropped,
            device_blocks=used._asdict(),
            moved=self._tiers.moves.read(),
            audits=dict(self._auditor.counts),
            ageing=self._tiers.ager.stats() if self._tiers.ager is not None else AgeingStats(),
            prefill_s_saved=self._stepper.prefill_s_saved,
            store_available=self._tiers.store.available() if self._tiers.store is not None else None,
        )

    def load(self) -> WorkerLoad:
        """What a turn would wait for and cost. Asked on the engine's thread."""
        transfers, store, block_bytes = self._tiers.transfers, self._tiers.store, self._block_bytes
        has_redis = store is not None and store.available()
        return WorkerLoad(
            queue_s=self._stepper.queue_s() + self._admission.request_s * self._num_waiting(),
            token_s=self._stepper.token_s(),
            host_byte_s=transfers.block_s(Tier.HOST, RAW.name) / block_bytes,
            redis_byte_s=transfers.block_s(Tier.REDIS, RAW.name) / block_bytes if has_redis else math.inf,
        )

    def _num_waiting(self) -> int:
        """Requests that wait for others to end; 0 where there is room for them now."""
        scheduler = self._scheduler
        return len(scheduler.waiting) if len(scheduler.running) >= self._max_running else 0
