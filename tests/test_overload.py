"""An engine with more to do than it can: whose turn it is, who is refused, who is told at once that it is too late."""

import time

import pytest

from tests.engines import EngineFactory, Stream, generate, start
from worker.calls import Finished, Token
from worker.engine.cost_model import CostModel
from worker.engine.engine import Engine
from worker.engine.plan import Span
from worker.errors import DeadlinePassed, DeadlineUnmeetable, Overloaded

PROMPT = tuple(range(5, 55))


class Slow(CostModel):
    """Prefill is believed to take so long, whatever was measured."""

    is_measured = True

    def __init__(self, *, token_s: float) -> None:
        super().__init__(max_prefill_tokens=2048)
        self._token_s = token_s

    def prefill_s(self, span: Span) -> float:
        return span.tokens * self._token_s


def occupy(engine: Engine) -> Stream:
    """A request that runs for long, from its first token on."""
    stream = start(engine, (), (9, 8, 7), max_new_tokens=3000)
    assert isinstance(stream.next(), Token)
    return stream


def let_in(streams: dict[str, Stream]) -> list[str]:
    """Who was let in, in that order: all of them came within milliseconds of each other, so who waited longer."""
    queued_ms = {name: stream.result().receipt.queue_ms for name, stream in streams.items()}
    return sorted(queued_ms, key=lambda name: queued_ms[name])


def test_a_flood_of_one_tenant_lets_another_in_after_one_request(build_engine: EngineFactory) -> None:
    engine = build_engine(max_running=1)
    running = occupy(engine)
    flood = {f"flood-{n}": start(engine, (), PROMPT, tenant="flood") for n in range(12)}
    late = {f"late-{n}": start(engine, (), PROMPT, tenant="late") for n in range(2)}
    engine.cancel(running.request_id)
    order = let_in(flood | late)
    assert order.index("late-0") <= 2
    assert order.index("late-1") <= 4


def test_weights_say_who_is_let_in_more_often(build_engine: EngineFactory) -> None:
    engine = build_engine(max_running=1, tenant_weights="paying=4")
    running = occupy(engine)
    streams = {}
    for number in range(8):
        streams[f"trial-{number}"] = start(engine, (), PROMPT, tenant="trial")
        streams[f"paying-{number}"] = start(engine, (), PROMPT, tenant="paying")
    engine.cancel(running.request_id)
    assert sum(name.startswith("paying") for name in let_in(streams)[:10]) == 8


def test_a_queue_of_long_prompts_is_full_by_its_tokens(build_engine: EngineFactory) -> None:
    engine = build_engine(max_running=1, max_waiting_tokens=120)
    running = occupy(engine)
    waiting = [start(engine, (), PROMPT) for _ in range(2)]
    with pytest.raises(Overloaded, match="100 tokens of prompts are waiting and 50 came, 120 may") as refused:
        start(engine, (), PROMPT)
    assert 0 < refused.value.retry_after_s <= 60
    stats = engine.stats()
    assert stats.waiting_tokens == 100
    assert stats.turned_away["overload_tokens"] == 1
    engine.cancel(running.request_id)
    for stream in waiting:
        assert isinstance(stream.result().finished, Finished)
    assert engine.stats().waiting_tokens == 0
    generate(engine, (), PROMPT)


def test_a_tenant_that_has_filled_the_queue_keeps_no_other_out(build_engine: EngineFactory) -> None:
    engine = build_engine(max_running=1, max_waiting=4)
    running = occupy(engine)
    flood = [start(engine, (), PROMPT, tenant="flood") for _ in range(4)]
    late = [start(engine, (), PROMPT, tenant="late") for _ in range(2)]
    with pytest.raises(Overloaded, match="5 requests wait or run, 5 may"):
        start(engine, (), PROMPT, tenant="flood")
    for stream in flood[2:]:
        with pytest.raises(Overloaded) as refused:
            stream.result()
        assert 0 < refused.value.retry_after_s <= 60
    engine.cancel(running.request_id)
    for stream in (*flood[:2], *late):
        assert isinstance(stream.result().finished, Finished)
    assert engine.stats().turned_away["overload_requests"] == 3
    assert engine.stats().waiting_tokens == 0
    for _ in range(4):
        generate(engine, (), PROMPT)


def test_a_deadline_that_the_prompt_alone_would_miss_is_refused_at_once(build_engine: EngineFactory) -> None:
    engine = build_engine()
    engine._scheduler._cost_model = Slow(token_s=5.0)
    began_s = time.monotonic()
    with pytest.raises(DeadlineUnmeetable, match=r"the first token takes about \d+\.\d+ s, \d+\.\d+ s are left"):
        generate(engine, (), PROMPT, deadline_s=began_s + 60)
    assert time.monotonic() - began_s < 5
    assert engine.stats().turned_away["deadline_unmeetable"] == 1
    assert engine.stats().computed_tokens == 0
    assert generate(engine, (), PROMPT).reply


def test_a_prompt_that_the_device_has_is_not_refused_for_what_it_would_have_cost(build_engine: EngineFactory) -> None:
    engine = build_engine()
    first = generate(engine, (), PROMPT[:48])
    engine._scheduler._cost_model = Slow(token_s=0.5)
    assert generate(engine, (), PROMPT[:48], deadline_s=time.monotonic() + 6).reply == first.reply
    with pytest.raises(DeadlineUnmeetable):
        generate(engine, (), PROMPT[::-1], deadline_s=time.monotonic() + 6)


def test_what_is_ahead_counts_against_a_deadline_and_the_fair_order_says_what_is_ahead(
    build_engine: EngineFactory,
) -> None:
    engine = build_engine(max_running=1)
    running = occupy(engine)
    engine._scheduler._cost_model = Slow(token_s=0.5)
    patient = [start(engine, (), PROMPT, tenant="flood") for _ in range(4)]
    deadline_s = time.monotonic() + 40
    with pytest.raises(DeadlineUnmeetable, match="4 requests are ahead"):
        generate(engine, (), PROMPT, tenant="flood", deadline_s=deadline_s)
    hopeful = start(engine, (), PROMPT, tenant="late", deadline_s=deadline_s)
    for stream in (running, *patient):
        engine.cancel(stream.request_id)
    assert hopeful.result().reply


def test_who_waits_is_dropped_as_soon_as_it_is_certain_and_not_before(build_engine: EngineFactory) -> None:
    engine = build_engine(max_running=1)
    running = occupy(engine)
    engine._scheduler._cost_model = Slow(token_s=2.0)
    now_s = time.monotonic()
    waiting = start(engine, (), PROMPT, deadline_s=now_s + 52)  # expected: 100 s, at least 50
    with pytest.raises(DeadlineUnmeetable):
        waiting.result()
    assert 1 < time.monotonic() - now_s < 10
    engine.cancel(running.request_id)


def test_a_reply_that_was_begun_elsewhere_goes_on_as_long_as_its_deadline_allows(build_engine: EngineFactory) -> None:
    engine = build_engine()
    reply = generate(engine, (), PROMPT).reply
    engine._scheduler._cost_model = Slow(token_s=5.0)
    going_on = start(engine, (), PROMPT, begun=reply[:3], deadline_s=time.monotonic() + 5)
    assert going_on.result().reply == reply[3:]


def test_deadlines_that_pass_are_counted(build_engine: EngineFactory) -> None:
    engine = build_engine()
    with pytest.raises(DeadlinePassed):
        generate(engine, (), PROMPT, max_new_tokens=3000, deadline_s=time.monotonic() + 0.3)
    assert engine.stats().turned_away["deadline_passed"] == 1
