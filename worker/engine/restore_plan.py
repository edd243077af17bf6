"""Load, compute, or both ends at once: where computing from the front and loading from the back meet. Pure numbers."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

from worker.engine.plan import Span

_WORTH = 0.8
"""Both at once only where that is expected to save a fifth: they take cores and memory bandwidth from each other,
which no estimate of either one alone knows of."""


class Coming(NamedTuple):
    """A block that is to come from a tier below, or to be computed."""

    span: Span
    """The positions that it would serve."""
    load_s: float
    """Between the landing of the block behind it and its own."""


class Meeting(NamedTuple):
    num_computed: int
    """So many of the blocks, from the front, are to be computed; the others are waited for."""
    predicted_s: float
    """From now until the prompt's last token was computed."""
    loading_s: float
    """The same if all of them are waited for."""


def meet(
    coming: Sequence[Coming],
    last: Span,
    prefill_s: Callable[[Span], float],
    *,
    busy_s: float,
    wait_s: float,
) -> Meeting:
    """Choose how many of the blocks (not none) to compute.

    `last` are the prompt's positions behind all of them, which need all of them. `prefill_s` gives the seconds of a
    span. The accelerator is taken by others for the next `busy_s`; the last of the blocks begins to come in `wait_s`.
    """
    count, front = len(coming), coming[0].span.start
    loads_s = list(accumulate((block.load_s for block in reversed(coming)), initial=0.0))[::-1]
    behind_s = prefill_s(last)

    def front_s(num: int) -> float:
        return busy_s + prefill_s(Span(front, coming[num - 1].span.end)) if num else busy_s

    def load_s(num: int) -> float:
        return wait_s + loads_s[num]

    def total_s(num: int) -> float:
        if num == count:  # nothing to wait for: it runs in one piece
            return busy_s + prefill_s(Span(front, last.end))
        return max(front_s(num), load_s(num)) + behind_s

    low, high = 0, count  # computing grows with the number and loading shrinks: find the first where it lasts longer
    while low < high:
        middle = (low + high) // 2
        if front_s(middle) < load_s(middle):
            low = middle + 1
        else:
            high = middle
    alone = min((0, count), key=total_s)
    both = min((max(low - 1, 0), low), key=total_s)
    best = both if total_s(both) <= _WORTH * total_s(alone) else alone
    return Meeting(best, total_s(best), total_s(0))
