"""Banks that a Redis 8 searches itself. Skipped where the redis-server on the PATH is an older one."""

from collections.abc import AsyncIterator

import numpy as np
import pytest
import redis

from cache_store.bank_keys import keys_of
from cache_store.bank_store import BankStore
from cache_store.banks import BankSettings, EntryFilter
from cache_store.embedded_redis import RedisServer
from cache_store.open_banks import open_banks
from server.banks.keeper import BankKeeper
from tests.fake_embedding import FakeEmbedding, vector_of
from tests.keyrings import keyring
from tests.redis_servers import command


@pytest.fixture
def redis8(own_redis: RedisServer) -> RedisServer:
    with redis.Redis.from_url(own_redis.url) as client:
        if int(client.info("server")["redis_version"].split(".")[0]) < 8:
            pytest.skip("this redis-server has no vector sets")
    return own_redis


@pytest.fixture
async def store(redis8: RedisServer) -> AsyncIterator[BankStore]:
    store = open_banks(redis8.url, vector_sets=True)
    yield store
    await store.aclose()


async def test_redis_finds_what_a_look_at_every_vector_finds(store: BankStore, redis8: RedisServer) -> None:
    embedding = FakeEmbedding()
    keeper, exact = (BankKeeper(store, embedding, exact_rows=rows) for rows in (10, 1000))
    bank = await keeper.create("t", "b", settings=BankSettings())
    assert bank.has_vector_set
    words = [f"w{number % 17} v{number % 13} u{number}" for number in range(300)]
    ids = [(await keeper.remember("t", "b", text=text, metadata={"odd": text[-1]})).id for text in words]
    for where in (EntryFilter(), EntryFilter(metadata={"odd": "3"})):
        found, expected = [await one.recall("t", "b", "w3 v5", k=20, where=where, peek=True) for one in (keeper, exact)]
        assert [one.entry.id for one in found] == [one.entry.id for one in expected]
    await keeper.forget("t", "b", ids=ids[::2])
    nearest = await store.near(bank, vector_of("w3 v5"), 150)
    assert sorted(nearest) == sorted(ids[1::2])
    embedding.embedder, embedding.dim = "other", 32
    assert [step async for step in keeper.reembed("t", "b")][-1] == (150, 150)
    assert len(await store.near(bank, np.ones(32, np.float32), 500)) == 150
    assert len(await keeper.recall("t", "b", "w3 v5")) == 8
    with redis.Redis.from_url(redis8.url) as client:
        assert command(client, "VDIM", keys_of("t", "b").near) == 32
    await keeper.delete("t", "b")
    await keeper.aclose()
    await exact.aclose()


async def test_a_sealed_bank_has_no_vector_set(redis8: RedisServer) -> None:
    sealed = open_banks(redis8.url, keyring=keyring(), vector_sets=True)
    keeper = BankKeeper(sealed, FakeEmbedding())
    assert not (await keeper.create("t", "b", settings=BankSettings())).has_vector_set
    await sealed.aclose()


async def test_an_older_redis_has_none_and_all_works_without(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        if int(client.info("server")["redis_version"].split(".")[0]) >= 8:
            pytest.skip("this redis-server has vector sets")
    older = open_banks(redis_url, vector_sets=True)
    keeper = BankKeeper(older, FakeEmbedding(), exact_rows=1)
    assert not (await keeper.create("t", "b", settings=BankSettings())).has_vector_set
    await keeper.remember("t", "b", text="a cat", metadata={})
    assert len(await keeper.recall("t", "b", "cat")) == 1
    await keeper.aclose()
    await older.aclose()
