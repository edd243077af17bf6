"""One turn: lock the session, pick a worker, relay its stream, commit, and only then say that it is finished.

Nothing is stored for a turn that fails or is cancelled. Knows sessions and workers; not who calls, nor how.
"""

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

import grpc
import structlog

from cache_store.errors import ServingError
from cache_store.records import RecordStore, SessionRecord, TurnRecord
from protos import rekindle_pb2 as pb
from protos import rekindle_worker_pb2 as wpb
from server.directory import Worker, WorkerDirectory
from server.errors import NoWorker, WorkerFault, WorkerLost, WorkerRefused
from server.lease import Lease
from server.metrics import FrontMetrics, kind_of_turn
from server.router import Candidate, choose

_ELSEWHERE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
"""A worker that drains or is full says nothing about the others."""

_log = structlog.get_logger(__name__)


class TurnSettings(Protocol):
    """Part of ServerConfig."""

    @property
    def lease_s(self) -> float: ...
    @property
    def flush_timeout_s(self) -> float: ...
    @property
    def block_ttl_s(self) -> int: ...
    @property
    def codec(self) -> str: ...


@dataclass(slots=True)
class _Turn:
    """What is known of a running turn."""

    tenant: str
    request: pb.GenerateRequest
    request_id: str
    deadline_s: float | None
    record: SessionRecord | None = None
    lease: Lease | None = None
    worker: Worker | None = None
    arrived_s: float = field(default_factory=time.monotonic)
    first_delta_s: float = 0.0
    input_ids: list[int] = field(default_factory=list)
    reply_ids: list[int] = field(default_factory=list)


