"""A reply that one engine began and another goes on with: the same tokens as from one that was never disturbed."""

import pytest

from tests.engines import TENANT, EngineFactory, Turn, generate, poison, start
from worker.calls import FinishReason, Sampling
from worker.engine.engine import Engine

HISTORY = tuple((7 * place + 3) % 300 + 5 for place in range(90))
NEW = tuple((5 * place + 1) % 300 + 5 for place in range(30))
DRAWN = Sampling(temperature=0.9, top_p=0.95, seed=11)
PENALIZED = Sampling(temperature=0.8, repetition_penalty=1.3, frequency_penalty=0.6, presence_penalty=0.4, seed=5)


def going_on(engine: Engine, begun: tuple[int, ...], **call: object) -> Turn:
    """What an engine says after `begun`."""
    return generate(engine, HISTORY, NEW, begun=begun, max_new_tokens=24, **call)


@pytest.mark.parametrize("sampling", [Sampling(), DRAWN, PENALIZED], ids=["greedy", "drawn", "penalized"])
@pytest.mark.parametrize("length", [1, 8, 23])
def test_another_engine_goes_on_with_the_same_tokens(
    build_engine: EngineFactory, redis_url: str, sampling: Sampling, length: int
) -> None:
    first, second = build_engine(redis_url=redis_url), build_engine(redis_url=redis_url)
    whole = generate(first, HISTORY, NEW, max_new_tokens=24, sampling=sampling)
    first.flush(TENANT, (*HISTORY, *NEW, *whole.reply)).result(30)
    poison(second)
    turn = going_on(second, whole.reply[:length], sampling=sampling)
    assert turn.reply == whole.reply[length:]
    assert turn.finished.completion_tokens == 24
    prompt = len(HISTORY) + len(NEW)
    assert turn.receipt.redis_tokens == min(prompt, (prompt + length) // 16 * 16), "the prompt's alone"
    turn.receipt.check(prompt)


def test_what_it_has_said_is_found_by_the_next_turn(build_engine: EngineFactory) -> None:
    engine = build_engine()
    whole = generate(build_engine(), HISTORY, NEW, max_new_tokens=24)
    going_on(engine, whole.reply[:10])
    history = (*HISTORY, *NEW, *whole.reply)
    assert generate(engine, history, (7, 8)).receipt.device_tokens == len(history) - 1


@pytest.mark.parametrize(
    ("ends", "reason"),
    [
        ({}, FinishReason.LENGTH),
        ({"eos_token_ids": True}, FinishReason.EOS),
        ({"stop_token_ids": True}, FinishReason.STOP),
    ],
)
def test_a_reply_that_was_complete_ends_without_another_token(
    build_engine: EngineFactory, ends: dict[str, bool], reason: FinishReason
) -> None:
    engine = build_engine()
    whole = generate(engine, HISTORY, NEW, max_new_tokens=24)
    begun = whole.reply if not ends else whole.reply[:9]
    last = {name: frozenset({begun[-1]}) for name in ends}
    turn = going_on(engine, begun, **last)
    assert (turn.reply, turn.finished.reason) == ((), reason)
    assert turn.finished.completion_tokens == len(begun)


def test_one_that_was_preempted_goes_on_too(build_engine: EngineFactory) -> None:
    """A pool in which two of them have no room to end together."""
    whole = generate(build_engine(), HISTORY, NEW, max_new_tokens=24)
    others = [tuple((number * 13 + place * 7) % 300 + 5 for place in range(90)) for number in range(4)]
    engine = build_engine(device_cache_bytes=1 << 20, host_cache_bytes=0)
    streams = [start(engine, (), other, max_new_tokens=60) for other in others]
    assert going_on(engine, whole.reply[:10]).reply == whole.reply[10:]
    for stream in streams:
        stream.result()
