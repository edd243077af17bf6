"""Stop when told to: SIGINT and SIGTERM cancel the work, once, and leave its cleaning up alone."""

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, Final, Self, TypeVar

T = TypeVar("T")
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """`with StopSignals():` is left, without an error, when one of the signals has cancelled the work inside."""

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self.arm()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> bool:
        for number in _SIGNALS:
            self._loop.remove_signal_handler(number)
        stopped = self.received and kind is asyncio.CancelledError
        if stopped and self._task is not None:
            self._task.uncancel()
        return stopped

    def arm(self) -> None:
        """Listen to the signals. To be called again after Ray has started, which takes SIGTERM for itself."""
        for number in _SIGNALS:
            self._loop.add_signal_handler(number, self._stop)

    def _stop(self) -> None:
        if not self.received and self._task is not None:
            self._task.cancel()
        self.received = True


async def whole(work: Coroutine[Any, Any, T]) -> T:
    """Run the work to its end even if cancelled meanwhile: for what can't be cleaned up when half done."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
