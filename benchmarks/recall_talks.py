"""Conversations many windows long: facts are told, some of them corrected, then comes other talk, then the questions.

Pure. All turns are those of generated dialogues (models/dialogues.py), put in another order.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from random import Random

from models.dialogues import Act, Dialogue, Style, Turn, dialogue, rough_tokens

_SOURCE_TOKENS = 1024
"""Length of the dialogues that turns are taken from."""
_SPREAD = 0.6
"""Facts are told within so many windows, from their distance on back."""
_BETWEEN = 0.25
"""Windows between a fact and its correction."""

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
        return self.question.reply.removeprefix("Let me see: ").removesuffix(f"{self.question.answer}.")


@dataclass(frozen=True, slots=True)
class Placed:
    fact: Fact
    windows: float
    """How many windows before the end the value was last told, at least."""


@dataclass(frozen=True, slots=True)
class Talk:
    turns: tuple[Turn, ...]
    """Before the questions."""
    placed: tuple[Placed, ...]


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


def place(told: Sequence[Fact], windows: Sequence[float]) -> list[Placed]:
    """Facts in turn at each of the distances, those at the same one apart from each other."""
    each = -(-len(told) // len(windows))
    return [
        Placed(fact, windows[number % len(windows)] + _SPREAD * (number // len(windows)) / each)
        for number, fact in enumerate(told)
    ]


def talk(
    placed: Sequence[Placed], *, windows: float, window_tokens: int, other_facts: float, seed: str, measure: Measure
) -> Talk:
    """A conversation of `windows` windows with these facts among small talk, of which the share `other_facts` may be
    facts about others. Ends before the questions."""
    due = sorted(
        (
            (distance + _BETWEEN * (len(item.fact.told) - 1 - at), number, turn)
            for number, item in enumerate(placed)
            for at, turn in enumerate(item.fact.told)
            for distance in [item.windows]
        ),
        key=lambda event: (-event[0], event[1]),
    )
    filler = _filler(f"{seed}/filler", [item.fact.subject for item in placed], other_facts)
    rest = windows * window_tokens
    turns: list[Turn] = []
    while due or rest > 0:
        turn = due.pop(0)[2] if due and due[0][0] * window_tokens >= rest else next(filler)
        turns.append(turn)
        rest -= measure(turn)
    return Talk(tuple(turns), tuple(placed))


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
