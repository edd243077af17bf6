"""Decide the next step from plain numbers. No tensor, no clock, no await."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Span(NamedTuple):
    """Positions [start, end) of a sequence."""

    start: int
    end: int

    @property
    def tokens(self) -> int:
        return self.end - self.start


def plan_step(num_decoding: int, prompts: Sequence[Sequence[Span]], max_tokens: int) -> list[list[Span]]:
    """Share a step of `max_tokens` between decoding sequences and unfinished prompts.

    Every decoding sequence gets its one token; what is left goes to the prompts' gaps, oldest prompt first, each gap
    front to back (a token needs the keys of all before it: within a step a later gap may follow an earlier one, as each
    layer writes all keys before it reads any). Returns the spans to run for each prompt.
    """
    left = max_tokens - num_decoding
    assert left >= 0, f"{num_decoding} decoding sequences in a step of {max_tokens} tokens"
    chosen: list[list[Span]] = []
    for gaps in prompts:
        spans: list[Span] = []
        for gap in gaps:
            if left == 0:
                break
            span = Span(gap.start, min(gap.end, gap.start + left))
            left -= span.tokens
            spans.append(span)
            if span.end < gap.end:
                break
        chosen.append(spans)
    return chosen


def subtract(gaps: Sequence[Span], done: Iterable[Span]) -> list[Span]:
    """Take spans that were run (each the front of a gap) out of the gaps."""
    ends = {span.start: span.end for span in done}
    rest = (Span(ends.get(gap.start, gap.start), gap.end) for gap in gaps)
    return [gap for gap in rest if gap.tokens]


def overlaps(span: Span, others: Iterable[Span]) -> list[Span]:
    """What of a span lies within each of the others, where anything does."""
    cut = (Span(max(span.start, other.start), min(span.end, other.end)) for other in others)
    return [part for part in cut if part.tokens > 0]


def joined(spans: Sequence[Span]) -> list[Span]:
    """Sorted spans, those that touch made one."""
    whole: list[Span] = []
    for span in spans:
        if whole and whole[-1].end == span.start:
            whole[-1] = Span(whole[-1].start, span.end)
        else:
            whole.append(span)
    return whole


def upto(span: Span, end: int) -> Span:
    """What of a span lies before `end`; empty where nothing does."""
    return Span(span.start, max(span.start, min(span.end, end)))


def complement(covered: Sequence[Span], end: int) -> list[Span]:
    """The gaps between sorted spans, up to `end`."""
    gaps: list[Span] = []
    at = 0
    for span in covered:
        if span.start > at:
            gaps.append(Span(at, span.start))
        at = max(at, span.end)
    if at < end:
        gaps.append(Span(at, end))
    return gaps
