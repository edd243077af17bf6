"""The queue's bounds: who is refused, before any work, and whether the time to come again is an honest one."""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial

import pytest

from worker.engine.admission import Admission, Ticket
from worker.errors import Overloaded


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def admission(clock: Clock, *, requests: int = 4, tokens: int = 1000) -> Admission:
    return Admission(max_requests=requests, max_waiting_tokens=tokens, weights={"heavy": 4.0}, now=clock)


def refusal(admission: Admission, tokens: int) -> Overloaded:
    with pytest.raises(Overloaded) as refused:
        admission.enter(tokens)
    return refused.value


def test_requests_beyond_the_bound_are_refused_until_one_leaves() -> None:
    door = admission(Clock(), requests=2)
    first, _ = door.enter(1), door.enter(1)
    assert "2 requests wait or run, 2 may" in str(refusal(door, 1))
    door.begin(first)
    refusal(door, 1)
    door.leave(first)
    door.enter(1)
    assert door.refused == {"requests": 2, "tokens": 0}


def test_tokens_beyond_the_bound_are_refused_until_those_before_have_begun() -> None:
    door = admission(Clock(), tokens=1000)
    first = door.enter(900)
    assert "900 tokens of prompts are waiting and 101 came, 1000 may" in str(refusal(door, 101))
    door.enter(100)
    door.begin(first)
    assert door.waiting_tokens == 100
    door.enter(900)
    assert door.refused == {"requests": 0, "tokens": 1}


def test_a_single_prompt_may_be_longer_than_the_bound() -> None:
    door = admission(Clock(), tokens=1000)
    long = door.enter(5000)
    refusal(door, 1)
    door.leave(long)  # cancelled while it waited
    assert door.waiting_tokens == 0
    door.enter(1)


def come(door: Admission, tenants: Sequence[str], gone: list[str]) -> None:
    """Let in as many turns as there is room for. Whose give way is told in `gone`, now and later."""
    for tenant in tenants:
        with suppress(Overloaded):
            door.enter(10, tenant=tenant, on_displaced=partial(gone.append, tenant))


def test_who_fills_the_queue_gives_way_to_a_tenant_that_has_less_waiting_until_they_have_the_same() -> None:
    door, gone = admission(Clock(), requests=6), list[str]()
    come(door, ["flood"] * 8 + ["late"] * 8, gone)
    assert gone == ["flood"] * 3
    come(door, ["flood", "late"] * 4, gone)
    assert gone == ["flood"] * 3, "nobody has more than another"
    come(door, ["third"] * 3, gone)
    assert gone == ["flood"] * 4 + ["late"], "whoever has most"


def test_a_tenant_of_more_weight_may_fill_more() -> None:
    door, gone = admission(Clock(), requests=10), list[str]()
    come(door, ["light"] * 10 + ["heavy"] * 20, gone)
    assert gone == ["light"] * 8


def test_those_who_run_give_way_to_nobody() -> None:
    door = admission(Clock(), requests=3)
    for _ in range(3):
        door.begin(door.enter(10, tenant="flood"))
    gone: list[str] = []
    come(door, ["late"], gone)
    assert not gone
    assert door.refused == {"requests": 1, "tokens": 0}


def test_as_many_give_way_as_a_long_prompt_needs_or_nobody() -> None:
    door = admission(Clock(), requests=100, tokens=1000)
    flood = [door.enter(100, tenant="flood") for _ in range(10)]
    with pytest.raises(Overloaded):
        door.enter(600, tenant="late")
    door.enter(350, tenant="late")
    assert [ticket.displaced is not None for ticket in flood] == [False] * 6 + [True] * 4
    assert all(ticket.displaced.retry_after_s > 0 for ticket in flood if ticket.displaced is not None)
    assert door.waiting_tokens == 950
    for ticket in flood:
        door.begin(ticket)
        door.leave(ticket)
    assert door.waiting_tokens == 350
    assert door.refused == {"requests": 0, "tokens": 5}


def serve(door: Admission, clock: Clock, waiting: list[Ticket], *, seconds: float, tokens: int) -> None:
    """One request is served in so many seconds, and another one comes."""
    door.begin(waiting[0])
    clock.now_s += seconds
    door.leave(waiting.pop(0))
    waiting.append(door.enter(tokens))


def test_who_is_refused_is_told_when_a_place_will_be_free_as_measured() -> None:
    clock = Clock()
    door = admission(clock, requests=3)
    waiting = [door.enter(10) for _ in range(3)]
    for _ in range(100):
        serve(door, clock, waiting, seconds=0.2, tokens=10)
    assert refusal(door, 1).retry_after_s == pytest.approx(0.2, rel=0.01)


def test_who_is_refused_for_tokens_is_told_when_these_will_have_begun() -> None:
    clock = Clock()
    door = admission(clock, requests=100, tokens=1000)
    waiting = [door.enter(250) for _ in range(4)]
    for _ in range(100):
        serve(door, clock, waiting, seconds=0.5, tokens=250)
    assert refusal(door, 500).retry_after_s == pytest.approx(1.0, rel=0.01)


def test_those_who_are_refused_together_are_not_told_to_come_back_together() -> None:
    clock = Clock()
    door = admission(clock, requests=1)
    door.enter(1)
    times = [refusal(door, 1).retry_after_s for _ in range(3)]
    assert times == pytest.approx([1.0, 2.0, 3.0])
    clock.now_s += 10.0  # these promises have been kept
    assert refusal(door, 1).retry_after_s == pytest.approx(1.0)
    assert max(refusal(door, 1).retry_after_s for _ in range(1000)) == 60.0


def test_time_in_which_nobody_waited_is_not_the_time_that_a_place_takes() -> None:
    clock = Clock()
    door = admission(clock, requests=3)
    waiting = [door.enter(10) for _ in range(3)]
    for _ in range(100):
        serve(door, clock, waiting, seconds=0.2, tokens=10)
    for ticket in waiting:
        door.leave(ticket)
    for _ in range(50):  # seldom one, alone
        clock.now_s += 100.0
        alone = door.enter(10)
        door.begin(alone)
        door.leave(alone)
    assert door.request_s == pytest.approx(0.2, rel=0.1)
