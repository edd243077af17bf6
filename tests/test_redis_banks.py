"""Banks in a real Redis: several front ends over one, what it loses or can't do, and what can be read there."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import redis

from benchmarks.banks import run
from cache_store import bank_scripts
from cache_store.bank_keys import keys_of
from cache_store.bank_store import BankStore, Seen
from cache_store.banks import BankSettings, EntryFilter
from cache_store.embedded_redis import RedisServer
from cache_store.errors import BankNotFound, RecordUnreadable, StoreFull, StoreUnavailable
from cache_store.open_banks import open_banks
from cache_store.record_scripts import script
from cache_store.sealing import Keyring
from server.banks.keeper import BankKeeper, Document
from tests.fake_embedding import FakeEmbedding, vector_of
from tests.keyrings import keyring
from tests.test_sealed_records import dump

SETTINGS = BankSettings(chunk_tokens=16, overlap_tokens=0)


class Front:
    """A front end's banks."""

    def __init__(self, url: str, ring: Keyring | None = None, timeout_s: float = 2.0) -> None:
        self.store: BankStore = open_banks(url, timeout_s=timeout_s, keyring=ring)
        self.embedding = FakeEmbedding()
        self.keeper = BankKeeper(self.store, self.embedding)

    async def remember(self, *texts: str) -> list[str]:
        return [(await self.keeper.remember("t", "b", text=text, metadata={})).id for text in texts]

    async def recall(self, query: str, k: int = 100) -> list[str]:
        return [one.entry.text for one in await self.keeper.recall("t", "b", query, k=k)]

    async def put(self, text: str, document_id: str = "d") -> None:
        async for _ in self.keeper.put_documents("t", "b", [Document(text=text, id=document_id)]):
            pass


@asynccontextmanager
async def front_end(url: str, ring: Keyring | None = None, timeout_s: float = 2.0) -> AsyncIterator[Front]:
    front = Front(url, ring, timeout_s)
    try:
        yield front
    finally:
        await front.keeper.aclose()
        await front.store.aclose()


@pytest.fixture
async def fronts(redis_url: str) -> AsyncIterator[tuple[Front, Front]]:
    """Two, over one Redis; there is a bank."""
    async with front_end(redis_url) as one, front_end(redis_url) as other:
        await one.keeper.create("t", "b", settings=SETTINGS)
        yield one, other


async def test_what_one_front_end_changes_the_other_finds_at_once(fronts: tuple[Front, Front]) -> None:
    one, other = fronts
    for number in range(20):
        [entry_id] = await one.remember(f"number {number}")
        assert f"number {number}" in await other.recall("number")
        if number % 3 == 0:
            await other.keeper.forget("t", "b", ids=[entry_id])
            assert f"number {number}" not in await one.recall("number")
    [old] = await one.remember("the code is red")
    await other.keeper.remember("t", "b", text="the code is blue", metadata={}, supersedes=[old])
    assert "the code is red" not in await one.recall("code")
    await other.keeper.delete("t", "b")
    with pytest.raises(BankNotFound):
        await one.recall("number")
    await other.keeper.create("t", "b", settings=SETTINGS)
    await other.remember("a new beginning")
    assert await one.recall("number") == ["a new beginning"]


async def test_of_what_two_front_ends_write_at_once_nothing_is_lost_or_doubled(fronts: tuple[Front, Front]) -> None:
    one, other = fronts
    told = [f"fact {number}" for number in range(60)]
    await asyncio.gather(*(front.remember(*told[part:], *told[:part]) for front in fronts for part in (0, 20, 40)))
    assert sorted(await one.recall("fact")) == sorted(await other.recall("fact")) == sorted(told)
    record = await one.keeper.get("t", "b")
    assert (record.entries, record.version) == (60, 60)


async def test_of_two_contents_of_a_document_put_at_once_one_is_there_whole(fronts: tuple[Front, Front]) -> None:
    one, other = fronts
    contents = [" ".join(f"{name}{number} same" for number in range(40)) for name in ("a", "b")]
    for _ in range(5):
        await asyncio.gather(one.put(contents[0]), other.put(contents[1]), one.put(contents[1]), other.put(contents[0]))
        chunks = await one.recall("same")
        assert len(chunks) == 5
        assert {word for chunk in chunks for word in chunk.split()} in [set(text.split()) for text in contents]
        assert sorted(await other.recall("same")) == sorted(chunks)


async def test_recalls_by_all_front_ends_make_an_entry_stronger(fronts: tuple[Front, Front]) -> None:
    one, _ = fronts
    await one.remember("a deep well")
    await asyncio.gather(*(front.recall("well") for front in fronts for _ in range(5)))
    for front in fronts:
        await front.keeper._uses.flush()
    [recalled] = await one.keeper.recall("t", "b", "well", peek=True)
    assert recalled.entry.recalls == 10
    assert (await one.keeper.get("t", "b")).version == 1


