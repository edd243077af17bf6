"""The engine: one thread that steps as long as there is work, and does what other threads ask of it between two steps.

All state is that thread's. Other threads put what they want into its inbox. It knows neither gRPC nor Ray, and works
without Redis.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import structlog

from cache_store.codecs import RAW
from worker.block_changes import BlockChanges
from worker.calls import (
    PLAIN,
    Context,
    DropReport,
    Event,
    Failed,
    FinishReason,
    GenerateCall,
    Located,
    ParkReport,
    WarmReport,
)
from worker.config import WorkerConfig
from worker.engine.admission import Admission
from worker.engine.auditor import Auditor
from worker.engine.conversations import Conversations
from worker.engine.engine_figures import EngineFigures
from worker.engine.histories import Histories
from worker.engine.inbox import Inbox
from worker.engine.pool import BlockPool
from worker.engine.request import Request
from worker.engine.sampler import Sampler
from worker.engine.scheduler import Scheduler
from worker.engine.stepper import Stepper
from worker.errors import Draining
from worker.figures import BlocksHeld, EngineStats, WorkerLoad
from worker.model.load import LoadedModel
from worker.tiers.open_tiers import Tiers

_MOST_FAILED = 3
_LOOK_S = 0.01
"""How often the idle engine looks whether blocks that it waits for are late,"""
_LOOK_SELDOM_S = 0.05
"""and whether somebody's deadline has passed."""
_HAND_OVER_S = 2.0
"""How long requests that are to be handed over go on, until their blocks are in Redis."""

log = structlog.get_logger(__name__)


