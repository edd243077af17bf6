"""What other threads ask of the engine's, in the order they asked. It knows nothing of what that is."""

import queue
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from worker.errors import Draining

T = TypeVar("T")


class Inbox:
    """Any thread posts and asks; the engine's alone reads."""

    def __init__(self) -> None:
        self.closed = False
        self._acts: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def post(self, act: Callable[[], None]) -> None:
        """Run `act` on the engine's thread, which does not outlive an error in it."""
        self._acts.put(act)

    def ask(self, act: Callable[[Future[T]], None]) -> Future[T]:
        """Run `act` on the engine's thread; it answers through the future, now or later. Raises (there) Draining."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return  # nobody waits any more; and from here on nobody can cancel what is answered
            try:
                act(future)
            except Exception as error:
                future.set_exception(error)

        if self.closed:
            future.set_exception(Draining("this worker is gone"))
        else:
            self.post(run)
        return future

    def do(self, act: Callable[[], None]) -> Future[None]:
        """Run `act` on the engine's thread; the future ends with it."""

        def run(future: Future[None]) -> None:
            act()
            future.set_result(None)

        return self.ask(run)

    def close(self) -> None:
        """Do what was posted until now, and nothing any more."""
        self.post(self._close)

    def _close(self) -> None:
        self.closed = True

    def read(self, *, wait: bool, timeout_s: float | None) -> None:
        """Do what was posted. With `wait`, wait for the first: `timeout_s` at the most, or as long as it takes."""
        try:
            if wait:
                self._acts.get(timeout=timeout_s)()
            while not self.closed:
                self._acts.get_nowait()()
        except queue.Empty:
            return
