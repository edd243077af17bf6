"""Where to cut a text into chunks of tokens: at the end of a sentence or a word where one is near. Plain arithmetic."""

from collections.abc import Sequence
from typing import Final, NamedTuple

_SENTENCE_ENDS: Final = (".", "!", "?", "…", ":", ";")
_FULL_STOPS: Final = ("\u3002", "\uff01", "\uff1f")
"""End a sentence without a space behind them."""
_CLOSING: Final = "\"')]}\u00bb\u201d\u2019"
_LOOK_BACK: Final = 16
"""Characters before a place that say what ends there."""

_WORD_END, _SENTENCE_END = 1, 2


class Span(NamedTuple):
    """A chunk: characters [start, end) of the text, tokens [first, last) of its tokens."""

    start: int
    end: int
    first: int
    last: int


class Passage(NamedTuple):
    """What one vector is made of."""

    span: Span
    token_ids: list[int]
    """As the model reads them: with its special tokens, and a prefix perhaps."""


def cut(text: str, token_starts: Sequence[int], *, size: int, overlap: int) -> list[Span]:
    """Chunks of at most `size` tokens, which together have every character of the text, in order.

    `token_starts` says at which character each token of the text begins, in order. A chunk ends where the last sentence
    within its last quarter does, else the last word, else after `size` tokens; the next one repeats at most `overlap`
    tokens (half of `size` at most), from the beginning of a word on. No tokens: no chunks.
    """
    assert 0 <= 2 * overlap <= size, "a chunk must get on"
    num_tokens = len(token_starts)
    spans: list[Span] = []
    first = 0
    while first < num_tokens:
        last = _last(text, token_starts, first, size)
        start = token_starts[first] if spans else 0
        end = token_starts[last] if last < num_tokens else len(text)
        spans.append(Span(start, end, first, last))
        first = _next_first(text, token_starts, last, overlap) if last < num_tokens else num_tokens
    return spans


def _last(text: str, token_starts: Sequence[int], first: int, size: int) -> int:
    """Where the chunk that begins with token `first` ends."""
    full = first + size
    if full >= len(token_starts):
        return len(token_starts)
    nearest_first = range(full, max(full - size // 4, first + 1) - 1, -1)
    for kind in (_SENTENCE_END, _WORD_END):
        for last in nearest_first:
            if _what_ends(text, token_starts[last]) >= kind:
                return last
    return full


def _next_first(text: str, token_starts: Sequence[int], last: int, overlap: int) -> int:
    """Where the chunk behind token `last` begins."""
    return next((first for first in range(last - overlap, last) if _what_ends(text, token_starts[first])), last)


def _what_ends(text: str, place: int) -> int:
    """Whether a word or a sentence ends before `place`; some tokens begin with the space before their word."""
    before = text[max(0, place - _LOOK_BACK) : place]
    said = before.rstrip()
    if not (len(said) < len(before) or text[place : place + 1].isspace()):
        return _SENTENCE_END if said.endswith(_FULL_STOPS) else 0
    if "\n" in before[len(said) :] or text[place : place + 1] == "\n":
        return _SENTENCE_END
    return _SENTENCE_END if said.rstrip(_CLOSING).endswith((*_SENTENCE_ENDS, *_FULL_STOPS)) else _WORD_END
