"""Has as many workers run as are asked for, or as the load needs: looks, decides, starts and drains. Knows no Ray."""

import asyncio
import time
from collections.abc import Sequence
from typing import Protocol

import structlog

from cache_store.errors import ServingError
from server.autoscale import Autoscaler, Load
from server.directory import WorkerDirectory

_log = structlog.get_logger(__name__)


class Scalable(Protocol):
    """A RayCluster."""

    @property
    def num_workers(self) -> int:
        """Without those that leave."""
        ...

    async def wanted(self) -> int | None:
        """What somebody has asked for, if anybody has."""
        ...

    async def scale_to(self, count: int, *, drain_s: float) -> None:
        """Start workers, or begin to drain them. Raises WorkerFault."""
        ...

    async def reserve(self, count: int) -> None:
        """Tell whoever provides machines how many workers there are to be."""
        ...


class Scaling:
    """`run` until cancelled."""

    def __init__(
        self,
        cluster: Scalable,
        directory: WorkerDirectory,
        autoscaler: Autoscaler | None,
        *,
        drain_s: float,
        period_s: float = 1.0,
    ) -> None:
        """Without an autoscaler it does what is asked for; with one that is where it goes on from."""
        self._cluster = cluster
        self._directory = directory
        self._autoscaler = autoscaler
        self._drain_s = drain_s
        self._period_s = period_s
        self._asked: int | None = None

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._period_s)
            try:
                await self._look()
            except ServingError as error:  # and try again
                _log.warning("workers not scaled", error=str(error))

    async def _look(self) -> None:
        before, self._asked = self._asked, await self._cluster.wanted()
        now = self._cluster.num_workers
        wanted = self._asked
        if self._autoscaler is not None and (wanted is None or wanted == before):  # what is asked for holds until then
            wanted = self._autoscaler.decide(now, await self._loads(), time.monotonic())
        if wanted is None or wanted == now:
            return
        _log.info("scaling", workers=wanted, before=now)
        await self._cluster.reserve(wanted)
        await self._cluster.scale_to(wanted, drain_s=self._drain_s)

    async def _loads(self) -> Sequence[Load]:
        """Of those that accept work and answer."""
        asked = [worker.client.stats() for worker in self._directory.living() if worker.accepting]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        return [
            Load(stats.waiting, stats.running, stats.device_used_blocks / max(1, stats.device.capacity_blocks))
            for stats in answers
            if not isinstance(stats, BaseException)
        ]
