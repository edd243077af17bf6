"""Workers say which blocks they hold, and turns go where most of their prompt is, unless that worker is busy."""

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from typing import Any

import pytest

from cache_store.ids import BlockHash, root_hash
from cache_store.records import SessionRecord
from protos import rekindle_pb2 as pb
from protos import rekindle_worker_pb2 as wpb
from protos.status import abort
from server.holdings import Prompt, _Model
from server.relay import Turn
from tests.engines import TENANT, EngineFactory, generate, start
from tests.fake_engine import FakeEngine
from tests.fake_worker import FakeWorker, front_end
from tests.systems import System, WorkerProcess, chat, eventually, running_system, session_for
from worker.block_changes import BlockChanges
from worker.engine.prefix import full_names
from worker.errors import Draining
from worker.figures import BlocksHeld
from worker.publisher import Publisher
from worker.status import failure_of


def name(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(16, "big"))


def names(*numbers: int) -> bytes:
    return b"".join(map(name, numbers))


# Of one tier


def test_changes_are_told_once_as_they_are_now() -> None:
    changes = BlockChanges()
    changes.tell(name(1), True)
    assert changes.take() == ([], []), "nobody listened"
    changes.listen(True)
    for number, is_here in ((1, True), (2, True), (1, False), (3, False), (3, True)):
        changes.tell(name(number), is_here)
    assert changes.take() == ([name(2), name(3)], [name(1)])
    assert changes.take() == ([], [])
    changes.tell(name(4), True)
    changes.listen(False)
    assert changes.take() == ([], [])


