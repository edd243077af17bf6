"""A thread that does one thing after another: what is urgent first, the rest in order."""

from collections.abc import Callable
from concurrent.futures import Future
from itertools import count
from queue import PriorityQueue
from threading import Thread
from typing import Any, Final, NamedTuple, TypeVar

T = TypeVar("T")


class _Work(NamedTuple):
    rank: int
    number: int
    """No two are equal: what comes behind it is never compared."""
    do: Callable[[], Any]
    done: "Future[Any]"


_URGENT: Final = 0
_USUAL: Final = 1
_LAST: Final = 2


class OneThread:
    """Used by one thread at a time. The other one starts with the first work."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: PriorityQueue[_Work] = PriorityQueue()
        self._numbers = count()
        self._thread: Thread | None = None

    def submit(self, do: Callable[[], T], *, urgent: bool = False) -> "Future[T]":
        """What `do` returns or raises. Cancelling it works until it begins."""
        if self._thread is None:
            self._thread = Thread(target=self._run, name=self._name)
            self._thread.start()
        return self._put(_URGENT if urgent else _USUAL, do)

    def close(self) -> None:
        """Wait for what was submitted. Nothing may be submitted any more."""
        if self._thread is not None:
            self._put(_LAST, lambda: None)
            self._thread.join()

    def _put(self, rank: int, do: Callable[[], T]) -> "Future[T]":
        work = _Work(rank, next(self._numbers), do, Future())
        self._queue.put(work)
        return work.done

    def _run(self) -> None:
        rank = _USUAL
        while rank != _LAST:
            rank, _, do, done = self._queue.get()
            if not done.set_running_or_notify_cancel():
                continue
            try:
                done.set_result(do())
            except BaseException as error:
                done.set_exception(error)
