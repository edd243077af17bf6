"""Tell everybody who watches which blocks this worker holds: a snapshot each, then what changes, in numbered events."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

import structlog

from cache_store.ids import DIGEST_BYTES
from protos import rekindle_worker_pb2 as wpb
from worker.engine_like import EngineLike
from worker.figures import BlocksHeld, WorkerLoad

_MOST_BEHIND = 64
"""Events that may wait for a watcher; one that is slower gets a new snapshot."""
_LOAD_EVERY = 5
"""An event without blocks is sent for every so many intervals, for the load in it."""

_log = structlog.get_logger(__name__)


class Publisher:
    """Lives on one event loop. Asks the engine every `interval_s` while somebody watches, and never else."""

    def __init__(self, engine: EngineLike, *, interval_s: float = 0.1) -> None:
        self._engine = engine
        self._interval_s = interval_s
        self._watchers: set[asyncio.Queue[wpb.BlockEvents | None]] = set()
        self._task: asyncio.Task[None] | None = None
        self._number = 0

    async def watch(self) -> AsyncGenerator[wpb.BlockEvents, None]:
        """A snapshot, then events, until it is closed; a snapshot again where there were too many events to wait."""
        while True:
            events: asyncio.Queue[wpb.BlockEvents | None] = asyncio.Queue(_MOST_BEHIND)
            self._begin(events)
            try:
                number = self._number  # what changes from here on comes as events, and may be in the snapshot as well
                yield await self._snapshot(number)
                while (event := await events.get()) is not None:
                    yield event
            finally:
                self._end(events)

    def _begin(self, events: "asyncio.Queue[wpb.BlockEvents | None]") -> None:
        if self._task is None:
            self._engine.watch_blocks(True)
            self._task = asyncio.create_task(self._publish(), name="publish blocks")
            self._task.add_done_callback(self._published)
        self._watchers.add(events)

    def _end(self, events: "asyncio.Queue[wpb.BlockEvents | None]") -> None:
        self._watchers.discard(events)
        if not self._watchers and self._task is not None:
            self._task.cancel()
            self._task = None
            self._engine.watch_blocks(False)

    def _published(self, task: asyncio.Task[None]) -> None:
        """The engine can't be asked any more, or a bug: who watches hears it where it asks for a snapshot."""
        if task.cancelled():
            return
        _log.warning("blocks are not published", error=str(task.exception()))
        self._task = None
        for events in list(self._watchers):
            self._begin_again(events)

    async def _snapshot(self, number: int) -> wpb.BlockEvents:
        held, load = await asyncio.gather(
            asyncio.wrap_future(self._engine.blocks_held()), asyncio.wrap_future(self._engine.load())
        )
        return _event(number, held, BlocksHeld(), load, is_snapshot=True)

    async def _publish(self) -> None:
        quiet = 0
        while True:
            await asyncio.sleep(self._interval_s)
            stored, removed = self._engine.blocks_changed()
            quiet += 1
            if stored.is_empty and removed.is_empty and quiet < _LOAD_EVERY:
                continue
            quiet = 0
            self._number += 1
            load = await asyncio.wrap_future(self._engine.load())
            self._tell(_event(self._number, stored, removed, load))

    def _tell(self, event: wpb.BlockEvents) -> None:
        for events in list(self._watchers):
            if events.full():
                self._begin_again(events)
            else:
                events.put_nowait(event)

    def _begin_again(self, events: "asyncio.Queue[wpb.BlockEvents | None]") -> None:
        """After what it has still to read."""
        self._watchers.discard(events)
        if events.full():
            events.get_nowait()
        events.put_nowait(None)


def _event(
    number: int, stored: BlocksHeld, removed: BlocksHeld, load: WorkerLoad, *, is_snapshot: bool = False
) -> wpb.BlockEvents:
    return wpb.BlockEvents(
        number=number,
        is_snapshot=is_snapshot,
        device_stored=_packed(stored.device),
        device_removed=_packed(removed.device),
        host_stored=_packed(stored.host),
        host_removed=_packed(removed.host),
        load=wpb.Load(
            queue_s=load.queue_s,
            token_s=load.token_s,
            host_byte_s=load.host_byte_s,
            redis_byte_s=load.redis_byte_s,
        ),
    )


def _packed(names: Sequence[bytes]) -> bytes:
    return b"".join(name[:DIGEST_BYTES] for name in names)  # the marks behind it say nothing more
