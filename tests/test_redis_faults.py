"""Conversations while Redis is slow, full, broken, forgetful, or somewhere else: no wrong token, no turn twice, and
what a worker can compute it does."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from functools import partial

import pytest
import redis

from benchmarks.fault_proxy import FaultProxy
from cache_store.embedded_redis import RedisServer
from protos import rekindle_pb2 as pb
from rekindle.errors import NotFound, Overloaded, RekindleError, Unavailable
from tests.redis_servers import RedisCluster, Watched, flush
from tests.systems import System, Truth, Turn, WorkerProcess, block_keys, chat, eventually, running_system, scrape

LONG = [number % 250 for number in range(400)]
"""Tokens of many blocks."""


class Behind:
    """A worker that reaches its Redis through a proxy; front ends reach it directly."""

    def __init__(self, server: RedisServer, proxy: FaultProxy, worker: WorkerProcess) -> None:
        self.server, self.proxy, self.worker = server, proxy, worker


@pytest.fixture(scope="module")
def started() -> Iterator[Behind]:
    with ExitStack() as stack:
        server = stack.enter_context(RedisServer())
        proxy = stack.enter_context(FaultProxy(server.port, seed=7))
        url = f"redis://127.0.0.1:{proxy.port}"
        worker = stack.enter_context(WorkerProcess("0", redis_url=url, redis_timeout_s=0.5, restore_timeout_s=2.0))
        yield Behind(server, proxy, worker)


@pytest.fixture
async def behind(started: Behind) -> AsyncIterator[Behind]:
    yield started
    started.proxy.heal()
    with redis.Redis.from_url(started.server.url) as client:
        client.config_set("maxmemory", 0)
    flush(started.server)
    await asked_for_blocks(started, yes=True)


@pytest.fixture
async def system(behind: Behind) -> AsyncIterator[System]:
    async with running_system(behind.server.url, [behind.worker]) as system:
        yield system


async def asked_for_blocks(behind: Behind, *, yes: bool) -> None:
    """Wait until the worker says that it asks Redis for blocks, or that it only probes it."""

    async def says_so() -> bool:
        return (await scrape(behind.worker.metrics_address))["rekindle_redis_available"] == yes

    await eventually(says_so, within_s=15)


async def parked(system: System, name: str) -> pb.Session:
    """A session of one turn whose KV is in Redis alone."""
    await system.client.create_session(name)
    await system.say([ord(letter) for letter in name] + LONG, name)
    await system.client.park_session(name, drop_host=True)
    return await system.client.get_session(name, with_token_ids=True)


async def until_done(system: System, text: str, session_id: str) -> Turn:
    """Say it until it is answered, as a user would."""
    turns: list[Turn] = []

    async def answered() -> bool:
        try:
            turns.append(await system.say(chat(text), session_id, timeout_s=5.0))
        except (RekindleError, TimeoutError):
            return False
        return True

    await eventually(answered, within_s=20)
    return turns[0]


@pytest.mark.parametrize(("delay_s", "restores"), [(0.001, True), (0.05, True), (30.0, False)])
async def test_a_slow_redis_costs_time_and_no_turn(
    behind: Behind, system: System, truth: Truth, delay_s: float, restores: bool
) -> None:
    session = await parked(system, f"slow-{delay_s:g}")
    behind.proxy.set(delay_s=delay_s)
    turn = await system.say(chat("How are you?"), session.session_id, timeout_s=10.0)
    assert (turn.receipt.redis_tokens > 0) is restores
    assert truth.confirms(await system.client.get_session(session.session_id, with_token_ids=True))


async def test_a_redis_that_breaks_off_in_the_middle_of_values_costs_no_turn(
    behind: Behind, system: System, truth: Truth
) -> None:
    with redis.Redis.from_url(behind.server.url) as client:
        for attempt in range(3):
            session = await parked(system, f"torn-{attempt}")
            size = len(client.get(block_keys(session)[0]) or b"")
            assert size > 1000
            behind.proxy.set(reset_within_bytes=4 * size)
            await system.say(chat("Are you whole?"), session.session_id, timeout_s=10.0)
            behind.proxy.heal()
            await asked_for_blocks(behind, yes=True)
            assert truth.confirms(await system.client.get_session(session.session_id, with_token_ids=True))


async def test_the_breaker_opens_closes_again_and_metrics_say_so(behind: Behind, system: System, truth: Truth) -> None:
    session = await parked(system, "breaker")
    behind.proxy.set(refused=True)
    for text in ("One.", "Two.", "Three."):
        await system.say(chat(text), session.session_id, timeout_s=10.0)
        with pytest.raises(Unavailable):
            await system.client.get_session(session.session_id, with_residency=True)
    await asked_for_blocks(behind, yes=False)
    front_says = await scrape(system.application.metrics_address)
    assert front_says["rekindle_front_redis_available"] == 1, "its own way to Redis is open"
    behind.proxy.heal()
    await asked_for_blocks(behind, yes=True)
    assert (await system.client.park_session(session.session_id, drop_host=True)).redis_tokens > 0
    turn = await system.say(chat("Four."), session.session_id)
    assert turn.receipt.redis_tokens > 0
    assert truth.confirms(await system.client.get_session(session.session_id, with_token_ids=True))


async def test_a_full_redis_takes_no_blocks_and_every_turn(behind: Behind, system: System, truth: Truth) -> None:
    session, other = await parked(system, "full"), await parked(system, "other")
    with redis.Redis.from_url(behind.server.url) as client:
        client.config_set("maxmemory", 1)
        for text in ("Is there room?", "And now?"):
            await system.say(chat(text), session.session_id)
        with pytest.raises((Overloaded, Unavailable)):
            await system.client.park_session(session.session_id, drop_host=True)
        await system.client.delete_session(other.session_id)
        assert (await scrape(behind.worker.metrics_address))["rekindle_redis_available"] == 1, "full is not down"
        client.config_set("maxmemory", 0)
    assert (await system.client.park_session(session.session_id, drop_host=True)).redis_tokens > 0
    turn = await system.say(chat("At last."), session.session_id)
    assert (turn.finished.turn, turn.receipt.computed_tokens < turn.receipt.redis_tokens) == (4, True)
    assert truth.confirms(await system.client.get_session(session.session_id, with_token_ids=True))


async def test_blocks_that_redis_lost_are_computed_and_the_others_come_from_it(
    behind: Behind, system: System, truth: Truth
) -> None:
    session = await parked(system, "lossy")
    keys = block_keys(session)
    lost = random.Random(5).sample(keys, len(keys) // 3)
    with redis.Redis.from_url(behind.server.url) as client:
        assert client.delete(*lost) == len(lost)
    turn = await system.say(chat("What is left?"), session.session_id)
    assert turn.receipt.redis_tokens > 0
    assert any(miss.reason == pb.MISS_REASON_ABSENT for miss in turn.receipt.misses)
    assert truth.confirms(await system.client.get_session(session.session_id, with_token_ids=True))


async def test_a_redis_that_comes_back_from_disk_has_every_session_and_its_blocks(
    behind: Behind, system: System, truth: Truth
) -> None:
    session = await parked(system, "saved")
    with redis.Redis.from_url(behind.server.url) as client:
        client.save()
    behind.server.kill()
    behind.server.start()
    turn = await until_done(system, "Do you remember?", session.session_id)
    assert turn.finished.turn == 2
    assert truth.confirms(await system.client.get_session(session.session_id, with_token_ids=True))
    with redis.Redis.from_url(behind.server.url) as client:
        assert all(client.exists(key) for key in block_keys(session)), "or it had started empty"


async def test_a_redis_that_comes_back_empty_has_forgotten_and_says_so(behind: Behind, system: System) -> None:
    session = await parked(system, "forgotten")
    flush(behind.server)
    behind.server.restart()

    async def is_forgotten() -> bool:
        try:
            await system.say(chat("Do you remember?"), session.session_id)
        except NotFound:
            return True
        except Unavailable:
            return False
        raise AssertionError("a turn of a session without a record")

    await eventually(is_forgotten)
    assert (await system.client.create_session(session.session_id)).version == 0


async def test_a_conversation_goes_on_when_the_replica_becomes_the_primary(
    watched_redis: Watched, truth: Truth
) -> None:
    with WorkerProcess("0", redis_url=watched_redis.url) as worker:
        async with running_system(watched_redis.url, [worker]) as system:
            session = await parked(system, "failed-over")
            await asyncio.to_thread(watched_redis.wait_for_replica)
            watched_redis.primary.kill()
            turn = await until_done(system, "Who are you now?", session.session_id)
            assert turn.finished.turn == 2
            await eventually(partial(system.is_serving, "redis"), within_s=15)
            parked_again = await eventual_park(system, session.session_id)
            again = await system.say(chat("And now?"), session.session_id)
            assert again.receipt.redis_tokens == parked_again.redis_tokens > 0
            assert truth.confirms(await system.client.get_session(session.session_id, with_token_ids=True))


async def eventual_park(system: System, session_id: str) -> pb.ParkSessionResponse:
    reports: list[pb.ParkSessionResponse] = []

    async def done() -> bool:
        try:
            reports.append(await system.client.park_session(session_id, drop_host=True))
        except RekindleError:
            return False
        return True

    await eventually(done, within_s=20)
    return reports[0]


async def test_a_slot_that_moves_costs_blocks_nothing_and_records_a_moment(
    redis_cluster: RedisCluster, truth: Truth
) -> None:
    with WorkerProcess("0", redis_url=redis_cluster.url) as worker:
        async with running_system(redis_cluster.url, [worker]) as system:
            session = await parked(system, "its-block")
            with redis_cluster.moving(block_keys(session)[0]) as move:
                await system.say(chat("It is about to move."), session.session_id)
                move.keys()
                await system.say(chat("It has moved, and they say ask."), session.session_id)
                move.slot()
                await system.say(chat("And now everybody knows."), session.session_id)
                assert truth.confirms(await system.client.get_session(session.session_id, with_token_ids=True))
                redis_cluster.flush()  # or the slot could not go back
            session = await parked(system, "its-record")
            with redis_cluster.moving("rekindle:{default/its-record}:meta") as move:
                move.keys()
                with pytest.raises(Unavailable):  # a cluster does not run scripts on a slot that is half here
                    await system.say(chat("Where are we?"), session.session_id, timeout_s=1.0)
                move.slot()
                turn = await until_done(system, "And now?", session.session_id)
                assert turn.finished.turn == 2
                assert truth.confirms(await system.client.get_session(session.session_id, with_token_ids=True))
                redis_cluster.flush()
