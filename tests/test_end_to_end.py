"""Conversations through the whole path: client, front end, worker processes, Redis. What is said must be what the
model says, wherever its KV has been meanwhile."""

import asyncio
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from protos import rekindle_pb2 as pb
from rekindle.errors import Busy, NotFound, TooLong
from tests.systems import BLOCK_TOKENS, System, Truth, WorkerProcess, chat, eventually, running_system
from worker.model.presets_tokenizer import byte_tokenizer

SAID = ("What did the tide bring in?", "And what did it take?", "Who keeps count of it?", "Thanks.")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(512)


async def test_a_parked_conversation_goes_on_as_one_that_was_never_parked(
    system: System, narrow_system: System, truth: Truth
) -> None:
    parked = (await system.client.create_session()).session_id
    undisturbed = (await narrow_system.client.create_session()).session_id
    num_tokens = 0
    for said in SAID:
        turn = await system.say(chat(said), parked)
        same = await narrow_system.say(chat(said), undisturbed)
        assert (turn.token_ids, turn.text) == (same.token_ids, same.text)
        assert turn.receipt.redis_tokens == max(0, num_tokens - 1)
        assert same.receipt.device_tokens == max(0, num_tokens - 1)
        num_tokens = turn.finished.usage.prompt_tokens + turn.finished.usage.completion_tokens
        report = await system.client.park_session(parked, drop_host=True)
        assert report.redis_tokens == num_tokens - 1
        assert report.device_blocks_dropped == report.host_blocks_dropped == -(-(num_tokens - 1) // BLOCK_TOKENS)
    session = await system.client.get_session(parked, with_token_ids=True, with_text=True)
    other = await narrow_system.client.get_session(undisturbed, with_token_ids=True, with_text=True)
    assert (session.token_ids, session.text) == (other.token_ids, other.text)
    assert truth.confirms(session)


async def test_a_receipt_says_why_tokens_were_computed(system: System) -> None:
    session_id = (await system.client.create_session()).session_id
    first = await system.say("Reasons, reasons, nothing but reasons", session_id)
    assert [(miss.reason, miss.tokens) for miss in first.receipt.misses] == [
        (pb.MISS_REASON_NEW, first.finished.usage.prompt_tokens)
    ]
    second = await system.say("and why", session_id)
    assert {miss.reason: miss.tokens for miss in second.receipt.misses} == {
        pb.MISS_REASON_NEW: second.finished.usage.input_tokens,
        pb.MISS_REASON_TAIL: 1,
    }
    assert second.receipt.ttft_ms > 0
    assert second.receipt.worker_id == first.receipt.worker_id
    assert (first.finished.turn, second.finished.turn) == (1, 2)


async def test_a_front_end_that_is_restarted_serves_its_sessions_on(
    redis_url: str, workers: tuple[WorkerProcess, WorkerProcess], truth: Truth
) -> None:
    async with running_system(redis_url, workers) as before:
        session_id = (await before.client.create_session()).session_id
        first = await before.say(chat("Do you still know me after a restart?"), session_id)
    async with running_system(redis_url, workers) as after:
        second = await after.say(chat("Well?"), session_id)
        session = await after.client.get_session(session_id, with_token_ids=True)
    assert second.receipt.worker_id == first.receipt.worker_id
    assert second.receipt.device_tokens == session.turns[0].end - 1
    assert truth.confirms(session)


async def test_a_turn_without_a_session_finds_what_another_left_in_the_cache(system: System) -> None:
    prompt = "A long system prompt that many share. " * 4
    first = await system.say(prompt)
    second = await system.say(prompt)
    assert first.receipt.device_tokens == 0
    assert second.receipt.device_tokens == first.finished.usage.prompt_tokens // BLOCK_TOKENS * BLOCK_TOKENS
    assert second.token_ids == first.token_ids
    assert second.finished.turn == 0


async def test_the_second_of_two_turns_at_once_is_refused_and_the_first_goes_on(system: System) -> None:
    session_id = (await system.client.create_session()).session_id
    async with system.client.generate("Me first", session_id=session_id, max_new_tokens=400, ignore_eos=True) as first:
        await anext(aiter(first))
        with pytest.raises(Busy):
            await system.say("No, me", session_id)
        await first.read()
    assert first.finished is not None
    assert len(first.token_ids) == 400
    assert len((await system.client.get_session(session_id)).turns) == 1


async def test_a_session_nobody_made_is_not_found(system: System) -> None:
    with pytest.raises(NotFound, match="nobody-made-me"):
        await system.say("Hello?", "nobody-made-me")


async def test_what_does_not_fit_is_refused_with_the_numbers_and_stores_nothing(system: System) -> None:
    session_id = (await system.client.create_session()).session_id
    await system.say([5] * 40, session_id, max_new_tokens=10, ignore_eos=True)
    with pytest.raises(TooLong, match=r"70 prompt tokens \(50 of history, 20 new\) and 5000 new ones are 5070, 4096"):
        await system.say([6] * 20, session_id, max_new_tokens=5000)
    session = await system.client.get_session(session_id)
    assert (session.num_tokens, len(session.turns), session.version) == (50, 1, 1)


async def test_a_cancelled_turn_stores_nothing_and_frees_its_session(system: System, truth: Truth) -> None:
    session_id = (await system.client.create_session()).session_id
    await system.say("Before the change of mind", session_id)
    before = await system.client.get_session(session_id, with_token_ids=True)
    async with system.client.generate("Never mind", session_id=session_id, max_new_tokens=2000) as cancelled:
        await anext(aiter(cancelled))
    await eventually(system.is_idle, within_s=1.0)
    after = await system.client.get_session(session_id, with_token_ids=True)
    assert (after.token_ids, after.turns, after.version) == (before.token_ids, before.turns, before.version)
    await system.say("After it", session_id)
    assert truth.confirms(await system.client.get_session(session_id, with_token_ids=True))


async def test_stop_strings_never_leak(system: System) -> None:
    sampling: dict[str, Any] = {"max_new_tokens": 200, "temperature": 1.0, "seed": 11, "ignore_eos": True}
    free = await system.say("Stop me if you can", **sampling)
    for start, length in ((1, 1), (17, 7), (90, 24)):
        stop = free.text[start : start + length]
        stopped = await system.say("Stop me if you can", stop=["never said at all", stop], **sampling)
        assert stopped.text == free.text[: free.text.index(stop)]
        assert "".join(delta.text for delta in stopped.deltas) == stopped.text
        assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
        assert (stopped.finished.reason, stopped.finished.stop_string) == (pb.FINISH_REASON_STOP, stop)


async def test_deltas_are_whole_characters_and_together_the_text_of_all_tokens(
    system: System, tokenizer: PreTrainedTokenizerFast
) -> None:
    turn = await system.say("Bytes", max_new_tokens=900, temperature=100.0, seed=3, ignore_eos=True)
    assert turn.text == tokenizer.decode(turn.token_ids, skip_special_tokens=True)
    assert any(character.isalpha() and not character.isascii() for character in turn.text), "no character of two bytes"
    assert len(turn.deltas) > 100


async def test_a_seed_gives_the_same_reply_again(system: System) -> None:
    sampling: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "max_new_tokens": 30}
    first, again, other = await asyncio.gather(
        *(system.say("Roll the dice", seed=seed, **sampling) for seed in (42, 42, 43))
    )
    assert first.token_ids == again.token_ids != other.token_ids
    assert first.finished.seed == 42
    unseeded = await system.say("Roll the dice", **sampling)
    repeated = await system.say("Roll the dice", seed=unseeded.finished.seed, **sampling)
    assert repeated.token_ids == unseeded.token_ids


async def test_logprobs_come_for_every_token_when_asked_for(system: System) -> None:
    turn = await system.say("How sure are you?", logprobs=3)
    assert len(turn.logprobs) == len(turn.token_ids)
    for token_id, logprobs in zip(turn.token_ids, turn.logprobs, strict=True):
        assert len(logprobs.top) == 3
        assert (logprobs.top[0].token_id, logprobs.top[0].logprob) == (token_id, logprobs.logprob)
        assert logprobs.logprob <= 0
    assert not (await system.say("How sure are you?")).logprobs
