"""A turn's events, from whichever workers it takes: one is chosen, and another goes on where that one can't.

Knows workers and what they hold; stores nothing. A worker that goes on is told which tokens the client has, and how
much of their text.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

import grpc
import structlog

from cache_store.errors import ServingError
from cache_store.inserts import Inserts
from cache_store.records import SessionRecord, inserts_of
from protos import rekindle_pb2 as pb
from protos import rekindle_worker_pb2 as wpb
from server.directory import Worker, WorkerDirectory
from server.errors import NoWorker, WorkerLost, WorkerRefused, WorkersLost
from server.holdings import Holdings, Prompt
from server.lease import Lease
from server.memories import Reading
from server.metrics import FrontMetrics
from server.router import Candidate, choose
from server.validation import CONTEXT_POLICY_OF

_ELSEWHERE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
"""A worker that drains or is full says nothing about the others."""
_NOT_IN_TIME_HERE = "DEADLINE_UNMEETABLE"
"""A worker's reason that says nothing about less busy ones."""
_FAULTS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
"""A worker that failed at the turn: out of memory, or broken. Another one may do better."""
_MOST_LOST = 3
"""Workers that one turn may lose: what kills whoever runs it is not given to all of them."""
_ANSWER_S = 0.5
"""Left of a turn's deadline when it stops waiting for a worker: its end has still to arrive."""
_LOOK_S = 1.0

_log = structlog.get_logger(__name__)


class RelaySettings(Protocol):
    """Part of ServerConfig."""

    @property
    def failover_wait_s(self) -> float: ...
    @property
    def flush_timeout_s(self) -> float: ...
    @property
    def block_ttl_s(self) -> int: ...
    @property
    def codec(self) -> str: ...


@dataclass(slots=True)
class Turn:
    """What is known of a running turn."""

    tenant: str
    request: pb.GenerateRequest
    request_id: str
    deadline_s: float | None
    record: SessionRecord | None = None
    lease: Lease | None = None
    reading: Reading | None = None
    """What it has read from its session's banks: `request` has it in its input."""
    worker: Worker | None = None
    arrived_s: float = field(default_factory=time.monotonic)
    first_delta_s: float = 0.0
    input_ids: list[int] = field(default_factory=list)
    insert_bounds: list[int] = field(default_factory=list)
    """Of its input, what was to be inserted: positions in the session,"""
    inserted: list[int] | None = None
    """and of all of the session, what is. None until its worker has said so."""
    reply_ids: list[int] = field(default_factory=list)
    reply_text: list[str] = field(default_factory=list)
    """In pieces, as the client has it."""
    num_characters: int = 0
    """Of the reply's text."""
    num_lost: int = 0
    """Workers that were lost, or failed, while they ran it."""
    lost_s: float = 0.0
    """When the last one was."""

    @property
    def is_begun(self) -> bool:
        """Has the client a part of the reply, which only a worker with the same model can go on with?"""
        return bool(self.reply_ids)


