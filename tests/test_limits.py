"""What a tenant may have at once: counted right by all front ends together, and refused by name."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import redis

from cache_store.errors import LimitReached, SessionExists, SessionNotFound
from cache_store.open_records import open_records
from cache_store.records import Quota, RecordStore, SessionRecord, Usage
from protos import rekindle_pb2 as pb
from server.config import ServerConfig
from server.identity import Identities
from server.limits import Limits
from tests.fake_worker import FrontEnd, details_of, front_end
from tests.test_api_keys import add_key, bearer
from tests.test_records import NOW_MS, new_record, take_turn, turn


@pytest.fixture(params=["memory", "redis", "cluster"])
async def stores(request: pytest.FixtureRequest) -> AsyncIterator[Sequence[RecordStore]]:
    """One place that keeps records, as two front ends see it."""
    if request.param == "memory":
        records = open_records("memory://")
        yield [records, records]
        await records.aclose()
        return
    url = request.getfixturevalue("redis_url" if request.param == "redis" else "redis_cluster")
    both = [open_records(getattr(url, "url", url)) for _ in range(2)]
    for records in both:
        assert await records.available()  # as a front end does before it serves
    yield both
    for records in both:
        await records.aclose()


@pytest.fixture
def records(stores: Sequence[RecordStore]) -> RecordStore:
    return stores[0]


def fork(session_id: str, num_tokens: int) -> SessionRecord:
    return replace(new_record(session_id), token_ids=tuple(range(num_tokens)), num_tokens=num_tokens)


async def test_sessions_and_tokens_are_counted_as_they_come_and_go(records: RecordStore) -> None:
    assert await records.usage("t") == Usage(0, 0)
    await records.create(new_record("a"))
    await records.create(fork("b", 5))
    assert await records.usage("t") == Usage(2, 5)
    await take_turn(records, "a", [1, 2, 3])
    await take_turn(records, "a", [4, 5])
    assert await records.usage("t") == Usage(2, 10)
    assert await records.usage("u") == Usage(0, 0)
    await records.delete("t", "a")
    assert await records.usage("t") == Usage(1, 5)
    await records.delete("t", "b")
    assert await records.usage("t") == await records.recount("t") == Usage(0, 0)


async def test_as_many_sessions_as_a_tenant_may_have_are_created_however_many_try_at_once(
    stores: Sequence[RecordStore],
) -> None:
    async def try_to_create(number: int) -> bool:
        try:
            await stores[number % 2].create(new_record(f"s-{number}"), quota=Quota(sessions=7))
        except LimitReached as error:
            return error.limit != "max_sessions"
        return True

    created = await asyncio.gather(*(try_to_create(number) for number in range(24)))
    assert sum(created) == 7
    page = await stores[0].list("t", page_size=100, page_token="")
    assert len(page.records) == 7
    assert await stores[1].usage("t") == Usage(7, 0)


async def test_forks_are_made_while_there_is_room_for_their_tokens(records: RecordStore) -> None:
    quota = Quota(tokens=10)
    await records.create(fork("a", 6), quota=quota)
    with pytest.raises(LimitReached, match="max_tokens: this tenant may have 10"):
        await records.create(fork("b", 5), quota=quota)
    await records.create(fork("b", 4), quota=quota)
    await records.create(new_record("empty"), quota=quota)
    assert await records.usage("t") == Usage(3, 10)


async def test_a_taken_id_changes_no_count(records: RecordStore) -> None:
    await records.create(new_record("a"))
    await take_turn(records, "a", [1, 2, 3])
    with pytest.raises(SessionExists):
        await records.create(fork("a", 1), quota=Quota(sessions=1))
    assert await records.usage("t") == Usage(1, 3)


async def test_sessions_that_have_expired_are_counted_no_longer_after_a_look(records: RecordStore) -> None:
    await records.create(replace(new_record("old", created_ms=NOW_MS), ttl_s=1))
    await records.create(fork("kept", 4))
    await take_turn(records, "old", [1, 2])
    await asyncio.sleep(1.2)
    assert await records.recount("t") == Usage(1, 4)
    await records.create(new_record("old"), quota=Quota(sessions=2))
    assert await records.usage("t") == Usage(2, 4)


async def test_a_turn_whose_session_was_deleted_leaves_no_count(records: RecordStore) -> None:
    await records.create(new_record("a"))
    before = await records.begin("t", "a", holder="h", lease_s=10)
    await records.delete("t", "a")
    with pytest.raises(SessionNotFound):
        await records.commit(before, holder="h", new_tokens=[1], turn=turn(0, 0, 1), model="m", worker_id="0")
    assert await records.usage("t") == Usage(0, 0)


async def test_sessions_from_before_there_were_counts_are_counted_when_they_are_looked_at(redis_url: str) -> None:
    records = open_records(redis_url)
    await records.create(fork("a", 3))
    with redis.Redis.from_url(redis_url) as server:
        server.delete("rekindle:count:t")
    assert await records.usage("t") == Usage(0, 0)
    assert await records.recount("t") == Usage(1, 3)
    await records.aclose()


class Front:
    """A front end whose tenants have limits, and calls of theirs."""

    def __init__(self, front: FrontEnd, keys: dict[str, str]) -> None:
        self.front, self._keys = front, keys

    async def create(self, tenant: str, session_id: str = "") -> None:
        request = pb.CreateSessionRequest(session_id=session_id)
        await self.front.sessions.CreateSession(request, metadata=bearer(self._keys[tenant]))

    async def fork(self, tenant: str, session_id: str) -> None:
        request = pb.ForkSessionRequest(session_id=session_id)
        await self.front.sessions.ForkSession(request, metadata=bearer(self._keys[tenant]))

    async def delete(self, tenant: str, session_id: str) -> None:
        request = pb.DeleteSessionRequest(session_id=session_id)
        await self.front.sessions.DeleteSession(request, metadata=bearer(self._keys[tenant]))

    async def say(self, tenant: str, session_id: str = "") -> None:
        sampling = pb.Sampling(max_new_tokens=4)
        request = pb.GenerateRequest(session_id=session_id, text="four", sampling=sampling)
        async for _ in self.front.inference.Generate(request, metadata=bearer(self._keys[tenant])):
            pass


@pytest.fixture
async def limited(tmp_path: Path) -> AsyncIterator[Front]:
    file = tmp_path / "keys.toml"
    keys = {tenant: add_key(file, tenant) for tenant in ("small", "other")}
    with file.open("a") as content:
        content.write("[tenants.small]\nmax_sessions = 2\nmax_tokens = 10\nmax_turns = 1\n")
    async with front_end(api_keys=str(file), tenant_max_sessions=3) as front:
        yield Front(front, keys)


async def refused(call: Any) -> list[Any]:
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await call
    assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    info, quota, *rest = details_of(refusal.value)
    assert info.reason == "TENANT_LIMIT"
    return [quota.violations[0].subject, *rest]


async def test_more_sessions_than_a_tenant_may_have_are_refused_to_it_alone(limited: Front) -> None:
    for session_id in ("a", "b"):
        await limited.create("small", session_id)
    assert await refused(limited.create("small", "c")) == ["max_sessions"]
    for _ in range(3):
        await limited.create("other")
    assert await refused(limited.create("other")) == ["max_sessions"]  # the settings', as the file says nothing of it
    await limited.delete("small", "a")
    await limited.create("small", "c")


async def test_a_session_goes_on_until_its_tenant_has_all_the_tokens_that_it_may(limited: Front) -> None:
    await limited.create("small", "a")
    for _ in range(2):
        await limited.say("small", "a")  # eight tokens each: the second begins below the limit, and may end above it
    assert await refused(limited.say("small", "a")) == ["max_tokens"]
    assert await refused(limited.fork("small", "a")) == ["max_tokens"]
    await limited.say("small")  # keeps nothing
    await limited.delete("small", "a")
    await limited.create("small", "a")
    await limited.say("small", "a")


async def test_more_turns_at_once_than_a_tenant_may_run_are_asked_to_come_back(limited: Front) -> None:
    for worker in limited.front.workers.values():
        worker.pause_s = 0.2
    first = asyncio.create_task(limited.say("small"))
    await asyncio.sleep(0.1)
    name, retry = await refused(limited.say("small"))
    assert (name, retry.retry_delay.ToMilliseconds()) == ("max_turns", 500)
    await limited.say("other")
    await first
    await limited.say("small")


async def test_a_tenant_at_its_limit_has_its_sessions_looked_at_again_but_not_all_the_time() -> None:
    records = open_records("memory://")
    looked: list[str] = []
    recount = records.recount

    async def counting(tenant: str) -> Usage:
        looked.append(tenant)
        return await recount(tenant)

    records.recount = counting  # type: ignore[method-assign]
    limits = Limits(Identities(ServerConfig(tenant_max_sessions=1)), records, recount_s=60.0)
    await limits.create(new_record("a"))
    for _ in range(3):
        with pytest.raises(LimitReached):
            await limits.create(new_record("b"))
    assert looked == ["t"]
    await records.aclose()
