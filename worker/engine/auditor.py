"""Compute restored turns again from their tokens alone, beside the turns that run, and act on what differs.

An audit is prefill of the lowest priority: it gets a part of those steps that no prompt is in, and blocks of its own
that nobody can find, which it gives up to any turn that needs them. It looks nothing up and publishes nothing. Used by
the engine's thread alone.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import structlog
import torch

from cache_store.ids import BlockHash
from worker.calls import AuditReport, Finished
from worker.engine.audit import Comparison, Recording, bound_of
from worker.engine.pool import BlockPool
from worker.engine.prefix import full_names, tail_of
from worker.engine.request import Request
from worker.engine.step import Chunk
from worker.ids import BlockId

log = structlog.get_logger(__name__)

_MAX_QUEUED = 16
"""Audits that wait, each with its turn's logits."""
_MAX_WAIT_S = 60.0
"""How long a turn waits for the audit that it asked for: prompts and a full batch may leave it no room for longer."""
_ANSWER_S = 0.5
"""Left of a turn's deadline when it stops waiting: its reply has still to arrive."""


@dataclass(slots=True, eq=False)
class _Audit:
    request: Request
    num_kept: int
    """Generated tokens that belong to the reply."""
    comparison: Comparison
    num_target: int
    """Positions to compute: up to the one that chose the last recorded token."""
    num_computed: int = 0
    table: list[BlockId] = field(default_factory=list)


class _Held(NamedTuple):
    """A turn that is over and waits for its audit."""

    request: Request
    finished: Finished
    until_s: float
    """Of `time.monotonic()`."""


