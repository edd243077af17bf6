"""Stop asking a server that does not answer, and find out behind everyone's back when it does again.

Knows times and counts. Knows no server.
"""

import threading
import time
from collections.abc import Callable


class Breaker:
    """Closed: calls go through. Open: they fail at once, until a probe, made by whoever watches `probe_in_s`, succeeds.

    Each probe that fails doubles the wait for the next, up to `longest_wait_s`.
    """

    def __init__(
        self,
        *,
        failures: int = 3,
        first_wait_s: float = 0.1,
        longest_wait_s: float = 5.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._failures, self._first_wait_s, self._longest_wait_s, self._now = (
            failures,
            first_wait_s,
            longest_wait_s,
            now,
        )
        self._lock = threading.Lock()
        self._failed_in_a_row = 0
        self._wait_s = first_wait_s
        self._probe_at_s: float | None = None  # None: closed

    @property
    def closed(self) -> bool:
        return self._probe_at_s is None

    def succeeded(self) -> None:
        with self._lock:
            self._failed_in_a_row = 0
            self._wait_s = self._first_wait_s
            self._probe_at_s = None

    def failed(self) -> None:
        """A call failed. Opens when it is one too many in a row; changes nothing while open."""
        with self._lock:
            self._failed_in_a_row += 1
            if self._probe_at_s is None and self._failed_in_a_row >= self._failures:
                self._open()

    def probe_failed(self) -> None:
        """Open, or stay so for longer."""
        with self._lock:
            self._open()

    def probe_in_s(self) -> float | None:
        """Seconds until the next probe is due (0: now); None while closed."""
        probe_at_s = self._probe_at_s
        return None if probe_at_s is None else max(0.0, probe_at_s - self._now())

    def _open(self) -> None:
        self._probe_at_s = self._now() + self._wait_s
        self._wait_s = min(self._wait_s * 2, self._longest_wait_s)
