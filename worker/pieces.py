"""Text to tokens piece by piece: parts of it that are known by themselves have the tokens that they have by themselves.

A tokenizer may join what ends one piece with what begins the next. Cut apart, a text may so have other tokens than as a
whole, which say the same.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple


class Encoded(NamedTuple):
    token_ids: tuple[int, ...]
    insert_bounds: tuple[int, ...] = ()
    """Where among them the known parts are: start, end, start, end, ..."""


def encode(tokenizer: Any, text: str, *, is_first: bool = False) -> tuple[int, ...]:
    """With the model's special tokens (BOS) where a conversation begins as plain text."""
    return tuple(tokenizer(text, add_special_tokens=is_first, verbose=False)["input_ids"])


def encode_pieces(tokenizer: Any, text: str, inserts: Sequence[str], *, is_first: bool = False) -> Encoded:
    """The known parts are looked for in order; one that is not there (a template may change it) is none."""
    token_ids: list[int] = []
    bounds: list[int] = []
    for insert in filter(None, inserts):
        before, found, after = text.partition(insert)
        if found:
            token_ids += _between(tokenizer, before, is_first and not token_ids)
            start = len(token_ids)
            token_ids += encode(tokenizer, insert)
            bounds += [start, len(token_ids)]
            text = after
    token_ids += _between(tokenizer, text, is_first and not token_ids)
    return Encoded(tuple(token_ids), tuple(bounds))


def _between(tokenizer: Any, text: str, is_first: bool) -> tuple[int, ...]:
    return encode(tokenizer, text, is_first=is_first) if text or is_first else ()
