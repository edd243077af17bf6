"""Which requests run, wait, give way and end. It decides and accounts; it runs no model and waits for nothing.

Which blocks they run on is seen to in worker/engine/block_tables.py. Used by the engine's thread alone.
"""

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace

import structlog

from cache_store.ids import BlockHash
from worker.calls import Failed, Finished, FinishReason
from worker.engine.auditor import Auditor
from worker.engine.block_tables import BlockTables, Lookup
from worker.engine.plan import Span
from worker.engine.request import Phase, Request
from worker.errors import DeadlinePassed

log = structlog.get_logger(__name__)


class Scheduler:
    def __init__(self, tables: BlockTables, auditor: Auditor, *, block_tokens: int, max_running: int) -> None:
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        """Everything admitted, in order of arrival: RESTORING, PREFILL and DECODE."""
        self.tokens_by_source = dict.fromkeys(("device", "host", "redis", "computed"), 0)
        self._tables = tables
        self._auditor = auditor
        self._block_tokens = block_tokens
        self._max_running = max_running

    # In

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def admit(self) -> None:
        """Move requests from the queue into the batch while there is room for them, first come first served."""
        while self.waiting and len(self.running) < self._max_running:
            if not self._admit(self.waiting[0]):
                return
            self.waiting.popleft()

    def _admit(self, request: Request) -> bool:
        lookup = self._tables.open(request)
        if lookup is None:
            return False
        self.running.append(request)
        request.admitted_s = request.restored_s = time.monotonic()
        request.phase = Phase.RESTORING
        self._tables.restore(request, lookup, lambda: self._restored(request, lookup))
        return True

    def _restored(self, request: Request, lookup: Lookup) -> None:
        """What can be restored is restored: begin to compute the rest."""
        if request.distrusted:
            self._start_again(request)
            return
        request.restored_s = time.monotonic()
        self._tables.publish_restored(request, lookup)
        first_time = request.receipt is None
        request.account(lookup.wanted, lookup.found, lookup.restored_bytes)
        receipt = request.receipt
        if first_time and receipt is not None:
            self.tokens_by_source["device"] += receipt.device_tokens
            self.tokens_by_source["host"] += receipt.host_tokens
            self.tokens_by_source["redis"] += receipt.redis_tokens
            self.tokens_by_source["computed"] += receipt.computed_tokens
        request.phase = Phase.PREFILL
        if request.cancelled:
            self._leave(request)

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
            while request.phase is Phase.DECODE and not self._tables.grow(request):
                self._preempt(next(r for r in reversed(self.running) if r.phase in (Phase.PREFILL, Phase.DECODE)))

    def _preempt(self, request: Request) -> None:
        """Send a request back to the queue's front. What it computed stays cached as long as there is room."""
        log.info("preempted", request=request.call.request_id, tokens=len(request.tokens))
        self.running.remove(request)
        self._tables.close(request)
        request.gaps = []
        request.num_target = len(request.tokens)
        request.phase = Phase.WAITING
        self.waiting.appendleft(request)

    def computed(self, request: Request, spans: Sequence[Span]) -> None:
        """The keys and values of these positions are in the request's blocks: publish the blocks that are full."""
        if request.phase is Phase.PREFILL:
            for index in request.ran(spans):
                self._tables.seal(request, index)
            if not request.gaps:
                request.phase = Phase.DECODE
            return
        end = spans[-1].end
        if end % self._block_tokens == 0:
            self._tables.seal(request, end // self._block_tokens - 1)

    # Out

    def finish(self, request: Request, reason: FinishReason, *, num_kept: int | None = None) -> None:
        """End a request well. `num_kept` generated tokens belong to the reply (None: all)."""
        now = time.monotonic()
        kept = request.num_generated if num_kept is None else min(num_kept, request.num_generated)
        assert request.receipt is not None, "a request finished before it was prefilled"
        receipt = replace(
            request.receipt,
            prefill_ms=(request.first_token_s - request.restored_s) * 1e3,
            decode_ms=(now - request.first_token_s) * 1e3,
            ttft_ms=(request.first_token_s - request.arrived_s) * 1e3,
        )
        if request.phase is Phase.DECODE:
            self._tables.keep_tail(request, request.num_prompt + kept - 1)
        if request.phase is Phase.RESTORING:  # after a preemption: its blocks are still being written
            request.cancelled = True
        else:
            self._leave(request)
        self._auditor.finished(request, Finished(reason, receipt, kept))

    def fail(self, request: Request, error: Exception) -> None:
        if request.phase is not Phase.OVER and not request.cancelled:
            self.cancel(request)
            request.listener(Failed(error))

    def cancel(self, request: Request) -> None:
        """Drop a request now; one that is being restored as soon as its blocks have landed."""
        if request.phase is Phase.OVER:
            return
        request.cancelled = True
        if request.phase is not Phase.RESTORING:
            self._leave(request)

    def expire(self, now_s: float) -> None:
        for request in [*self.waiting, *self.running]:
            if request.call.deadline_s is not None and now_s >= request.call.deadline_s:
                self.fail(request, DeadlinePassed(f"after {now_s - request.arrived_s:.3f} s"))

    def _leave(self, request: Request) -> None:
        if request.phase is Phase.WAITING:
            self.waiting.remove(request)
        else:
            self.running.remove(request)
            self._tables.close(request)
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
            if request.phase is Phase.RESTORING:
                request.distrusted = True
            else:
                self._preempt(request)
        self._tables.distrust(wrong)
        return wrong

    def check(self) -> None:
        """No request has a block twice."""
        for request in self.running:
            assert len(set(request.table)) == len(request.table), "a block stands twice in a table"
