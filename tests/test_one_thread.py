"""A thread that does one thing after another."""

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest

from worker.one_thread import OneThread


@pytest.fixture
def thread() -> Iterator[OneThread]:
    one = OneThread("one")
    yield one
    one.close()


def test_what_is_urgent_comes_first_and_the_rest_in_order(thread: OneThread) -> None:
    may_run, done = threading.Event(), list[str]()
    thread.submit(lambda: may_run.wait(10))
    for name in ("a", "b", "urgent 1", "c", "urgent 2"):
        thread.submit(lambda name=name: done.append(name), urgent=name.startswith("urgent"))  # type: ignore[misc]
    may_run.set()
    thread.close()
    assert done == ["urgent 1", "urgent 2", "a", "b", "c"]


def test_results_and_errors_come_back_from_the_one_thread(thread: OneThread) -> None:
    assert thread.submit(threading.get_ident).result(10) == thread.submit(threading.get_ident).result(10)
    with pytest.raises(ZeroDivisionError):
        thread.submit(lambda: 1 // 0).result(10)
    assert thread.submit(lambda: 1).result(10) == 1


def test_work_that_was_cancelled_in_time_is_not_done(thread: OneThread) -> None:
    may_run, done = threading.Event(), list[str]()
    thread.submit(lambda: may_run.wait(10))
    late = thread.submit(lambda: done.append("late"))
    assert late.cancel()
    may_run.set()
    thread.submit(lambda: done.append("last")).result(10)
    assert done == ["last"]
    with pytest.raises(CancelledError):
        late.result(10)


def test_a_thread_that_was_never_needed_is_never_started() -> None:
    before = threading.active_count()
    one = OneThread("one")
    one.close()
    assert threading.active_count() == before
