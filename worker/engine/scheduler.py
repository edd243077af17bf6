"""Which requests run, wait, give way and end. It decides and accounts; it runs no model and waits for nothing.

Which blocks they run on is seen to in worker/engine/block_tables.py. Used by the engine's thread alone.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice, takewhile
from operator import is_not
from typing import Any

import structlog

from cache_store.ids import BlockHash
from cache_store.inserts import Insert
from worker.calls import Failed, Finished, FinishReason, MissReason
from worker.engine.admission import Admission
from worker.engine.auditor import Auditor
from worker.engine.block_tables import BlockTables
from worker.engine.cost_model import CostModel
from worker.engine.deadlines import hopeless
from worker.engine.fair_queue import FairQueue
from worker.engine.gather import Gatherer
from worker.engine.inserter import Inserter, Parts
from worker.engine.passages import Passages
from worker.engine.plan import Span
from worker.engine.planner import Planner
from worker.engine.request import Phase, Request
from worker.engine.restoring import Lookup, Restoring
from worker.errors import DeadlinePassed, DeadlineUnmeetable, TenantErased
from worker.tiers.moves import Tier

_PREFETCH_AHEAD = 8
"""Requests at the queue's front."""
_OUTPUT_WEIGHT = 2
"""What a generated token is charged, in tokens of prompts: it takes about so much more of the device."""
_MAY_GIVE_WAY = (Phase.PREFILL, Phase.DECODE, Phase.RECALLING)
_LOOK_S = 0.05
"""How often it is estimated again who of those that wait will be late."""

log = structlog.get_logger(__name__)


