"""The engine's inbox: order, answers and errors, and what becomes of who asks too late."""

from concurrent.futures import Future

import pytest

from worker.engine.inbox import Inbox
from worker.errors import Draining


@pytest.fixture
def inbox() -> Inbox:
    return Inbox()


def test_what_was_posted_is_done_in_order_and_nothing_is_waited_for(inbox: Inbox) -> None:
    done: list[int] = []
    for number in range(3):
        inbox.post(lambda number=number: done.append(number))  # type: ignore[misc]
    inbox.read(wait=False, timeout_s=None)
    inbox.read(wait=True, timeout_s=0.01)
    assert done == [0, 1, 2]


def test_who_asks_is_answered_by_a_value_or_by_the_error(inbox: Inbox) -> None:
    def answer(future: Future[int]) -> None:
        future.set_result(7)

    def fail(future: Future[int]) -> None:
        raise KeyError("no such block")

    answered, failed = inbox.ask(answer), inbox.ask(fail)
    assert not answered.done()
    inbox.read(wait=False, timeout_s=None)
    assert answered.result(0) == 7
    with pytest.raises(KeyError, match="no such block"):
        failed.result(0)


def test_what_was_posted_before_the_end_is_done_and_who_asks_later_hears_that_it_is_over(inbox: Inbox) -> None:
    before = inbox.do(lambda: None)
    inbox.close()
    inbox.read(wait=False, timeout_s=None)
    assert before.done()
    with pytest.raises(Draining):
        inbox.do(lambda: None).result(0)


def test_what_nobody_waits_for_any_more_is_not_done_and_what_is_begun_is_answered(inbox: Inbox) -> None:
    answered: list[str] = []

    def begin(future: Future[str]) -> None:
        assert not future.cancel(), "too late"
        answered.append("begun")
        future.set_result("begun")

    left: Future[str] = inbox.ask(lambda future: answered.append("left"))
    begun: Future[str] = inbox.ask(begin)
    assert left.cancel()
    inbox.read(wait=False, timeout_s=None)
    assert (answered, begun.result()) == (["begun"], "begun")
