"""Which waiting turns can't have their first token in time: by what is ahead of them and what prefill costs.

An estimate, on the hopeful side: all that may be found in a tier comes for nothing, and only what would be late in half
of the time is late. Pure numbers; used by the engine's thread alone.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from worker.engine.cost_model import CostModel
from worker.engine.plan import Span
from worker.engine.request import Request

_SURE = 0.5
"""The part of what is expected that it takes at least."""


class Hopeless(NamedTuple):
    """A request, and why it can't be served in time."""

    request: Request
    needed_s: float
    ahead: int
    """Requests that come before it and wait, too."""
    left_s: float

    def __str__(self) -> str:
        return (
            f"the first token takes about {self.needed_s:.3f} s, {self.left_s:.3f} s are left; "
            f"{self.ahead} requests are ahead"
        )


def hopeless(
    running: Iterable[Request],
    waiting: Iterable[Request],
    cost_model: CostModel,
    *,
    num_free: int,
    request_s: float,
    now_s: float,
) -> Iterator[Hopeless]:
    """Those of `waiting` (in the order in which they are let in) that will miss their deadlines.

    `num_free` more may run beside those that do; for more than that, others have to end first, one in `request_s`.
    """
    ahead_s = sum(cost_model.prefill_s(gap) for request in running for gap in request.gaps)
    ahead = 0
    for request in waiting:
        own_s = cost_model.prefill_s(Span(request.num_target - request.expected_tokens, request.num_target))
        places_s = max(0, ahead + 1 - num_free) * request_s
        needed_s = max(ahead_s, places_s) + own_s
        deadline_s = request.call.deadline_s
        if deadline_s is not None and not request.has_begun and now_s + _SURE * needed_s > deadline_s:
            yield Hopeless(request, needed_s, ahead, deadline_s - now_s)
        else:
            ahead, ahead_s = ahead + 1, ahead_s + own_s