class Scheduler:
    def __init__(
        self,
        tables: BlockTables,
        planner: Planner,
        auditor: Auditor,
        cost_model: CostModel,
        admission: Admission,
        *,
        block_tokens: int,
        max_running: int,
        weights: Mapping[str, float],
        gatherer: Gatherer | None = None,
        passages: Passages | None = None,
        inserter: Inserter | None = None,
    ) -> None:
        """Without `passages` no request may reach beyond its window, and without `inserter` nothing be inserted. Both
        use `gatherer`."""
        self.waiting: FairQueue[Request] = FairQueue(weights)
        self.running: list[Request] = []
        """Everything admitted, in that order: RESTORING, PREFILL and DECODE."""
        self.dropped = {"deadline_passed": 0, "deadline_unmeetable": 0}
        """Requests, by the reason."""
        self.tokens_by_source = dict.fromkeys(("device", "host", "disk", "redis", "computed"), 0)
        self._tables = tables
        self._planner = planner
        self._auditor = auditor
        self._cost_model = cost_model
        self._admission = admission
        self._look_s = 0.0
        self._block_tokens = block_tokens
        self._max_running = max_running
        self._gatherer = gatherer
        self._passages = passages
        self._inserter = inserter
        self._num_left = 0
        """Requests that have let go of their blocks for good."""
        if passages is not None:
            passages.again, passages.decode = self._again, self._decode

    # In

    def add(self, request: Request) -> None:
        gaps = self._tables.expected_gaps(request)
        inserted = self._inserter.expected_tokens(request, gaps) if self._inserter is not None else 0
        request.expected_tokens = max(1, sum(gap.tokens for gap in gaps) - inserted)
        self.waiting.push(request)
        if request.call.deadline_s is not None:
            self._look_s = 0.0  # at once

    def admit(self) -> None:
        """Move requests from the queue into the batch while there is room for them, each tenant by its share."""
        while len(self.running) < self._max_running and (request := self.waiting.front()) is not None:
            if self.running and request.stalled_at == self._num_left:
                break
            lookup = self._tables.open(request)
            if lookup is None:
                break
            self._begin(self.waiting.take(), lookup)
        self._prefetch()

    def _prefetch(self) -> None:
        """Have the blocks of those who will be let in next brought to the host tier, each once."""
        for request in islice(self.waiting, _PREFETCH_AHEAD):
            if not request.prefetched:
                request.prefetched = self._tables.prefetch(request)
                if not request.prefetched:
                    return

    def _begin(self, request: Request, lookup: Lookup) -> None:
        self.running.append(request)
        self._admission.begin(request.ticket)
        request.admitted_s = time.monotonic()
        request.phase = Phase.RESTORING
        restoring = self._tables.ask(request, lookup, lambda: self._settled(request, restoring))
        request.restoring = restoring
        request.waits_for_all = bool(request.epoch or request.to_insert(restoring))
        if not request.waits_for_all:
            self._planner.plan(request, restoring, _ahead(request, self.prompts))
        self._tables.restore(request, restoring)
        self._advance(request, restoring)

    @property
    def prompts(self) -> list[Request]:
        """Everything admitted that does not decode yet, in the order in which it is to be computed."""
        return self.waiting.in_turn(request for request in self.running if request.phase is not Phase.DECODE)

    @property
    def is_restoring(self) -> bool:
        if self._gatherer is not None and self._gatherer.is_busy:
            return True
        return any(request.restoring is not None for request in self.running)

    def advance(self, now_s: float) -> None:
        """Look how the restores go: what may be computed meanwhile, what is not waited for any longer."""
        if self._gatherer is not None:
            self._gatherer.advance(now_s)
        if not self.is_restoring:
            return
        prompts = self.prompts  # sorted once: whoever leaves it meanwhile has nothing left to compute
        for request in [*self.running]:
            restoring = request.restoring
            if restoring is None or request.cancelled or request.distrusted:
                continue
            if now_s >= restoring.deadline_s:
                restoring.claims.take_all(MissReason.LATE)
            if not request.waits_for_all:
                self._planner.plan(request, restoring, _ahead(request, prompts))
            self._advance(request, restoring)

    def _advance(self, request: Request, restoring: Restoring) -> None:
        if not request.cancelled and not request.distrusted and not request.waits_for_all:
            request.may_compute(restoring.advance())
        if restoring.claims.is_settled:
            self._settled(request, restoring)

    def _settled(self, request: Request, restoring: Restoring) -> None:
        """Nobody writes the request's blocks any more: begin to compute what is left. Harmless when said twice."""
        if request.restoring is not restoring:
            return
        request.restoring = None
        if request.distrusted:
            self._start_again(request)
            return
        restoring.settle()
        if not request.evicted:
            self._tables.publish_restored(request, restoring.lookup)
        if request.cancelled:
            self._leave(request)
            return
        if request.epoch:
            self._carry(request, restoring)
        elif parts := request.to_insert(restoring):
            self._insert(request, restoring, parts)
        else:
            self._prepared(request, restoring)

    def _carry(self, request: Request, restoring: Restoring) -> None:
        """Bring what a request beyond its window attends to."""
        assert self._passages is not None

        def carried(found: Mapping[int, Tier], num_bytes: int) -> None:
            restoring.lookup.carried, restoring.lookup.copied_bytes = dict(found), num_bytes
            self._prepared(request, restoring)

        self._passages.fill(request, carried)

    def _insert(self, request: Request, restoring: Restoring, parts: Parts) -> None:
        """Bring what was computed by itself."""
        assert self._inserter is not None

        def inserted(found: list[tuple[Span, Tier]], num_bytes: int) -> None:
            restoring.lookup.inserted, restoring.lookup.copied_bytes = found, num_bytes
            self._prepared(request, restoring)
            for index in request.ran([span for span, _ in found]):
                self._tables.seal(request, index)

        def lost(inserts: list[Insert], has_no_room: bool) -> None:
            waits = has_no_room and len(self.running) > 1  # there is some when another has ended
            if not waits:
                request.lose_inserts(inserts)
            self._again(request, needs_room=waits)

        self._inserter.fill(request, parts, inserted, lost)

    def _prepared(self, request: Request, restoring: Restoring) -> None:
        """All that was found is where the request can attend to it."""
        first_time = request.receipt is None
        if first_time:
            request.restored_s = time.monotonic()
        request.account(restoring)
        receipt = request.receipt
        if first_time and receipt is not None:
            self.waiting.charge(request.tenant, receipt.computed_tokens - request.expected_tokens)
            for source in self.tokens_by_source:
                self.tokens_by_source[source] += getattr(receipt, f"{source}_tokens")
        request.phase = Phase.PREFILL
        if request.beyond is not None and self._passages is not None and (request.epoch or not request.gaps):
            self._passages.begin(request)

    def _start_again(self, request: Request) -> None:
        request.distrusted = False
        self._tables.forget_restored(request)
        if request.cancelled:
            self._leave(request)
        else:
            self._preempt(request)

    # On

    def grow(self) -> None:
        """Give every decoding request the block for its next token; where there is none, the youngest waits."""
        for request in list(self.running):
            if request.phase is Phase.DECODE and request.beyond is not None and self._passages is not None:
                self._passages.before_token(request)
            while request.phase is Phase.DECODE and not self._tables.grow(request):
                self._preempt(next(r for r in reversed(self.running) if r.phase in _MAY_GIVE_WAY))

    def _again(self, request: Request, needs_room: bool) -> None:
        """Start a request anew where it is to begin; where it found no room further on, when another has ended."""
        self._preempt(request)
        if needs_room:
            request.stalled_at = self._num_left

    def _preempt(self, request: Request) -> None:
        """Send a request back to the queue's front. What it computed stays cached as long as there is room."""
        log.info("preempted", request=request.call.request_id, tokens=len(request.tokens))
        self.running.remove(request)
        self._tables.close(request)
        request.gaps = []
        request.num_target = len(request.tokens)
        request.set_out()
        request.phase = Phase.WAITING
        self.waiting.give_back(request)

    def computed(self, request: Request, spans: Sequence[Span]) -> None:
        """The keys and values of these positions are in the request's blocks: publish the blocks that are full."""
        if request.phase is not Phase.DECODE:
            full = request.ran(spans)
            for index in () if request.only_asks else full:
                self._tables.seal(request, index)
            if request.phase is Phase.PREFILL and not request.gaps:
                if request.beyond is None or self._passages is None:
                    self._decode(request)
                else:
                    self._passages.computed(request)
            return
        self.waiting.charge(request.tenant, _OUTPUT_WEIGHT)
        end = spans[-1].end
        if end % self._block_tokens == 0:
            self._tables.seal(request, end // self._block_tokens - 1)

    def hears(self, request: Request, span: Span) -> Callable[[int, Any], None] | None:
        """Who is told the queries of a part of a request, if anybody."""
        return None if self._passages is None or request.stage is None else self._passages.hears(request, span)

    def asks(self, request: Request, span: Span) -> bool:
        """A part of a request was run: is it to be run again, with something that it asked for?"""
        return self._passages is not None and request.stage is not None and self._passages.asks(request, span)

    def run_again(self, request: Request) -> None:
        assert self._passages is not None
        self._passages.run_again(request)

    def _decode(self, request: Request) -> None:
        """All that is known of a request is computed."""
        request.phase = Phase.DECODE
        request.lost_at.clear()
        self.waiting.done(request)
        self.waiting.charge(request.tenant, _OUTPUT_WEIGHT)

    # Out

    def finish(self, request: Request, reason: FinishReason, *, num_kept: int | None = None) -> None:
        """End a request well. `num_kept` generated tokens belong to the reply (None: all)."""
        now = time.monotonic()
        kept = request.num_generated if num_kept is None else min(num_kept, request.num_generated)
        assert request.receipt is not None, "a request finished before it was prefilled"
        ttft_ms = (request.first_token_s - request.arrived_s) * 1e3
        plan = request.receipt.plan
        receipt = replace(
            request.receipt,
            restored_bytes=request.receipt.restored_bytes + request.restored_later_bytes,
            prefill_ms=(request.first_token_s - request.restored_s) * 1e3,
            decode_ms=(now - request.first_token_s) * 1e3,
            ttft_ms=ttft_ms,
            plan=plan and replace(plan, actual_ms=ttft_ms - request.receipt.queue_ms),
            context=request.finished_context(),
            insert_bounds=request.inserts.bounds if request.inserts is not None else (),
        )
        if request.phase in (Phase.DECODE, Phase.RECALLING):
            self._tables.keep_tail(request, request.num_prompt + kept - 1)
        self._drop(request)
        self._auditor.finished(request, Finished(reason, receipt, kept))

    def fail(self, request: Request, error: Exception) -> None:
        if request.phase is not Phase.OVER and not request.cancelled:
            self.cancel(request)
            request.listener(Failed(error))

    def cancel(self, request: Request) -> None:
        """Drop a request now; one that is being restored as soon as none of its blocks is written any more."""
        if request.phase is not Phase.OVER:
            self._drop(request)

    def _drop(self, request: Request) -> None:
        request.cancelled = True
        if request.restoring is None:
            self._leave(request)
        else:
            self._let_go(request, request.restoring)

    def _let_go(self, request: Request, restoring: Restoring) -> None:
        """Wait for no block any longer than it is being written."""
        request.gaps = []
        restoring.claims.take_all(MissReason.LATE)
        self._advance(request, restoring)

    def expire(self, now_s: float) -> None:
        """Drop whose deadline has passed, and who waits and can't be served before it does."""
        for request in [*self.waiting, *self.running]:
            if request.call.deadline_s is not None and now_s >= request.call.deadline_s and not request.cancelled:
                self.dropped["deadline_passed"] += 1
                self.fail(request, DeadlinePassed(f"after {now_s - request.arrived_s:.3f} s"))
        if now_s >= self._look_s and self._cost_model.is_measured:
            self._look_s = now_s + _LOOK_S
            self._drop_hopeless(now_s)

    def _drop_hopeless(self, now_s: float) -> None:
        if all(request.call.deadline_s is None for request in self.waiting):
            return
        found = hopeless(
            self.running,
            self.waiting,
            self._cost_model,
            num_free=self._max_running - len(self.running),
            request_s=self._admission.request_s,
            now_s=now_s,
        )
        for late in [*found]:
            self.dropped["deadline_unmeetable"] += 1
            self.fail(late.request, DeadlineUnmeetable(str(late)))

    def _leave(self, request: Request) -> None:
        if request.phase is Phase.WAITING:
            self.waiting.remove(request)
        else:
            self.running.remove(request)
            self.waiting.done(request)
            self._tables.close(request)
            self._num_left += 1
        request.phase = Phase.OVER
        request.on_over()

    # Of what was found wrong

    def distrust(self, names: Iterable[BlockHash]) -> set[BlockHash]:
        """Forget contents on the device, and start again whatever runs on them.

        Nothing restores or offloads them until the tables trust them again. Returns their names, and those of what was
        computed on them.
        """
        wrong = set(names)
        for request in reversed([*self.running]):  # so that the oldest is the queue's first again
            if wrong.isdisjoint(request.relies_on):
                continue
            wrong.update(request.relies_on, request.names)
            if request.restoring is not None:
                request.distrusted = True
                self._let_go(request, request.restoring)
            else:
                self._preempt(request)
        self._tables.distrust(wrong)
        return wrong

    def evict(self, tenant: str) -> None:
        """End a tenant's requests, and make nothing findable of what is being restored for them."""
        error = TenantErased("all that this tenant has is being erased")
        for request in [*self.waiting, *self.running]:
            if request.tenant == tenant:
                request.evicted = True
                self.fail(request, error)
        self._auditor.evict(tenant)

    def check(self) -> None:
        """No request has a block twice."""
        for request in self.running:
            assert len(set(request.table)) == len(request.table), "a block stands twice in a table"


def _ahead(request: Request, prompts: Iterable[Request]) -> Iterable[Request]:
    return takewhile(partial(is_not, request), prompts)
