"""What happens to real conversations when parts of the system die, stall or are full. What was committed stays; what
was not leaves nothing behind."""

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from cache_store.embedded_redis import RedisServer
from protos import rekindle_pb2 as pb
from protos.status import DETAILS_KEY
from rekindle.errors import Busy, RekindleError, TimedOut, Unavailable
from tests.systems import BLOCK_TOKENS, System, Truth, WorkerProcess, chat, eventually, running_system, session_for

LONG = 900
"""Tokens that take the narrow worker a second or more."""

_TALKATIVE_CLIENT = """
import asyncio, sys
from rekindle.client import Client

async def main():
    async with Client(sys.argv[1]) as client:
        turn = client.generate("Are you there?", session_id=sys.argv[2], max_new_tokens=900, ignore_eos=True)
        async for delta in turn:
            print("a delta", flush=True)

asyncio.run(main())
"""


@pytest.fixture
def doomed(redis_server: RedisServer) -> Iterator[WorkerProcess]:
    """A worker on the shared Redis, to be killed."""
    with WorkerProcess("doomed", redis_url=redis_server.url) as worker:
        yield worker


@pytest.fixture
async def doomed_system(
    redis_url: str, doomed: WorkerProcess, workers: tuple[WorkerProcess, WorkerProcess]
) -> AsyncIterator[System]:
    """The doomed worker and another."""
    async with running_system(redis_url, [doomed, workers[0]]) as system:
        yield system


async def test_a_conversation_goes_on_elsewhere_when_its_worker_is_killed(
    doomed_system: System, doomed: WorkerProcess, workers: tuple[WorkerProcess, WorkerProcess], truth: Truth
) -> None:
    system = doomed_system
    parked = session_for("doomed", ["doomed", workers[0].worker_id])
    await system.client.create_session(parked)
    first = await system.say(chat("This one is parked before its worker dies."), parked)
    assert first.receipt.worker_id == "doomed"
    hot = (await system.client.fork_session(parked)).session_id
    await system.say(chat("And this one is not, and has a block that is not full."), hot)
    await system.client.park_session(parked)
    before = {id: (await system.client.get_session(id)).num_tokens - 1 for id in (parked, hot)}
    full = before[hot] // BLOCK_TOKENS * BLOCK_TOKENS
    assert full < before[hot]

    async def written_behind() -> bool:
        residency = (await system.client.get_session(hot, with_residency=True)).residency
        return any(where.tier == pb.TIER_REDIS and where.tokens == full for where in residency)

    await eventually(written_behind)
    doomed.kill()
    for session_id, in_redis in ((parked, before[parked]), (hot, full)):
        turn = await system.say(chat("Where are we?"), session_id)
        assert turn.receipt.worker_id == workers[0].worker_id
        found = turn.receipt.host_tokens + turn.receipt.device_tokens  # what the other session has brought already
        assert turn.receipt.redis_tokens + found == in_redis
        assert turn.receipt.redis_tokens > 0
        assert truth.confirms(await system.client.get_session(session_id, with_token_ids=True))
    assert not await system.is_serving("worker/doomed")
    assert await system.is_serving("")


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_p": 0.95, "frequency_penalty": 0.5, "seed": 11}])
async def test_a_turn_whose_worker_is_killed_goes_on_where_it_was(
    doomed_system: System,
    doomed: WorkerProcess,
    workers: tuple[WorkerProcess, WorkerProcess],
    truth: Truth,
    sampling: dict[str, Any],
) -> None:
    system, other = doomed_system, workers[0].worker_id
    session_id = (await system.client.create_session(session_for("doomed", ["doomed", other]))).session_id
    await system.say(chat(f"Nothing can happen to us, {sampling}."), session_id)
    undisturbed_id = (await system.client.fork_session(session_id)).session_id
    more: dict[str, Any] = {"max_new_tokens": 800, "ignore_eos": True, "stop": ["never to be found"], **sampling}
    generation = system.client.generate(chat("Tell me more."), session_id=session_id, **more)
    deltas = aiter(generation)
    for _ in range(20):
        await anext(deltas)
    doomed.kill()
    assert len(generation.token_ids) < 800, "it was over too early"
    await generation.read()
    assert generation.finished is not None
    assert generation.finished.receipt.worker_id == other
    undisturbed = await system.say(chat("Tell me more."), undisturbed_id, **more)
    assert generation.token_ids == undisturbed.token_ids
    assert generation.text == undisturbed.text
    session = await system.client.get_session(session_id, with_token_ids=True)
    assert (session.version, len(session.turns)) == (2, 2)
    if not sampling:
        assert truth.confirms(session)


async def test_a_worker_that_freezes_is_lost_too(
    redis_url: str, doomed: WorkerProcess, workers: tuple[WorkerProcess, WorkerProcess]
) -> None:
    async with running_system(redis_url, [doomed, workers[0]], worker_silence_s=1.0) as system:
        session_id = session_for("doomed", ["doomed", workers[0].worker_id])
        await system.client.create_session(session_id)
        generation = system.client.generate(
            chat("Stay."), session_id=session_id, max_new_tokens=600, ignore_eos=True, timeout_s=60
        )
        await anext(aiter(generation))
        doomed.freeze()
        await generation.read()
        assert generation.finished is not None
        assert generation.finished.receipt.worker_id == workers[0].worker_id
        assert len(generation.token_ids) == 600
        doomed.thaw()
        undisturbed = await system.say(chat("Stay."), max_new_tokens=600, ignore_eos=True)
        assert generation.token_ids == undisturbed.token_ids

        async def is_back() -> bool:
            return await system.is_serving("worker/doomed")

        await eventually(is_back)


