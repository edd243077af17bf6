"""A session's KV between its turns: where it lies, and how it is moved, kept and dropped. Knows workers, and not how
records are kept or locked."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import structlog

from cache_store.records import SessionRecord
from protos import rekindle_pb2 as pb
from protos import rekindle_worker_pb2 as wpb
from server.directory import Worker, WorkerDirectory
from server.errors import NoWorker, WorkerLost
from server.relay import Relay, history_of, prompt_of

_Answer = TypeVar("_Answer")
_log = structlog.get_logger(__name__)


class SessionBlocks:
    """Who calls holds the session's lock, where something changes."""

    def __init__(self, directory: WorkerDirectory, workers: Relay) -> None:
        self._directory = directory
        self._workers = workers

    async def text(self, record: SessionRecord) -> str:
        """The history, detokenized. Raises NoWorker."""
        if not record.token_ids:
            return ""
        _, text = await self._ask_one(record, lambda worker: worker.client.detokenize(record.token_ids))
        return text

    async def residency(self, record: SessionRecord) -> list[pb.Residency]:
        """Where the KV is: tiers that hold nothing are left out."""
        living = self._directory.living()
        located = await self._ask_all(
            living, lambda worker: worker.client.locate(history_of(record), with_redis=worker is living[0])
        )
        found = []
        for worker, reply in located:
            found.append(pb.Residency(tier=pb.TIER_DEVICE, worker_id=worker.worker_id, tokens=reply.device_tokens))
            found.append(pb.Residency(tier=pb.TIER_HOST, worker_id=worker.worker_id, tokens=reply.host_tokens))
            found.append(pb.Residency(tier=pb.TIER_DISK, worker_id=worker.worker_id, tokens=reply.disk_tokens))
        redis_tokens = max((reply.redis_tokens for _, reply in located), default=0)
        found.append(pb.Residency(tier=pb.TIER_REDIS, tokens=redis_tokens))
        return [residency for residency in found if residency.tokens]

    async def retain(self, record: SessionRecord) -> None:
        """Redis keeps them as long as the session says. Raises NoWorker, WorkerRefused."""
        block_ttl_s = self._workers.block_ttl_s(record)
        await self._ask_one(record, lambda worker: worker.client.retain(history_of(record), block_ttl_s=block_ttl_s))

    async def park(self, record: SessionRecord, *, drop_host: bool) -> pb.ParkSessionResponse:
        """Offload wholly from every worker that holds some. Raises NoWorker, WorkerLost, and what workers raise."""
        request = wpb.ParkRequest(
            history=history_of(record), drop_host=drop_host, block_ttl_s=self._workers.block_ttl_s(record)
        )
        answers = await self._ask_all(await self._holders(record), lambda worker: worker.client.park(request))
        parked = [reply for _, reply in answers]
        if not parked:
            raise WorkerLost("the session's worker has just gone; what it had not stored is computed again")
        return pb.ParkSessionResponse(
            redis_tokens=max(reply.redis_tokens for reply in parked),
            device_blocks_dropped=sum(reply.device_blocks_dropped for reply in parked),
            host_blocks_dropped=sum(reply.host_blocks_dropped for reply in parked),
            bytes_stored=sum(reply.bytes_stored for reply in parked),
        )

    async def warm(self, record: SessionRecord) -> tuple[Worker, wpb.WarmReply]:
        """Restore onto the worker that the next turn would go to. Raises NoWorker."""
        request = wpb.WarmRequest(history=history_of(record))
        return await self._ask_one(record, lambda worker: worker.client.warm(request))

    async def drop(self, record: SessionRecord) -> list[wpb.DropReply]:
        """From every worker and from Redis, under all names that they have had. Raises NoWorker, and what workers
        raise: then some may be left."""
        replies = [await self._drop(history_of(known)) for known in (*_renamed(record), record)]
        return [reply for of_names in replies for reply in of_names]

    async def _drop(self, history: wpb.History) -> list[wpb.DropReply]:
        return await self._forget(lambda worker, with_redis: worker.client.drop(history, with_redis=with_redis))

    async def erase(self, tenant: str) -> list[wpb.DropReply]:
        """Drop all that workers and Redis have of a tenant, whatever session it was of. Raises as `drop` does."""
        return await self._forget(lambda worker, with_redis: worker.client.erase(tenant, with_redis=with_redis))

    async def _forget(self, ask: Callable[[Worker, bool], Awaitable[wpb.DropReply]]) -> list[wpb.DropReply]:
        """Have every worker drop blocks, and one of each model, which alone can name its blocks, drop them in Redis.

        These are the last: a worker that is still writing behind would put back what was deleted before it dropped its
        own.
        """
        living = self._living()
        last = {worker.description.fingerprint: worker for worker in reversed(living)}.values()
        others = await self._ask_all(
            [worker for worker in living if worker not in last], lambda worker: ask(worker, False)
        )
        return [*(reply for _, reply in others), *await asyncio.gather(*(ask(worker, True) for worker in last))]

    async def _holders(self, record: SessionRecord) -> list[Worker]:
        """The last worker (blocks may be on their way from it), then others that hold blocks; at least one."""
        living = self._living()
        located = await self._ask_all(living, lambda worker: worker.client.locate(history_of(record), with_redis=False))
        holding = [worker for worker, reply in located if reply.device_tokens or reply.host_tokens or reply.disk_tokens]
        last = self._directory.find(record.worker_id)
        if last is None:
            return holding or living[:1]
        return [last, *(worker for worker in holding if worker is not last)]

    def _living(self) -> list[Worker]:
        living = self._directory.living()
        if not living:
            raise NoWorker("no worker is up")
        return living

    async def _ask_one(
        self, record: SessionRecord, ask: Callable[[Worker], Awaitable[_Answer]]
    ) -> tuple[Worker, _Answer]:
        """Ask the worker that the session's next turn would go to; another if it has just gone. Raises NoWorker."""
        while True:
            worker = self._workers.pick(prompt_of(record), record)
            try:
                return worker, await ask(worker)
            except WorkerLost as error:
                self._lost(worker, error)

    async def _ask_all(
        self, workers: list[Worker], ask: Callable[[Worker], Awaitable[_Answer]]
    ) -> list[tuple[Worker, _Answer]]:
        """Ask all at once; one that has just gone is left out: its memory went with it."""

        async def one(worker: Worker) -> tuple[Worker, _Answer] | None:
            try:
                return worker, await ask(worker)
            except WorkerLost as error:
                self._lost(worker, error)
                return None

        return [answer for answer in await asyncio.gather(*(one(worker) for worker in workers)) if answer is not None]

    def _lost(self, worker: Worker, error: WorkerLost) -> None:
        self._directory.suspect(worker)
        _log.warning("worker left out", worker=worker.worker_id, error=str(error))


def _renamed(record: SessionRecord) -> Iterator[SessionRecord]:
    """The session as it was before each turn that lost inserts: with it all behind them got other names."""
    for number, turn in enumerate(record.turns):
        if turn.lost_inserts:
            yield replace(record, turns=record.turns[:number], token_ids=record.token_ids[: turn.start])
