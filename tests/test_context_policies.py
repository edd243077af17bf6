"""Sessions longer than the window, through the whole system: front end, workers that die, Redis."""

from collections.abc import AsyncIterator, Iterator

import pytest

from protos import rekindle_pb2 as pb
from rekindle.display import receipt_line
from rekindle.errors import BadInput, TooLong
from tests.systems import System, Turn, WorkerProcess, running_system

SETTINGS: dict[str, object] = {"context_tokens": 256, "recall_tokens": 64}
POLICIES = ["window", "recall"]
INPUTS = [[(number * 53 + at * 17) % 400 + 10 for at in range(90)] for number in range(6)]


@pytest.fixture(scope="module")
def lone_worker() -> Iterator[WorkerProcess]:
    with WorkerProcess("lone", **SETTINGS) as worker:
        yield worker


@pytest.fixture
async def undisturbed(redis_url: str, lone_worker: WorkerProcess) -> AsyncIterator[System]:
    async with running_system(redis_url, [lone_worker]) as system:
        yield system


async def talk(system: System, policy: str, inputs: list[list[int]] = INPUTS) -> tuple[str, list[Turn]]:
    session_id = (await system.client.create_session(context_policy=policy)).session_id
    return session_id, [await system.say(tokens, session_id, max_new_tokens=24) for tokens in inputs]


@pytest.mark.parametrize("policy", POLICIES)
async def test_a_session_goes_on_beyond_the_window_and_says_what_it_left(undisturbed: System, policy: str) -> None:
    session_id, turns = await talk(undisturbed, policy)
    session = await undisturbed.client.get_session(session_id)
    assert session.context_policy == pb.ContextPolicy.Value(f"CONTEXT_POLICY_{policy.upper()}")
    assert session.num_tokens == 6 * (90 + 24)
    assert not turns[0].receipt.HasField("context")
    last = turns[-1].receipt.context
    assert (last.policy, last.left_tokens > 200) == (session.context_policy, True)
    assert (last.choices > 0, len(last.recalled_starts) > 0) == (policy == "recall", policy == "recall")
    shown = receipt_line(turns[-1].finished)
    assert f"{last.left_tokens} beyond the window" in shown
    assert (f"recalled {last.recalled_tokens} tokens" in shown) == (policy == "recall")


@pytest.mark.parametrize("policy", POLICIES)
async def test_a_worker_that_dies_in_mid_reply_beyond_the_window_is_not_noticed(
    redis_url: str, undisturbed: System, policy: str
) -> None:
    _, expected = await talk(undisturbed, policy)
    with WorkerProcess("0", redis_url=redis_url, **SETTINGS) as first:
        async with running_system(redis_url, [first]) as system:
            session_id, turns = await talk(system, policy, INPUTS[:5])
            await system.client.park_session(session_id)
        with WorkerProcess("1", redis_url=redis_url, **SETTINGS) as second:
            async with running_system(redis_url, [first, second]) as system:
                generation = system.client.generate(INPUTS[5], session_id=session_id, max_new_tokens=24)
                tokens: list[int] = []
                async for delta in generation:
                    if not tokens:
                        first.kill()
                    tokens += delta.token_ids
                turns_in_redis = await system.client.get_session(session_id, with_residency=True)
    assert [turn.token_ids for turn in turns] + [tokens] == [turn.token_ids for turn in expected]
    assert len(turns_in_redis.turns) == 6


async def test_a_session_without_a_policy_ends_with_its_window(undisturbed: System) -> None:
    session_id = (await undisturbed.client.create_session()).session_id
    for _ in range(35):
        await undisturbed.say([7] * 110, session_id, max_new_tokens=5)
    with pytest.raises(TooLong):
        await undisturbed.say([7] * 110, session_id, max_new_tokens=5)


async def test_a_forked_session_goes_on_with_the_policy_of_its_parent(undisturbed: System) -> None:
    session_id, turns = await talk(undisturbed, "recall", INPUTS[:5])
    fork = await undisturbed.client.fork_session(session_id, at_turn=4)
    again = await undisturbed.say(INPUTS[4], fork.session_id, max_new_tokens=24)
    assert again.token_ids == turns[4].token_ids
    assert again.receipt.context.left_tokens > 0


async def test_a_worker_that_has_too_few_positions_for_a_policy_says_so(redis_url: str) -> None:
    with WorkerProcess("0", context_tokens=64) as worker:
        async with running_system(redis_url, [worker]) as system:
            session_id = (await system.client.create_session(context_policy="recall")).session_id
            with pytest.raises(BadInput, match="RECALL is not served"):
                await system.say([1, 2, 3], session_id)
