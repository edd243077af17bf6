"""One turn: lock the session, pass on what workers say, commit, and only then say that it is finished.

Nothing is stored for a turn that is cancelled, or that fails (unless it asks for that). Knows sessions; not which
workers it takes, nor who calls, nor what banks know.
"""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Final, Protocol

import structlog

from cache_store.records import SessionRecord, TurnMemory, TurnRecord, inserts_of
from protos import rekindle_pb2 as pb
from server.errors import NoWorker, WorkerFault, WorkerLost, WorkerRefused
from server.exchanges import Exchange
from server.lease import Leases
from server.memories import Memories, Reading
from server.metrics import FrontMetrics, kind_of_turn
from server.relay import Relay, Turn

_MOST_MEMORIES: Final = 50
_log = structlog.get_logger(__name__)


class Remembers(Protocol):
    def add(self, exchange: Exchange) -> None:
        """A turn was committed. Returns at once, and never fails."""
        ...


class Turns:
    """Runs turns, with a session or without."""

    def __init__(
        self,
        leases: Leases,
        workers: Relay,
        memories: Memories,
        metrics: FrontMetrics,
        *,
        remembered_by: Sequence[Remembers],
    ) -> None:
        self._leases = leases
        self._workers = workers
        self._memories = memories
        self._remembered_by = remembered_by
        self._metrics = metrics

    async def run(
        self, tenant: str, request: pb.GenerateRequest, *, request_id: str, deadline_s: float | None
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Deltas, then one Finished. Closing the generator stops the turn. `deadline_s` is of `time.monotonic()`.

        Raises NoWorker, WorkerLost, WorkerRefused; with a session also what `Lease` raises.
        """
        turn = Turn(tenant, request, request_id, deadline_s)
        if not request.session_id:
            async with aclosing(self._relay(turn)) as responses:
                async for response in responses:
                    yield response
            return
        async with self._leases.hold(tenant, request.session_id) as lease:
            turn.lease, turn.record = lease, lease.record
            number = _turn_of(lease.record, request.idempotency_key)
            if number is None:
                reading = await self._memories.read(request, lease.record, deadline_s=deadline_s)
                turn.request, turn.reading = reading.request, reading  # from here on the same, whoever serves it
            async with aclosing(self._relay(turn) if number is None else self._repeat(turn, number)) as responses:
                async for response in responses:
                    yield response

    async def _relay(self, turn: Turn) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Pass on what the workers say; commit before Finished."""
        try:
            async with aclosing(self._workers.events(turn)) as events:
                async for event in events:
                    kind = event.WhichOneof("event")
                    if kind == "delta":
                        turn.reply_ids.extend(event.delta.token_ids)
                        turn.reply_text.append(event.delta.text)
                        turn.num_characters += len(event.delta.text)
                        if not turn.first_delta_s:
                            turn.first_delta_s = time.monotonic()
                        if turn.lease is not None:
                            turn.lease.check()
                        yield pb.GenerateResponse(delta=event.delta)
                    elif kind == "started":
                        turn.input_ids = list(event.started.input_token_ids)
                        turn.insert_bounds = list(event.started.insert_bounds)
                    elif kind == "finished":
                        yield pb.GenerateResponse(finished=await self._finish(turn, event.finished))
                        return
        except (NoWorker, WorkerLost, WorkerRefused):
            if turn.request.on_failure == pb.ON_FAILURE_COMMIT and turn.is_begun:
                await self._commit(turn, pb.FINISH_REASON_INTERRUPTED)
            raise

    async def _repeat(self, turn: Turn, number: int) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Send a committed turn again. A worker goes on with the whole of its reply, and so sends its text alone."""
        record = turn.record
        assert record is not None
        said = record.turns[number - 1]
        turn.record = replace(record, token_ids=record.token_ids[: said.start], turns=record.turns[: number - 1])
        turn.input_ids = list(record.token_ids[said.start : said.reply_start])
        turn.insert_bounds = list(said.insert_bounds)
        turn.reply_ids = list(record.token_ids[said.reply_start : said.end])
        turn.request.sampling.max_new_tokens = len(turn.reply_ids)
        yield pb.GenerateResponse(delta=pb.Delta(token_ids=turn.reply_ids))
        async with aclosing(self._workers.events(turn)) as events:
            async for event in events:
                if event.HasField("delta"):
                    turn.num_characters += len(event.delta.text)
                    yield pb.GenerateResponse(delta=event.delta)
                elif event.HasField("finished"):
                    finished = event.finished
                    finished.turn, finished.repeated = number, True
                    finished.receipt.memories.extend(pb.MemorySource(**one._asdict()) for one in said.memories)
                    finished.reason = said.finish_reason  # type: ignore[assignment]  # a number, as records keep it
                    yield pb.GenerateResponse(finished=finished)

    async def _finish(self, turn: Turn, finished: pb.Finished) -> pb.Finished:
        worker = turn.worker
        assert worker is not None
        usage = finished.usage
        if usage.completion_tokens != len(turn.reply_ids):
            raise WorkerFault(
                f"worker {worker.worker_id} sent {len(turn.reply_ids)} tokens and counted {usage.completion_tokens}"
            )
        ended_s = time.monotonic()
        turn.inserted = list(finished.receipt.insert_bounds)
        finished.turn = await self._commit(turn, finished.reason)
        if turn.reading is not None:
            finished.receipt.memories.extend(turn.reading.sources)
            finished.receipt.bank_misses.extend(turn.reading.misses)
        first_s = turn.first_delta_s or ended_s
        self._metrics.turn_finished(
            finished, tenant=turn.tenant, ttft_s=first_s - turn.arrived_s, decode_s=ended_s - first_s
        )
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
            memories=len(receipt.memories),
            ttft_ms=round((first_s - turn.arrived_s) * 1000, 1),
        )
        return finished

    async def _commit(self, turn: Turn, reason: pb.FinishReason) -> int:
        """Append the turn to its session. Returns its number; 0 without a session."""
        if turn.lease is None or turn.record is None:
            return 0
        assert turn.worker is not None
        await turn.lease.commit(
            [*turn.input_ids, *turn.reply_ids],
            _turn_record(turn, reason),
            model=turn.worker.description.fingerprint,
            worker_id=turn.worker.worker_id,
        )
        number = len(turn.record.turns) + 1
        if turn.reading is not None:
            inserted = _inserts(turn)[0]
            self._memories.committed(turn.reading, turn.record.codec, num_inserted=len(inserted) // 2)
            exchange = Exchange(turn.record, number, turn.reading.asked, "".join(turn.reply_text), turn.worker)
            for one in self._remembered_by:
                one.add(exchange)
        return number


def _turn_record(turn: Turn, reason: pb.FinishReason) -> TurnRecord:
    assert turn.record is not None
    start = len(turn.record.token_ids)
    reply_start = start + len(turn.input_ids)
    new_inserts, lost_inserts = _inserts(turn)
    key = turn.request.idempotency_key
    return TurnRecord(
        start=start,
        reply_start=reply_start,
        end=reply_start + len(turn.reply_ids),
        finish_reason=reason,
        committed_ms=int(time.time() * 1000),
        idempotency_key=key,
        insert_bounds=new_inserts,
        lost_inserts=lost_inserts,
        memories=_memories(turn.reading) if key and turn.reading is not None else (),
    )


def _memories(reading: Reading) -> tuple[TurnMemory, ...]:
    """The best of what was read: a record has its bounds."""
    return tuple(
        TurnMemory(source.bank, source.entry_id, source.score, source.document_id, source.tokens)
        for source in reading.sources[:_MOST_MEMORIES]
    )


def _inserts(turn: Turn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What was inserted of a turn's input, and where inserts of earlier turns begin that are none any more. Of one that
    was interrupted nobody has said: what was to be inserted is taken for it."""
    assert turn.record is not None
    before = inserts_of(turn.record.turns)
    inserted = turn.inserted if turn.inserted is not None else [*before, *turn.insert_bounds]
    new = tuple(bound for bound in inserted if bound >= len(turn.record.token_ids))
    return new, tuple(start for start in before[0::2] if start not in inserted[0::2])


def _turn_of(record: SessionRecord, idempotency_key: str) -> int | None:
    """The number of the turn with this key, from 1."""
    if not idempotency_key:
        return None
    numbers = (number for number, turn in enumerate(record.turns, 1) if turn.idempotency_key == idempotency_key)
    return next(numbers, None)
