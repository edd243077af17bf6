"""When a front end has KV of banks' entries computed ahead, and dropped: by fake workers."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from cache_store.banks import BankRecord, BankSettings, Entry, EntryKind
from tests.fake_worker import FakeWorker, FrontEnd, front_end
from tests.systems import eventually


@pytest.fixture
async def front() -> AsyncIterator[FrontEnd]:
    async with front_end(num_workers=1) as front:
        yield front


async def bank_of(front: FrontEnd) -> BankRecord:
    return await front.app._banks.create("t", "b", settings=BankSettings(kv_ttl_s=60))


def entries(count: int) -> list[Entry]:
    return [Entry(id=str(n), text=f"entry {n}", kind=EntryKind.FACT, created_ms=0) for n in range(count)]


async def asked(worker: FakeWorker, count: int) -> None:
    async def is_asked() -> bool:
        return len(worker.prefilled) >= count

    await eventually(is_asked)


async def test_what_turns_had_to_compute_is_prefilled_once_and_two_at_a_time(front: FrontEnd) -> None:
    worker, bank = front.workers["0"], await bank_of(front)
    worker.may_prefill.clear()
    texts = dict.fromkeys([f"text {n}" for n in range(10)], bank)
    for _ in range(2):
        front.app._prefilling.again("raw", texts)
    await asked(worker, 2)
    await front.turn()
    assert len(worker.prefilled) == 2
    worker.may_prefill.set()
    await asked(worker, 10)
    await front.app._prefilling.aclose()
    assert worker.prefilled == [*texts]


@pytest.mark.parametrize("is_behind", [False, True])
async def test_nothing_more_is_prefilled_of_a_bank_that_is_gone(front: FrontEnd, is_behind: bool) -> None:
    worker, bank, prefilling = front.workers["0"], await bank_of(front), front.app._prefilling
    worker.may_prefill.clear()
    if is_behind:
        prefilling.again("raw", {entry.text: bank for entry in entries(20)})
        begun = 2
    else:
        put = asyncio.create_task(prefilling.prefill(bank, entries(20)))
        begun = 8
    await asked(worker, begun)
    await front.app._banks.erase("t")
    worker.may_prefill.set()
    if is_behind:

        async def is_idle() -> bool:
            return not prefilling._tasks

        await eventually(is_idle)
    else:
        assert await put == begun
    assert len(worker.prefilled) == begun


async def test_redis_is_the_last_to_lose_what_is_forgotten_by_one_worker_of_each_model() -> None:
    async with front_end(num_workers=3) as front:
        calls: list[str] = []
        front.workers["2"].fingerprint = "beef"

        async def is_known() -> bool:
            return {worker.description.fingerprint for worker in front.app.directory.living()} == {"f00d", "beef"}

        await eventually(is_known)
        for worker in front.workers.values():
            worker.calls = calls
        await front.app._prefilling.forget(await bank_of(front), entries(1))
        assert calls == ["drop prefilled", "drop prefilled+redis", "drop prefilled+redis"]
