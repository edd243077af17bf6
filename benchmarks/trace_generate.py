"""A synthetic load of conversations, after what public traces and papers report of turns, lengths and think times.

Transcripts are fixed beforehand, replies included: a turn's prompt is all that was said before it and something new.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, count
from random import Random

from benchmarks.trace import Piece, Request, TraceError

_SINGLE_TURN = 0.38
_LAST_TURN = 0.22
_MAX_TURNS = 64
_ARRIVAL_VARIATION = 1.75
"""Coefficient of variation of the time between two conversations' first turns: they come in bursts."""
_MEAN_OUTPUT = 343
_TENANTS = 8
_SYSTEM_TOKENS = (500, 2000)


@dataclass(frozen=True, slots=True)
class Lognormal:
    median: float
    sigma: float

    def draw(self, random: Random) -> float:
        return random.lognormvariate(math.log(self.median), self.sigma)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of use."""

    first_input: Lognormal
    later_input: Lognormal
    think_s: tuple[tuple[float, Lognormal], ...]
    """Shares, which add up to 1, and times."""


_PEOPLE = ((0.75, Lognormal(85, 1.1)), (0.25, Lognormal(1500, 1.5)))
KINDS = {
    "chat": Kind(first_input=Lognormal(600, 1.3), later_input=Lognormal(80, 1.0), think_s=_PEOPLE),
    "long": Kind(first_input=Lognormal(6900, 1.3), later_input=Lognormal(830, 1.0), think_s=_PEOPLE),
    "agents": Kind(
        first_input=Lognormal(6900, 1.3), later_input=Lognormal(830, 1.0), think_s=((1.0, Lognormal(1.5, 1.2)),)
    ),
}


def generated(kind: str, *, requests: int, gap_s: float, seed: int) -> list[Request]:
    """The first `requests` turns of conversations that begin every `gap_s` seconds on average.

    Each begins with the system prompt of one of 8 tenants, of 500 to 2,000 tokens; tenants are chosen by Zipf's law.
    Raises TraceError for an unknown kind.
    """
    if kind not in KINDS:
        raise TraceError(f"there is no load {kind!r}; there are {', '.join(KINDS)}")
    random, ids = Random(seed), count()
    systems = [Piece(next(ids), random.randint(*_SYSTEM_TOKENS)) for _ in range(_TENANTS)]
    zipf = list(accumulate(1 / rank for rank in range(1, _TENANTS + 1)))
    shape = _ARRIVAL_VARIATION**-2
    at_s, turns = 0.0, list[Request]()
    for conversation in count():
        (system,) = random.choices(systems, cum_weights=zipf)
        turns += _conversation(KINDS[kind], random, ids, system, conversation, at_s)
        at_s += random.gammavariate(shape, gap_s / shape)
        if sum(turn.at_s <= at_s for turn in turns) >= requests:  # nothing that begins later comes before these
            break
    return sorted(turns, key=lambda turn: turn.at_s)[:requests]


def _conversation(
    kind: Kind, random: Random, ids: Iterator[int], system: Piece, conversation: int, at_s: float
) -> Iterator[Request]:
    said: tuple[Piece, ...] = (system,)
    for turn in range(1, _num_turns(random) + 1):
        asked = kind.first_input if turn == 1 else kind.later_input
        said = (*said, Piece(next(ids), math.ceil(asked.draw(random))))
        output_tokens = math.ceil(random.expovariate(1 / _MEAN_OUTPUT))
        yield Request(at_s=at_s, pieces=said, output_tokens=output_tokens, conversation=conversation, turn=turn)
        said = (*said, Piece(next(ids), output_tokens))
        (think_s,) = random.choices([time for _, time in kind.think_s], [share for share, _ in kind.think_s])
        at_s += think_s.draw(random)


def _num_turns(random: Random) -> int:
    turns = 1
    if random.random() >= _SINGLE_TURN:
        turns += 1
        while turns < _MAX_TURNS and random.random() >= _LAST_TURN:
            turns += 1
    return turns