async def needs_every_block(system: System) -> None:
    """Run a turn as long as the worker's whole pool: it would not fit beside a block that somebody forgot."""
    blocks = (await system.worker_stats("narrow")).device.capacity_blocks
    await system.say([7] * (blocks * BLOCK_TOKENS - 8), max_new_tokens=8, ignore_eos=True)


async def test_a_client_that_vanishes_in_mid_stream_leaves_nothing_running(narrow_system: System) -> None:
    system = narrow_system
    session_id = (await system.client.create_session()).session_id
    arguments = (sys.executable, "-c", _TALKATIVE_CLIENT, system.application.address, session_id)
    process = await asyncio.create_subprocess_exec(*arguments, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"a delta\n"
    assert (await system.worker_stats("narrow")).running == 1
    process.kill()
    await process.communicate()
    await eventually(system.is_idle, within_s=1.0)
    assert (await system.client.get_session(session_id)).version == 0
    assert (await system.say("Somebody else", session_id)).finished.turn == 1
    await needs_every_block(system)


async def test_a_full_queue_refuses_work_before_it_is_accepted(narrow_system: System) -> None:
    system = narrow_system
    session_id = (await system.client.create_session()).session_id

    def generate(text: str) -> Any:
        sampling = pb.Sampling(max_new_tokens=LONG, ignore_eos=True)
        return system.inference.Generate(pb.GenerateRequest(text=text, sampling=sampling))

    first = generate("I run")
    await first.read()
    second = generate("I wait")  # only now: calls made together arrive in any order
    waiting = asyncio.ensure_future(second.read())

    async def queue_is_full() -> bool:
        stats = await system.worker_stats("narrow")
        return (stats.running, stats.waiting) == (1, 1)

    await eventually(queue_is_full)
    third = system.inference.Generate(pb.GenerateRequest(text="I am too many", session_id=session_id))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await third.read()
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert retry_delay_s(refused.value) > 0
    for call in (first, second):
        call.cancel()
    await asyncio.wait([waiting])
    await eventually(system.is_idle, within_s=1.0)
    assert (await system.client.get_session(session_id)).version == 0
    assert (await system.say("Now there is room", session_id)).finished.turn == 1


def retry_delay_s(error: grpc.aio.AioRpcError) -> float:
    trailing: Any = error.trailing_metadata()  # pairs; grpc's stubs have it otherwise
    delay = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(delay) for detail in status_pb2.Status.FromString(dict(trailing)[DETAILS_KEY]).details)
    return float(delay.retry_delay.ToTimedelta().total_seconds())


async def test_a_deadline_that_passes_ends_the_work_too(narrow_system: System) -> None:
    system = narrow_system
    session_id = (await system.client.create_session()).session_id
    with pytest.raises(TimedOut):
        await system.client.generate(
            "No hurry", session_id=session_id, max_new_tokens=LONG, ignore_eos=True, timeout_s=0.3
        ).read()
    await eventually(system.is_idle, within_s=1.0)
    assert (await system.client.get_session(session_id)).version == 0
    assert (await system.say("In time", session_id)).finished.turn == 1
    await needs_every_block(system)


async def test_redis_may_be_absent_at_the_start_vanish_in_mid_run_and_come_back(own_redis: RedisServer) -> None:
    own_redis.stop()
    with WorkerProcess("0", redis_url=own_redis.url) as worker:
        async with running_system(own_redis.url, [worker]) as system:
            await without_redis(system)
            own_redis.start()
            await with_redis(system)
            own_redis.kill()
            await without_redis(system)
            own_redis.start()
            await with_redis(system)


async def test_a_session_survives_a_redis_that_stalls(
    own_redis: RedisServer, workers: tuple[WorkerProcess, WorkerProcess]
) -> None:
    async with running_system(own_redis.url, workers, redis_timeout_s=0.2, lease_s=600.0) as system:
        session_id = (await system.client.create_session()).session_id
        await system.say("Before the stall", session_id)
        own_redis.pause()
        with pytest.raises(Unavailable):
            await system.say("During it", session_id, timeout_s=1.0)
        own_redis.resume()

        async def goes_on() -> bool:
            try:
                turn = await system.say("After it", session_id)
            except Busy:  # the lock that nobody waited for any more may have been taken when Redis woke up
                return False
            return turn.finished.turn == 2

        await eventually(goes_on)


async def without_redis(system: System) -> None:
    """Turns go on, sessions wait, and health says so."""

    async def noticed() -> bool:
        return not await system.is_serving("redis")

    await eventually(noticed)
    assert await system.is_serving("")
    assert (await system.say("Nobody remembers this")).token_ids
    for attempt in (system.client.create_session(), system.say("Do you?", "some-session", timeout_s=1.0)):
        with pytest.raises(Unavailable):
            await attempt
    assert not (await system.client.stats()).redis.available


async def with_redis(system: System) -> None:
    """Sessions live, and park, without anybody having done anything."""

    async def recovered() -> bool:
        try:
            session_id = (await system.client.create_session()).session_id
            await system.say("Is there anybody to remember this?", session_id)
            parked = await system.client.park_session(session_id, drop_host=True)
            turn = await system.say("There is", session_id)
        except RekindleError:
            return False
        return parked.redis_tokens > 0 and turn.receipt.redis_tokens == parked.redis_tokens

    await eventually(recovered, within_s=15)
    await eventually(partial(system.is_serving, "redis"), within_s=15)  # health looks now and then
    assert (await system.client.stats()).redis.available