class Turns:
    """Runs turns, with a session or without."""

    def __init__(
        self, records: RecordStore, directory: WorkerDirectory, metrics: FrontMetrics, settings: TurnSettings
    ) -> None:
        self._records = records
        self._directory = directory
        self._metrics = metrics
        self._settings = settings

    async def run(
        self, tenant: str, request: pb.GenerateRequest, *, request_id: str, deadline_s: float | None
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Deltas, then one Finished. Closing the generator stops the turn. `deadline_s` is of `time.monotonic()`.

        Raises NoWorker, WorkerLost, WorkerRefused; with a session also what `Lease` raises.
        """
        turn = _Turn(tenant, request, request_id, deadline_s)
        if not request.session_id:
            async with aclosing(self._relay(turn)) as responses:
                async for response in responses:
                    yield response
            return
        lease = Lease(self._records, tenant, request.session_id, holder=request_id, lease_s=self._settings.lease_s)
        async with lease, aclosing(self._relay(turn)) as responses:
            turn.lease, turn.record = lease, lease.record
            async for response in responses:
                yield response

    def block_ttl_s(self, record: SessionRecord | None) -> int:
        """How long Redis keeps a session's blocks without use; 0: for ever."""
        if record is None:
            return self._settings.block_ttl_s
        return 0 if record.pinned else max(record.ttl_s, self._settings.block_ttl_s)

    def pick(self, record: SessionRecord | None, key: str, *, but: frozenset[str] = frozenset()) -> Worker:
        """The worker for a session's next turn. Raises NoWorker."""
        able = {
            worker.worker_id: worker
            for worker in self._directory.living()
            if worker.accepting and worker.worker_id not in but
        }
        candidates = [
            Candidate(worker.worker_id, worker.in_flight, worker.description.fingerprint) for worker in able.values()
        ]
        last, model = (record.worker_id, record.model) if record is not None else ("", "")
        chosen = choose(candidates, key=key, last_worker_id=last, model=model)
        if chosen is None:
            raise NoWorker("no worker accepts work now")
        return able[chosen]

    async def _relay(self, turn: _Turn) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Pass on what the workers say; commit before Finished."""
        async with aclosing(self._events(turn)) as events:
            async for event in events:
                kind = event.WhichOneof("event")
                if kind == "delta":
                    turn.reply_ids.extend(event.delta.token_ids)
                    if not turn.first_delta_s:
                        turn.first_delta_s = time.monotonic()
                    if turn.lease is not None:
                        turn.lease.check()
                    yield pb.GenerateResponse(delta=event.delta)
                elif kind == "started":
                    turn.input_ids = list(event.started.input_token_ids)
                elif kind == "finished":
                    yield pb.GenerateResponse(finished=await self._finish(turn, event.finished))
                    return
        raise WorkerLost("the worker's stream ended before its reply did")

    async def _events(self, turn: _Turn) -> AsyncGenerator[wpb.WorkerEvent, None]:
        """One worker's stream; another's if the first is lost, or refuses for want of room, before its first delta."""
        tried: frozenset[str] = frozenset()
        refusal: ServingError | None = None
        key = turn.request.session_id or _prefix_key(turn.request)
        while True:
            try:
                worker = turn.worker = self.pick(turn.record, key, but=tried)
            except NoWorker:
                raise refusal or NoWorker("no worker accepts work now") from refusal
            await self._flush_last_worker(turn, worker)
            try:
                with worker.serving():
                    async with aclosing(self._ask(turn, worker)) as events:
                        async for event in events:
                            yield event
                return
            except (WorkerLost, WorkerRefused) as error:
                if isinstance(error, WorkerLost):
                    self._directory.suspect(worker)
                elif error.code not in _ELSEWHERE:
                    raise
                if turn.first_delta_s:
                    raise
                refusal, tried = error, tried | {worker.worker_id}
                self._metrics.turn_retried()
                _log.warning("turn goes to another worker", worker=worker.worker_id, error=str(error))

    def _ask(self, turn: _Turn, worker: Worker) -> AsyncGenerator[wpb.WorkerEvent, None]:
        alone = wpb.History(tenant=turn.tenant, codec=self._settings.codec)
        request = wpb.WorkerGenerateRequest(
            request_id=turn.request_id,
            session_id=turn.request.session_id,
            history=alone if turn.record is None else history_of(turn.record),
            sampling=turn.request.sampling,
            block_ttl_s=self.block_ttl_s(turn.record),
            audit=turn.request.audit,
        )
        given = turn.request.WhichOneof("input")
        assert given is not None, "an unchecked request"
        if given == "text":
            request.text = turn.request.text
        else:
            getattr(request, given).CopyFrom(getattr(turn.request, given))
        timeout_s = None if turn.deadline_s is None else max(0.0, turn.deadline_s - time.monotonic())
        return worker.client.generate(request, timeout_s=timeout_s)

    async def _flush_last_worker(self, turn: _Turn, worker: Worker) -> None:
        """Read your writes: what the last worker has not yet stored would be missed on this one."""
        record = turn.record
        if record is None or record.worker_id in ("", worker.worker_id):
            return
        last = self._directory.find(record.worker_id)
        if last is None:
            return
        try:
            await last.client.flush(history_of(record), timeout_s=self._settings.flush_timeout_s)
        except ServingError as error:  # what is missed is computed
            _log.warning("last worker not flushed", worker=last.worker_id, error=str(error))

    async def _finish(self, turn: _Turn, finished: pb.Finished) -> pb.Finished:
        worker = turn.worker
        assert worker is not None
        usage = finished.usage
        if usage.completion_tokens != len(turn.reply_ids):
            raise WorkerFault(
                f"worker {worker.worker_id} sent {len(turn.reply_ids)} tokens and counted {usage.completion_tokens}"
            )
        ended_s = time.monotonic()
        if turn.lease is not None and turn.record is not None:
            await turn.lease.commit(
                [*turn.input_ids, *turn.reply_ids],
                _turn_record(turn.record, len(turn.input_ids), len(turn.reply_ids), finished.reason),
                model=worker.description.fingerprint,
                worker_id=worker.worker_id,
            )
            finished.turn = len(turn.record.turns) + 1
        first_s = turn.first_delta_s or ended_s
        self._metrics.turn_finished(finished, ttft_s=first_s - turn.arrived_s, decode_s=ended_s - first_s)
        receipt = finished.receipt
        _log.info(
            "turn finished",
            session=turn.request.session_id,
            turn=finished.turn,
            worker=worker.worker_id,
            kind=kind_of_turn(receipt),
            device_tokens=receipt.device_tokens,
            host_tokens=receipt.host_tokens,
            disk_tokens=receipt.disk_tokens,
            redis_tokens=receipt.redis_tokens,
            computed_tokens=receipt.computed_tokens,
            completion_tokens=usage.completion_tokens,
            ttft_ms=round((first_s - turn.arrived_s) * 1000, 1),
        )
        return finished


def history_of(record: SessionRecord) -> wpb.History:
    """What a worker must know of a session to name its blocks."""
    return wpb.History(tenant=record.tenant, token_ids=record.token_ids, codec=record.codec)


def _turn_record(record: SessionRecord, num_input: int, num_reply: int, reason: int) -> TurnRecord:
    start = len(record.token_ids)
    return TurnRecord(
        start=start,
        reply_start=start + num_input,
        end=start + num_input + num_reply,
        finish_reason=reason,
        committed_ms=int(time.time() * 1000),
    )


_PREFIXES: dict[str, Callable[[pb.GenerateRequest], str]] = {
    "text": lambda request: request.text[:256],
    "chat": lambda request: request.chat.messages[0].content[:256],
    "tokens": lambda request: str(list(request.tokens.token_ids[:64])),
}


def _prefix_key(request: pb.GenerateRequest) -> str:
    """How a request without a session begins: requests that begin alike share blocks, so they go to one worker."""
    given = request.WhichOneof("input")
    assert given is not None, "an unchecked request"
    return _PREFIXES[given](request)
