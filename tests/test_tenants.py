"""Two tenants on one system: neither sees, meets or measures anything of the other."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import redis

from protos import rekindle_pb2 as pb
from rekindle.client import Client
from rekindle.errors import NotFound
from server.metrics import OTHER_TENANTS, FrontMetrics
from tests.systems import System, WorkerProcess, chat, running_system, scrape
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
    tenants: Tenants, redis_url: str
) -> None:
    for client in (tenants.acme, tenants.other):
        for session_id in ("a", "b"):
            await client.create_session(session_id)
            await say(client, f"Erase me. {LONG} {session_id}", session_id)
    await tenants.acme.fork_session("a", new_session_id="fork")
    for session_id in ("a", "b"):
        await tenants.acme.park_session(session_id)
        await tenants.acme.warm_session(session_id)
    sessions = [await tenants.acme.get_session(name, with_residency=True) for name in ("a", "b", "fork")]
    tiers = {lies.tier for session in sessions for lies in session.residency}
    assert tiers == {pb.TIER_DEVICE, pb.TIER_HOST, pb.TIER_REDIS}
    with redis.Redis.from_url(redis_url) as server:
        await tenants.other.park_session("a")
        await tenants.other.park_session("b")
        blocks = len(server.keys("rekindle:b:*"))
        erased = await tenants.acme.erase_tenant()
        assert (erased.sessions, erased.tokens) == (3, sum(session.num_tokens for session in sessions))
        assert min(erased.device_blocks, erased.host_blocks) > 0
        assert len(server.keys("rekindle:b:*")) == blocks - erased.redis_blocks == blocks // 2
        left = [key for key in server.keys("rekindle:*") if b"acme" in key]
        assert all(key.endswith(b":gone") and server.ttl(key) <= 300 for key in left)  # ids of calls, for minutes
    await tenants.acme.create_session("a")
    assert from_tiers(await say(tenants.acme, f"Erase me. {LONG} a", "a")) == 0  # no worker has kept any of it
    assert [session.session_id async for session in tenants.other.list_sessions()] == ["b", "a"]
    assert from_tiers(await say(tenants.other, "Still there?", "a")) > 0


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
