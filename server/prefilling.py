"""Has workers compute the KV of what is in banks ahead of the turns that read it, where a bank asks for that.

It never fails anybody: what is not prefilled is computed in the turn that reads it, and prefilled after that.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Final

import structlog

from cache_store.banks import BankRecord, Entry
from cache_store.errors import ServingError
from protos import rekindle_worker_pb2 as wpb
from server.directory import WorkerDirectory
from server.errors import NoWorker
from server.memory_text import element
from server.metrics import FrontMetrics

_AT_ONCE: Final = 8
"""Texts of one request to a worker, which computes one after the other."""
_ANSWER_S: Final = 120.0
_MOST_WAITING: Final = 100

_log = structlog.get_logger(__name__)


class Prefilling:
    """Used on one event loop."""

    def __init__(
        self, directory: WorkerDirectory, metrics: FrontMetrics, *, codec: str, most_waiting: int = _MOST_WAITING
    ) -> None:
        """`codec` is that of most sessions: KV of another one has other names."""
        self._directory = directory
        self._metrics = metrics
        self._codec = codec
        self._most_waiting = most_waiting
        self._tasks: set[asyncio.Task[int]] = set()

    async def prefill(self, bank: BankRecord, entries: Sequence[Entry]) -> int:
        """Prefill entries of a bank that asks for it. How many of them were."""
        if not bank.settings.kv_ttl_s:
            return 0
        texts = [element(bank.name, entry) for entry in entries]
        return await self._prefill(bank.tenant, self._codec, texts, bank.settings.kv_ttl_s)

    def again(self, tenant: str, codec: str, texts: Mapping[str, int]) -> None:
        """Prefill what a turn has read and had to compute, behind its back: texts, and for how many seconds each is
        kept."""
        for text, ttl_s in texts.items():
            if len(self._tasks) >= self._most_waiting:
                self._metrics.prefilled("full", 1)
                return
            task = asyncio.create_task(self._prefill(tenant, codec, [text], ttl_s))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def forget(self, bank: BankRecord, entries: Sequence[Entry]) -> None:
        """Entries of a bank are deleted: so is their KV, as far as workers can be asked."""
        if not (bank.settings.kv_ttl_s and entries):
            return
        texts = [element(bank.name, entry) for entry in entries]
        living = self._directory.living()
        requests = [
            wpb.DropPrefilledRequest(tenant=bank.tenant, texts=texts, with_redis=worker is living[0])
            for worker in living
        ]
        asked = zip(living, requests, strict=True)
        answers = await asyncio.gather(
            *(worker.client.drop_prefilled(request) for worker, request in asked), return_exceptions=True
        )
        for worker, answer in zip(living, answers, strict=True):
            if isinstance(answer, BaseException):
                _log.warning("KV of deleted entries stays", worker=worker.worker_id, error=str(answer))

    async def aclose(self) -> None:
        """Give up what is not prefilled."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _prefill(self, tenant: str, codec: str, texts: Sequence[str], ttl_s: int) -> int:
        done = 0
        for start in range(0, len(texts), _AT_ONCE):
            some = texts[start : start + _AT_ONCE]
            try:
                kept = await self._ask(wpb.PrefillRequest(tenant=tenant, codec=codec, texts=some, block_ttl_s=ttl_s))
            except ServingError as error:
                self._metrics.prefilled("failed", len(some))
                _log.warning("entries of a bank are not prefilled", tenant=tenant, entries=len(some), error=str(error))
                continue
            self._metrics.prefilled("kept", kept)
            self._metrics.prefilled("not_kept", len(some) - kept)
            done += kept
        return done

    async def _ask(self, request: wpb.PrefillRequest) -> int:
        """How many are kept. Raises NoWorker, WorkerLost, WorkerRefused."""
        able = [worker for worker in self._directory.living() if worker.accepting]
        if not able:
            raise NoWorker("no worker accepts work now")
        worker = min(able, key=lambda worker: worker.in_flight)
        with worker.serving():
            reply = await worker.client.prefill(request, timeout_s=_ANSWER_S)
        return sum(tokens > 0 for tokens in reply.tokens)
