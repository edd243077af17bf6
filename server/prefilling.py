"""Has workers compute the KV of what is in banks ahead of the turns that read it, where a bank asks for that.

It never fails anybody: what is not prefilled is computed in the turn that reads it, and prefilled after that.
"""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Final, Protocol

import structlog

from cache_store.banks import BankRecord, Entry
from cache_store.errors import BankNotFound, ServingError
from protos import rekindle_worker_pb2 as wpb
from server.directory import Worker, WorkerDirectory
from server.errors import NoWorker, WorkerLost
from server.memory_text import element
from server.metrics import FrontMetrics

_AT_ONCE: Final = 8
"""Texts of one request to a worker, which computes one after the other."""
_BEHIND_AT_ONCE: Final = 2
"""Requests behind turns' backs: they take places that turns would have."""
_ANSWER_S: Final = 120.0
_MOST_WAITING: Final = 100

_log = structlog.get_logger(__name__)


class KnowsBanks(Protocol):
    """Part of a BankStore."""

    async def get(self, tenant: str, name: str) -> BankRecord: ...


class Prefilling:
    """Used on one event loop."""

    def __init__(
        self,
        banks: KnowsBanks,
        directory: WorkerDirectory,
        metrics: FrontMetrics,
        *,
        codec: str,
        most_waiting: int = _MOST_WAITING,
    ) -> None:
        """`codec` is that of most sessions: KV of another one has other names."""
        self._banks = banks
        self._directory = directory
        self._metrics = metrics
        self._codec = codec
        self._most_waiting = most_waiting
        self._behind = asyncio.Semaphore(_BEHIND_AT_ONCE)
        self._tasks: dict[tuple[str, str, str], asyncio.Task[None]] = {}
        """By tenant, codec and text."""

    async def prefill(self, bank: BankRecord, entries: Sequence[Entry]) -> int:
        """Prefill entries of a bank that asks for it. How many of them were."""
        if not bank.settings.kv_ttl_s:
            return 0
        return await self._prefill(bank, self._codec, [element(bank.name, entry) for entry in entries])

    def again(self, codec: str, texts: Mapping[str, BankRecord]) -> None:
        """Prefill what a turn has read and had to compute, behind its back: texts, and which bank each is of."""
        for text, bank in texts.items():
            key = (bank.tenant, codec, text)
            if key in self._tasks:
                continue
            if len(self._tasks) >= self._most_waiting:
                self._metrics.prefilled("full", 1)
                return
            self._tasks[key] = asyncio.create_task(self._prefill_behind(bank, codec, text))
            self._tasks[key].add_done_callback(partial(self._over, key))

    async def forget(self, bank: BankRecord, entries: Sequence[Entry]) -> None:
        """Entries of a bank are deleted: so is their KV, as far as workers can be asked.

        In Redis by one worker of each model, which alone can name it, and last: a worker that is still writing behind
        would put back what was deleted before it dropped its own.
        """
        if not (bank.settings.kv_ttl_s and entries):
            return
        texts = [element(bank.name, entry) for entry in entries]
        living = self._directory.living()
        last = {worker.description.fingerprint: worker for worker in reversed(living)}.values()
        for workers, with_redis in (([worker for worker in living if worker not in last], False), (last, True)):
            await self._drop(workers, wpb.DropPrefilledRequest(tenant=bank.tenant, texts=texts, with_redis=with_redis))

    async def _drop(self, workers: Collection[Worker], request: wpb.DropPrefilledRequest) -> None:
        answers = await asyncio.gather(
            *(worker.client.drop_prefilled(request) for worker in workers), return_exceptions=True
        )
        for worker, answer in zip(workers, answers, strict=True):
            if isinstance(answer, BaseException):
                _log.warning("KV of deleted entries stays", worker=worker.worker_id, error=str(answer))

    async def aclose(self) -> None:
        """Give up what is not prefilled."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _over(self, key: tuple[str, str, str], task: asyncio.Task[None]) -> None:
        del self._tasks[key]

    async def _prefill_behind(self, bank: BankRecord, codec: str, text: str) -> None:
        async with self._behind:
            await self._prefill(bank, codec, [text])

    async def _prefill(self, bank: BankRecord, codec: str, texts: Sequence[str]) -> int:
        done = 0
        for start in range(0, len(texts), _AT_ONCE):
            some = texts[start : start + _AT_ONCE]
            request = wpb.PrefillRequest(
                tenant=bank.tenant, codec=codec, texts=some, block_ttl_s=bank.settings.kv_ttl_s
            )
            try:
                if not await self._is_there(bank):  # a document may take minutes
                    self._metrics.prefilled("gone", len(texts) - start)
                    return done
                kept = await self._ask(request)
            except ServingError as error:
                self._metrics.prefilled("failed", len(some))
                _log.warning(
                    "entries of a bank are not prefilled", tenant=bank.tenant, entries=len(some), error=str(error)
                )
                continue
            self._metrics.prefilled("kept", kept)
            self._metrics.prefilled("not_kept", len(some) - kept)
            done += kept
        return done

    async def _is_there(self, bank: BankRecord) -> bool:
        """Of a bank that was deleted nothing goes to a worker again, nor of a tenant that was erased."""
        try:
            return (await self._banks.get(bank.tenant, bank.name)).incarnation == bank.incarnation
        except BankNotFound:
            return False

    async def _ask(self, request: wpb.PrefillRequest) -> int:
        """How many are kept. Raises NoWorker, WorkerLost, WorkerRefused."""
        able = [worker for worker in self._directory.living() if worker.accepting]
        if not able:
            raise NoWorker("no worker accepts work now")
        worker = min(able, key=lambda worker: worker.in_flight)
        try:
            with worker.serving():
                reply = await worker.client.prefill(request, timeout_s=_ANSWER_S)
        except WorkerLost:
            self._directory.suspect(worker)
            raise
        return sum(tokens > 0 for tokens in reply.tokens)
