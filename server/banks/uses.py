"""How often entries were recalled, written behind: nobody who recalls waits for it.

What is not written yet is known here, and added to what the store says. It is bounded: when a store can't be reached
for long, the uses of the longest ago are lost, and nothing else. One that is written twice, because an answer was lost,
makes an entry a little stronger.
"""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Final

import structlog

from cache_store.bank_store import BankStore
from cache_store.banks import BankRecord, Use
from cache_store.errors import BankNotFound, ServingError

_MOST_WAITING: Final = 20_000
_BATCH: Final = 500
_EVERY_S: Final = 1.0
_log = structlog.get_logger(__name__)
_Place = tuple[str, str, str]
"""Tenant, bank, incarnation."""


class Uses:
    def __init__(self, store: BankStore, *, every_s: float = _EVERY_S) -> None:
        self._store = store
        self._every_s = every_s
        self._waiting: dict[_Place, dict[str, Use]] = {}
        self._banks: dict[_Place, BankRecord] = {}
        self._num_waiting = 0
        self._writer: asyncio.Task[None] | None = None

    async def read(self, bank: BankRecord, ids: Sequence[str]) -> list[Use]:
        """Of these entries, as of now. Raises what the store raises."""
        waiting = self._waiting.get(_place(bank), {})
        return [
            _sum(use, waiting.get(entry_id))
            for entry_id, use in zip(ids, await self._store.uses(bank, ids), strict=True)
        ]

    def add(self, bank: BankRecord, ids: Iterable[str], now_ms: int) -> None:
        """These were just recalled."""
        place = _place(bank)
        waiting = self._waiting.setdefault(place, {})
        self._banks[place] = bank
        for entry_id in ids:
            self._num_waiting += entry_id not in waiting
            waiting[entry_id] = _sum(Use(1, now_ms), waiting.pop(entry_id, None))
        while self._num_waiting > _MOST_WAITING:
            self._forget_one()
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_behind())

    async def flush(self) -> None:
        """Write all of it now. Raises what the store raises; what was not written waits on."""
        while self._waiting:
            place = next(iter(self._waiting))
            waiting = self._waiting[place]
            batch = {entry_id: waiting.pop(entry_id) for entry_id in list(waiting)[:_BATCH]}
            self._num_waiting -= len(batch)
            bank = self._banks[place]
            if not waiting:
                del self._waiting[place], self._banks[place]
            try:
                await self._store.add_uses(bank, batch)
            except BankNotFound:
                continue  # nobody asks for them any more
            except BaseException:
                self._put_back(bank, batch)
                raise

    async def aclose(self) -> None:
        """Write what waits, if the store can be reached."""
        if self._writer is not None:
            self._writer.cancel()
            await asyncio.gather(self._writer, return_exceptions=True)
        try:
            await self.flush()
        except ServingError as error:
            _log.warning("it is lost how often entries were recalled", entries=self._num_waiting, error=str(error))

    async def _write_behind(self) -> None:
        while self._waiting:
            await asyncio.sleep(self._every_s)
            try:
                await self.flush()
            except ServingError as error:  # and try again
                _log.warning("can't write how often entries were recalled", waiting=self._num_waiting, error=str(error))

    def _put_back(self, bank: BankRecord, batch: dict[str, Use]) -> None:
        place = _place(bank)
        waiting = self._waiting.setdefault(place, {})
        self._banks[place] = bank
        for entry_id, use in batch.items():
            self._num_waiting += entry_id not in waiting
            waiting[entry_id] = _sum(use, waiting.get(entry_id))

    def _forget_one(self) -> None:
        place = next(iter(self._waiting))
        waiting = self._waiting[place]
        del waiting[next(iter(waiting))]
        self._num_waiting -= 1
        if not waiting:
            del self._waiting[place], self._banks[place]


def _place(bank: BankRecord) -> _Place:
    return bank.tenant, bank.name, bank.incarnation


def _sum(use: Use, more: Use | None) -> Use:
    return use if more is None else Use(use.recalls + more.recalls, max(use.last_ms, more.last_ms))
