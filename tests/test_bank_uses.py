"""How often entries were recalled, written behind: bounded, and never in a recall's way."""

from collections.abc import AsyncIterator, Mapping

import numpy as np
import pytest

from cache_store.banks import BankRecord, BankSettings, Entry, EntryKind, Kept, Use
from cache_store.errors import StoreUnavailable
from cache_store.memory_banks import MemoryBanks
from server.banks import uses as bank_uses
from server.banks.uses import Uses
from tests.systems import eventually


class Unsteady(MemoryBanks):
    """Can't be written to while it is away."""

    is_away = False
    num_writes = 0

    async def was_written(self) -> bool:
        return self.num_writes > 0

    async def was_tried_again(self) -> bool:
        return self.num_writes > 2

    async def add_uses(self, bank: BankRecord, uses: Mapping[str, Use]) -> None:
        self.num_writes += 1
        if self.is_away:
            raise StoreUnavailable("away")
        await super().add_uses(bank, uses)


@pytest.fixture
def store() -> Unsteady:
    return Unsteady()


@pytest.fixture
async def bank(store: Unsteady) -> BankRecord:
    record = BankRecord(tenant="t", name="b", description="", created_ms=1, settings=BankSettings())
    record = await store.create(record)
    kept = [
        Kept(Entry(id=name, text=name, kind=EntryKind.FACT, created_ms=1), np.ones(1, np.float32)) for name in "abc"
    ]
    await store.add(record, kept, embedder="e")
    return record


@pytest.fixture
async def uses(store: Unsteady) -> AsyncIterator[Uses]:
    uses = Uses(store, every_s=0.01)
    yield uses
    await uses.aclose()


async def test_what_waits_is_read_at_once_and_written_soon_in_one_batch(
    uses: Uses, store: Unsteady, bank: BankRecord
) -> None:
    uses.add(bank, ["a", "b"], 5)
    uses.add(bank, ["a"], 7)
    assert store.num_writes == 0
    assert await uses.read(bank, ["a", "b", "c"]) == [Use(2, 7), Use(1, 5), Use(0, 0)]
    await eventually(store.was_written)
    assert store.num_writes == 1
    assert await store.uses(bank, ["a", "b", "c"]) == [Use(2, 7), Use(1, 5), Use(0, 0)]
    assert await uses.read(bank, ["a"]) == [Use(2, 7)]


async def test_a_store_that_is_away_gets_them_when_it_is_back(uses: Uses, store: Unsteady, bank: BankRecord) -> None:
    store.is_away = True
    uses.add(bank, ["a"], 5)
    await eventually(store.was_tried_again)
    uses.add(bank, ["a"], 9)
    assert await uses.read(bank, ["a"]) == [Use(2, 9)]
    store.is_away = False
    await uses.flush()
    assert await store.uses(bank, ["a"]) == [Use(2, 9)]


async def test_so_many_wait_and_the_oldest_are_lost(
    uses: Uses, store: Unsteady, bank: BankRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bank_uses, "_MOST_WAITING", 2)
    store.is_away = True
    for number, name in enumerate("abac"):
        uses.add(bank, [name], number)
    assert await uses.read(bank, ["a", "b", "c"]) == [Use(2, 2), Use(0, 0), Use(1, 3)]


async def test_uses_of_a_bank_that_is_gone_are_dropped_and_the_end_writes_the_rest(
    store: Unsteady, bank: BankRecord
) -> None:
    uses = Uses(store, every_s=60)
    gone = await store.create(
        BankRecord(tenant="t", name="gone", description="", created_ms=1, settings=BankSettings())
    )
    uses.add(gone, ["x"], 1)
    uses.add(bank, ["c"], 4)
    await store.delete("t", "gone")
    await uses.aclose()
    assert await store.uses(bank, ["c"]) == [Use(1, 4)]