class Engine:
    def __init__(
        self,
        config: WorkerConfig,
        loaded: LoadedModel,
        tiers: Tiers,
        inbox: Inbox,
        pool: BlockPool,
        device_changes: BlockChanges,
        sampler: Sampler,
        auditor: Auditor,
        admission: Admission,
        scheduler: Scheduler,
        stepper: Stepper,
        histories: Histories,
        conversations: Conversations,
        figures: EngineFigures,
    ) -> None:
        self.layout = loaded.layout
        self.fingerprint = loaded.fingerprint
        self.names_from = loaded.names_from
        self.max_context_tokens = loaded.max_context_tokens
        self.eos_token_ids = loaded.eos_token_ids
        self.vocab_size = loaded.vocab_size
        self.can_insert = loaded.rope is not None
        self._config = config
        self._tiers = tiers
        self._inbox = inbox
        self._pool = pool
        self._device_changes = device_changes
        self.broken: Future[None] = Future()
        """Ends when the accelerator fails step after step, or the engine's thread does: a new process may do better."""
        self._sampler = sampler
        self._auditor = auditor
        self._scheduler = scheduler
        self._stepper = stepper
        self._histories = histories
        self._loaded = loaded
        self._conversations = conversations
        self._figures = figures
        self._requests: dict[str, Request] = {}
        self._admission = admission
        self._draining = False
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()
        if self._tiers.ager is not None:
            self._tiers.ager.start()

    # Asked from any thread

    def submit(self, call: GenerateCall, listener: Callable[[Event], None]) -> None:
        """Queue a turn. `listener` hears its tokens and its end, on the engine's thread, and must return at once.

        Raises ContextTooLong, Overloaded, Draining: then nothing was queued. One that waits may hear of Overloaded
        later, when the queue is full and a tenant comes that has less in it.
        """
        num_history = len(call.history)
        call.check()
        going_on = self._conversations.beyond(call.context, num_history, num_history + len(call.input))
        max_new_tokens = self._conversations.max_new_tokens(call, going_on)
        if self._draining:
            raise Draining("this worker is leaving")
        num_seen = num_history if going_on is None else min(num_history, going_on.epochs.reach)
        ticket = self._admission.enter(
            num_seen + len(call.input) + len(call.begun),
            tenant=call.tenant,
            on_displaced=lambda: self._inbox.post(lambda: self._with_request(call.request_id, self._displace)),
        )
        try:
            request = Request(
                call,
                listener,
                root=self._conversations.root(call.tenant, call.codec),
                block_tokens=self.layout.block_tokens,
                max_new_tokens=max_new_tokens,
                row=self._sampler.start(call.sampling, [*call.history, *call.input], call.begun),
                ticket=ticket,
                beyond=going_on,
                inserts=self._conversations.inserts(call.context, call.insert_bounds),
            )
        except Exception:  # the accelerator has no room for what the sampler keeps, say
            self._admission.leave(ticket)
            raise
        self._inbox.post(lambda: self._accept(request))

    def cancel(self, request_id: str) -> None:
        """Drop a request within one step; its listener hears nothing more. Harmless when it is over."""

        def drop() -> None:
            self._with_request(request_id, self._scheduler.cancel)
            self._auditor.cancel(request_id)

        self._inbox.post(drop)

    def finish(self, request_id: str, num_kept: int) -> None:
        """End a request as STOP, its reply being the first `num_kept` tokens generated. Harmless when it is over."""

        def end(request: Request) -> None:
            if not request.cancelled:
                self._scheduler.finish(request, FinishReason.STOP, num_kept=num_kept)

        self._inbox.post(lambda: self._with_request(request_id, end))

    def park(
        self,
        tenant: str,
        tokens: Sequence[int],
        *,
        codec: str = RAW.name,
        context: Context = PLAIN,
        drop_host: bool,
        ttl_s: int,
    ) -> Future[ParkReport]:
        history = self._conversations.history(tenant, tokens, codec, context)
        return self._inbox.ask(lambda future: self._histories.park(history, drop_host, ttl_s, future))

    def warm(
        self, tenant: str, tokens: Sequence[int], *, codec: str = RAW.name, context: Context = PLAIN
    ) -> Future[WarmReport]:
        history = self._conversations.history(tenant, tokens, codec, context)
        return self._inbox.ask(lambda future: self._histories.warm(history, future))

    def flush(
        self, tenant: str, tokens: Sequence[int], *, codec: str = RAW.name, context: Context = PLAIN
    ) -> Future[None]:
        history = self._conversations.history(tenant, tokens, codec, context)
        return self._inbox.ask(lambda future: self._histories.flush(history, future))

    def locate(
        self,
        tenant: str,
        tokens: Sequence[int],
        *,
        codec: str = RAW.name,
        context: Context = PLAIN,
        with_redis: bool,
    ) -> Future[Located]:
        history = self._conversations.history(tenant, tokens, codec, context)
        return self._inbox.ask(lambda future: self._histories.locate(history, with_redis, future))

    def drop(
        self,
        tenant: str,
        tokens: Sequence[int],
        *,
        codec: str = RAW.name,
        context: Context = PLAIN,
        with_redis: bool,
    ) -> Future[DropReport]:
        history = self._conversations.history(tenant, tokens, codec, context)
        return self._inbox.ask(lambda future: self._histories.drop(history, with_redis, future))

    def erase(self, tenant: str, *, with_redis: bool) -> Future[DropReport]:
        return self._inbox.ask(lambda future: self._histories.erase(tenant, with_redis, future))

    def retain(
        self, tenant: str, tokens: Sequence[int], *, codec: str = RAW.name, context: Context = PLAIN, ttl_s: int
    ) -> Future[int]:
        history = self._conversations.history(tenant, tokens, codec, context)
        return self._inbox.ask(lambda future: self._histories.retain(history, ttl_s, future))

    def stats(self) -> EngineStats:
        """Counters and levels; safe from any thread (each figure is read at once, all of them nearly)."""
        return self._figures.stats()

    def watch_blocks(self, wanted: bool) -> None:
        """Begin to note which blocks come and go, or stop."""
        self._device_changes.listen(wanted)
        self._tiers.host_changes.listen(wanted)

    def blocks_held(self) -> Future[BlocksHeld]:
        """All blocks that can be found on the device and in host memory."""
        return self._inbox.ask(
            lambda future: future.set_result(BlocksHeld(self._pool.names(), self._tiers.host.blocks()))
        )

    def blocks_changed(self) -> tuple[BlocksHeld, BlocksHeld]:
        """What came and what went since this was last asked; no block of a tier does both."""
        device, host = self._device_changes.take(), self._tiers.host_changes.take()
        return BlocksHeld(device.stored, host.stored), BlocksHeld(device.removed, host.removed)

    def load(self) -> Future[WorkerLoad]:
        """What a turn would wait for and cost here."""
        return self._inbox.ask(lambda future: future.set_result(self._figures.load()))

    def check(self) -> None:
        """Prove that blocks balance; when no request is left, that none is used. For idle moments and tests."""
        settled = self._tiers.write_behind.settled(timeout_s=30)
        self._inbox.do(lambda: self._check(settled)).result(timeout=60)

    def drain(self, within_s: float) -> None:
        """Take no new work, wait for what runs, and store what is not in Redis yet: the next worker finds it all.

        What there is no room for fails with Draining at once, what still runs after `within_s` then: other workers go
        on with it.
        """
        self._draining = True
        deadline = time.monotonic() + within_s
        self._inbox.do(lambda: None).result()  # whatever was submitted before is in by now
        while (self._requests or self._auditor.is_awaited) and time.monotonic() < deadline:
            time.sleep(0.01)
        if self._requests:  # so that who goes on with them finds what they have computed
            self._tiers.write_behind.settled(timeout_s=_HAND_OVER_S)
        self._inbox.do(self._fail_all).result()
        self._tiers.write_behind.store_tails()

    def close(self, *, flush_s: float = 5.0) -> None:
        """Stop: fail what runs, write out what is queued for Redis within `flush_s`, and let go of everything."""
        if self._is_closed:
            return
        self._is_closed = self._draining = True
        self._inbox.post(self._fail_all)
        self._histories.close()
        self._tiers.close(flush_s=flush_s)
        self._inbox.close()
        self._thread.join()

    # On the engine's thread

    def _run(self) -> None:
        try:
            while not self._inbox.closed:
                self._go_on()
        except Exception as error:  # a bug: turns would wait here for ever, and more would come
            log.critical("the engine's thread has failed", exc_info=error)
            self._draining = self._inbox.closed = True
            for request in self._requests.values():
                request.listener(Failed(error))
            self._break()

    def _go_on(self) -> None:
        """Look at the time, do a step if there is one to do, and read the inbox."""
        now_s = time.monotonic()
        self._scheduler.expire(now_s)
        self._auditor.expire(now_s)
        self._scheduler.advance(now_s)
        self._scheduler.admit()
        if self._draining:
            self._hand_over_waiting()
        held_s = self._stepper.held_s(now_s)
        stepped = not held_s and self._stepper.step()
        if self._stepper.num_failed >= _MOST_FAILED:
            self._break()
        # With nothing to run, wait for work, but not past anybody's deadline by much.
        is_timed = bool(self._requests) or self._auditor.is_awaited
        timeout_s = _LOOK_S if self._scheduler.is_restoring else _LOOK_SELDOM_S if is_timed else None
        self._inbox.read(wait=not stepped, timeout_s=min(held_s, _LOOK_S) if held_s else timeout_s)

    def _break(self) -> None:
        if not self.broken.done():
            self.broken.set_result(None)

    def _accept(self, request: Request) -> None:
        self._requests[request.call.request_id] = request
        request.on_over = lambda: self._forget(request)
        self._scheduler.add(request)
        self._displace(request)

    def _displace(self, request: Request) -> None:
        """Refuse it after all if another tenant's has its place in the queue."""
        if request.ticket.displaced is not None:
            self._scheduler.fail(request, request.ticket.displaced)

    def _forget(self, request: Request) -> None:
        del self._requests[request.call.request_id]
        self._admission.leave(request.ticket)

    def _with_request(self, request_id: str, act: Callable[[Request], None]) -> None:
        request = self._requests.get(request_id)
        if request is not None:
            act(request)

    def _hand_over_waiting(self) -> None:
        for request in list(self._scheduler.waiting):
            self._scheduler.fail(request, Draining("this worker is leaving"))

    def _fail_all(self) -> None:
        for request in list(self._requests.values()):
            self._scheduler.fail(request, Draining("this worker is leaving"))
        self._auditor.drop_all()

    def _check(self, settled: bool) -> None:
        self._pool.check()
        self._tiers.host.check()
        if self._tiers.disk is not None:
            self._tiers.disk.check()
        self._scheduler.check()
        if not self._requests and settled:
            used = self._pool.stats().used
            assert used == 0, f"{used} blocks are used by nobody"
