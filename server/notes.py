"""After a turn: the served model itself writes down facts of it, or a summary, where a bank asks for that.

Behind the turn's back, and at a low price: by one request at a time on a worker that has little to do, greedy, of
bounded length and time, without a session. What there is no place for, and what fails, is given up and counted.
"""

import asyncio
import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, Final, Protocol

import structlog

from cache_store.banks import BankRecord, EntryKind
from cache_store.errors import ServingError
from protos import rekindle_pb2 as pb
from protos import rekindle_worker_pb2 as wpb
from server.banks.keeper import Recalled
from server.directory import Worker, WorkerDirectory
from server.errors import WorkerFault, WorkerLost
from server.exchanges import Exchange
from server.metrics import FrontMetrics
from server.note_text import Wish, answers, normal, question, wishes_of

_MOST_WAITING: Final = 200
_PATIENCE_S: Final = 60.0
"""How long one waits for a worker that has little to do,"""
_ANSWER_S: Final = 60.0
"""and for the answer."""
_BUSY_S: Final = 0.25
"""With more than that to do a worker is left alone."""
_LOOK_S: Final = 0.25
_MAX_BYTES: Final = 8192
_LEAST_BYTES: Final = 256
_QUESTION_TOKENS: Final = 640
"""More than what is asked has, and what the template puts around it."""
_SIMILAR: Final = 8
"""Entries that a new one is compared with."""
_log = structlog.get_logger(__name__)


class NoteBanks(Protocol):
    """Part of a BankKeeper."""

    async def get(self, tenant: str, name: str) -> BankRecord: ...
    async def recall(self, tenant: str, name: str, query: str, *, k: int, peek: bool) -> Sequence[Recalled]: ...
    async def remember(
        self,
        tenant: str,
        name: str,
        *,
        text: str,
        metadata: dict[str, str],
        kind: EntryKind,
        session_id: str,
        turn: int,
    ) -> Any: ...


class Queues(Protocol):
    """Part of Holdings."""

    def queue_s(self, worker: Worker) -> float: ...


