"""Whether one more turn may queue: bounds by requests and by tokens, and when who is refused should come again.

A full queue is shared too: where a tenant's waiting turns have more than their share of it, the latest of them give way
to a tenant that has less. Else who comes again at once when it is refused would keep all others out.
Any thread asks to enter, the engine's says what became of whom. Knows no request and no queue.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from worker.errors import Overloaded

_NEWEST = 0.1
_MOST_S = 60.0
"""Nobody is told to stay away longer: until then, much may be different."""


class Pace:
    """How fast room comes free while others wait for it, and who was promised what of it."""

    def __init__(self, *, seconds: float) -> None:
        """`seconds` for one part of it, until that is measured."""
        self.is_measured = False
        self._seconds = seconds
        self._parts = 1.0
        self._freed_s: float | None = None
        self._promised_s = 0.0

    @property
    def seconds(self) -> float:
        """For one part."""
        return self._seconds / self._parts

    def freed(self, parts: int, now_s: float, *, is_awaited: bool) -> None:
        """Parts came free, and more are awaited or not."""
        if self._freed_s is not None:
            self.is_measured = True
            self._seconds += _NEWEST * (now_s - self._freed_s - self._seconds)
            self._parts += _NEWEST * (parts - self._parts)
        self._freed_s = now_s if is_awaited else None

    def pause(self) -> None:
        """Nobody waits: the time until room comes free again says nothing."""
        self._freed_s = None

    def retry_after_s(self, parts: int, now_s: float) -> float:
        """When these parts may be free. Each one that asks is promised parts of its own, behind those promised before:
        not all of them come back for the same ones."""
        self._promised_s = min(max(self._promised_s, now_s) + parts * self.seconds, now_s + _MOST_S)
        return self._promised_s - now_s


@dataclass(slots=True, eq=False)
class Ticket:
    """One turn's place."""

    tenant: str
    waiting_tokens: int
    """Of its prompt, while it waits."""
    on_displaced: Callable[[], None]
    displaced: Overloaded | None = None
    """Why it has to go, and when to come again: another tenant's turn has its place. There is nothing to leave."""


class Admission:
    """`enter`, then `begin` when it waits no longer (or never), then `leave`."""

    def __init__(
        self,
        *,
        max_requests: int,
        max_waiting_tokens: int,
        weights: Mapping[str, float],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`max_requests` may wait or run. The prompts of those that wait may have `max_waiting_tokens` together; a
        single one may have more. A tenant of weight 2 has twice the share of one of weight 1, which is what all others
        have."""
        self.refused = {"requests": 0, "tokens": 0}
        """By the bound that was met, also who was displaced."""
        self._max_requests = max_requests
        self._max_waiting_tokens = max_waiting_tokens
        self._weights = weights
        self._now = now
        self._lock = threading.Lock()
        self._requests = 0
        self._waiting: dict[Ticket, None] = {}
        """In the order in which they came."""
        self._waiting_tokens = 0
        self._requests_pace = Pace(seconds=1.0)
        self._tokens_pace = Pace(seconds=1e-3)

    @property
    def waiting_tokens(self) -> int:
        return self._waiting_tokens

    @property
    def request_s(self) -> float:
        """Seconds from the end of one request to the end of the next, while others wait; 0 until that is measured."""
        return self._requests_pace.seconds if self._requests_pace.is_measured else 0.0

    def enter(self, prompt_tokens: int, *, tenant: str = "", on_displaced: Callable[[], None] = lambda: None) -> Ticket:
        """Raises Overloaded, with an honest time to come again: then there is nothing to leave.

        `on_displaced` is called on the thread of whoever takes the place, if anybody does.
        """
        with self._lock:
            displaced = self._who_gives_way(prompt_tokens, tenant)
            if displaced is None:
                raise self._refusal(prompt_tokens)
            for ticket in displaced:
                ticket.displaced = self._refusal(prompt_tokens)
                self._requests -= 1
                self._stop_waiting(ticket)
            entered = Ticket(tenant, prompt_tokens, on_displaced)
            self._requests += 1
            self._waiting[entered] = None
            self._waiting_tokens += prompt_tokens
        for ticket in displaced:
            ticket.on_displaced()
        return entered

    def begin(self, ticket: Ticket) -> None:
        """Harmless when it has begun before."""
        with self._lock:
            if tokens := self._stop_waiting(ticket):
                self._tokens_pace.freed(tokens, self._now(), is_awaited=bool(self._waiting))

    def leave(self, ticket: Ticket) -> None:
        with self._lock:
            if ticket.displaced is not None:
                return
            self._requests -= 1
            if not self._stop_waiting(ticket):
                self._requests_pace.freed(1, self._now(), is_awaited=bool(self._waiting))
            elif not self._waiting:  # who gave up was the last one that waited
                self._requests_pace.pause()
                self._tokens_pace.pause()

    def _who_gives_way(self, prompt_tokens: int, tenant: str) -> list[Ticket] | None:
        """The latest turns of those tenants that have most waiting, by their weights, as long as each keeps no less
        than this one would have. None where that makes no room; nobody where there is room."""
        going: list[Ticket] = []
        if not self._bound(prompt_tokens, going):
            return going
        queues: dict[str, list[Ticket]] = {}
        for ticket in self._waiting:
            queues.setdefault(ticket.tenant, []).append(ticket)
        shares = {other: self._share(other, queue) for other, queue in queues.items()}
        would_have = shares.get(tenant, 0.0) + prompt_tokens / self._weights.get(tenant, 1.0)
        while shares and self._bound(prompt_tokens, going):
            most = max(shares, key=lambda other: shares[other])
            going.append(queues[most].pop())
            shares[most] = self._share(most, queues[most])
            if most == tenant or shares[most] < would_have:
                return None
        return going if shares else None

    def _share(self, tenant: str, waiting: list[Ticket]) -> float:
        return sum(ticket.waiting_tokens for ticket in waiting) / self._weights.get(tenant, 1.0)

    def _bound(self, prompt_tokens: int, going: Sequence[Ticket] = ()) -> str:
        """Which one is in the way once these have gone; empty if none is."""
        if self._requests - len(going) >= self._max_requests:
            return "requests"
        tokens = self._waiting_tokens - sum(ticket.waiting_tokens for ticket in going) + prompt_tokens
        return "tokens" if len(self._waiting) > len(going) and tokens > self._max_waiting_tokens else ""

    def _refusal(self, prompt_tokens: int) -> Overloaded:
        bound = self._bound(prompt_tokens)
        self.refused[bound] += 1
        if bound == "requests":
            return Overloaded(
                f"{self._requests} requests wait or run, {self._max_requests} may",
                self._requests_pace.retry_after_s(1, self._now()),
            )
        too_many = self._waiting_tokens + prompt_tokens - self._max_waiting_tokens
        return Overloaded(
            f"{self._waiting_tokens} tokens of prompts are waiting and {prompt_tokens} came, "
            f"{self._max_waiting_tokens} may",
            self._tokens_pace.retry_after_s(too_many, self._now()),
        )

    def _stop_waiting(self, ticket: Ticket) -> int:
        """The tokens that wait no longer."""
        tokens, ticket.waiting_tokens = ticket.waiting_tokens, 0
        self._waiting.pop(ticket, None)
        self._waiting_tokens -= tokens
        return tokens
