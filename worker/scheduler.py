"""Which requests run, and which blocks they hold. It decides and accounts; it runs no model and waits for nothing.

Used by the engine's thread alone. What other threads finish comes back through `post`.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import structlog

from cache_store.ids import BlockHash
from cache_store.store import Encoding
from worker.auditor import Auditor
from worker.calls import Failed, Finished, FinishReason, MissReason, WarmReport
from worker.errors import DeadlinePassed
from worker.ids import BlockId
from worker.moves import Content, Tier, content_of
from worker.plan import Span
from worker.pool import BlockPool
from worker.prefix import Wanted, tail_of, wanted_by_prompt
from worker.request import Phase, Request
from worker.restore import Outcome, Restore, Restored, Restorer
from worker.write_behind import Offload, WriteBehind

log = structlog.get_logger(__name__)


class Scheduler:
    def __init__(
        self,
        pool: BlockPool,
        write_behind: WriteBehind,
        restorer: Restorer,
        auditor: Auditor,
        *,
        block_tokens: int,
        max_running: int,
        restore_timeout_s: float,
        copy_tokens: Callable[[BlockId, BlockId, int], None],
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        self.pool = pool
        self._write_behind = write_behind
        self._restorer = restorer
        self._auditor = auditor
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        """Everything admitted, in order of arrival: RESTORING, PREFILL and DECODE."""
        self.distrusted: set[BlockHash] = set()
        """Contents that were found wrong and are on their way out of every tier: not restored, not offloaded."""
        self.tokens_by_source = dict.fromkeys(("device", "host", "redis", "computed"), 0)
        self._block_tokens = block_tokens
        self._max_running = max_running
        self._restore_timeout_s = restore_timeout_s
        self._copy_tokens = copy_tokens
        self._post = post

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
        size = self._block_tokens
        full = request.num_target // size
        if full:
            request.name_of(full - 1)
        wanted = wanted_by_prompt(
            request.root, request.names[:full], request.tokens[: request.num_target], len(request.call.history), size
        )
        on_device = {want.index: block for want in wanted if (block := self.pool.find(want.name)) is not None}
        self.pool.acquire(on_device.values())
        shared = {
            want.index: on_device[want.index] for want in wanted if want.offers == size and want.index in on_device
        }
        fresh = self._take(
            request.num_blocks - len(shared),
            after=next(reversed(shared.values()), None),
            room=request.num_blocks_at_most - len(shared),
        )
        if fresh is None:
            self.pool.release(list(on_device.values()))
            return False
        rest = iter(fresh)
        request.table = [shared[index] if index in shared else next(rest) for index in range(request.num_blocks)]
        found: dict[int, Tier | MissReason] = {}
        for want in wanted:
            if want.content_tokens < size:
                self._write_behind.outgrown(want.name)
            if want.index not in on_device:
                self.pool.need(want.name)
                continue
            found[want.index] = Tier.DEVICE
            if want.index not in shared:  # copy on write: the request goes on writing behind these tokens
                self._copy_tokens(on_device[want.index], request.table[want.index], want.offers)
                if self.pool.is_lossy(on_device[want.index]):
                    self.pool.mark_lossy(request.table[want.index])
                self.pool.release([on_device[want.index]])
        self.running.append(request)
        request.relies_on = frozenset(want.name for want in wanted)
        request.admitted_s = request.restored_s = time.monotonic()
        self._restore(request, wanted, found)
        return True

    def _take(self, count: int, *, after: BlockId | None, room: int = 0) -> list[BlockId] | None:
        """As the pool's: where it has too few, an audit gives way."""
        fresh = self.pool.take(count, after=after, room=room)
        if fresh is None and self._auditor.give_way():
            fresh = self.pool.take(count, after=after, room=room)
        return fresh

    def _restore(self, request: Request, wanted: Sequence[Wanted], found: dict[int, Tier | MissReason]) -> None:
        """Ask the tiers below for what the device has not; go on at once if there is nobody to ask."""
        missing = [want for want in wanted if want.index not in found]
        asked = [want for want in missing if want.name not in self.distrusted and self._restorer.may_have(want.name)]
        found.update({want.index: MissReason.ABSENT for want in missing})
        if not asked:
            self._ready(request, wanted, found, {})
            return
        request.phase = Phase.RESTORING

        def done(outcomes: list[Outcome]) -> None:
            restored: dict[int, Encoding] = {}
            for want, outcome in zip(asked, outcomes, strict=True):
                if isinstance(outcome, Restored):
                    found[want.index], restored[want.index] = outcome
                else:
                    found[want.index] = outcome
            self._post(lambda: self._ready(request, wanted, found, restored))

        deadline_s = time.monotonic() + self._restore_timeout_s
        if request.call.deadline_s is not None:
            deadline_s = min(deadline_s, request.call.deadline_s)
        self._restorer.restore(
            [
                Restore(content_of(want, self._block_tokens, request.call.codec), request.table[want.index])
                for want in asked
            ],
            done,
            deadline_s=deadline_s,
            cancelled=lambda: request.cancelled,
        )

    def _ready(
        self,
        request: Request,
        wanted: Sequence[Wanted],
        found: dict[int, Tier | MissReason],
        restored: dict[int, Encoding],
    ) -> None:
        """What can be restored is restored: publish it and begin to compute the rest."""
        if request.distrusted:
            self._start_again(request)
            return
        request.restored_s = time.monotonic()
        for index, encoding in restored.items():
            if encoding.codec.lossy:
                self.pool.mark_lossy(request.table[index])
        for want in wanted:
            if found[want.index] in (Tier.HOST, Tier.REDIS):
                request.restored.add(want.name)
                if want.offers == self._block_tokens:
                    self.pool.name(request.table[want.index], want.name)
        first_time = request.receipt is None
        request.account(wanted, found, sum(encoding.num_bytes for encoding in restored.values()))
        receipt = request.receipt
        if first_time and receipt is not None:
            self.tokens_by_source["device"] += receipt.device_tokens
            self.tokens_by_source["host"] += receipt.host_tokens
            self.tokens_by_source["redis"] += receipt.redis_tokens
            self.tokens_by_source["computed"] += receipt.computed_tokens
        request.phase = Phase.PREFILL
        if request.cancelled:
            self._leave(request)

    # On

    def grow(self) -> None:
        """Give every decoding request the block for its next token; where there is none, the youngest waits."""
        for request in list(self.running):
            while request.phase is Phase.DECODE and len(request.tokens) > len(request.table) * self._block_tokens:
                fresh = self._take(1, after=request.table[-1])
                if fresh is not None:
                    request.table += fresh
                    continue
                self._preempt(next(r for r in reversed(self.running) if r.phase in (Phase.PREFILL, Phase.DECODE)))

    def _preempt(self, request: Request) -> None:
        """Send a request back to the queue's front. What it computed stays cached as long as there is room."""
        log.info("preempted", request=request.call.request_id, tokens=len(request.tokens))
        self.running.remove(request)
        self.pool.release(request.table)
        request.table, request.gaps = [], []
        request.num_target = len(request.tokens)
        request.phase = Phase.WAITING
        self.waiting.appendleft(request)

    def computed(self, request: Request, spans: Sequence[Span]) -> None:
        """The keys and values of these positions are in the request's blocks: publish the blocks that are full."""
        if request.phase is Phase.PREFILL:
            for index in request.ran(spans):
                self._seal(request, index)
            if not request.gaps:
                request.phase = Phase.DECODE
            return
        end = spans[-1].end
        if end % self._block_tokens == 0:
            self._seal(request, end // self._block_tokens - 1)

    def _seal(self, request: Request, index: int) -> None:
        block, name = request.table[index], request.name_of(index)
        if self.pool.name(block, name) and name not in self.distrusted:
            self._offload(request, index, name, self._block_tokens, to_store=True)

    def _offload(self, request: Request, index: int, name: BlockHash, num_tokens: int, *, to_store: bool) -> None:
        block = request.table[index]
        if self.pool.is_lossy(block):  # encoded from it, it would be encoded twice
            return
        self.pool.acquire([block])
        release = [block]
        self._write_behind.offload(
            Offload(
                block=block,
                content=Content(name, num_tokens, index * self._block_tokens, request.call.codec),
                ttl_s=request.call.block_ttl_s,
                to_store=to_store,
                done=lambda: self._post(lambda: self.pool.release(release)),
            )
        )

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
            self._keep_tail(request, request.num_prompt + kept - 1)
        if request.phase is Phase.RESTORING:  # after a preemption: its blocks are still being written
            request.cancelled = True
        else:
            self._leave(request)
        self._auditor.finished(request, Finished(reason, receipt, kept))

    def _keep_tail(self, request: Request, num_kv: int) -> None:
        """Make the unfull last block findable by the next turn, on the device and in the host tier."""
        size = self._block_tokens
        full = num_kv // size
        if full:
            request.name_of(full - 1)
        tail = tail_of(request.root, request.names, request.tokens, num_kv, size)
        if tail is None or tail.name in self.distrusted or self.pool.find(tail.name) is not None:
            return
        block = request.table[tail.index]
        if not self.pool.is_named(block):  # it is when tokens behind a stop string filled it
            self.pool.name(block, tail.name)
        self._offload(request, tail.index, tail.name, tail.content_tokens, to_store=False)

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
            self.pool.release(request.table)
        request.table = []
        request.phase = Phase.OVER
        request.on_over()

    # Of what was found wrong

    def distrust(self, names: Iterable[BlockHash]) -> set[BlockHash]:
        """Forget contents on the device, and start again whatever runs on them. Nothing restores or offloads them until
        `trust`. Returns their names, and those of what was computed on them."""
        wrong = set(names)
        for request in reversed([*self.running]):  # so that the oldest is the queue's first again
            if wrong.isdisjoint(request.relies_on):
                continue
            wrong.update(request.relies_on, request.names)
            if request.phase is Phase.RESTORING:
                request.distrusted = True
            else:
                self._preempt(request)
        self.distrusted |= wrong
        self.pool.drop(wrong)
        return wrong

    def trust(self, names: Iterable[BlockHash]) -> None:
        """No tier has the wrong contents any more."""
        self.distrusted.difference_update(names)

    def _start_again(self, request: Request) -> None:
        request.distrusted = False
        self._write_behind.host.drop(request.relies_on)  # what it brought there on its way
        if request.cancelled:
            self._leave(request)
        else:
            self._preempt(request)

    # Ahead of a turn

    def warm(self, wanted: Sequence[Wanted], codec: str, done: Callable[[WarmReport], None]) -> None:
        """Restore what the device lacks of a history, as far as blocks are free, and leave it cached."""
        missing = [want for want in wanted if self.pool.find(want.name) is None and self._restorer.may_have(want.name)]
        missing = missing[: self.pool.available]
        have = [block for want in wanted if (block := self.pool.find(want.name)) is not None]
        self.pool.acquire(have)
        targets = self.pool.take(min(len(missing), self.pool.available)) or []
        missing = missing[: len(targets)]

        def landed(outcomes: list[Outcome]) -> None:
            for want, target, outcome in zip(missing, targets, outcomes, strict=True):
                if isinstance(outcome, Restored) and outcome.encoding.codec.lossy:
                    self.pool.mark_lossy(target)
                if isinstance(outcome, Restored) and want.name not in self.distrusted:
                    self.pool.name(target, want.name)
            restored = sum(w.offers for w, o in zip(missing, outcomes, strict=True) if isinstance(o, Restored))
            self.pool.release(targets)
            self.pool.release(have)
            on_device = sum(want.offers for want in wanted if self.pool.find(want.name) is not None)
            done(WarmReport(device_tokens=on_device, restored_tokens=restored))

        self._restorer.restore(
            [
                Restore(content_of(want, self._block_tokens, codec), target)
                for want, target in zip(missing, targets, strict=True)
            ],
            lambda outcomes: self._post(lambda: landed(outcomes)),
            deadline_s=time.monotonic() + self._restore_timeout_s,
            cancelled=lambda: False,
        )

    def check(self) -> None:
        """Blocks balance. When nothing runs and nothing moves, nothing is used."""
        self.pool.check()
        for request in self.running:
            assert len(request.table) <= self.pool.num_blocks
        self._write_behind.host.check()
