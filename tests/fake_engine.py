"""An engine that plays a script on a thread of its own, for tests of what is around the engine."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from cache_store.layout import KVLayout
from worker.calls import (
    PLAIN,
    Context,
    DropReport,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerateCall,
    Located,
    MissReason,
    ParkReport,
    Receipt,
    WarmReport,
)
from worker.figures import BlocksHeld, EngineStats, Moved, TierUse, WorkerLoad

T = TypeVar("T")


class FakeEngine:
    """Each submitted call hears `script`, then `reason`; with `reason` None it waits to be finished or cancelled."""

    def __init__(self, *, vocab_size: int = 1000) -> None:
        self.max_context_tokens = 4096
        self.layout = KVLayout(num_layers=2, num_kv_heads=1, head_dim=8, block_tokens=16, dtype="float32")
        self.fingerprint = self.names_from = b"\x01\x02"
        self.eos_token_ids = frozenset({1})
        self.vocab_size = vocab_size
        self.can_insert = True
        self.script: Sequence[Event] = ()
        self.reason: FinishReason | None = FinishReason.LENGTH
        self.refusal: Exception | None = None
        """Raised by `submit`, and by the futures of everything else."""
        self.calls: list[GenerateCall] = []
        self.asked: list[tuple[object, ...]] = []
        self.ended: dict[str, threading.Event] = {}
        self.kept: dict[str, int] = {}
        self.steps: list[str] = []
        self.broken: Future[None] = Future()
        self.watched: list[bool] = []
        self.held = BlocksHeld()
        self.changed = (BlocksHeld(), BlocksHeld())
        self._thread = ThreadPoolExecutor(1)

    def submit(self, call: GenerateCall, listener: Callable[[Event], None]) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.calls.append(call)
        self.ended[call.request_id] = threading.Event()
        self._thread.submit(self._play, call, listener)

    def cancel(self, request_id: str) -> None:
        self.ended[request_id].set()

    def finish(self, request_id: str, num_kept: int) -> None:
        self.kept[request_id] = num_kept
        self.ended[request_id].set()

    def park(
        self, tenant: str, tokens: Sequence[int], *, codec: str, context: Context = PLAIN, drop_host: bool, ttl_s: int
    ) -> Future[ParkReport]:
        return self._answer(ParkReport(32, 2, 1, 999), "park", tenant, tokens, codec, drop_host, ttl_s)

    def warm(self, tenant: str, tokens: Sequence[int], *, codec: str, context: Context = PLAIN) -> Future[WarmReport]:
        return self._answer(WarmReport(48, 16), "warm", tenant, tokens, codec)

    def flush(self, tenant: str, tokens: Sequence[int], *, codec: str, context: Context = PLAIN) -> Future[None]:
        return self._answer(None, "flush", tenant, tokens, codec)

    def locate(
        self, tenant: str, tokens: Sequence[int], *, codec: str, context: Context = PLAIN, with_redis: bool
    ) -> Future[Located]:
        return self._answer(Located(16, 32, 48), "locate", tenant, tokens, codec, with_redis)

    def drop(
        self, tenant: str, tokens: Sequence[int], *, codec: str, context: Context = PLAIN, with_redis: bool
    ) -> Future[DropReport]:
        return self._answer(DropReport(1, 2, 4, 3), "drop", tenant, tokens, codec, with_redis)

    def erase(self, tenant: str, *, with_redis: bool) -> Future[DropReport]:
        return self._answer(DropReport(5, 6, 7, 8), "erase", tenant, with_redis)

    def retain(
        self, tenant: str, tokens: Sequence[int], *, codec: str, context: Context = PLAIN, ttl_s: int
    ) -> Future[int]:
        return self._answer(7, "retain", tenant, tokens, codec, ttl_s)

    def check(self) -> None:
        """Nothing here could be out of balance."""

    def stats(self) -> EngineStats:
        return EngineStats(
            device_tokens=1,
            host_tokens=2,
            redis_tokens=3,
            computed_tokens=4,
            device=TierUse(5, 10, 500, 1000),
            host=TierUse(6, 20, 600, 2000),
            stores_dropped=7,
            evicted_then_needed=8,
            running=9,
            waiting=10,
            waiting_tokens=11,
            turned_away={"deadline_unmeetable": 12},
            device_blocks={"free": 5, "used": 3, "cached": 2},
            moved=(Moved("redis", "host", "int8", blocks=4, bytes=200, raw_bytes=400, seconds=0.5),),
            prefill_s_saved=2.5,
        )

    def watch_blocks(self, wanted: bool) -> None:
        self.watched.append(wanted)

    def blocks_held(self) -> Future[BlocksHeld]:
        return self._answer(self.held, "blocks held")

    def blocks_changed(self) -> tuple[BlocksHeld, BlocksHeld]:
        changed, self.changed = self.changed, (BlocksHeld(), BlocksHeld())
        return changed

    def load(self) -> Future[WorkerLoad]:
        return self._answer(WorkerLoad(queue_s=0.5, token_s=1e-3, host_byte_s=1e-9, redis_byte_s=2e-9), "load")

    def drain(self, within_s: float) -> None:
        self.steps.append(f"drain {within_s}")

    def close(self) -> None:
        self.steps.append("close")
        for ended in self.ended.values():
            ended.set()
        self._thread.shutdown()

    def _play(self, call: GenerateCall, listener: Callable[[Event], None]) -> None:
        for event in self.script:
            listener(event)
            if isinstance(event, Failed):
                return
        if self.reason is None:
            self.ended[call.request_id].wait(timeout=30)
            if call.request_id not in self.kept:
                return  # cancelled: nothing more is heard
        num_prompt = len(call.history) + len(call.input)
        receipt = Receipt(
            device_tokens=0,
            host_tokens=1,
            redis_tokens=0,
            computed_tokens=num_prompt - 1,
            misses={MissReason.NEW: num_prompt - 1},
            restored_bytes=64,
            decode_ms=10.0,
            ttft_ms=20.0,
        )
        listener(Finished(self.reason or FinishReason.STOP, receipt, len(self.script)))

    def _answer(self, answer: T, *asked: object) -> Future[T]:
        self.asked.append(asked)
        future: Future[T] = Future()
        if self.refusal is not None:
            future.set_exception(self.refusal)
        else:
            future.set_result(answer)
        return future
