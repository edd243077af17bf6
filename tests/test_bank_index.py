"""What a front end keeps of banks in memory: filters, what came and went, graphs, and how much room it takes."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_store.bank_store import Changes, Seen
from cache_store.banks import BankRecord, BankSettings, Entry, EntryFilter, EntryKind, Kept, Vector
from cache_store.errors import StoreUnavailable
from cache_store.memory_banks import MemoryBanks
from server.banks import index as bank_index
from server.banks.index import BankIndex
from server.banks.indexes import Indexes, in_thread
from server.banks.keeper import BankKeeper
from server.banks.vectors import GraphBuilder, Vectors
from tests.fake_embedding import FakeEmbedding

DIM = 16
EVERYTHING = EntryFilter()


def clustered(num: int, dim: int = DIM, seed: int = 0) -> list[Vector]:
    random = np.random.default_rng(seed)
    centres = random.standard_normal((max(num // 50, 4), dim), np.float32)
    vectors = centres[random.integers(0, len(centres), num)] + 0.5 * random.standard_normal((num, dim), np.float32)
    return list(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def bank_of(version: int, entries: int) -> BankRecord:
    return BankRecord(
        tenant="t",
        name="b",
        description="",
        created_ms=1,
        settings=BankSettings(),
        entries=entries,
        embedder="e",
        embedding_dim=DIM,
        version=version,
        incarnation="i",
    )


def changes(kept: Sequence[Kept], gone: Sequence[str], *, anew: bool = False) -> Changes:
    return Changes(bank_of(1, len(kept)), Seen("i", "e", 1, 1), anew, list(kept), list(gone), True)


def entry(number: int, *, superseded_by: str = "") -> Entry:
    return Entry(
        id=f"{number:032x}",
        text=f"number {number} of {number % 7}",
        kind=EntryKind(1 + number % 4),
        metadata={"rest": str(number % 3)},
        created_ms=1000 + number,
        document_id=f"d{number % 5}",
        session_id="s" if number % 2 else "",
        superseded_by=superseded_by,
    )


FILTERS = st.builds(
    EntryFilter,
    metadata=st.sampled_from([{}, {"rest": "1"}, {"rest": "9"}, {"other": "1"}]),
    kinds=st.frozensets(st.sampled_from(EntryKind)),
    created_after_ms=st.sampled_from([0, 1010]),
    created_before_ms=st.sampled_from([0, 1015]),
    document_id=st.sampled_from(["", "d1", "d9"]),
    session_id=st.sampled_from(["", "s"]),
    not_session_id=st.sampled_from(["", "s", "another"]),
)


def passes(one: Entry, where: EntryFilter) -> bool:
    return (
        where.metadata.items() <= one.metadata.items()
        and (not where.kinds or one.kind in where.kinds)
        and one.created_ms >= where.created_after_ms
        and (not where.created_before_ms or one.created_ms < where.created_before_ms)
        and where.document_id in ("", one.document_id)
        and where.session_id in ("", one.session_id)
        and (not where.not_session_id or where.not_session_id != one.session_id)
    )


@settings(max_examples=60)
@given(
    steps=st.lists(st.tuples(st.sets(st.integers(0, 29)), st.sets(st.integers(0, 29))), max_size=6),
    where=FILTERS,
    with_superseded=st.booleans(),
)
def test_a_search_finds_what_a_look_at_every_entry_finds(
    steps: list[tuple[set[int], set[int]]], where: EntryFilter, with_superseded: bool
) -> None:
    vectors = clustered(30)
    index, there = BankIndex(), dict[int, Entry]()
    index.apply(changes([], [], anew=True))
    for added, gone in steps:
        new = {number: entry(number, superseded_by="x" if number % 5 == 0 else "") for number in added - gone}
        there = {number: one for number, one in (there | new).items() if number not in gone}
        kept = [Kept(one, vectors[number]) for number, one in new.items()]
        index.apply(changes(kept, [f"{number:032x}" for number in gone]))
    assert len(index) == len(there)
    query = vectors[7]
    found = index.search("number 7", query, where, with_superseded=with_superseded, k=50)
    expected = {
        one.id: float(vectors[number] @ query)
        for number, one in there.items()
        if passes(one, where) and (with_superseded or not one.superseded_by)
    }
    assert dict(zip(found.ids, found.cosine.tolist(), strict=True)) == pytest.approx(expected, abs=1e-5)
    matching = [one.id for one in sorted(there.values(), key=lambda one: one.created_ms) if passes(one, where)]
    assert index.matching(where) == matching


def test_rows_of_what_is_gone_are_dropped_and_nothing_else_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank_index, "_LEAST_GONE", 4)
    vectors = clustered(40)
    index, other = BankIndex(), BankIndex()
    index.apply(changes([Kept(entry(number), vectors[number]) for number in range(40)], [], anew=True))
    index.apply(changes([], [f"{number:032x}" for number in range(0, 30, 2)]))
    left = [number for number in range(40) if number >= 30 or number % 2]
    other.apply(changes([Kept(entry(number), vectors[number]) for number in left], [], anew=True))
    assert len(index.vectors) == len(index) == len(left)
    for where in (EVERYTHING, EntryFilter(metadata={"rest": "2"}), EntryFilter(session_id="s")):
        ours, theirs = (one.search("number 3", vectors[3], where, k=9, with_superseded=True) for one in (index, other))
        assert ours.ids == theirs.ids
        np.testing.assert_allclose(ours.bm25, theirs.bm25)
        np.testing.assert_allclose(ours.relevance, theirs.relevance)


@pytest.fixture(scope="module")
def many() -> Vectors:
    """5,000, with a graph to which the last 500 came later."""
    rows = clustered(5000, 32)
    vectors = Vectors(32, exact_rows=1000)
    vectors.add(rows[:4000])
    assert vectors.lacks_graph
    builder = GraphBuilder(vectors)
    vectors.add(rows[4000:4500])
    while (graph := builder.step()) is None:
        pass
    vectors.use_graph(graph)
    vectors.add(rows[4500:])
    assert not vectors.lacks_graph
    return vectors


def exact(vectors: Vectors, query: Vector, eligible: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> list[int]:
    cosines = np.where(eligible, vectors.matrix @ query, -np.inf)
    return [int(row) for row in np.argsort(-cosines)[:20]]


@pytest.mark.parametrize("share", [1.0, 0.5, 0.1])
def test_a_graph_finds_nearly_all_that_a_look_at_every_vector_finds(many: Vectors, share: float) -> None:
    eligible = np.random.default_rng(1).random(5000) < share
    hits = 0
    for query in clustered(20, 32, seed=0):
        found = many.nearest(query, eligible, 20).tolist()
        assert len(found) == 20
        assert eligible[found].all()
        cosines = many.matrix[found] @ query
        assert (np.diff(cosines) <= 1e-6).all()
        hits += len(set(found) & set(exact(many, query, eligible)))
    assert hits >= 0.97 * 20 * 20


def test_where_nothing_near_is_eligible_a_graph_is_no_hindrance(many: Vectors) -> None:
    query = clustered(1, 32, seed=0)[0]
    cosines = many.matrix @ query
    eligible = cosines < np.median(cosines)  # the far half: more than are compared without a graph
    assert many.nearest(query, eligible, 20).tolist() == exact(many, query, eligible)


class SlowBanks(MemoryBanks):
    """Each page takes 10 ms, and one may fail."""

    num_read = 0
    fails_after = 0

    async def changes(self, tenant: str, name: str, seen: Seen, *, most: int) -> Changes:
        await asyncio.sleep(0.01)
        answer = await super().changes(tenant, name, seen, most=most)
        self.num_read += len(answer.kept)
        if 0 < self.fails_after < self.num_read:
            self.fails_after = 0
            raise StoreUnavailable("away for a moment")
        return answer


@asynccontextmanager
async def keeper_of(store: MemoryBanks, *, max_index_bytes: int = 1 << 30) -> AsyncIterator[BankKeeper]:
    keeper = BankKeeper(store, FakeEmbedding(), max_index_bytes=max_index_bytes)
    try:
        yield keeper
    finally:
        await keeper.aclose()


async def test_a_large_bank_gets_its_graph_in_the_background() -> None:
    store = MemoryBanks()
    bank = await store.create(bank_of(0, 0))
    vectors = clustered(300, 64)
    await store.add(bank, [Kept(entry(number), vectors[number]) for number in range(300)], embedder="fa4e")
    indexes = Indexes(store, max_bytes=1 << 30, exact_rows=100)
    async with indexes.current("t", "b") as (_, index):
        assert index.vectors.lacks_graph
    async with asyncio.timeout(20):
        while index.vectors.lacks_graph:  # noqa: ASYNC110 - nobody says when it is built
            await asyncio.sleep(0.01)
    async with indexes.current("t", "b") as (_, index):
        found = index.search("", vectors[5], EVERYTHING, k=9, with_superseded=True)
    assert entry(5).id in found.ids
    await indexes.aclose()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads have no priority of their own")
async def test_a_graph_is_built_at_a_lower_priority_than_banks_are_searched() -> None:
    indexes = Indexes(MemoryBanks(), max_bytes=1 << 30)
    ours, builders = await in_thread(_priority), await in_thread(_priority, indexes._builder)
    assert builders == min(19, ours + 10)
    await indexes.aclose()


def _priority() -> int:
    """Of the calling thread."""
    return os.getpriority(os.PRIO_PROCESS, 0)


async def test_the_bank_that_was_searched_longest_ago_makes_room() -> None:
    store = MemoryBanks()
    async with keeper_of(store, max_index_bytes=100_000) as keeper:
        for name in ("a", "b", "c"):
            await keeper.create("t", name, settings=BankSettings())
            for number in range(20):
                await keeper.remember("t", name, text=f"number {number}", metadata={})
        indexes = keeper._indexes
        for name in ("a", "b", "a", "c"):
            assert len(await keeper.recall("t", name, "number 3", k=20)) == 20
            assert ("t", name) in indexes
        assert indexes.nbytes <= 100_000 or len(indexes) == 1
        assert len(indexes) < 3


async def test_a_bank_that_takes_longer_to_read_than_anybody_waits_is_read_to_the_end() -> None:
    store = SlowBanks()
    bank = await store.create(bank_of(0, 0))
    vectors = clustered(2000, 64)
    await store.add(bank, [Kept(entry(number), vectors[number]) for number in range(2000)], embedder="fa4e")
    async with keeper_of(store) as keeper:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await keeper.recall("t", "b", "number 3")
        async with asyncio.timeout(10):
            while store.num_read < 2000:  # noqa: ASYNC110 - nobody waits for it
                await asyncio.sleep(0.01)
        assert len(await keeper.recall("t", "b", "number 3")) == 8
        assert store.num_read == 2000  # nothing was read twice


async def test_who_waits_for_a_bank_that_fails_to_be_read_reads_all_of_it() -> None:
    store = SlowBanks()
    bank = await store.create(bank_of(0, 0))
    vectors = clustered(600, 64)
    await store.add(bank, [Kept(entry(number), vectors[number]) for number in range(600)], embedder="fa4e")
    async with keeper_of(store) as keeper:
        store.fails_after = 300
        first, second = await asyncio.gather(
            *(keeper.recall("t", "b", "number 3", k=100) for _ in range(2)), return_exceptions=True
        )
        assert isinstance(first, StoreUnavailable)
        assert isinstance(second, list)
        assert len(second) == 100
        async with keeper._indexes.current("t", "b") as (_, index):
            assert len(index) == len(index.vectors) == 600


async def test_what_is_read_for_nobody_ends_with_its_keeper() -> None:
    store = SlowBanks()
    bank = await store.create(bank_of(0, 0))
    await store.add(bank, [Kept(entry(0), clustered(1, 64)[0])], embedder="fa4e")
    before = asyncio.all_tasks()
    async with keeper_of(store) as keeper:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.005):
                await keeper.recall("t", "b", "number 3")
    assert asyncio.all_tasks() == before


async def test_a_search_that_is_cancelled_leaves_the_bank_searchable() -> None:
    store = MemoryBanks()
    async with keeper_of(store) as keeper:
        await keeper.create("t", "b", settings=BankSettings())
        for number in range(50):
            await keeper.remember("t", "b", text=f"number {number}", metadata={})
        for delay_s in (0.0, 0.0001, 0.001, 0.002, 0.004):
            task = asyncio.create_task(keeper.recall("t", "b", "number 3"))
            await asyncio.sleep(delay_s)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        best = (await keeper.recall("t", "b", "number 3"))[0]
        assert best.entry.text == "number 3"
