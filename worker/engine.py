"""The engine: one thread that steps as long as there is work, and does what other threads ask of it between two steps.

All state is that thread's. Other threads put what they want into its inbox. It knows neither gRPC nor Ray, and works
without Redis.
"""

import queue
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TypeVar

import structlog
import torch

from cache_store.codecs import RAW, fidelity_of
from cache_store.host_tier import HostTier
from cache_store.ids import BlockHash, root_hash
from cache_store.ladder import Ladder, parse_ladder
from cache_store.open_store import open_block_store
from cache_store.store import BlockStore
from worker.ageing import Ager
from worker.auditor import Auditor
from worker.calls import (
    AgeingStats,
    DropReport,
    EngineStats,
    Event,
    FinishReason,
    GenerateCall,
    Located,
    ParkReport,
    TierUse,
    WarmReport,
)
from worker.codecs import open_codecs
from worker.codecs.codec import Codec
from worker.coder import BlockCoder
from worker.config import WorkerConfig
from worker.errors import ContextTooLong, Draining, Overloaded
from worker.histories import Histories
from worker.kv_cache import KVCache
from worker.model import LoadedModel, load_model
from worker.moves import MoveCounter
from worker.pool import BlockPool
from worker.request import Request
from worker.restore import Restorer
from worker.runner import ModelRunner
from worker.sampler import Sampler
from worker.scheduler import Scheduler
from worker.shrink import Shrinker
from worker.stepper import Stepper
from worker.write_behind import WriteBehind

T = TypeVar("T")

log = structlog.get_logger(__name__)

DEFAULT_NEW_TOKENS = 256
_MIN_HOST_BLOCKS = 8
"""Restores land in host buffers first, so even a worker without a host tier has a few."""


