"""A whole deployment under every fault once; and that its judges would notice."""

import json
import random
from collections.abc import AsyncIterator

import pytest

from benchmarks.chaos import run
from benchmarks.chaos_faults import KINDS
from benchmarks.chaos_load import Clients, Script, Speaker, Tally, undisturbed
from protos import rekindle_pb2 as pb
from tests.fake_worker import FrontEnd, front_end

SCRIPT = Script(("Hello.", "Are you there?"), {"max_new_tokens": 8})


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_conversations_come_through_every_fault_as_if_nothing_had_been(capsys: pytest.CaptureFixture[str]) -> None:
    status = run(minutes=0, seed=3, as_json=True)
    said = capsys.readouterr().out
    assert status == 0, said
    assert set(KINDS) <= set(json.loads(said)["figures"])


@pytest.fixture
async def front() -> AsyncIterator[FrontEnd]:
    async with front_end() as front:
        yield front


async def judged(front: FrontEnd, change: str = "") -> Tally:
    """Hold the script's conversation, and compare it with one that went otherwise."""
    clients = Clients([front.app.address])
    tally = Tally()
    try:
        (expected,) = await undisturbed(clients, [SCRIPT])
        if change == "a token":
            expected.token_ids[-1] += 1
        if change == "a turn more":
            expected.turns.append(pb.Turn(number=3, start=0, reply_start=0, end=0))
        await Speaker(clients, tally, lambda: "nothing", random.Random(0)).converse(SCRIPT, "judged", expected)
    finally:
        await clients.aclose()
    return tally


async def test_a_conversation_that_went_as_it_should_is_found_right(front: FrontEnd) -> None:
    tally = await judged(front)
    assert (tally.turns, tally.problems) == (2, [])


async def test_a_wrong_token_is_seen_in_the_stream_and_in_the_record(front: FrontEnd) -> None:
    tally = await judged(front, "a token")
    assert tally.wrong_tokens == 2
    assert len(tally.problems) == 2


async def test_a_lost_turn_is_seen(front: FrontEnd) -> None:
    assert (await judged(front, "a turn more")).lost_turns == 1
