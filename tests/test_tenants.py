"""Two tenants on one system: neither sees, meets or measures anything of the other."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import pytest
import redis

from cache_store import redis_records
from cache_store.ids import tenant_mark
from protos import rekindle_pb2 as pb
from rekindle.client import Client
from rekindle.errors import NotFound
from server.metrics import OTHER_TENANTS, FrontMetrics
from tests.systems import BLOCK_TOKENS, System, WorkerProcess, chat, eventually, running_system, scrape
from tests.test_api_keys import add_key

LONG = "A prompt of many blocks, so that there is something to share. " * 4
HOT = "Another one, which stays on the device that computed it. " * 4


class Tenants:
    """A real system, and a client of each tenant and of an operator."""

    def __init__(self, system: System, acme: Client, other: Client, operator: Client) -> None:
        self.system, self.acme, self.other, self.operator = system, acme, other, operator


@pytest.fixture
async def tenants(
    redis_url: str, workers: tuple[WorkerProcess, WorkerProcess], tmp_path: Path
) -> AsyncIterator[Tenants]:
    file = tmp_path / "keys.toml"
    names = ("acme", "other", "operators")
    keys = [add_key(file, name, operator=name == "operators") for name in names]
    async with AsyncExitStack() as stack:
        system = await stack.enter_async_context(running_system(redis_url, workers, api_keys=str(file)))
        clients = [
            await stack.enter_async_context(Client(system.application.address, api_key=key, timeout_s=20.0))
            for key in keys
        ]
        yield Tenants(system, *clients)


async def say(client: Client, text: str, session_id: str = "") -> pb.Receipt:
    generation = client.generate(chat(text), session_id=session_id, max_new_tokens=4)
    await generation.read()
    assert generation.receipt is not None
    return generation.receipt


def from_tiers(receipt: pb.Receipt) -> int:
    return receipt.device_tokens + receipt.host_tokens + receipt.disk_tokens + receipt.redis_tokens


async def test_one_session_id_is_two_conversations_and_each_is_listed_to_its_own(tenants: Tenants) -> None:
    for client, text in ((tenants.acme, "I am of acme."), (tenants.other, "I am another, and say more.")):
        await client.create_session("s")
        await say(client, text, "s")
    acme, other = [await c.get_session("s", with_token_ids=True) for c in (tenants.acme, tenants.other)]
    assert acme.num_tokens != other.num_tokens
    await tenants.other.create_session("theirs")
    assert [session.session_id async for session in tenants.acme.list_sessions()] == ["s"]
    assert [session.session_id async for session in tenants.operator.list_sessions()] == []
    await tenants.acme.delete_session("s")
    assert (await tenants.other.get_session("s", with_token_ids=True)).token_ids == other.token_ids


async def test_a_session_of_another_tenant_is_not_found_whatever_is_asked(tenants: Tenants) -> None:
    await tenants.acme.create_session("mine")
    await say(tenants.acme, "hello", "mine")
    before = await tenants.acme.get_session("mine")
    other = tenants.other
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: other.get_session("mine", with_text=True, with_residency=True, user_is_typing=True),
        lambda: other.update_session("mine", pinned=True),
        lambda: other.fork_session("mine"),
        lambda: other.park_session("mine", drop_host=True),
        lambda: other.warm_session("mine"),
        lambda: other.delete_session("mine"),
        lambda: say(other, "go on", "mine"),
        lambda: tenants.operator.get_session("mine"),
    ]
    for call in calls:
        with pytest.raises(NotFound) as theirs:
            await call()
        with pytest.raises(NotFound) as nobodys:
            await other.get_session("nobodys")
        assert theirs.value.message == nobodys.value.message.replace("nobodys", "mine")
    assert await tenants.acme.get_session("mine") == before


async def test_equal_prompts_of_two_tenants_share_no_block_in_any_tier(tenants: Tenants) -> None:
    for client in (tenants.acme, tenants.other):
        await client.create_session("s")
    assert from_tiers(await say(tenants.acme, HOT)) == 0
    assert from_tiers(await say(tenants.acme, HOT)) > 0  # to its own tenant a prefix is a hit
    assert from_tiers(await say(tenants.other, HOT)) == 0
    first = await say(tenants.acme, LONG, "s")
    await tenants.acme.park_session("s", drop_host=True)
    parked = await say(tenants.other, LONG, "s")
    assert (from_tiers(parked), parked.computed_tokens) == (0, first.computed_tokens)
    assert {miss.reason for miss in parked.misses} == {miss.reason for miss in first.misses}
    residency = (await tenants.other.get_session("s", with_residency=True)).residency
    assert all(lies.tokens <= parked.computed_tokens + 4 for lies in residency)


async def test_stats_of_a_tenant_are_its_own_and_an_operators_are_the_clusters(tenants: Tenants) -> None:
    cost = await say(tenants.acme, "Count me once.")
    acme, other = await tenants.acme.stats(), await tenants.other.stats()
    assert acme.prompt_tokens.computed == cost.computed_tokens
    assert other == pb.CacheStats(prompt_tokens=pb.TokensBySource())
    for stats in (acme, other):
        assert not stats.workers
        assert not stats.HasField("redis")
    whole = await tenants.operator.stats()
    assert len(whole.workers) == 2
    assert whole.redis.available
    assert whole.prompt_tokens.computed >= cost.computed_tokens
    samples = await scrape(tenants.system.application.metrics_address)
    name = "rekindle_front_tenant_tokens_total"
    assert samples[f"{name}{{source=computed,tenant=acme}}"] == cost.computed_tokens
    assert samples[f"{name}{{source=completion,tenant=acme}}"] == 4
    assert not any("tenant=other" in sample for sample in samples)


async def test_all_that_a_tenant_has_is_erased_from_every_tier_and_nothing_of_another(
    tenants: Tenants, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_records, "_CREATING_MS", 500)  # so that the session that expires counts as one that was
    for client in (tenants.acme, tenants.other):
        for session_id in ("a", "b"):
            await client.create_session(session_id)
            await say(client, f"Erase me. {LONG} {session_id}", session_id)
        await say(client, f"Of no session. {LONG}")
        await client.create_session("brief", ttl_s=1)
        await say(client, f"Gone before. {LONG}", "brief")
        async with client.generate(f"Never mind. {LONG}", session_id="b", max_new_tokens=2000) as interrupted:
            await anext(aiter(interrupted))
    await tenants.acme.fork_session("a", new_session_id="fork")
    for client in (tenants.acme, tenants.other):
        await eventually(partial(is_gone, client, "brief"))
        for session_id in ("a", "b"):
            await client.park_session(session_id)
            await client.warm_session(session_id)
    sessions = [await tenants.acme.get_session(name) for name in ("a", "b", "fork")]
    await eventually(lambda: is_idle(tenants.operator))
    with redis.Redis.from_url(redis_url) as server:
        mine, theirs = (blocks_of(server, name) for name in ("acme", "other"))
        erased = await tenants.acme.erase_tenant()
        assert (erased.sessions, erased.tokens) == (3, sum(session.num_tokens for session in sessions))
        assert erased.redis_blocks >= mine > blocks_in(sessions), "what no session names, too"
        assert min(erased.device_blocks, erased.host_blocks) > 0
        assert (blocks_of(server, "acme"), blocks_of(server, "other")) == (0, theirs)
        assert await tenants.acme.erase_tenant() == pb.EraseTenantResponse()
        left = [key for key in server.keys("rekindle:*") if b"acme" in key]
        assert all(key.endswith(b":gone") and server.ttl(key) <= 300 for key in left)  # ids of calls, for minutes
    await tenants.acme.create_session("a")
    for text, session_id in ((f"Erase me. {LONG} a", "a"), (f"Of no session. {LONG}", "")):
        assert from_tiers(await say(tenants.acme, text, session_id)) == 0  # no worker has kept any of it
    assert [session.session_id async for session in tenants.other.list_sessions()] == ["b", "a"]
    before = await tenants.other.get_session("a")
    assert from_tiers(await say(tenants.other, "Still there?", "a")) == before.num_tokens - 1


async def is_idle(operator: Client) -> bool:
    return not any(worker.running or worker.waiting for worker in (await operator.stats()).workers)


async def is_gone(client: Client, session_id: str) -> bool:
    try:
        await client.get_session(session_id)
    except NotFound:
        return True
    return False


def blocks_of(server: redis.Redis, tenant: str) -> int:
    """How many blocks of a tenant's Redis has."""
    return sum(tenant_mark(tenant).hex().encode() in key for key in server.scan_iter("rekindle:b:*"))


def blocks_in(sessions: Iterable[pb.Session]) -> int:
    """At most so many blocks the sessions name."""
    return sum(-(-session.num_tokens // BLOCK_TOKENS) for session in sessions)


def test_however_many_tenants_there_are_the_metrics_name_a_few() -> None:
    metrics = FrontMetrics(most_tenants=2)
    finished = pb.Finished(receipt=pb.Receipt(computed_tokens=3), usage=pb.Usage(completion_tokens=1))
    for tenant in ("a", "b", "c", "d", "a", "c"):
        metrics.turn_finished(finished, tenant=tenant, ttft_s=0.1, decode_s=0.1)
    counted = {
        sample.labels["tenant"]: sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "rekindle_front_tenant_tokens_total" and sample.labels["source"] == "computed"
    }
    assert counted == {"a": 6, "b": 3, OTHER_TENANTS: 9}
    assert metrics.prompt_tokens_of("c")["computed"] == 6
    assert metrics.prompt_tokens_of("e")["computed"] == 0