async def test_who_lacks_what_is_no_longer_known_reads_all_again(
    fronts: tuple[Front, Front], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = fronts
    monkeypatch.setattr(bank_scripts, "REMOVE", script(bank_scripts.REMOVE.text.replace("- 10000\n", "- 3\n")))
    assert "- 3\n" in bank_scripts.REMOVE.text
    ids = await one.remember(*(f"number {number}" for number in range(12)))
    assert len(await other.recall("number")) == 12
    assert await one.keeper.forget("t", "b", ids=ids[:8]) == 8
    bank = await one.keeper.get("t", "b")
    answer = await one.store.changes("t", "b", Seen(bank.incarnation, bank.embedder, 12, 12), most=100)
    assert answer.from_nothing
    assert len(answer.kept) == 4
    assert sorted(await other.recall("number")) == [f"number {number}" for number in range(10, 12)] + [
        "number 8",
        "number 9",
    ]
    assert len(await one.recall("number")) == 4


async def test_a_bank_is_read_in_pages_while_it_changes(fronts: tuple[Front, Front]) -> None:
    one, other = fronts
    ids = await one.remember(*(f"number {number}" for number in range(30)))
    seen, there = Seen(), dict[str, str]()
    for step in range(100):
        changes = await other.store.changes("t", "b", seen, most=4)
        assert changes.from_nothing == (step == 0)
        there |= {kept.entry.id: kept.entry.text for kept in changes.kept}
        for entry_id in changes.gone:
            there.pop(entry_id, None)
        seen = changes.seen
        if step < 5:
            await one.keeper.forget("t", "b", ids=[ids[step * 6]])
            await one.remember(f"late {step}")
        elif changes.is_last:
            break
    assert sorted(there.values()) == sorted(await one.recall("number"))
    assert len(there) == 30


async def test_a_redis_that_has_lost_its_last_writes_is_believed(own_redis: RedisServer) -> None:
    async with front_end(own_redis.url) as front:
        await front.keeper.create("t", "b", settings=SETTINGS)
        await front.remember("a cat", "a dog")
        keys = keys_of("t", "b")
        with redis.Redis.from_url(own_redis.url) as client:
            before = {name: client.dump(name) for name in client.scan_iter()}
            await front.remember("a bird")
            assert len(await front.recall("a")) == 3
            client.flushall()
            for name, value in before.items():
                client.restore(name, 0, value)
            assert client.exists(keys.meta)
        assert sorted(await front.recall("a")) == ["a cat", "a dog"]


async def test_no_key_of_a_bank_expires_and_all_are_in_one_slot(fronts: tuple[Front, Front], redis_url: str) -> None:
    one, _ = fronts
    [old] = await one.remember("a cat")
    await one.keeper.remember("t", "b", text="a dog", metadata={}, supersedes=[old])
    await one.put("word " * 20)
    await one.recall("dog")
    await one.keeper._uses.flush()
    with redis.Redis.from_url(redis_url) as client:
        names = sorted(name.decode() for name in client.scan_iter())
        assert all(client.ttl(name) == -1 for name in names)
    of_bank = set(keys_of("t", "b"))
    assert set(names) - of_bank == {"rekindle:banks:t"}
    assert {name.split("{")[1].split("}")[0] for name in of_bank} == {"t/b"}


async def test_a_full_redis_refuses_entries_and_lets_them_be_deleted(own_redis: RedisServer) -> None:
    async with front_end(own_redis.url) as front:
        await front.keeper.create("t", "b", settings=SETTINGS)
        ids = await front.remember("a cat", "a dog")
        await front.put("word " * 40)
        with redis.Redis.from_url(own_redis.url) as client:
            client.config_set("maxmemory-policy", "volatile-lru")
            client.config_set("maxmemory", 1)
        with pytest.raises(StoreFull):
            await front.remember("a bird")
        with pytest.raises(StoreFull):
            await front.put("another document", "other")
        assert len(await front.recall("cat")) == 5
        assert await front.keeper.forget("t", "b", ids=ids[:1]) == 1
        assert await front.keeper.forget("t", "b", where=EntryFilter(document_id="d")) == 3
        assert await front.recall("cat") == ["a dog"]
        assert await front.keeper.delete("t", "b") == 1


async def test_a_redis_that_is_gone_is_said_in_time_and_found_when_it_is_back(own_redis: RedisServer) -> None:
    async with front_end(own_redis.url, timeout_s=0.3) as front:
        await front.keeper.create("t", "b", settings=SETTINGS)
        await front.remember("a cat")
        await front.recall("cat")
        own_redis.pause()
        async with asyncio.timeout(3):
            with pytest.raises(StoreUnavailable):
                await front.recall("cat")
            assert not await front.store.available()
        own_redis.resume()
        assert await front.recall("cat") == ["a cat"]
        assert await front.store.available()


async def test_no_text_metadata_or_vector_is_in_redis_where_it_is_sealed(redis_url: str) -> None:
    async with front_end(redis_url, keyring()) as front:
        await front.keeper.create("t", "b", description="a diary", settings=SETTINGS)
        [old] = await front.remember("the secret is plum")
        await front.keeper.remember("t", "b", text="secret pear", metadata={"mood": "sunny"}, supersedes=[old])
        await front.put("plum pudding recipe", "cookbook")
        vector = vector_of("the secret is plum").tobytes()
        with redis.Redis.from_url(redis_url) as client:
            content = dump(client)
        for shown in (b"plum", b"pear", b"mood", b"sunny", b"diary", b"cookbook", vector[:12]):
            assert shown not in content
        unsealed_id = open_banks("memory://").name_of("t", "b", "FACT", "the secret is plum", "", "0", "", "0")
        assert unsealed_id.encode() not in content  # nobody can try what he thinks likely
    async with front_end(redis_url) as front:
        with pytest.raises(RecordUnreadable, match="no master keys"):
            await front.recall("secret")


async def test_an_entry_that_was_changed_or_moved_is_an_error_and_never_a_text(redis_url: str) -> None:
    keys = keys_of("t", "b")
    async with front_end(redis_url, keyring()) as front:
        await front.keeper.create("t", "b", settings=SETTINGS)
        first, second = await front.remember("a cat", "a dog")
        with redis.Redis.from_url(redis_url) as client:
            for field in (keys.entries, keys.vectors):
                good, other = client.hget(field, first), client.hget(field, second)
                assert good is not None
                for bad in (good[:-1] + bytes([good[-1] ^ 1]), other, b"p" + good[1:], b"s", b""):
                    client.hset(field, first, bad)
                    async with front_end(redis_url, keyring()) as fresh:
                        with pytest.raises(RecordUnreadable, match=f"entry {first}"):
                            await fresh.recall("cat")
                client.hset(field, first, good)
        async with front_end(redis_url, keyring()) as fresh:
            assert len(await fresh.recall("cat")) == 2


async def test_a_bank_outlives_a_change_of_master_keys_and_the_move_to_sealed_values(redis_url: str) -> None:
    async with front_end(redis_url) as plain:
        await plain.keeper.create("t", "b", settings=SETTINGS)
        await plain.remember("in the clear")
    async with front_end(redis_url, keyring("one", takes_plain=True)) as moved:
        await moved.remember("under one")
    async with front_end(redis_url, keyring("two", "one", takes_plain=True)) as rotated:
        await rotated.remember("under two")
        assert sorted(await rotated.recall("the")) == ["in the clear", "under one", "under two"]
    async with front_end(redis_url, keyring("two", takes_plain=True)) as fresh:
        with pytest.raises(RecordUnreadable, match="called 'one'"):
            await fresh.recall("the")


async def test_a_damaged_bank_can_still_be_erased(redis_url: str) -> None:
    async with front_end(redis_url) as front:
        await front.keeper.create("t", "b", settings=SETTINGS)
        await front.remember("a cat")
        with redis.Redis.from_url(redis_url) as client:
            client.hset(keys_of("t", "b").meta, "about", "nonsense")
            with pytest.raises(RecordUnreadable):
                await front.keeper.page("t", page_size=5, page_token="")
            assert await front.keeper.erase("t") == 1
            assert client.dbsize() == 0


async def test_names_of_banks_that_are_gone_leave_the_index(redis_url: str) -> None:
    async with front_end(redis_url) as front:
        record = await front.keeper.create("t", "b", settings=SETTINGS)
        old = replace(record, name="old", created_ms=1)
        await front.store.create(old)
        with redis.Redis.from_url(redis_url) as client:
            client.delete(keys_of("t", "old").meta)
            assert [one.name for one in (await front.keeper.page("t", page_size=5, page_token="")).records] == ["b"]
            assert client.zcard("rekindle:banks:t") == 1


def test_a_large_bank_is_measured_from_its_first_entry_to_a_search_after_a_write(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(entries=300, words=5, queries=2, as_json=True) == 0
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert figures.pop("entries") == 300
    assert set(figures) >= {"put_ms_each", "redis_mib", "first_search_s", "search_p99_ms", "after_write_p50_ms"}
    assert all(value >= 0 for value in figures.values())
