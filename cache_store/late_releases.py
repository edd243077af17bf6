"""Locks whose release Redis did not answer: given up behind their callers' back, as soon as it does.

Knows no Redis: it is told how to release. Lives on the event loop that first needs it.
"""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from cache_store.errors import StoreError, StoreUnavailable

_PAUSE_S = 0.5
_MOST = 10_000
"""Beyond these the oldest are left to their leases."""

_log = structlog.get_logger(__name__)


class LateReleases:
    """`release` takes tenant, session id and holder; it raises StoreUnavailable while there is no answer."""

    def __init__(self, release: Callable[[str, str, str], Awaitable[None]]) -> None:
        self._release = release
        self._owed: dict[tuple[str, str, str], None] = {}  # in the order in which they are tried
        self._task: asyncio.Task[None] | None = None

    def add(self, tenant: str, session_id: str, holder: str, error: StoreUnavailable) -> None:
        _log.warning("session is unlocked when redis answers", session=session_id, error=str(error))
        if len(self._owed) == _MOST:
            del self._owed[next(iter(self._owed))]
        self._owed[tenant, session_id, holder] = None
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work(), name="late releases")

    async def aclose(self) -> None:
        """What is still owed is left to the leases."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _work(self) -> None:
        while self._owed:
            oldest = next(iter(self._owed))
            try:
                await self._release(*oldest)
            except StoreUnavailable:
                if oldest in self._owed:  # behind the others: of a Cluster only a part may be away
                    self._owed[oldest] = self._owed.pop(oldest)
                await asyncio.sleep(_PAUSE_S)
                continue
            except StoreError as error:
                _log.warning("session stays locked until its lease ends", session=oldest[1], error=str(error))
            self._owed.pop(oldest, None)
