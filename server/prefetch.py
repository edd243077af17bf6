"""Restore sessions while their users are still typing. Nobody waits for it, and nothing fails by it.

Knows how much at once. Knows neither calls nor workers: how a session is restored is handed to it.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

import structlog

from cache_store.errors import ServingError
from cache_store.records import SessionRecord
from server.metrics import FrontMetrics

_AT_ONCE = 16
"""Sessions restored ahead by one front end: more would only take turns' bandwidth. Further hints are forgotten."""
_WITHIN_S = 30.0

_Key = tuple[str, str]
_log = structlog.get_logger(__name__)


class Prefetcher:
    """Used on one event loop."""

    def __init__(self, restore: Callable[[SessionRecord], Awaitable[int]], metrics: FrontMetrics) -> None:
        """`restore` brings a session to the device of the worker for its next turn; returns the tokens restored."""
        self._restore = restore
        self._metrics = metrics
        self._running: dict[_Key, asyncio.Task[None]] = {}
        self._held_off: Counter[_Key] = Counter()

    def start(self, record: SessionRecord) -> None:
        """Begin to restore a session, once at a time, and not while there is too much to do."""
        key = record.tenant, record.session_id
        if not record.token_ids:
            return
        if key in self._running or key in self._held_off:
            self._metrics.prefetched("joined")
        elif len(self._running) >= _AT_ONCE:
            self._metrics.prefetched("refused")
        else:
            self._running[key] = asyncio.create_task(self._run(key, record), name=f"prefetch {record.session_id}")

    @asynccontextmanager
    async def held_off(self, tenant: str, session_id: str) -> AsyncGenerator[None, None]:
        """Inside, no prefetch of ours puts back what is being parked or deleted."""
        key = tenant, session_id
        self._held_off[key] += 1
        try:
            if key in self._running:
                await asyncio.wait([self._running[key]])
            yield
        finally:
            self._held_off[key] -= 1
            if not self._held_off[key]:
                del self._held_off[key]

    async def aclose(self) -> None:
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, key: _Key, record: SessionRecord) -> None:
        try:
            async with asyncio.timeout(_WITHIN_S):
                restored_tokens = await self._restore(record)
            self._metrics.prefetched("restored" if restored_tokens else "hot")
        except (ServingError, TimeoutError) as error:  # the turn itself will restore what it can, and say what it can't
            self._metrics.prefetched("failed")
            _log.info("not prefetched", session=record.session_id, error=str(error) or "took too long")
        finally:
            del self._running[key]