class Notes:
    """Used on one event loop."""

    def __init__(
        self,
        banks: NoteBanks,
        directory: WorkerDirectory,
        queues: Queues,
        metrics: FrontMetrics,
        *,
        most_waiting: int = _MOST_WAITING,
        patience_s: float = _PATIENCE_S,
    ) -> None:
        self._banks = banks
        self._directory = directory
        self._queues = queues
        self._metrics = metrics
        self._most_waiting = most_waiting
        self._patience_s = patience_s
        self._num_waiting = 0
        self._looking: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        """By model: who came first is served first."""
        self._writing: set[str] = set()
        """Workers that have one of ours."""
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, exchange: Exchange) -> None:
        if exchange.banks:
            task = asyncio.create_task(self._write_all(exchange))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def aclose(self) -> None:
        """Give up what is not written."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _write_all(self, exchange: Exchange) -> None:
        asked: dict[Wish, list[str]] = defaultdict(list)
        for name in exchange.banks:
            for wish in await self._wishes(exchange, name):
                asked[wish].append(name)
        for wish, names in asked.items():  # banks that want the same share what is written
            if self._num_waiting >= self._most_waiting:
                self._metrics.note_written("full")
                continue
            self._num_waiting += 1
            result = "failed"
            try:
                result = await self._write(exchange, wish, names)
            except ServingError as error:
                self._failed(exchange, error)
            finally:
                self._num_waiting -= 1
                self._metrics.note_written(result)

    async def _wishes(self, exchange: Exchange, name: str) -> list[Wish]:
        try:
            return wishes_of((await self._banks.get(exchange.record.tenant, name)).settings)
        except ServingError as error:
            self._failed(exchange, error)
            return []

    async def _write(self, exchange: Exchange, wish: Wish, names: Sequence[str]) -> str:
        """What came of it."""
        async with self._idle_worker(exchange.worker.description.fingerprint) as worker:
            if worker is None:
                return "busy"
            # It may have waited for long: of a tenant that was erased nothing goes to a worker again.
            names = [name for name in names if wish in await self._wishes(exchange, name)]
            texts = await self._ask(worker, exchange, wish) if names else []
        kept = [await self._keep(exchange, wish.kind, name, text) for name in names for text in texts]
        return "written" if any(kept) else "empty"

    @asynccontextmanager
    async def _idle_worker(self, model: str) -> AsyncGenerator[Worker | None, None]:
        """A worker of this model that has little to do; None where there is none in time."""
        try:
            async with asyncio.timeout(self._patience_s), self._looking[model]:
                worker = await self._look(model)
                self._writing.add(worker.worker_id)
        except TimeoutError:
            yield None
            return
        try:
            yield worker
        finally:
            self._writing.discard(worker.worker_id)

    async def _look(self, model: str) -> Worker:
        while True:
            worker = self._least_busy(model)
            if worker is not None:
                return worker
            await asyncio.sleep(_LOOK_S)

    def _least_busy(self, model: str) -> Worker | None:
        able = [
            worker
            for worker in self._directory.living()
            if worker.accepting and worker.description.fingerprint == model and worker.worker_id not in self._writing
        ]
        idle = [worker for worker in able if self._queues.queue_s(worker) <= _BUSY_S]
        return min(idle, key=lambda worker: worker.in_flight, default=None)

    async def _ask(self, worker: Worker, exchange: Exchange, wish: Wish) -> list[str]:
        room = worker.description.max_context_tokens - wish.max_new_tokens - _QUESTION_TOKENS
        said = await exchange.text(most_bytes=max(_LEAST_BYTES, min(_MAX_BYTES, room)))  # a token has a byte at least
        if not said:
            return []
        [quoted] = await worker.client.quote([said])
        if not quoted.text:
            return []
        message = pb.ChatMessage(role="user", content=question(wish, quoted.text))
        request = wpb.WorkerGenerateRequest(
            request_id=uuid.uuid4().hex,
            history=wpb.History(tenant=exchange.record.tenant, codec=exchange.record.codec),
            chat=pb.ChatInput(messages=[message]),
            sampling=pb.Sampling(max_new_tokens=wish.max_new_tokens, temperature=0.0),
            device_only=True,
        )
        reply, finished = await self._generate(worker, request)
        self._metrics.note_asked(finished.usage)
        return answers(wish, reply, is_whole=finished.reason != pb.FINISH_REASON_LENGTH)

    async def _generate(self, worker: Worker, request: wpb.WorkerGenerateRequest) -> tuple[str, pb.Finished]:
        pieces: list[str] = []
        try:
            with worker.serving():
                async with aclosing(worker.client.generate(request, timeout_s=_ANSWER_S)) as events:
                    async for event in events:
                        pieces.append(event.delta.text)
                        if event.HasField("finished"):
                            return "".join(pieces), event.finished
        except WorkerLost:
            self._directory.suspect(worker)
            raise
        raise WorkerFault(f"the stream of worker {worker.worker_id} ended before its reply did")

    async def _keep(self, exchange: Exchange, kind: EntryKind, name: str, text: str) -> bool:
        """Whether it is an entry now; what an entry says already is none."""
        tenant = exchange.record.tenant
        try:
            similar = await self._banks.recall(tenant, name, text, k=_SIMILAR, peek=True)
            if any(normal(one.entry.text) == normal(text) for one in similar):
                return False
            session_id, turn = exchange.record.session_id, exchange.turn
            await self._banks.remember(
                tenant, name, text=text, metadata={}, kind=kind, session_id=session_id, turn=turn
            )
        except ServingError as error:
            self._failed(exchange, error)
            return False
        return True

    def _failed(self, exchange: Exchange, error: ServingError) -> None:
        _log.warning("no note of a turn", session=exchange.record.session_id, turn=exchange.turn, error=str(error))
