"""Conversations many windows long: facts are told, some of them corrected, then comes other talk, then the questions.

Pure. All turns are those of generated dialogues (models/dialogues.py), put in another order.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from random import Random

from models.dialogues import Act, Dialogue, Style, Turn, dialogue, rough_tokens

_SOURCE_TOKENS = 1024
"""Length of the dialogues that turns are taken from."""
_SPREAD = 0.6
"""Facts are told within so many windows, from their distance on back."""
SOON = 0.25
"""Windows between a fact and its correction, where that follows soon,"""
LATER = 3.0
"""and where it is many turns later."""

_CONFIRMS = "Noted: "
_ANSWERS = "Let me see: "

Measure = Callable[[Turn], int]


@dataclass(frozen=True, slots=True)
class Fact:
    told: tuple[Turn, ...]
    """The turn that tells it, and the one that corrects it, if any."""
    question: Turn

    @property
    def is_corrected(self) -> bool:
        return len(self.told) > 1

    @property
    def subject(self) -> str:
        """As the assistant names it, up to the value: "your sister's dog is called "."""
        return self.question.reply.removeprefix(_ANSWERS).removesuffix(f"{self.question.answer}.")

    @property
    def outdated(self) -> str | None:
        """The reply that would have been right before the correction."""
        return _ANSWERS + self.told[0].reply.removeprefix(_CONFIRMS) if self.is_corrected else None


@dataclass(frozen=True, slots=True)
class Placed:
    fact: Fact
    windows: float
    """How many windows before the end the value was last told, at least."""
    apart: float = SOON
    """Windows between its first telling and its correction."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two facts that one message asks for. The model was trained on one answer a reply, and answers the latter
    question: so both orders are asked."""

    first: Placed
    second: Placed

    @property
    def windows(self) -> tuple[int, int]:
        return int(self.first.windows), int(self.second.windows)

    @property
    def questions(self) -> tuple[Turn, Turn]:
        """The second one's answer is not in the first one's reply."""
        asked = self.first.fact.question, self.second.fact.question
        return _both(*asked), _both(*reversed(asked))


@dataclass(frozen=True, slots=True)
class Talk:
    turns: tuple[Turn, ...]
    """Before the questions."""
    placed: tuple[Placed, ...]
    """Facts that are asked for one by one."""
    pairs: tuple[Pair, ...] = ()

    @property
    def num_questions(self) -> int:
        return len(self.placed) + 2 * len(self.pairs)


def facts(random_seed: str, *, singles: int, corrected: int) -> list[Fact]:
    """So many facts that are told once, then those that are corrected; no two about the same. Words are held out."""
    found: dict[bool, list[Fact]] = {False: [], True: []}
    subjects: set[str] = set()
    for source in _sources(f"{random_seed}/facts"):
        for fact in _facts_of(source):
            kind = found[fact.is_corrected]
            if len(kind) < (corrected if fact.is_corrected else singles) and fact.subject not in subjects:
                subjects.add(fact.subject)
                kind.append(fact)
        if len(found[False]) == singles and len(found[True]) == corrected:
            return found[False] + found[True]
    raise AssertionError("dialogues without end have an end")


def place(told: Sequence[Fact], windows: Sequence[float], apart: Sequence[float] = (SOON,)) -> list[Placed]:
    """Facts in turn at each of the distances, those at the same one apart from each other, and corrected after each of
    the times `apart`."""
    each = -(-len(told) // len(windows))
    return [
        Placed(
            fact,
            windows[number % len(windows)] + _SPREAD * (number // len(windows)) / each,
            apart[number // len(windows) % len(apart)],
        )
        for number, fact in enumerate(told)
    ]


def place_pairs(told: Sequence[Fact], windows: Sequence[float]) -> list[Pair]:
    """Facts two by two, at distances of which each is paired with each other one in turn (or with itself alone)."""
    pairs, some = [], len(windows)
    for number in range(len(told) // 2):
        step = 1 + number // some % max(1, some - 1)
        first, second = windows[number % some], windows[(number + step) % some]
        within = _SPREAD * number / (len(told) // 2)
        pairs.append(Pair(Placed(told[2 * number], first + within), Placed(told[2 * number + 1], second + within)))
    return pairs


def talk(
    placed: Sequence[Placed],
    pairs: Sequence[Pair] = (),
    *,
    windows: float,
    window_tokens: int,
    other_facts: float,
    seed: str,
    measure: Measure,
) -> Talk:
    """A conversation of `windows` windows with these facts among small talk, of which the share `other_facts` may be
    facts about others. Ends before the questions."""
    told = [*placed, *(one for pair in pairs for one in (pair.first, pair.second))]
    due = sorted(
        (
            (item.windows + item.apart * (len(item.fact.told) - 1 - at), number, turn)
            for number, item in enumerate(told)
            for at, turn in enumerate(item.fact.told)
        ),
        key=lambda event: (-event[0], event[1]),
    )
    filler = _filler(f"{seed}/filler", [item.fact.subject for item in told], other_facts)
    rest = windows * window_tokens
    turns: list[Turn] = []
    while due or rest > 0:
        turn = due.pop(0)[2] if due and due[0][0] * window_tokens >= rest else next(filler)
        turns.append(turn)
        rest -= measure(turn)
    return Talk(tuple(turns), tuple(placed), tuple(pairs))


def pieces(turns: Sequence[Turn], tokens: int, measure: Measure) -> Iterator[list[Turn]]:
    """Turns in order, in lists of at least so many tokens, but for the last."""
    piece: list[Turn] = []
    length = 0
    for turn in turns:
        piece.append(turn)
        length += measure(turn)
        if length >= tokens:
            yield piece
            piece, length = [], 0
    if piece:
        yield piece


def messages(piece: Sequence[Turn]) -> list[dict[str, str]]:
    """What was said, without the last reply, which is the model's to give."""
    said = [
        message
        for turn in piece
        for message in ({"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.reply})
    ]
    return said[:-1]


def _both(first: Turn, second: Turn) -> Turn:
    return replace(second, user=f"{first.user} {second.user}")


def _sources(seed: str) -> Iterator[Dialogue]:
    style = Style(held_out_words=True)
    for number in count():
        yield dialogue(Random(f"{seed}/{number}"), style, _SOURCE_TOKENS, rough_tokens)


def _facts_of(source: Dialogue) -> Iterator[Fact]:
    for question in source.turns:
        if question.act is not Act.ASK or question.told_turn is None:
            continue
        last = source.turns[question.told_turn]
        if last.act is Act.TELL:
            yield Fact((last,), question)
        elif last.told_turn is not None and question.told_turn - last.told_turn > 1:  # next to it, it may be "No, Rex."
            first = source.turns[last.told_turn]
            if first.act is Act.TELL:
                yield Fact((first, last), question)


def _filler(seed: str, subjects: Sequence[str], other_facts: float) -> Iterator[Turn]:
    random = Random(seed)
    for source in _sources(seed):
        for turn in source.turns:
            is_other = turn.act is Act.TELL and not any(subject in turn.reply for subject in subjects)
            if turn.act is Act.CHAT or (is_other and random.random() < other_facts):
                yield turn