class Auditor:
    def __init__(
        self,
        pool: BlockPool,
        *,
        rate: float,
        draw: Callable[[], float],
        block_tokens: int,
        dtype: str,
        discard: Callable[[Sequence[BlockHash]], Future[None]],
    ) -> None:
        """Audits a share `rate` of the restored turns, where `draw` gives numbers from [0, 1), and those that ask.

        `discard` deletes blocks from this worker's device and host memory and from the store, and its future ends on
        the engine's thread.
        """
        self.counts = dict.fromkeys(("passed", "mismatched", "skipped"), 0)
        self._pool = pool
        self._rate = rate
        self._draw = draw
        self._block_tokens = block_tokens
        self._dtype = dtype
        self._discard = discard
        self._queue: list[_Audit] = []
        """Those that a turn waits for come first."""
        self._current: _Audit | None = None
        self._held: dict[str, _Held] = {}
        """By request id."""

    @property
    def is_awaited(self) -> bool:
        """Does a turn wait for its audit?"""
        return bool(self._held)

    # Of turns

    def watch(self, requests: Sequence[Request], logits: torch.Tensor) -> None:
        """Keep the logits [n, vocab] by which turns choose their next token, of those that will be audited."""
        watched = [row for row, request in enumerate(requests) if self._is_watched(request)]
        if not watched:
            return
        for row, kept in zip(watched, logits[watched].cpu(), strict=True):
            recording = requests[row].recording
            assert recording is not None
            recording.keep(kept)

    def _is_watched(self, request: Request) -> bool:
        is_first = not request.num_generated  # never of a reply that another worker has begun
        if is_first and request.restored and (request.call.audit or self._draw() < self._rate):
            if request.follows_from_tokens:
                request.recording = Recording()
            else:  # what was recalled would have to be chosen again, what was inserted to be computed by itself
                self.counts["skipped"] += 1
        return request.recording is not None

    def finished(self, request: Request, finished: Finished) -> None:
        """Tell the turn's listener that it is over: now, or where it asked for the audit, with the report or when it
        has waited long enough (`expire`)."""
        if request.recording is None:
            request.listener(finished)
            return
        if request.call.audit:
            self._held[request.call.request_id] = _Held(request, finished, _patience_ends_s(request))
        else:
            request.listener(finished)
        rows = request.recording.rows
        reply = request.tokens[request.num_prompt : request.num_prompt + len(rows)]
        audit = _Audit(request, finished.completion_tokens, Comparison(rows, reply), request.num_prompt + len(rows) - 1)
        self._queue.append(audit)
        self._queue.sort(key=lambda queued: not queued.request.call.audit)
        if len(self._queue) > _MAX_QUEUED:
            self._end(self._queue.pop(), "skipped")

    def cancel(self, request_id: str) -> None:
        """Nobody waits for this turn any more: drop its audit. Harmless where none is awaited."""
        if self._held.pop(request_id, None) is not None:
            self._skip(request_id)

    def expire(self, now_s: float) -> None:
        """Skip the audits that turns have waited for long enough, and tell these that they are over, without a report.

        One whose mismatch is being acted on goes on being counted as that.
        """
        for request_id in [request_id for request_id, held in self._held.items() if now_s >= held.until_s]:
            self._skip(request_id)
            self._answer(request_id, None)

    def _skip(self, request_id: str) -> None:
        if self._current is not None and self._current.request.call.request_id == request_id:
            self.give_way()
        for audit in [audit for audit in self._queue if audit.request.call.request_id == request_id]:
            self._queue.remove(audit)
            self._end(audit, "skipped")

    # Of steps

    def plan(self, max_tokens: int) -> list[Chunk]:
        """What to run in a step that has room for `max_tokens`. The positions that chose tokens go one by one, as they
        did in the turn: each gives logits."""
        if max_tokens <= 0:
            return []
        if self._current is None and self._queue:
            self._begin(self._queue.pop(0))
        audit = self._current
        if audit is None:
            return []
        tokens, start = audit.request.tokens, audit.num_computed
        end = min(audit.num_target, start + max_tokens)
        split = min(end, max(start, audit.request.num_prompt - 1))
        chunks = [Chunk(tokens[start:split], start, audit.table, wants_logits=False)] if start < split else []
        return chunks + [
            Chunk([tokens[position]], position, audit.table, wants_logits=True) for position in range(split, end)
        ]

    def _begin(self, audit: _Audit) -> None:
        blocks = self._pool.take(-(-audit.num_target // self._block_tokens))
        if blocks is None:
            self._end(audit, "skipped")
        else:
            audit.table = blocks
            self._current = audit

    def ran(self, chunks: Sequence[Chunk], logits: torch.Tensor) -> None:
        """The planned chunks were run and gave these logits ([n, vocab] float32)."""
        audit = self._current
        assert audit is not None, "nothing was planned"
        audit.num_computed += sum(len(chunk.token_ids) for chunk in chunks)
        if len(logits):
            audit.comparison.add(logits)
        if audit.num_computed < audit.num_target:
            return
        self._pool.release(audit.table)
        self._current = None
        report = audit.comparison.report(bound_of(audit.request.call.codec, self._dtype))
        if report.passed:
            self._end(audit, "passed", report)
        else:
            self._mismatch(audit, report)

    def _mismatch(self, audit: _Audit, report: AuditReport) -> None:
        """Which block is wrong is not known, and what was computed on it is wrong too: all of the conversation goes."""
        names = self._names(audit)
        log.error(
            "audit mismatch",
            request=audit.request.call.request_id,
            codec=audit.request.call.codec,
            restored=sorted(name.hex() for name in audit.request.restored),
            discarded=len(names),
            mean_kl=report.mean_kl,
            max_kl=report.max_kl,
            agreeing_tokens=report.agreeing_tokens,
            tokens=report.tokens,
        )

        def discarded(future: Future[None]) -> None:
            if error := future.exception():
                log.error("mismatched blocks not deleted", request=audit.request.call.request_id, error=str(error))
            self._end(audit, "mismatched", report)

        self._discard(names).add_done_callback(discarded)

    def _names(self, audit: _Audit) -> list[BlockHash]:
        """All blocks that the turn used or made: full ones, and the unfull last ones of its history and of its own."""
        request, size = audit.request, self._block_tokens
        names = full_names(request.root, request.tokens, size)
        ends = (len(request.call.history) - 1, request.num_prompt + audit.num_kept - 1)
        tails = [tail_of(request.root, names, request.tokens, end, size) for end in ends if end > 0]
        return list(dict.fromkeys([*names, *(tail.name for tail in tails if tail is not None)]))

    # Out

    def give_way(self) -> bool:
        """Drop the audit that is being run and let go of its blocks. False if there is none."""
        audit, self._current = self._current, None
        if audit is None:
            return False
        self._pool.release(audit.table)
        self._end(audit, "skipped")
        return True

    def evict(self, tenant: str) -> None:
        """Drop a tenant's audits, and tell turns that wait for one that they are over."""
        if self._current is not None and self._current.request.tenant == tenant:
            self.give_way()
        for audit in [audit for audit in self._queue if audit.request.tenant == tenant]:
            self._queue.remove(audit)
            self._end(audit, "skipped")

    def drop_all(self) -> None:
        """Drop every audit, and tell turns that wait for one that they are over."""
        self.give_way()
        while self._queue:
            self._end(self._queue.pop(0), "skipped")
        for request_id in list(self._held):  # their blocks are being deleted: they need not wait for that
            self._answer(request_id, None)

    def _end(self, audit: _Audit, result: str, report: AuditReport | None = None) -> None:
        self.counts[result] += 1
        self._answer(audit.request.call.request_id, report)

    def _answer(self, request_id: str, report: AuditReport | None) -> None:
        held = self._held.pop(request_id, None)
        if held is not None:
            receipt = replace(held.finished.receipt, audit=report)
            held.request.listener(replace(held.finished, receipt=receipt))


def _patience_ends_s(request: Request) -> float:
    """When the turn, which has its reply now, is not to wait for its audit any longer."""
    until_s, deadline_s = time.monotonic() + _MAX_WAIT_S, request.call.deadline_s
    return until_s if deadline_s is None else min(until_s, deadline_s - _ANSWER_S)
