"""Banks through their keeper: the same for memory and Redis, in the clear and sealed."""

from collections.abc import AsyncIterator

import pytest

from cache_store.bank_store import BankStore
from cache_store.banks import BankSettings, EntryFilter, EntryKind
from cache_store.errors import (
    BankExists,
    BankFull,
    BankNotFound,
    EmbedderChanged,
    InvalidRequest,
)
from cache_store.open_banks import open_banks
from server.banks.keeper import BankKeeper, Recalled
from server.errors import NoWorker
from tests.fake_embedding import FakeEmbedding
from tests.keyrings import keyring

DAY_S = 86_400.0


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def embedding() -> FakeEmbedding:
    return FakeEmbedding()


@pytest.fixture(params=["memory", "redis", "sealed", "cluster"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[BankStore]:
    if request.param == "memory":
        url = "memory://"
    elif request.param in ("redis", "sealed"):
        url = request.getfixturevalue("redis_url")
    else:
        url = request.getfixturevalue("redis_cluster").url
    store = open_banks(url, keyring=keyring() if request.param == "sealed" else None)
    yield store
    await store.aclose()


@pytest.fixture
async def keeper(store: BankStore, embedding: FakeEmbedding, clock: Clock) -> AsyncIterator[BankKeeper]:
    keeper = BankKeeper(store, embedding, max_entries=50, now=clock)
    await keeper.create("t", "b", settings=BankSettings())
    yield keeper
    await keeper.aclose()


async def remember(keeper: BankKeeper, *texts: str) -> list[str]:
    """Their ids."""
    return [(await keeper.remember("t", "b", text=text, metadata={})).id for text in texts]


def texts(recalled: list[Recalled]) -> list[str]:
    return [one.entry.text for one in recalled]


async def test_what_was_remembered_is_recalled_the_nearest_first(keeper: BankKeeper) -> None:
    await remember(keeper, "the cat sleeps on the mat", "the dog eats fish", "rain falls in november")
    recalled = await keeper.recall("t", "b", "where does the cat sleep", k=3)
    assert texts(recalled)[0] == "the cat sleeps on the mat"
    assert len(recalled) == 3
    best = recalled[0]
    assert best.cosine == max(one.cosine for one in recalled)
    assert best.bm25 > 0
    assert best.retention == 1.0


async def test_an_entry_that_is_said_again_is_the_same_entry(keeper: BankKeeper, embedding: FakeEmbedding) -> None:
    first = await keeper.remember("t", "b", text="tea at four", metadata={"who": "Ann"})
    embedding.error = NoWorker("nobody embeds")
    assert await keeper.remember("t", "b", text="tea at four", metadata={"who": "Ann"}) == first
    assert (await keeper.get("t", "b")).entries == 1
    with pytest.raises(NoWorker):
        await keeper.remember("t", "b", text="tea at four", metadata={"who": "Bob"})


async def test_a_superseded_entry_is_hidden_unless_asked_for(keeper: BankKeeper) -> None:
    [old, older] = await remember(keeper, "Ann lives in Rome", "Ann lives in Bern")
    new = await keeper.remember("t", "b", text="Ann lives in Oslo", metadata={}, supersedes=[old, older])
    assert texts(await keeper.recall("t", "b", "where does Ann live")) == ["Ann lives in Oslo"]
    everything = await keeper.recall("t", "b", "where does Ann live", with_superseded=True)
    assert {one.entry.text: one.entry.superseded_by for one in everything} == {
        "Ann lives in Rome": new.id,
        "Ann lives in Bern": new.id,
        "Ann lives in Oslo": "",
    }
    again = await keeper.remember("t", "b", text="Ann lives in Rome", metadata={}, supersedes=[new.id])
    assert again.id == old
    assert texts(await keeper.recall("t", "b", "where does Ann live")) == ["Ann lives in Rome"]


async def test_who_had_lost_to_a_forgotten_entry_loses_to_its_heir_or_stands(keeper: BankKeeper) -> None:
    [first] = await remember(keeper, "the code is one")
    second = await keeper.remember("t", "b", text="the code is two", metadata={}, supersedes=[first])
    third = await keeper.remember("t", "b", text="the code is three", metadata={}, supersedes=[second.id])
    assert await keeper.forget("t", "b", ids=[second.id, "f" * 32]) == 1
    everything = await keeper.recall("t", "b", "the code", with_superseded=True)
    assert {one.entry.id: one.entry.superseded_by for one in everything} == {first: third.id, third.id: ""}
    assert await keeper.forget("t", "b", ids=[third.id]) == 1
    assert texts(await keeper.recall("t", "b", "the code")) == ["the code is one"]


async def test_each_recall_makes_an_entry_stronger_but_a_peek_does_not(keeper: BankKeeper, clock: Clock) -> None:
    await remember(keeper, "a well is deep")
    clock.now_s += 5 * DAY_S
    [before] = await keeper.recall("t", "b", "well", peek=True)
    assert before.retention == pytest.approx(0.36788, abs=1e-4)
    [first] = await keeper.recall("t", "b", "well")
    assert first.entry.recalls == 0
    clock.now_s += 5 * DAY_S
    [second] = await keeper.recall("t", "b", "well", peek=True)
    assert second.entry.recalls == 1
    assert second.entry.last_recalled_ms == int((clock.now_s - 5 * DAY_S) * 1000)
    assert second.retention == pytest.approx(0.60653, abs=1e-4)


async def test_filters_look_at_metadata_kind_time_and_session(keeper: BankKeeper, clock: Clock) -> None:
    await keeper.remember("t", "b", text="blue paint", metadata={"room": "hall", "year": "1"})
    clock.now_s += 10
    await keeper.remember("t", "b", text="green paint", metadata={"room": "hall"})
    await keeper.remember("t", "b", text="red paint", metadata={}, kind=EntryKind.EPISODE, session_id="s", turn=3)
    later_ms = int(clock.now_s * 1000)

    async def found(where: EntryFilter) -> set[str]:
        return {text.split()[0] for text in texts(await keeper.recall("t", "b", "paint", where=where))}

    assert await found(EntryFilter(metadata={"room": "hall"})) == {"blue", "green"}
    assert await found(EntryFilter(metadata={"room": "hall", "year": "1"})) == {"blue"}
    assert await found(EntryFilter(metadata={"room": "cellar"})) == set()
    assert await found(EntryFilter(kinds=frozenset({EntryKind.EPISODE}))) == {"red"}
    assert await found(EntryFilter(created_after_ms=later_ms)) == {"green", "red"}
    assert await found(EntryFilter(created_before_ms=later_ms)) == {"blue"}
    assert await found(EntryFilter(session_id="s")) == {"red"}
    assert await keeper.forget("t", "b", where=EntryFilter(metadata={"room": "hall"})) == 2
    assert await found(EntryFilter()) == {"red"}


async def test_what_no_bank_takes_is_refused_by_name(keeper: BankKeeper) -> None:
    async def refused(**fields: object) -> str:
        arguments: dict[str, object] = {"text": "x", "metadata": {}} | fields
        with pytest.raises(InvalidRequest) as caught:
            await keeper.remember("t", "b", **arguments)  # type: ignore[arg-type]
        return caught.value.field

    assert await refused(text=" ") == "text"
    assert await refused(text="ä" * 32_769) == "text"
    assert await refused(text="\ud800") == "text"
    assert await refused(text="!") == "text"
    assert await refused(metadata={str(key): "" for key in range(33)}) == "metadata"
    assert await refused(metadata={"": ""}) == "metadata"
    assert await refused(metadata={"k": "v" * 1025}) == "metadata[k]"
    assert await refused(importance=float("nan")) == "importance"
    assert await refused(supersedes=["0" * 32]) == "supersedes"
    for k in (0, 101):
        with pytest.raises(InvalidRequest, match="k: must be"):
            await keeper.recall("t", "b", "x", k=k)
    with pytest.raises(InvalidRequest, match="query"):
        await keeper.recall("t", "b", "")
    with pytest.raises(InvalidRequest, match="one of ids"):
        await keeper.forget("t", "b")
    with pytest.raises(InvalidRequest, match="name"):
        await keeper.create("t", "a/b", settings=BankSettings())
    with pytest.raises(InvalidRequest, match=r"settings\.diversity"):
        BankSettings(diversity=float("nan"))


async def test_unknown_and_taken_names_are_said(keeper: BankKeeper) -> None:
    with pytest.raises(BankExists):
        await keeper.create("t", "b", settings=BankSettings())
    for tenant, name in (("t", "other"), ("other", "b")):
        with pytest.raises(BankNotFound):
            await keeper.recall(tenant, name, "x")
        with pytest.raises(BankNotFound):
            await keeper.remember(tenant, name, text="x", metadata={})


async def test_a_full_bank_takes_no_more_but_what_it_has(keeper: BankKeeper) -> None:
    await remember(keeper, *(f"number {number}" for number in range(50)))
    with pytest.raises(BankFull, match="50"):
        await remember(keeper, "one more")
    await remember(keeper, "number 7")
    await keeper.forget("t", "b", ids=await remember(keeper, "number 7"))
    await remember(keeper, "one more")


async def test_banks_are_listed_by_name_in_pages(keeper: BankKeeper) -> None:
    for name in ("c", "a", "a.b", "a:b"):
        await keeper.create("t", name, description=f"of {name}", settings=BankSettings(read_entries=3))
    await keeper.create("other", "z", settings=BankSettings())
    names, token = [], ""
    while True:
        page = await keeper.page("t", page_size=2, page_token=token)
        names += [record.name for record in page.records]
        token = page.next_token
        if not token:
            break
    assert names == ["a", "a.b", "a:b", "b", "c"]
    assert (await keeper.get("t", "c")).settings == BankSettings(read_entries=3)
    assert (await keeper.get("t", "c")).description == "of c"


async def test_a_deleted_bank_is_gone_and_a_new_one_of_its_name_is_empty(keeper: BankKeeper) -> None:
    await remember(keeper, "a cat", "a dog")
    assert len(await keeper.recall("t", "b", "cat")) == 2
    assert await keeper.delete("t", "b") == 2
    with pytest.raises(BankNotFound):
        await keeper.recall("t", "b", "cat")
    await keeper.create("t", "b", settings=BankSettings())
    assert await keeper.recall("t", "b", "cat") == []


async def test_erasing_a_tenant_leaves_the_others(keeper: BankKeeper) -> None:
    await keeper.create("other", "b", settings=BankSettings())
    await keeper.create("t", "b2", settings=BankSettings())
    await remember(keeper, "a cat")
    assert await keeper.erase("t") == 1
    assert (await keeper.page("t", page_size=9, page_token="")).records == []
    assert len((await keeper.page("other", page_size=9, page_token="")).records) == 1


async def test_another_embedder_is_refused_until_all_vectors_are_made_anew(
    keeper: BankKeeper, embedding: FakeEmbedding
) -> None:
    await remember(keeper, *(f"fact {number}" for number in range(30)))
    embedding.embedder, embedding.dim = "f" * 32, 32
    with pytest.raises(EmbedderChanged, match="reembed b"):
        await keeper.recall("t", "b", "fact 3")
    with pytest.raises(EmbedderChanged):
        await remember(keeper, "another fact")
    assert [step async for step in keeper.reembed("t", "b")][-1] == (30, 30)
    record = await keeper.get("t", "b")
    assert (record.embedder, record.embedding_dim) == ("f" * 32, 32)
    assert texts(await keeper.recall("t", "b", "fact 3"))[0] == "fact 3"
    assert [step async for step in keeper.reembed("t", "b")] == [(30, 30)]


async def test_entries_unused_for_long_go_where_the_bank_says_so(keeper: BankKeeper, clock: Clock) -> None:
    await keeper.create("t", "short", settings=BankSettings(delete_after_s=100))
    for text in ("a cat", "a dog"):
        await keeper.remember("t", "short", text=text, metadata={})
    clock.now_s += 60
    await keeper.recall("t", "short", "cat", k=1)
    clock.now_s += 60
    assert texts(await keeper.recall("t", "short", "dog")) == ["a cat"]
    assert (await keeper.get("t", "short")).entries == 1
    clock.now_s += 200
    await keeper.remember("t", "short", text="a bird", metadata={})
    assert texts(await keeper.recall("t", "short", "cat")) == ["a bird"]


async def test_forgetting_by_age_spares_what_was_recalled(keeper: BankKeeper, clock: Clock) -> None:
    await remember(keeper, "a cat", "a dog")
    clock.now_s += 60
    await keeper.recall("t", "b", "cat", k=1)
    clock.now_s += 60
    assert await keeper.forget("t", "b", unused_for_s=100) == 1
    assert texts(await keeper.recall("t", "b", "dog")) == ["a cat"]