def test_changes_told_by_many_threads_are_all_heard() -> None:
    changes = BlockChanges()
    changes.listen(True)
    heard: set[BlockHash] = set()

    def tell(first: int) -> None:
        for number in range(first, first + 2000):
            changes.tell(name(number), True)

    threads = [threading.Thread(target=tell, args=(2000 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        heard.update(changes.take().stored)
    heard.update(changes.take().stored)
    assert len(heard) == 8000


# Of an engine


def test_an_engine_says_what_came_and_what_went(build_engine: EngineFactory) -> None:
    engine = build_engine(device_cache_bytes=2 << 20, host_cache_bytes=1 << 20)
    tokens = [[(place * 7 + number) % 300 + 5 for place in range(160)] for number in range(6)]
    generate(engine, (), tokens[0])
    before = engine.blocks_held().result(5)
    assert set(full_names(root_hash(engine.fingerprint, TENANT), tokens[0], 16)) <= set(before.device)
    engine.watch_blocks(True)
    here = {"device": set(before.device), "host": set(before.host)}
    for prompt in tokens[1:]:
        generate(engine, (), prompt)
    engine.drop(TENANT, tokens[1], with_redis=False).result(10)
    engine.check()
    stored, removed = engine.blocks_changed()
    now = engine.blocks_held().result(5)
    for tier in ("device", "host"):
        came, went = set(getattr(stored, tier)), set(getattr(removed, tier))
        assert not came & went
        assert went, "the test has to evict"
        assert (here[tier] - went) | came == set(getattr(now, tier))
    engine.watch_blocks(False)


def test_a_busy_engine_says_so(build_engine: EngineFactory) -> None:
    engine = build_engine(max_running=1)
    generate(engine, (), range(5, 300))  # measured: what a token costs
    idle = engine.load().result(5)
    assert idle.queue_s == 0.0
    assert 0 < idle.token_s < 1
    assert 0 < idle.host_byte_s < 1e-3
    assert idle.redis_byte_s == float("inf"), "it has none"
    streams = [start(engine, (), range(5, 300), max_new_tokens=200) for _ in range(3)]
    streams[0].next()
    assert engine.load().result(5).queue_s > 0
    for stream in streams:
        stream.result()


# Of a worker


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


async def test_who_watches_gets_a_snapshot_and_then_what_changes(engine: FakeEngine) -> None:
    publisher = Publisher(engine, interval_s=0.01)
    engine.held = BlocksHeld([name(1)], [name(2), name(3)])
    async with aclosing(publisher.watch()) as events:
        first = await anext(events)
        assert first.is_snapshot
        assert (first.device_stored, first.host_stored) == (names(1), names(2, 3))
        assert first.load.queue_s == 0.5
        engine.changed = (BlocksHeld([name(4)]), BlocksHeld([name(1)], [name(2)]))
        second = await anext(events)
        assert (second.number, second.is_snapshot) == (first.number + 1, False)
        assert (second.device_stored, second.device_removed, second.host_removed) == (names(4), names(1), names(2))
        assert (await anext(events)).number == first.number + 2, "how busy it is comes anyway"
    assert engine.watched == [True, False]


async def test_a_watcher_that_does_not_keep_up_begins_again(engine: FakeEngine) -> None:
    publisher = Publisher(engine, interval_s=0.001)
    async with aclosing(publisher.watch()) as slow, aclosing(publisher.watch()) as quick:
        await anext(slow)
        numbers = [(await anext(quick)).number]
        while len(numbers) < 70:
            engine.changed = (BlocksHeld([name(len(numbers))]), BlocksHeld())
            numbers.append((await anext(quick)).number)
        assert numbers == list(range(numbers[0], numbers[0] + 70)), "nothing is lost to one who does"
        engine.held = BlocksHeld([name(1), name(2)])
        async for event in slow:
            if event.is_snapshot:
                assert event.device_stored == names(1, 2)
                break
    assert engine.watched == [True, False]


async def test_a_publisher_that_failed_begins_again(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    publisher = Publisher(engine, interval_s=0.01)
    engine.held = BlocksHeld([name(1)])
    async with aclosing(publisher.watch()) as events:
        assert (await anext(events)).is_snapshot
        with monkeypatch.context() as failing:
            failing.setattr(engine, "blocks_changed", lambda: 1 / 0)
            engine.held = BlocksHeld([name(1), name(2)])
            async with asyncio.timeout(5):
                while not (event := await anext(events)).is_snapshot:
                    pass
        assert event.device_stored == names(1, 2)
        engine.refusal = Draining("this worker is gone")
        with pytest.raises(Draining):
            async for _ in events:
                pass
    assert engine.watched[-1] is False


# Of a front end


async def test_what_is_known_of_a_sessions_next_prompt_is_what_was_committed() -> None:
    """New tokens may never be said, and the names of a session's blocks are kept: they would stay wrong."""
    async with front_end(1) as front:
        relay = front.app._turns._workers
        record = SessionRecord(
            tenant="t", session_id="s", version=1, model="", created_ms=1, last_used_ms=1, ttl_s=0, pinned=False,
            worker_id="", token_ids=(5, 6, 7), num_tokens=3,
        )  # fmt: skip
        request = pb.GenerateRequest(session_id="s", tokens=pb.TokenInput(token_ids=[8, 9]))
        assert relay._prompt(Turn("t", request, "r", None, record=record)).tokens == (5, 6, 7)
        request.session_id = ""
        assert relay._prompt(Turn("t", request, "r", None)).tokens == (8, 9)


async def test_a_worker_that_was_leaving_is_followed_as_soon_as_it_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0

    async def watch(worker: FakeWorker, request: wpb.WatchRequest, context: Any) -> AsyncIterator[wpb.BlockEvents]:
        nonlocal asked
        asked += 1
        if asked == 1:
            await abort(context, failure_of(Draining("this worker is leaving"), "fake"))
        yield wpb.BlockEvents(number=1, is_snapshot=True, load=wpb.Load(token_s=0.01))
        await asyncio.Event().wait()

    monkeypatch.setattr(FakeWorker, "Watch", watch)
    async with front_end(1) as front:
        holdings, able = front.app._holdings, front.app.directory.living()

        async def is_followed() -> bool:
            return holdings.choose(Prompt("t", "raw", range(32), key="any"), able) is not None

        await eventually(is_followed)
        able[0].description = wpb.DescribeReply(fingerprint="another")
        assert holdings.choose(Prompt("t", "raw", range(32), key="any"), able, model="f00d") is None


@pytest.fixture(scope="module")
def alone() -> Iterator[Sequence[WorkerProcess]]:
    """Workers without Redis: what one of them has costs the other its computation."""
    with WorkerProcess("0") as first, WorkerProcess("1") as second:
        assert first.address != second.address
        yield first, second


def test_a_session_is_not_taken_from_its_worker_only_because_that_has_not_told_yet_what_it_holds() -> None:
    model = _Model(wpb.DescribeReply(block_tokens=4, block_bytes=100, names_from=bytes(16)))
    told = wpb.BlockEvents(number=1, is_snapshot=True, load=wpb.Load(token_s=0.01, host_byte_s=1e-6))
    prompt = Prompt("t", "raw", range(16), key="s")
    model.take("other", told)
    assert model.choose(prompt, ["other", "last"], "") == "other"
    assert model.choose(prompt, ["other", "last"], "last") is None
    assert model.choose(prompt, ["other"], "last") == "other", "it has gone"
    model.take("last", told)
    assert model.choose(prompt, ["other", "last"], "last") == "last"
    model.leave("last")
    assert model.choose(prompt, ["other", "last"], "last") is None


@pytest.fixture
async def system_apart(redis_url: str, alone: Sequence[WorkerProcess]) -> AsyncIterator[System]:
    async with running_system(redis_url, alone) as system:
        yield system


async def test_a_turn_goes_where_its_history_is_hot_though_another_served_it_last(system_apart: System) -> None:
    """A fork's record says nothing of where the blocks are now: the workers do."""
    system = system_apart
    home, other = "0", "1"
    session_id = session_for(home, [home, other])
    await system.client.create_session(session_id)
    first = await system.say(chat("Remember where you are. " * 60), session_id)
    assert first.receipt.worker_id == home
    tokens = list((await system.client.get_session(session_id, with_token_ids=True)).token_ids)

    holdings, able = system.application._holdings, system.application.directory.living()

    async def is_known() -> bool:
        chosen = holdings.choose(Prompt("default", "raw", tokens, key="any"), able)
        return chosen is not None and chosen.worker_id == home

    await eventually(is_known)
    turns = [await system.say([*tokens, 9, 8, 7, number], max_new_tokens=1) for number in range(12)]
    served = Counter(turn.receipt.worker_id for turn in turns)
    assert served[home] >= 9, "no session says so: its blocks do (a busy machine may make it look busy now and then)"


async def test_many_turns_on_one_prefix_spread_over_the_workers(system: System) -> None:
    """Redis has it for both."""
    tokens = [(place * 11) % 300 + 5 for place in range(600)]
    await system.say(tokens, max_new_tokens=1)

    async def ask(number: int) -> str:
        turn = await system.say([*tokens, 5 + number], max_new_tokens=24, ignore_eos=True)
        return str(turn.receipt.worker_id)

    served: Sequence[str] = []
    for _ in range(5):
        served = await asyncio.gather(*(ask(number) for number in range(24)))
        if len(set(served)) == 2:
            break
    assert set(served) == {"0", "1"}


async def test_a_worker_that_died_holds_nothing(redis_url: str, workers: tuple[WorkerProcess, WorkerProcess]) -> None:
    with WorkerProcess("doomed", redis_url=redis_url) as doomed:
        async with running_system(redis_url, [doomed, workers[0]]) as system:
            session_id = session_for("doomed", ["doomed", workers[0].worker_id])
            await system.client.create_session(session_id)
            await system.say(chat("Here today. " * 20), session_id)
            doomed.kill()
            turn = await system.say(chat("And tomorrow?"), session_id)
            assert turn.receipt.worker_id == workers[0].worker_id
