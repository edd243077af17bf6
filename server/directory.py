"""Which workers there are, and which of them live. Asks each one again and again; decides nothing about turns."""

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import structlog

from cache_store.errors import ServingError
from protos import rekindle_worker_pb2 as wpb
from protos.tls import Tls
from server.errors import WorkerLost
from server.worker_client import WorkerClient

_log = structlog.get_logger(__name__)


class WorkerAddresses(Protocol):
    """Where workers are said to be. They may be dead, or not yet up."""

    async def addresses(self) -> Mapping[str, str]:
        """host:port by worker id. Called once in every poll; raises ServingError when it can't say."""
        ...


class StaticAddresses:
    """Workers that somebody else runs, at places that don't change."""

    def __init__(self, addresses: Mapping[str, str]) -> None:
        self._addresses = dict(addresses)

    async def addresses(self) -> Mapping[str, str]:
        return self._addresses


class Worker:
    """One worker as this front end sees it."""

    def __init__(self, worker_id: str, client: WorkerClient) -> None:
        self.worker_id = worker_id
        self.client = client
        self.alive = False
        self.description = wpb.DescribeReply()
        """What it last said of itself."""
        self.heard_s = time.monotonic()
        """When it last answered."""
        self.in_flight = 0
        """Turns that this front end has on it now."""

    @property
    def accepting(self) -> bool:
        return self.alive and self.description.accepting

    @contextmanager
    def serving(self) -> Iterator[None]:
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1


class WorkerDirectory:
    """Keeps a client for each worker and probes it every `poll_s`, and at once when it is suspected."""

    def __init__(
        self,
        source: WorkerAddresses,
        *,
        poll_s: float,
        silence_s: float,
        max_message_bytes: int,
        tls: Tls | None = None,
    ) -> None:
        """A worker that has not answered for `silence_s` loses its turns: it is frozen, or its network is gone."""
        self._source = source
        self._poll_s = poll_s
        self._probe_s = max(1.0, poll_s)
        self._silence_s = silence_s
        self._max_message_bytes = max_message_bytes
        self._tls = tls
        self._workers: dict[str, Worker] = {}
        self._changed = asyncio.Event()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Look once, then keep looking until `aclose`."""
        await self._poll()
        self._task = asyncio.create_task(self._keep_polling(), name="worker directory")

    async def aclose(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for worker in self._workers.values():
            await worker.client.aclose()
        self._workers.clear()

    def known(self) -> list[Worker]:
        """All workers, by id, the dead too."""
        return [self._workers[worker_id] for worker_id in sorted(self._workers)]

    def living(self) -> list[Worker]:
        return [worker for worker in self.known() if worker.alive]

    def find(self, worker_id: str) -> Worker | None:
        """The worker, if it lives."""
        worker = self._workers.get(worker_id)
        return worker if worker is not None and worker.alive else None

    def suspect(self, worker: Worker) -> None:
        """Take a worker for dead until it answers again."""
        self._mark(worker, alive=False)
        self._wake.set()

    async def changed(self) -> None:
        """Return after the next change of any worker's state."""
        await self._changed.wait()

    async def wait_for_workers(self, count: int, *, timeout_s: float) -> None:
        """Return when `count` workers accept work. Raises WorkerLost after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                while sum(worker.accepting for worker in self._workers.values()) < count:
                    await self.changed()
        except TimeoutError as error:
            raise WorkerLost(f"fewer than {count} workers are up after {timeout_s:g} s") from error

    async def _keep_polling(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._poll_s):
                    await self._wake.wait()
            except TimeoutError:
                pass  # nothing happened: time for the usual look
            else:
                self._wake.clear()
                await asyncio.sleep(0.05)  # a suspect that is being restarted is not asked in a tight loop
            await self._poll()

    async def _poll(self) -> None:
        try:
            await self._follow(await self._source.addresses())
        except ServingError as error:
            _log.warning("workers' addresses are unknown", error=str(error))
        await asyncio.gather(*(self._probe(worker) for worker in self.known()))

    async def _follow(self, addresses: Mapping[str, str]) -> None:
        for worker_id in list(self._workers):
            if self._workers[worker_id].client.address != addresses.get(worker_id):
                gone = self._workers.pop(worker_id)
                self._mark(gone, alive=False)
                await gone.client.aclose()
        for worker_id, address in addresses.items():
            if worker_id not in self._workers:
                client = WorkerClient(address, max_message_bytes=self._max_message_bytes, tls=self._tls)
                self._workers[worker_id] = Worker(worker_id, client)

    async def _probe(self, worker: Worker) -> None:
        try:
            description = await worker.client.describe(timeout_s=self._probe_s)
        except ServingError as error:
            if worker.alive:
                _log.warning("worker does not answer", worker=worker.worker_id, error=str(error))
            self._mark(worker, alive=False)
            if time.monotonic() - worker.heard_s >= self._silence_s:
                worker.client.abandon()
            return
        worker.heard_s = time.monotonic()
        moved = description.accepting != worker.description.accepting
        worker.description = description
        # A port can be taken over by another worker after a restart: then this is not the one we mean.
        self._mark(worker, alive=description.worker_id == worker.worker_id, moved=moved)

    def _mark(self, worker: Worker, *, alive: bool, moved: bool = False) -> None:
        if worker.alive == alive and not moved:
            return
        if worker.alive != alive:
            _log.info("worker is up" if alive else "worker is down", worker=worker.worker_id)
        worker.alive = alive
        self._changed.set()
        self._changed = asyncio.Event()
