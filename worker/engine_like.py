"""What the worker's shells (service, metrics) ask of an engine. No torch: cheap to import."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

from cache_store.layout import KVLayout
from worker.calls import PLAIN, Context, DropReport, Event, GenerateCall, Located, ParkReport, WarmReport
from worker.figures import BlocksHeld, EngineStats, WorkerLoad


class EngineLike(Protocol):
    """Safe from any thread; only `check`, `drain` and `close` block. Futures raise StoreUnavailable, Draining."""

    max_context_tokens: int
    layout: KVLayout
    fingerprint: bytes
    names_from: bytes
    """What names of blocks follow from: the fingerprint, or a secret made from it where blocks are sealed."""
    eos_token_ids: frozenset[int]
    vocab_size: int
    can_insert: bool
    """Keys of its model can be turned: KV that was computed by itself can be inserted."""
    broken: Future[None]
    """Ends when nothing runs here any more until the process is another one."""

    def submit(self, call: GenerateCall, listener: Callable[[Event], None]) -> None:
        """Queue a turn; `listener` hears of it on the engine's thread and must return at once.

        Raises ContextTooLong, Overloaded, Draining: then nothing was queued.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """Drop a request within one step; its listener hears nothing more. Harmless when it is over."""
        ...

    def finish(self, request_id: str, num_kept: int) -> None:
        """End a request as STOP, its reply being its first `num_kept` tokens. Harmless when it is over."""
        ...

    # Of a history: `codec` and `context` are its session's.

    def park(
        self, tenant: str, tokens: Sequence[int], *, codec: str, context: Context = PLAIN, drop_host: bool, ttl_s: int
    ) -> Future[ParkReport]: ...
    def warm(
        self, tenant: str, tokens: Sequence[int], *, codec: str, context: Context = PLAIN
    ) -> Future[WarmReport]: ...
    def flush(self, tenant: str, tokens: Sequence[int], *, codec: str, context: Context = PLAIN) -> Future[None]: ...
    def locate(
        self, tenant: str, tokens: Sequence[int], *, codec: str, context: Context = PLAIN, with_redis: bool
    ) -> Future[Located]: ...
    def drop(
        self, tenant: str, tokens: Sequence[int], *, codec: str, context: Context = PLAIN, with_redis: bool
    ) -> Future[DropReport]: ...
    def erase(self, tenant: str, *, with_redis: bool) -> Future[DropReport]:
        """Forget every block of a tenant's, whatever its turns were, and end those that are here."""
        ...

    def retain(
        self, tenant: str, tokens: Sequence[int], *, codec: str, context: Context = PLAIN, ttl_s: int
    ) -> Future[int]: ...

    def stats(self) -> EngineStats: ...

    # For whoever wants to know what this worker holds

    def watch_blocks(self, wanted: bool) -> None:
        """Begin to note which blocks come and go, or stop."""
        ...

    def blocks_held(self) -> Future[BlocksHeld]:
        """All blocks that can be found on the device and in host memory."""
        ...

    def blocks_changed(self) -> tuple[BlocksHeld, BlocksHeld]:
        """What came and what went since this was last asked; no block of a tier does both."""
        ...

    def load(self) -> Future[WorkerLoad]: ...

    def check(self) -> None: ...
    def drain(self, within_s: float) -> None: ...
    def close(self) -> None: ...
