"""Traces of requests: which tokens each prompt consists of, when it comes, and which turn of a conversation it is.

Reads Mooncake's and Bailian's JSONL, and the compact form of the trace that comes along. Knows no server and no clock.
"""

import gzip
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np

BUNDLED = "data/mooncake_synthetic_trace.jsonl.gz"
_MOONCAKE_TOKENS = 512
_BAILIAN_TOKENS = 16
_LONGEST_CONVERSATION = 64
"""Ids that more requests than this have are a system prompt: sharing them makes no conversation."""


class TraceError(ValueError):
    """A trace that can't be read, or be replayed as asked."""


class Piece(NamedTuple):
    """The first `num_tokens` tokens that an id stands for. Equal ids, equal tokens."""

    id: int
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and how long its reply is."""

    at_s: float
    pieces: tuple[Piece, ...]
    output_tokens: int
    conversation: int
    turn: int
    """From 1."""

    @property
    def prompt_tokens(self) -> int:
        return sum(piece.num_tokens for piece in self.pieces)


class _Logged(NamedTuple):
    """A line of a trace that says nothing of conversations."""

    at_s: float
    input_tokens: int
    output_tokens: int
    ids: Sequence[int]


def read_trace(path: Path | None = None) -> list[Request]:
    """All requests of a trace, by time; of the bundled one without a path. `.gz` is unpacked.

    Raises TraceError for what is neither Mooncake's format nor Bailian's, and OSError.
    """
    packed = path.read_bytes() if path is not None else (resources.files("benchmarks") / BUNDLED).read_bytes()
    text = gzip.decompress(packed) if packed[:2] == b"\x1f\x8b" else packed
    rows = [row for line in text.splitlines() if (row := _row(line)) is not None]
    if not rows:
        raise TraceError("the trace is empty")
    try:
        if isinstance(rows[0], dict) and "chat_id" in rows[0]:
            requests = _of_bailian(rows)
        else:
            requests = _of_conversations([_logged(row) for row in rows])
    except (KeyError, TypeError, IndexError) as error:
        raise TraceError(f"a line lacks a field, or has one of a wrong type: {error!r}") from error
    return sorted(requests, key=lambda request: request.at_s)


def chosen(requests: Sequence[Request], *, at_most: int, seed: int) -> list[Request]:
    """Whole conversations, drawn by the seed, with at most so many requests; as in the trace, they share prefixes."""
    sizes = Counter(request.conversation for request in requests)
    drawn = list(sizes)
    Random(seed).shuffle(drawn)
    kept: set[int] = set()
    num_kept = 0
    for conversation in drawn:
        if num_kept + sizes[conversation] <= at_most:
            kept.add(conversation)
            num_kept += sizes[conversation]
    return [request for request in requests if request.conversation in kept]


def scaled(requests: Sequence[Request], scale: float) -> list[Request]:
    """All lengths divided by `scale`, rounded up. Ids stay, and so does what prompts share."""
    longest = max(piece.num_tokens for request in requests for piece in request.pieces)
    if not 1.0 <= scale <= longest:
        raise TraceError(f"scale must be from 1 to {longest}, the tokens of the trace's longest piece; got {scale:g}")
    return [
        replace(
            request,
            pieces=tuple(Piece(piece.id, -int(-piece.num_tokens // scale)) for piece in request.pieces),
            output_tokens=-int(-request.output_tokens // scale),
        )
        for request in requests
    ]


class TokenSource:
    """The tokens that ids stand for, drawn from a vocabulary by a generator that is seeded by the id."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def prompt(self, request: Request) -> list[int]:
        return [token for piece in request.pieces for token in self._tokens(piece)]

    def _tokens(self, piece: Piece) -> list[int]:
        generator = np.random.Generator(np.random.Philox(key=piece.id))
        return [int(token) for token in (generator.random(piece.num_tokens) * self._vocab_size)]


def _row(line: bytes) -> Any:
    if not line.strip():
        return None
    try:
        return json.loads(line)
    except ValueError as error:
        raise TraceError(f"not a line of JSON: {line[:60]!r}") from error


def _logged(row: Any) -> _Logged:
    if isinstance(row, dict):
        return _Logged(row["timestamp"] / 1000, row["input_length"], row["output_length"], row["hash_ids"])
    at_ms, input_tokens, output_tokens, runs = row
    ids = [number for first, count in runs for number in range(first, first + count)]
    return _Logged(at_ms / 1000, input_tokens, output_tokens, ids)


def _pieces(ids: Sequence[int], input_tokens: int, id_tokens: int) -> tuple[Piece, ...]:
    """Every id but the last stands for `id_tokens` tokens."""
    last = input_tokens - (len(ids) - 1) * id_tokens
    if not ids or not 0 < last <= id_tokens:
        raise TraceError(f"{len(ids)} ids of {id_tokens} tokens don't make a prompt of {input_tokens}")
    return (*(Piece(number, id_tokens) for number in ids[:-1]), Piece(ids[-1], last))


def _of_bailian(rows: Sequence[Any]) -> list[Request]:
    roots: dict[int, int] = {}
    for row in rows:
        roots[row["chat_id"]] = roots.get(row["parent_chat_id"], row["chat_id"])
    return [
        Request(
            at_s=row["timestamp"],
            pieces=_pieces(row["hash_ids"], row["input_length"], _BAILIAN_TOKENS),
            output_tokens=max(1, row["output_length"]),
            conversation=roots[row["chat_id"]],
            turn=row["turn"],
        )
        for row in rows
    ]


def _of_conversations(rows: Sequence[_Logged]) -> list[Request]:
    """Recognise conversations: a request goes on from the one before it that it shares the longest prefix with, if
    that is at least half of that one's, and more than a system prompt."""
    num_having = Counter(number for row in rows for number in row.ids)
    last_having: dict[int, int] = {}
    requests: list[Request] = []
    for index, row in enumerate(sorted(rows, key=lambda row: row.at_s)):
        shared = _num_shared(row.ids, last_having)
        before = requests[last_having[row.ids[shared - 1]]] if shared else None
        goes_on = (
            before is not None
            and 2 * shared >= len(before.pieces)
            and num_having[row.ids[shared - 1]] <= _LONGEST_CONVERSATION
        )
        requests.append(
            Request(
                at_s=row.at_s,
                pieces=_pieces(row.ids, row.input_tokens, _MOONCAKE_TOKENS),
                output_tokens=max(1, row.output_tokens),
                conversation=before.conversation if before is not None and goes_on else index,
                turn=before.turn + 1 if before is not None and goes_on else 1,
            )
        )
        last_having.update(dict.fromkeys(row.ids, index))
    return requests


def _num_shared(ids: Sequence[int], seen: dict[int, int]) -> int:
    return next((index for index, number in enumerate(ids) if number not in seen), len(ids))