class Relay:
    """Used on one event loop."""

    def __init__(
        self, directory: WorkerDirectory, holdings: Holdings, metrics: FrontMetrics, settings: RelaySettings
    ) -> None:
        self._directory = directory
        self._holdings = holdings
        self._metrics = metrics
        self._settings = settings

    async def events(self, turn: Turn) -> AsyncGenerator[wpb.WorkerEvent, None]:
        """What the workers say: the next one goes on where one is lost, fails, or has no room.

        Raises NoWorker, WorkerLost, WorkerRefused.
        """
        refused: frozenset[str] = frozenset()
        last: ServingError | None = None
        prompt = self._prompt(turn)
        if not turn.request.sampling.HasField("seed"):
            turn.request.sampling.seed = secrets.randbits(64)  # every worker draws the same
        model = ""
        while True:
            try:
                worker = self.pick(prompt, turn.record, but=refused, only_model=model if turn.is_begun else "")
            except NoWorker as error:
                if last is None or not _is_worth_waiting(turn, last) or not await self._another_comes(turn):
                    raise last or error from error
                refused = frozenset()
                continue
            turn.worker, model = worker, worker.description.fingerprint
            await self._flush_last_worker(turn, worker)
            try:
                with worker.serving():
                    async with aclosing(self._ask(turn, worker)) as events:
                        async for event in events:
                            yield event
                            if event.HasField("finished"):
                                return
                raise WorkerLost(f"the stream of worker {worker.worker_id} ended before its reply did")
            except WorkerLost as error:
                self._directory.suspect(worker)
                turn.num_lost, turn.lost_s, last = turn.num_lost + 1, time.monotonic(), error
            except WorkerRefused as error:
                if error.code not in (*_ELSEWHERE, *_FAULTS) and error.reason != _NOT_IN_TIME_HERE:
                    raise
                turn.num_lost += error.code in _FAULTS
                turn.lost_s = turn.lost_s or time.monotonic()
                refused, last = refused | {worker.worker_id}, error
            if turn.num_lost >= _MOST_LOST:
                if isinstance(last, WorkerLost):
                    raise WorkersLost(f"{turn.num_lost} workers were lost over this turn") from last
                raise last
            if turn.is_begun:
                self._metrics.turn_failed_over()
            else:
                self._metrics.turn_retried()
            _log.warning(
                "turn goes to another worker", worker=worker.worker_id, tokens=len(turn.reply_ids), error=str(last)
            )

    async def _another_comes(self, turn: Turn) -> bool:
        """Wait for a worker that may have come up. False where the turn's time is over."""
        patience_ends_s = turn.lost_s + self._settings.failover_wait_s
        left_s = (patience_ends_s if turn.deadline_s is None else turn.deadline_s - _ANSWER_S) - time.monotonic()
        if left_s <= 0:
            return False
        try:
            async with asyncio.timeout(min(left_s, _LOOK_S)):
                await self._directory.changed()
        except TimeoutError:
            pass
        return True

    def _prompt(self, turn: Turn) -> Prompt:
        if turn.record is not None:
            return prompt_of(turn.record)
        new = tuple(turn.request.tokens.token_ids)  # none where the input is text
        return Prompt(turn.tenant, self._settings.codec, new, key=_prefix_key(turn.request))

    def _ask(self, turn: Turn, worker: Worker) -> AsyncGenerator[wpb.WorkerEvent, None]:
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
        if turn.is_begun:
            request.tokens.token_ids.extend(turn.input_ids)
            request.tokens_inserted.extend(bound - len(request.history.token_ids) for bound in turn.insert_bounds)
            request.begun.token_ids.extend(turn.reply_ids)
            request.begun.text_characters = turn.num_characters
        elif given == "text":
            request.text = turn.request.text
        else:
            getattr(request, given).CopyFrom(getattr(turn.request, given))
        if turn.reading is not None and not turn.is_begun:
            request.inserts.extend(turn.reading.inserts)
        timeout_s = None if turn.deadline_s is None else max(0.0, turn.deadline_s - time.monotonic())
        return worker.client.generate(request, timeout_s=timeout_s)

    async def _flush_last_worker(self, turn: Turn, worker: Worker) -> None:
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

    def pick(
        self, prompt: Prompt, record: SessionRecord | None, *, but: frozenset[str] = frozenset(), only_model: str = ""
    ) -> Worker:
        """The worker for a session's next turn, of this model only if one is given. Raises NoWorker."""
        able = {
            worker.worker_id: worker
            for worker in self._directory.living()
            if worker.accepting and worker.worker_id not in but and only_model in ("", worker.description.fingerprint)
        }
        last, model = (record.worker_id, record.model) if record is not None else ("", "")
        if able and not _is_beyond(record, able.values()):
            best = self._holdings.choose(prompt, able.values(), model=model, last_worker_id=last)
            if best is not None:
                return best
        candidates = [
            Candidate(worker.worker_id, worker.in_flight, worker.description.fingerprint) for worker in able.values()
        ]
        chosen = choose(candidates, key=prompt.key, last_worker_id=last, model=model)
        if chosen is None:
            raise NoWorker("no worker accepts work now")
        return able[chosen]

    def block_ttl_s(self, record: SessionRecord | None) -> int:
        """How long Redis keeps a session's blocks without use; 0: for ever."""
        if record is None:
            return self._settings.block_ttl_s
        return 0 if record.pinned else max(record.ttl_s, self._settings.block_ttl_s)


def _is_worth_waiting(turn: Turn, error: ServingError) -> bool:
    """Where no worker is left: may one that comes up do better?"""
    if isinstance(error, WorkerRefused):
        return turn.is_begun and error.code in _ELSEWHERE
    return True


def _is_beyond(record: SessionRecord | None, able: Iterable[Worker]) -> bool:
    """Is a session longer than the window? What it needs then are a few of its blocks, under names that only workers
    know: it stays with its worker as long as that is not much busier than others."""
    if record is None or not record.context_policy:
        return False
    return record.num_tokens > max(worker.description.max_context_tokens for worker in able)


def prompt_of(record: SessionRecord) -> Prompt:
    """A session's next one, as far as it is sure: new tokens may never be said, and names of blocks are kept."""
    return Prompt(
        record.tenant,
        record.codec,
        record.token_ids,
        key=record.session_id,
        created_ms=record.created_ms,
        inserts=Inserts(inserts_of(record.turns)),
    )


def history_of(record: SessionRecord) -> wpb.History:
    """What a worker must know of a session to name its blocks."""
    history = wpb.History(
        tenant=record.tenant,
        token_ids=record.token_ids,
        codec=record.codec,
        context_policy=CONTEXT_POLICY_OF[record.context_policy],
    )
    if history.context_policy == pb.CONTEXT_POLICY_RECALL:
        history.turn_bounds.extend(bound for turn in record.turns for bound in (turn.start, turn.reply_start))
    history.insert_bounds.extend(inserts_of(record.turns))
    return history


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