class Engine:
    def __init__(
        self,
        config: WorkerConfig,
        loaded: LoadedModel,
        kv_cache: KVCache,
        host: HostTier,
        store: BlockStore | None,
        codecs: Mapping[str, Codec],
    ) -> None:
        ladder = parse_ladder(config.codec_ladder)
        self.layout = loaded.layout
        self.fingerprint = loaded.fingerprint
        self.max_context_tokens = loaded.max_context_tokens
        self.eos_token_ids = loaded.eos_token_ids
        self.vocab_size = loaded.vocab_size
        self._config = config
        self._kv_cache = kv_cache
        self._sampler = Sampler(loaded.vocab_size, loaded.device)
        self._host = host
        self._store = store
        self._moves = MoveCounter(self.layout.block_bytes)
        coder = BlockCoder(kv_cache, codecs, first_rung=ladder.first.name)
        self._write_behind = WriteBehind(
            coder,
            host,
            store,
            self._moves,
            max_pinned_blocks=max(1, kv_cache.num_blocks // 8),
            max_queued_stores=max(1, config.store_queue_bytes // self.layout.block_bytes),
            enabled=config.host_cache_bytes > 0 or store is not None,
        )
        self._restorer = Restorer(coder, host, store, self._moves)
        self._pool = BlockPool(kv_cache.num_blocks)
        self._auditor = Auditor(
            self._pool,
            rate=config.audit_rate,
            draw=random.Random().random,
            block_tokens=self.layout.block_tokens,
            dtype=self.layout.dtype,
            discard=self._discard,
        )
        self._scheduler = Scheduler(
            self._pool,
            self._write_behind,
            self._restorer,
            self._auditor,
            block_tokens=self.layout.block_tokens,
            max_running=config.max_running,
            restore_timeout_s=config.restore_timeout_s,
            copy_tokens=kv_cache.copy_tokens,
            post=self._post,
        )
        self._stepper = Stepper(
            self._scheduler,
            ModelRunner(loaded, kv_cache),
            self._sampler,
            self._auditor,
            max_step_tokens=config.max_step_tokens,
            max_prefill_tokens=config.max_prefill_tokens,
        )
        self._histories = Histories(
            self._pool, self._scheduler, self._write_behind, self.layout, self.fingerprint, self._post
        )
        self._ager = _open_ager(store, ladder, loaded)
        self._requests: dict[str, Request] = {}
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._accepting = threading.Semaphore(config.max_waiting + config.max_running)
        self._draining = False
        self._closed = False
        self._seconds_a_request = 1.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @classmethod
    def build(cls, config: WorkerConfig) -> "Engine":
        """Load the model, take all memory, connect the tiers, and start. Raises ModelRefused, InvalidRequest."""
        loaded = load_model(config)
        block_bytes = loaded.layout.block_bytes
        kv_cache = KVCache(loaded.layout, loaded.num_device_blocks(config.device_cache_bytes), loaded.device)
        host = HostTier(
            capacity_bytes=max(config.host_cache_bytes, _MIN_HOST_BLOCKS * block_bytes), block_bytes=block_bytes
        )
        store = open_block_store(
            config.redis_url,
            loaded.layout,
            loaded.fingerprint,
            timeout_s=config.redis_timeout_s,
            refresh_ttl_s=config.block_ttl_s,
        )
        codecs = open_codecs(loaded.layout, loaded.rope, loaded.device)
        engine = cls(config, loaded, kv_cache, host, store, codecs)
        engine._thread.start()
        if engine._ager is not None:
            engine._ager.start()
        return engine

    # Asked from any thread

    def submit(self, call: GenerateCall, listener: Callable[[Event], None]) -> None:
        """Queue a turn. `listener` hears its tokens and its end, on the engine's thread, and must return at once.

        Raises ContextTooLong, Overloaded, Draining: then nothing was queued.
        """
        max_new_tokens = self._max_new_tokens(call)
        if self._draining:
            raise Draining("this worker is leaving")
        if not self._accepting.acquire(blocking=False):
            waiting = len(self._scheduler.waiting)
            retry_after_s = self._seconds_a_request * (waiting + 1) / self._config.max_running
            raise Overloaded(f"{waiting} requests are waiting, {self._config.max_waiting} may", retry_after_s)
        request = Request(
            call,
            listener,
            root=root_hash(self.fingerprint, call.tenant, fidelity_of(call.codec)),
            block_tokens=self.layout.block_tokens,
            max_new_tokens=max_new_tokens,
            row=self._sampler.start(call.sampling, [*call.history, *call.input]),
        )
        self._post(lambda: self._accept(request))

    def cancel(self, request_id: str) -> None:
        """Drop a request within one step; its listener hears nothing more. Harmless when it is over."""

        def drop() -> None:
            self._with_request(request_id, self._scheduler.cancel)
            self._auditor.cancel(request_id)

        self._post(drop)

    def finish(self, request_id: str, num_kept: int) -> None:
        """End a request as STOP, its reply being the first `num_kept` tokens generated. Harmless when it is over."""

        def end(request: Request) -> None:
            if not request.cancelled:
                self._scheduler.finish(request, FinishReason.STOP, num_kept=num_kept)

        self._post(lambda: self._with_request(request_id, end))

    def park(
        self, tenant: str, tokens: Sequence[int], *, codec: str = RAW.name, drop_host: bool, ttl_s: int
    ) -> Future[ParkReport]:
        return self._ask(lambda future: self._histories.park(tenant, tokens, codec, drop_host, ttl_s, future))

    def warm(self, tenant: str, tokens: Sequence[int], *, codec: str = RAW.name) -> Future[WarmReport]:
        return self._ask(lambda future: self._histories.warm(tenant, tokens, codec, future))

    def flush(self, tenant: str, tokens: Sequence[int], *, codec: str = RAW.name) -> Future[None]:
        return self._ask(lambda future: self._histories.flush(tenant, tokens, codec, future))

    def locate(self, tenant: str, tokens: Sequence[int], *, codec: str = RAW.name, with_redis: bool) -> Future[Located]:
        return self._ask(lambda future: self._histories.locate(tenant, tokens, codec, with_redis, future))

    def drop(
        self, tenant: str, tokens: Sequence[int], *, codec: str = RAW.name, with_redis: bool
    ) -> Future[DropReport]:
        return self._ask(lambda future: self._histories.drop(tenant, tokens, codec, with_redis, future))

    def retain(self, tenant: str, tokens: Sequence[int], *, codec: str = RAW.name, ttl_s: int) -> Future[int]:
        return self._ask(lambda future: self._histories.retain(tenant, tokens, codec, ttl_s, future))

    def stats(self) -> EngineStats:
        """Counters and levels; safe from any thread (each figure is read at once, all of them nearly)."""
        scheduler, block_bytes = self._scheduler, self.layout.block_bytes
        used = self._pool.stats()
        host = self._host.use()
        held = used.used + used.cached
        sources = scheduler.tokens_by_source
        return EngineStats(
            device_tokens=sources["device"],
            host_tokens=sources["host"],
            redis_tokens=sources["redis"],
            computed_tokens=sources["computed"],
            device=TierUse(held, self._pool.num_blocks, held * block_bytes, self._pool.num_blocks * block_bytes),
            host=TierUse(host.blocks, host.capacity, host.blocks * block_bytes, host.capacity * block_bytes),
            stores_dropped=self._write_behind.stores_dropped,
            evicted_then_needed=self._pool.evicted_then_needed,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            device_blocks=used._asdict(),
            moved=self._moves.read(),
            audits=dict(self._auditor.counts),
            ageing=self._ager.stats() if self._ager is not None else AgeingStats(),
            prefill_s_saved=self._stepper.prefill_s_saved,
        )

    def check(self) -> None:
        """Prove that blocks balance; when no request is left, that none is used. For idle moments and tests."""
        settled = self._write_behind.settled(timeout_s=30)
        self._do(lambda: self._check(settled)).result(timeout=60)

    def drain(self, within_s: float) -> None:
        """Take no new work, wait for what runs, and store what is not in Redis yet: the next worker finds it all.

        What still runs after `within_s` fails with Draining.
        """
        self._draining = True
        deadline = time.monotonic() + within_s
        self._do(lambda: None).result()  # whatever was submitted before is in by now
        while (self._requests or self._auditor.is_awaited) and time.monotonic() < deadline:
            time.sleep(0.01)
        self._do(self._fail_all).result()
        self._write_behind.store_tails()

    def close(self, *, flush_s: float = 5.0) -> None:
        """Stop: fail what runs, write out what is queued for Redis within `flush_s`, and let go of everything."""
        if self._closed:
            return
        self._draining = True
        self._post(self._fail_all)
        self._histories.close()
        self._write_behind.close(flush_s=flush_s)
        self._restorer.close()
        self._post(self._stop)
        self._thread.join()
        if self._ager is not None:
            self._ager.close()
        if self._store is not None:
            self._store.close()

    # On the engine's thread

    def _run(self) -> None:
        while not self._closed:
            self._scheduler.expire(time.monotonic())
            self._scheduler.admit()
            stepped = self._stepper.step()
            self._read_inbox(block=not stepped)

    def _read_inbox(self, *, block: bool) -> None:
        """Do what others asked for. With nothing to run, wait for it, but not past anybody's deadline by much."""
        try:
            if block:
                self._inbox.get(timeout=0.05 if self._requests else None)()
            while not self._closed:
                self._inbox.get_nowait()()
        except queue.Empty:
            return

    def _accept(self, request: Request) -> None:
        self._requests[request.call.request_id] = request
        request.on_over = lambda: self._forget(request)
        self._scheduler.add(request)

    def _forget(self, request: Request) -> None:
        del self._requests[request.call.request_id]
        self._seconds_a_request += 0.1 * (time.monotonic() - request.arrived_s - self._seconds_a_request)
        self._accepting.release()

    def _with_request(self, request_id: str, act: Callable[[Request], None]) -> None:
        request = self._requests.get(request_id)
        if request is not None:
            act(request)

    def _fail_all(self) -> None:
        for request in list(self._requests.values()):
            self._scheduler.fail(request, Draining("this worker is leaving"))
        self._auditor.drop_all()

    def _discard(self, names: Sequence[BlockHash]) -> Future[None]:
        return self._ask(lambda future: self._histories.discard(names, future))

    def _stop(self) -> None:
        self._closed = True

    def _check(self, settled: bool) -> None:
        self._scheduler.check()
        if not self._requests and settled:
            used = self._pool.stats().used
            assert used == 0, f"{used} blocks are used by nobody"

    def _post(self, act: Callable[[], None]) -> None:
        self._inbox.put(act)

    def _do(self, act: Callable[[], None]) -> Future[None]:
        def run(future: Future[None]) -> None:
            act()
            future.set_result(None)

        return self._ask(run)

    def _ask(self, act: Callable[[Future[T]], None]) -> Future[T]:
        """Run `act` on the engine's thread; it answers through the future, now or later."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                act(future)
            except Exception as error:
                future.set_exception(error)

        if self._closed:
            future.set_exception(Draining("this worker is gone"))
        else:
            self._post(run)
        return future

    def _max_new_tokens(self, call: GenerateCall) -> int:
        """How many tokens the reply may have. Raises ContextTooLong, with the numbers."""
        prompt = len(call.history) + len(call.input)
        assert prompt, "an empty prompt"
        room = min(self.max_context_tokens, self._pool.num_blocks * self.layout.block_tokens) - prompt
        wanted = call.max_new_tokens if call.max_new_tokens is not None else max(1, min(DEFAULT_NEW_TOKENS, room))
        if wanted > room:
            limit = min(self.max_context_tokens, self._pool.num_blocks * self.layout.block_tokens)
            raise ContextTooLong(
                f"{prompt} prompt tokens ({len(call.history)} of history, {len(call.input)} new) and {wanted} new ones "
                f"are {prompt + wanted}, {limit} fit"
            )
        return wanted


def _open_ager(store: BlockStore | None, ladder: Ladder, loaded: LoadedModel) -> Ager | None:
    """None where no block can age: nothing keeps it, or there is nothing to move it to."""
    shelf = store.ageing() if store is not None else None
    if shelf is None or len(ladder.rungs) == 1:
        return None
    codecs = open_codecs(loaded.layout, loaded.rope, torch.device("cpu"))  # where the store's bytes come to
    return Ager(shelf, ladder, Shrinker(loaded.layout, codecs), block_tokens=loaded.layout.block_tokens)
