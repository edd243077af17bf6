"""A hint that the user is typing: the session is restored behind the caller, who does not wait for it."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from protos import rekindle_pb2 as pb
from tests.fake_worker import FrontEnd, front_end
from worker.errors import Overloaded


@pytest.fixture
async def front() -> AsyncIterator[FrontEnd]:
    """One worker, which holds back what it is asked to restore until a test lets it."""
    async with front_end(num_workers=1) as front:
        yield front
        front.workers["0"].may_warm.set()


async def parked(front: FrontEnd, session_id: str = "s") -> None:
    await front.new_session(session_id)
    await front.turn(f"{session_id}-1", session_id)
    await front.sessions.ParkSession(pb.ParkSessionRequest(session_id=session_id, drop_host=True))


async def outcomes(front: FrontEnd, **expected: int) -> None:
    """Wait until hints have come to this."""

    def seen() -> dict[str, int]:
        samples = [sample for family in front.app.metrics.registry.collect() for sample in family.samples]
        counts = {s.labels["outcome"]: int(s.value) for s in samples if s.name == "rekindle_front_prefetches_total"}
        return {outcome: count for outcome, count in counts.items() if count}

    give_up = time.monotonic() + 5
    while seen() != expected:
        assert time.monotonic() < give_up, f"hints came to {seen()}"
        await asyncio.sleep(0.01)


async def warms(front: FrontEnd, count: int) -> None:
    """Wait until the worker was asked so often, and see that it is not asked again."""
    give_up = time.monotonic() + 5
    while (asked := front.workers["0"].calls.count("warm")) < count:
        assert time.monotonic() < give_up, f"asked {asked} times"
        await asyncio.sleep(0.01)
    assert asked == count


async def test_the_session_is_hot_when_the_user_has_typed(front: FrontEnd) -> None:
    await parked(front)
    assert (await front.session(user_is_typing=True)).num_tokens == 11
    await outcomes(front, restored=1)
    assert (await front.turn("two", "s")).finished.receipt.device_tokens == 11
    await front.session(user_is_typing=True)
    await outcomes(front, restored=1, hot=1)


async def test_the_answer_does_not_wait_and_hints_for_one_session_are_one_restore(front: FrontEnd) -> None:
    await parked(front)
    front.workers["0"].may_warm.clear()
    for _ in range(5):
        assert (await front.session(user_is_typing=True)).num_tokens == 11
    await warms(front, 1)
    await outcomes(front, joined=4)
    front.workers["0"].may_warm.set()
    await outcomes(front, joined=4, restored=1)


async def test_a_turn_that_comes_in_the_middle_is_not_refused(front: FrontEnd) -> None:
    await parked(front)
    front.workers["0"].may_warm.clear()
    await front.session(user_is_typing=True)
    await warms(front, 1)
    assert (await front.turn("two", "s")).finished.turn == 2


async def test_further_hints_are_forgotten_while_many_sessions_are_being_restored(front: FrontEnd) -> None:
    names = [f"s{number}" for number in range(18)]
    for name in names:
        await parked(front, name)
    front.workers["0"].may_warm.clear()
    for name in names:
        await front.session(name, user_is_typing=True)
    await warms(front, 16)
    await outcomes(front, refused=2)
    front.workers["0"].may_warm.set()
    await outcomes(front, refused=2, restored=16)


async def test_a_hint_that_comes_to_nothing_fails_nobody(front: FrontEnd) -> None:
    await parked(front)
    front.workers["0"].refuse_with = Overloaded("no room", 1.0)
    assert (await front.session(user_is_typing=True)).num_tokens == 11
    await outcomes(front, failed=1)
    front.workers["0"].refuse_with = None
    await front.kill("0")
    assert (await front.session(user_is_typing=True)).num_tokens == 11
    await outcomes(front, failed=2)


async def test_nothing_is_restored_unasked_or_of_an_empty_session(front: FrontEnd) -> None:
    await parked(front)
    await front.session()
    await front.new_session("empty")
    await front.session("empty", user_is_typing=True)
    await front.session(user_is_typing=True)
    await outcomes(front, restored=1)
    await warms(front, 1)


@pytest.mark.parametrize("method", ["ParkSession", "DeleteSession"])
async def test_what_is_parked_or_deleted_is_not_put_back(front: FrontEnd, method: str) -> None:
    await parked(front)
    front.workers["0"].may_warm.clear()
    await front.session(user_is_typing=True)
    await warms(front, 1)
    request = getattr(pb, f"{method}Request")(session_id="s")
    call = asyncio.ensure_future(getattr(front.sessions, method)(request))
    await asyncio.sleep(0.2)
    assert not call.done(), "it waits for what would be put back"
    front.workers["0"].may_warm.set()
    await call
    assert not front.workers["0"].device


async def test_closing_stops_what_is_being_restored(front: FrontEnd) -> None:
    await parked(front)
    front.workers["0"].may_warm.clear()
    await front.session(user_is_typing=True)
    await warms(front, 1)
    await front.app.aclose()
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("prefetch")]
