"""grpc.health.v1: "" (can turns be served), "redis" (can sessions), "worker/N" (does it take work). Watch works."""

import asyncio
from typing import Any

import structlog
from grpc_health.v1 import health_pb2
from grpc_health.v1._async import HealthServicer

from cache_store.records import RecordStore
from server.directory import WorkerDirectory
from server.metrics import FrontMetrics

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_log = structlog.get_logger(__name__)


class Health:
    """Looks every `poll_s`, and at once when a worker's state changes."""

    def __init__(
        self, records: RecordStore, directory: WorkerDirectory, metrics: FrontMetrics, *, poll_s: float
    ) -> None:
        self.servicer: Any = HealthServicer()
        self._records = records
        self._directory = directory
        self._metrics = metrics
        self._poll_s = poll_s
        self._tasks: list[asyncio.Task[None]] = []
        self._redis_was_up: bool | None = None
        self._workers: set[str] = set()
        """All that there ever were."""

    async def start(self) -> None:
        """Say what is so now, then follow it until `aclose`. Redis has a task of its own: it may be slow to fail."""
        await asyncio.gather(self._see_workers(), self._see_redis())
        self._tasks = [
            asyncio.create_task(self._follow_workers(), name="health of workers"),
            asyncio.create_task(self._follow_redis(), name="health of redis"),
        ]

    async def say_goodbye(self) -> None:
        """NOT_SERVING in everything, for good: load balancers should look elsewhere."""
        await self.servicer.enter_graceful_shutdown()

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _follow_workers(self) -> None:
        while True:
            await self._directory.changed()
            await self._see_workers()

    async def _follow_redis(self) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            await self._see_redis()

    async def _see_workers(self) -> None:
        known = self._directory.known()
        for gone in self._workers - {worker.worker_id for worker in known}:
            await self.servicer.set(f"worker/{gone}", _NOT_SERVING)
        self._workers.update(worker.worker_id for worker in known)
        for worker in known:
            await self.servicer.set(f"worker/{worker.worker_id}", _SERVING if worker.accepting else _NOT_SERVING)
        accepting = sum(worker.accepting for worker in known)
        alive = sum(worker.alive for worker in known)
        await self.servicer.set("", _SERVING if accepting else _NOT_SERVING)
        self._metrics.workers_seen(accepting=accepting, draining=alive - accepting, down=len(known) - alive)

    async def _see_redis(self) -> None:
        up = await self._records.available()
        if up != self._redis_was_up:
            _log.info("redis is up") if up else _log.warning("redis is down")
            self._redis_was_up = up
        self._metrics.redis_seen(up)
        await self.servicer.set("redis", _SERVING if up else _NOT_SERVING)
