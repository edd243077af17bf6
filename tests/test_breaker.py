"""The breaker opens after failures in a row, and closes for a probe's success only."""

from cache_store.breaker import Breaker


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def opened(clock: Clock) -> Breaker:
    breaker = Breaker(failures=1, first_wait_s=1.0, longest_wait_s=4.0, now=clock)
    breaker.failed()
    assert not breaker.closed
    return breaker


def test_it_opens_only_after_failures_in_a_row() -> None:
    breaker = Breaker(failures=3)
    for _ in range(5):
        breaker.failed()
        breaker.failed()
        breaker.succeeded()
    assert breaker.closed
    assert breaker.probe_in_s() is None
    for _ in range(3):
        breaker.failed()
    assert not breaker.closed


def test_a_probe_is_due_after_a_wait_that_calls_meanwhile_do_not_prolong() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now_s = 0.75
    breaker.failed()
    assert breaker.probe_in_s() == 0.25
    clock.now_s = 9.0
    assert breaker.probe_in_s() == 0.0
    assert not breaker.closed, "time alone closes nothing"


def test_each_failed_probe_doubles_the_wait_up_to_the_longest() -> None:
    clock = Clock()
    breaker = opened(clock)
    waits = [breaker.probe_in_s()]
    for _ in range(4):
        breaker.probe_failed()
        waits.append(breaker.probe_in_s())
    assert waits == [1.0, 2.0, 4.0, 4.0, 4.0]


def test_a_success_closes_it_and_forgets_the_waits() -> None:
    clock = Clock()
    breaker = opened(clock)
    breaker.probe_failed()
    breaker.succeeded()
    assert breaker.closed
    breaker.failed()
    assert breaker.probe_in_s() == 1.0


def test_a_probe_that_fails_at_the_start_opens_it_at_once() -> None:
    breaker = Breaker(failures=3)
    breaker.probe_failed()
    assert not breaker.closed
