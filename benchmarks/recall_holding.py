"""Hold a conversation many windows long with a server, ask for what was told in it, note the answers and their cost.

Knows what is right. Compares nothing.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Final

from benchmarks.recall_talks import (
    LATER,
    SOON,
    Fact,
    Measure,
    Pair,
    Placed,
    Talk,
    messages,
    pieces,
    place,
    place_pairs,
    talk,
)
from models.dialogues import Turn, exact
from rekindle.client import Client

_IN_WINDOW: Final = 0.7
"""Windows that the conversations have which the model's answers inside its window are measured in."""
_MAX_NEW_TOKENS: Final = 64


@dataclass(slots=True)
class Held:
    """What came of one or more conversations under one policy."""

    right: dict[tuple[float, bool], list[bool]] = field(default_factory=lambda: defaultdict(list))
    """By distance in windows, and whether the fact had been corrected."""
    outdated: dict[float, list[bool]] = field(default_factory=lambda: defaultdict(list))
    """Of corrected facts, by distance: whether the answer is the one from before the correction."""
    pairs: dict[tuple[int, int], list[bool]] = field(default_factory=lambda: defaultdict(list))
    """Of facts that were asked for in one message, by the distances of both: whether both answers are right."""
    replies: list[str] = field(default_factory=list)
    """All answers, in order."""
    turn_s: list[float] = field(default_factory=list)
    """Of each turn that told something, in order."""
    token_ms: list[float] = field(default_factory=list)
    """Of each answer: decoding, by token."""
    ttft_ms: list[float] = field(default_factory=list)
    """Of each answer: from the worker's receipt of the question to the first token."""
    device_bytes: list[int] = field(default_factory=list)
    """Of KV, after each turn, unless the worker was too busy to say."""

    def accuracy(self, windows: float | None = None, *, corrected: bool | None = None) -> float:
        """Share of exactly right answers to single questions, at one distance or all; NaN without questions."""
        found = [
            hits
            for (distance, is_corrected), hits in self.right.items()
            if windows in (None, distance) and corrected in (None, is_corrected)
        ]
        return _share(chain(*found))

    def outdated_share(self, windows: float | None = None) -> float:
        """Of the corrected facts, the share whose old value was named; NaN without any."""
        return _share(chain(*(hits for distance, hits in self.outdated.items() if windows in (None, distance))))

    def pair_accuracy(self, windows: tuple[int, int] | None = None) -> float:
        """Share of pairs with two right answers, at these distances (in any order) or all; NaN without pairs."""
        wanted = None if windows is None else sorted(windows)
        return _share(chain(*(hits for distances, hits in self.pairs.items() if wanted in (None, sorted(distances)))))

    @property
    def growth(self) -> float:
        """What the last quarter of the turns took, in what the second did: the first is in the window in part."""
        quarter = max(1, len(self.turn_s) // 4)
        return statistics.median(self.turn_s[-quarter:]) / statistics.median(self.turn_s[quarter : 2 * quarter])


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    window: int
    windows: tuple[int, ...]
    told: Sequence[Fact]
    """What is asked for one by one,"""
    told_in_pairs: Sequence[Fact]
    """and by two in a message."""
    other_facts: float
    turn_tokens: int
    seed: int
    measure: Measure

    def beyond(self) -> Talk:
        """One conversation with facts at all distances."""
        placed, pairs = place(self.told, self.windows, (SOON, LATER)), place_pairs(self.told_in_pairs, self.windows)
        windows = max(self.windows) + 1.0 + max((one.apart for one in placed if one.fact.is_corrected), default=0.0)
        return self._talk(placed, pairs, windows, "beyond")

    def within(self) -> list[Talk]:
        """The same facts in conversations that fit the window, a few in each."""
        talks = []
        for number, start in enumerate(range(0, len(self.told), 8)):
            placed = place(self.told[start : start + 8], (0.05,))
            talks.append(self._talk(placed, (), _IN_WINDOW, f"within {number}"))
        for number, start in enumerate(range(0, len(self.told_in_pairs), 8)):
            pairs = place_pairs(self.told_in_pairs[start : start + 8], (0.05,))
            talks.append(self._talk((), pairs, _IN_WINDOW, f"pairs within {number}"))
        return talks

    def num_turns(self, one: Talk) -> int:
        """Of telling and asking."""
        return len(list(pieces(one.turns, self.turn_tokens, self.measure))) + one.num_questions

    def _talk(self, placed: Sequence[Placed], pairs: Sequence[Pair], windows: float, name: str) -> Talk:
        return talk(
            placed,
            pairs,
            windows=windows,
            window_tokens=self.window,
            other_facts=self.other_facts,
            seed=f"{self.seed}/{name}",
            measure=self.measure,
        )


class Holder:
    """One conversation with one server after another."""

    def __init__(self, setup: Setup, one: Talk, held: Held, on_turn: Callable[[], None]) -> None:
        self._setup = setup
        self._talk = one
        self._held = held
        self._on_turn = on_turn

    async def tell(self, client: Client, session_id: str) -> None:
        """All that comes before the questions."""
        for piece in pieces(self._talk.turns, self._setup.turn_tokens, self._setup.measure):
            begun = time.perf_counter()
            await client.generate(messages(piece), session_id=session_id, max_new_tokens=_MAX_NEW_TOKENS).read()
            self._held.turn_s.append(time.perf_counter() - begun)
            self._held.device_bytes += [worker.device.bytes for worker in (await client.stats()).workers]
            self._on_turn()

    async def ask(self, client: Client, session_id: str) -> None:
        held = self._held
        for placed in self._talk.placed:
            fact, windows = placed.fact, int(placed.windows)
            hit = await self._answer(client, session_id, fact.question)
            held.right[windows, fact.is_corrected].append(hit)
            if fact.is_corrected:
                held.outdated[windows].append(held.replies[-1] == fact.outdated)
        for pair in self._talk.pairs:
            hits = [await self._answer(client, session_id, question) for question in pair.questions]
            held.pairs[pair.windows].append(all(hits))

    async def _answer(self, client: Client, session_id: str, question: Turn) -> bool:
        generation = client.generate(
            [{"role": "user", "content": question.user}], session_id=session_id, max_new_tokens=_MAX_NEW_TOKENS
        )
        reply = await generation.read()
        assert generation.receipt is not None
        self._held.ttft_ms.append(generation.receipt.ttft_ms)
        self._held.replies.append(reply.strip())
        self._held.token_ms.append(generation.receipt.decode_ms / max(1, len(generation.token_ids) - 1))
        self._on_turn()
        return exact(reply, question)


def _share(hits: Iterable[bool]) -> float:
    found = list(hits)
    return statistics.mean(found) if found else float("nan")
