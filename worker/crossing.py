"""Carry events from the engine's thread to the asyncio loop: one wake-up of the loop for all that piled up."""

import asyncio
from collections import deque
from collections.abc import Callable

from worker.calls import Event


class EventStream:
    """One request's events, on the loop's side."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._arrived = asyncio.Event()

    def put(self, event: Event) -> None:
        self._events.append(event)
        self._arrived.set()

    async def take(self) -> list[Event]:
        """Wait until there are events, and return all there are."""
        await self._arrived.wait()
        self._arrived.clear()
        events, self._events = self._events, []
        return events


class Crossing:
    """From any one thread to the running loop, for all streams together."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[EventStream, Event]] = deque()
        self._is_woken = False

    def into(self, stream: EventStream) -> Callable[[Event], None]:
        """A listener for the engine that fills `stream`."""

        def listener(event: Event) -> None:
            self._waiting.append((stream, event))
            if not self._is_woken:  # else the loop has yet to clear the flag, and empties the queue after that
                self._is_woken = True
                self._loop.call_soon_threadsafe(self._deliver)

        return listener

    def _deliver(self) -> None:
        self._is_woken = False
        while self._waiting:
            stream, event = self._waiting.popleft()
            stream.put(event)
