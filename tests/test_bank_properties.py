"""Whatever happens to a bank, Redis keeps what memory does, and who catches up has what who reads all has."""

import asyncio

import numpy as np
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache_store.bank_store import BankStore, Seen
from cache_store.banks import BankRecord, BankSettings, Entry, EntryKind, Kept, Supersession, Use
from cache_store.errors import EntriesMissing
from cache_store.open_banks import open_banks

Steps = list[tuple[str, set[int], list[int]]]
NUMBERS = st.integers(0, 7)
LOSERS = st.lists(NUMBERS, max_size=2)
"""To the first that is added."""
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sets(NUMBERS, min_size=1), LOSERS),
        st.tuples(st.just("remove"), st.sets(NUMBERS, min_size=1), st.just([])),
        st.tuples(st.just("put"), st.sets(NUMBERS, min_size=1), st.just([])),
        st.tuples(st.just("use"), st.sets(NUMBERS, min_size=1), st.just([])),
        st.tuples(st.just("read"), st.just(set[int]()), st.just([])),
    ),
    max_size=12,
)


def kept(number: int, *, of_document: bool = False) -> Kept:
    """Chunks of a document have other ids than the rest."""
    name = f"{number + 100 * of_document:032x}"
    entry = Entry(
        id=name,
        text=f"text {name}",
        kind=EntryKind.DOCUMENT if of_document else EntryKind.FACT,
        created_ms=number,
        document_id="d" if of_document else "",
        chunk=number,
    )
    return Kept(entry, np.full(4, 0.5, np.float32))


class Reader:
    """Catches up, as a front end does."""

    def __init__(self, store: BankStore) -> None:
        self._store = store
        self._seen = Seen()
        self.entries: dict[str, Entry] = {}

    async def catch_up(self) -> None:
        is_last = False
        while not is_last:
            _, self._seen, anew, new, gone, is_last = await self._store.changes("t", "b", self._seen, most=3)
            self.entries = {} if anew else self.entries
            self.entries |= {entry.id: entry for entry, _ in new}
            for entry_id in gone:
                self.entries.pop(entry_id, None)


async def happens(store: BankStore, bank: BankRecord, reader: Reader, steps: Steps) -> list[object]:
    """What each step answered."""
    answers: list[object] = []
    for step, numbers, losers in steps:
        these = [kept(number) for number in sorted(numbers)]
        match step:
            case "add":
                stands = these[0].entry.id
                loses = [Supersession(kept(one).entry.id, stands) for one in losers if one != min(numbers)]
                try:
                    answers.append(
                        await store.add(bank, these, embedder="e", supersedes=loses, stands=stands if loses else "")
                    )
                except EntriesMissing as error:
                    answers.append(sorted(error.ids))
            case "remove":
                chunks = [kept(number, of_document=True) for number in sorted(numbers)]
                answers.append(sorted(await store.remove(bank, [entry for entry, _ in these + chunks])))
            case "put":
                chunks = [kept(number, of_document=True) for number in sorted(numbers)]
                await store.stage(bank, chunks, embedder="e", max_entries=100)
                ids = [entry.id for entry, _ in chunks]
                answers.append(await store.commit_document(bank, "d", str(sorted(numbers)), ids))
                answers.append(await store.has_document(bank, "d", str(sorted(numbers))))
            case "use":
                await store.add_uses(bank, {entry.id: Use(1, entry.created_ms + 1) for entry, _ in these})
            case "read":
                await reader.catch_up()
    return answers


async def lived(url: str, steps: Steps) -> tuple[object, ...]:
    """All that a bank is after these steps."""
    store = open_banks(url)
    try:
        record = BankRecord(tenant="t", name="b", description="", created_ms=1, settings=BankSettings())
        bank = await store.create(record)
        reader, late = Reader(store), Reader(store)
        answers = await happens(store, bank, reader, steps)
        await reader.catch_up()
        await late.catch_up()
        ids = sorted(late.entries)
        now = {entry.id: entry for entry in await store.entries(bank, ids) if entry is not None}
        assert now == late.entries
        lost = {entry.id: entry.superseded_by for entry in now.values()}
        assert {name: entry.superseded_by for name, entry in reader.entries.items()} == lost
        assert all(winner in now for winner in lost.values() if winner)
        after = await store.get("t", "b")
        assert after.entries == len(now)
        return answers, now, after.entries, after.documents, after.version
    finally:
        await store.aclose()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(steps=STEPS)
def test_redis_keeps_what_memory_keeps_and_who_catches_up_has_it_all(redis_url: str, steps: Steps) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    assert asyncio.run(lived(redis_url, steps)) == asyncio.run(lived("memory://", steps))
