"""After a turn: what was said is remembered in its session's banks, behind the turn's back. Nothing waits for it.

What there is no place for, and what fails, is given up and counted: banks are written to as well as they can.
"""

import asyncio
import time
from typing import Any, Final, Protocol

import structlog

from cache_store.banks import EntryKind
from cache_store.errors import ServingError
from server.banks.checks import MAX_TEXT_BYTES
from server.exchanges import Exchange
from server.metrics import FrontMetrics

_MOST_WAITING: Final = 1000
_AT_ONCE: Final = 4
_log = structlog.get_logger(__name__)


class WriteBanks(Protocol):
    """Part of a BankKeeper."""

    async def remember(
        self,
        tenant: str,
        name: str,
        *,
        text: str,
        metadata: dict[str, str],
        kind: EntryKind,
        session_id: str,
        turn: int,
    ) -> Any: ...


class Episodes:
    """Used on one event loop."""

    def __init__(self, banks: WriteBanks, metrics: FrontMetrics, *, most_waiting: int = _MOST_WAITING) -> None:
        self._banks = banks
        self._metrics = metrics
        self._most_waiting = most_waiting
        self._places = asyncio.Semaphore(_AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, exchange: Exchange) -> None:
        for bank in exchange.banks:
            if len(self._tasks) >= self._most_waiting:
                self._metrics.episode_written("full", 0.0)
                session = exchange.record.session_id
                _log.warning("a turn is not remembered: too many wait", session=session, bank=bank)
                continue
            task = asyncio.create_task(self._write(exchange, bank))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def drain(self, within_s: float) -> bool:
        """Wait for what is to be written. False if some still is after `within_s`."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=within_s)
        return not self._tasks

    async def aclose(self) -> None:
        """Give up what is not written."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _write(self, exchange: Exchange, bank: str) -> None:
        began_s, result = time.monotonic(), "failed"
        session, turn = exchange.record.session_id, exchange.turn
        try:
            async with self._places:
                text = await exchange.text(most_bytes=MAX_TEXT_BYTES)
                if text:
                    await self._banks.remember(
                        exchange.record.tenant,
                        bank,
                        text=text,
                        metadata={},
                        kind=EntryKind.EPISODE,
                        session_id=session,
                        turn=turn,
                    )
            result = "written" if text else "empty"
        except ServingError as error:
            _log.warning("a turn is not remembered", session=session, turn=turn, bank=bank, error=str(error))
        finally:
            self._metrics.episode_written(result, time.monotonic() - began_s)
