"""The indexes of the banks that this front end has searched last, each brought up to date before it is used."""

import asyncio
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeVar

import structlog

from cache_store.bank_store import BankStore
from cache_store.banks import BankRecord
from cache_store.errors import ServingError
from server.banks.index import BankIndex
from server.banks.vectors import EXACT_ROWS, GraphBuilder

_Result = TypeVar("_Result")
_log = structlog.get_logger(__name__)
_PAGE: Final = 256
"""Changes that are read at once."""
_NICENESS: Final = 10
_FEW: Final = 8
"""Changes that are not worth a thread."""


class Current(NamedTuple):
    bank: BankRecord
    its_index: BankIndex
    """Belongs to whoever got it, for now."""


@dataclass(slots=True)
class _Slot:
    index: BankIndex
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    building: asyncio.Task[None] | None = None
    """Of a graph over its vectors."""
    reading: asyncio.Task[None] | None = None
    """What somebody has begun to read, and did not wait for."""

    def cancel(self) -> list[asyncio.Task[None]]:
        tasks = [task for task in (self.building, self.reading) if task is not None]
        for task in tasks:
            task.cancel()
        return tasks


class Indexes:
    def __init__(self, store: BankStore, *, max_bytes: int, exact_rows: int = EXACT_ROWS) -> None:
        """Beyond `max_bytes` the index that was used longest ago is dropped, if there is another one. A bank of more
        than `exact_rows` gets a graph, built in the background, unless its store searches."""
        self._store = store
        self._max_bytes = max_bytes
        self._exact_rows = exact_rows
        self._slots: OrderedDict[tuple[str, str], _Slot] = OrderedDict()
        self._builder = ThreadPoolExecutor(1, "graphs", initializer=_stand_back)

    @property
    def nbytes(self) -> int:
        return sum(slot.index.nbytes for slot in self._slots.values())

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, bank: tuple[str, str]) -> bool:
        return bank in self._slots

    @asynccontextmanager
    async def current(self, tenant: str, name: str) -> AsyncGenerator[Current, None]:
        """The bank's index as the bank was after this was called; nobody else has it meanwhile.

        Raises BankNotFound and what else the store raises.
        """
        key = (tenant, name)
        slot = self._slots.setdefault(key, _Slot(BankIndex(exact_rows=self._exact_rows)))
        async with slot.lock:
            try:
                bank = await self._catch_up(tenant, name, slot.index)
            except asyncio.CancelledError:  # a turn waits for two seconds, and a large bank takes longer
                if slot.reading is None and self._slots.get(key) is slot:
                    slot.reading = asyncio.create_task(self._read_on(slot, tenant, name))
                raise
            except Exception:
                slot.index = BankIndex(exact_rows=self._exact_rows)  # it may be half of it; others may wait for it
                self.drop(tenant, name)
                raise
            if self._slots.setdefault(key, slot) is slot:  # else it was dropped while this waited, and begun anew
                self._slots.move_to_end(key)
                self._make_room()
                if slot.index.vectors.lacks_graph and slot.building is None and not bank.has_vector_set:
                    slot.building = asyncio.create_task(self._build(slot))
            yield Current(bank, slot.index)

    def drop(self, tenant: str, name: str) -> None:
        slot = self._slots.pop((tenant, name), None)
        if slot is not None:
            slot.cancel()

    def drop_tenant(self, tenant: str) -> None:
        for owner, name in list(self._slots):
            if owner == tenant:
                self.drop(owner, name)

    async def aclose(self) -> None:
        """Stop what goes on in the background."""
        tasks = [task for slot in self._slots.values() for task in slot.cancel()]
        self._slots.clear()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._builder.shutdown()  # nothing runs on it any more

    async def _catch_up(self, tenant: str, name: str, index: BankIndex) -> BankRecord:
        while True:
            changes = await self._store.changes(tenant, name, index.seen, most=_PAGE)
            if len(changes.kept) > _FEW:
                await in_thread(lambda changes=changes: index.apply(changes))  # type: ignore[misc]
            else:
                index.apply(changes)
            if changes.is_last:
                return changes.bank

    def _make_room(self) -> None:
        total = self.nbytes
        while total > self._max_bytes and len(self._slots) > 1:
            oldest = next(iter(self._slots))
            total -= self._slots[oldest].index.nbytes
            self.drop(*oldest)

    async def _read_on(self, slot: _Slot, tenant: str, name: str) -> None:
        try:
            async with self.current(tenant, name):
                pass
        except ServingError as error:  # whoever asks next is told
            _log.warning("a bank can't be read", bank=name, error=str(error))
        finally:
            slot.reading = None

    async def _build(self, slot: _Slot) -> None:
        try:
            vectors = slot.index.vectors
            builder = GraphBuilder(vectors)
            while (graph := await in_thread(builder.step, self._builder)) is None:
                if vectors is not slot.index.vectors:  # it was begun anew
                    return
            async with slot.lock:
                if vectors is slot.index.vectors:
                    await in_thread(lambda: vectors.use_graph(graph))
        finally:
            slot.building = None


async def in_thread(work: Callable[[], _Result], executor: Executor | None = None) -> _Result:
    """What `work` returns. Who is cancelled waits for its end: nothing of the index changes after the lock is given
    back."""
    running = asyncio.get_running_loop().run_in_executor(executor, work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        running.result()  # its own error counts more
        raise


def _stand_back() -> None:
    """Give this thread, and those that it starts, a lower priority: while a graph is built all vectors are compared,
    which beside a builder of the same rank takes twice as long (on two cores)."""
    if sys.platform == "linux":  # where a thread has a priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + _NICENESS)
