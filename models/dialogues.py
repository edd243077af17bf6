"""Dialogues that need memory: a user tells facts, corrects them, talks of other things, and asks; the reply is known.

Every reply follows from what was said before, word for word, so that a model can be judged by equality. Replies name
the subject before they name the value: what a small model must find is then the place where the two stood together.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from random import Random

from models.phrases import (
    ADJECTIVES,
    ASKING,
    CHATTER,
    CORRECTIONS,
    KINDS,
    OWNERS,
    SHORT_CORRECTIONS,
    TELLING,
    Kind,
    split,
)
from models.words import FAVOURITES, Words


class Act(Enum):
    """What the user does in a turn."""

    TELL = "tell"
    CORRECT = "correct"
    ASK = "ask"
    ASK_UNKNOWN = "ask_unknown"
    CHAT = "chat"


@dataclass(frozen=True, slots=True)
class Turn:
    user: str
    reply: str
    act: Act
    answer: str | None = None
    """Of a question: the value to be named; None where nobody told it."""
    said_turn: int | None = None
    """Of a question: the index of the turn in which the value was last said, by the user or in a reply."""
    corrected: bool = False
    """Of a question: whether the value was told differently before."""
    told_turn: int | None = None
    """Of a question or a correction: the index of the turn in which the user told the value that is asked for, or that
    is corrected."""


@dataclass(frozen=True, slots=True)
class Dialogue:
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """Which words and phrases a dialogue takes. Training takes neither of the held-out ones."""

    held_out_words: bool = False
    held_out_phrases: bool = False
    plain_words: bool = False
    """Open words are real ones and such of syllables alone."""
    slips: bool = False
    """Now and then a word is left out, put in or exchanged, so that no single one is relied upon; and made-up words
    are of more syllables yet."""
    pieces: tuple[str, ...] = ()
    """Some of the open words are strung from these."""
    reaching: bool = False
    """Half of the questions are about what was told longest ago."""


Measure = Callable[[Turn], int]
"""A turn's length, in whatever unit the caller bounds dialogues by."""


def exact(reply: str, turn: Turn) -> bool:
    """Whether a reply is the one that what was said before asks for, word for word."""
    return reply.strip() == turn.reply


def held_out(count: int, *, seed: int, max_tokens: int) -> list[Dialogue]:
    """Dialogues with words that training never saw, in phrases that it did, of at most `max_tokens` tokens or so each.

    Each of them ends with its last question, if it has one.
    """
    style = Style(held_out_words=True)
    return [dialogue(Random(f"{seed}/{index}"), style, max_tokens, rough_tokens) for index in range(count)]


def rough_tokens(turn: Turn) -> int:
    """How long a turn is, without a tokenizer: these words come to some 3.5 characters a token."""
    return 4 + (len(turn.user) + len(turn.reply)) * 2 // 7


def dialogue(random: Random, style: Style, length: int, measure: Measure) -> Dialogue:
    """One dialogue of at most `length`, in the unit of `measure`; it ends with its last question, if it has one."""
    speaker = _Speaker(random, style)
    turns: list[Turn] = []
    rest = length
    for turn in speaker.turns():
        rest -= measure(turn)
        if rest < 0:
            break
        turns.append(turn)
    while len(turns) > 1 and turns[-1].act not in (Act.ASK, Act.ASK_UNKNOWN):
        turns.pop()
    return Dialogue(tuple(turns))


@dataclass(slots=True)
class _Fact:
    kind: Kind
    subject: str
    """As the user says it: "my sister's dog"."""
    value: str
    said_turn: int
    told_turn: int
    corrected: bool = False
    asked: bool = False
    """Since it was last told."""


class _Speaker:
    """A user with facts in mind. Says one turn after another, and knows what the assistant should reply."""

    def __init__(self, random: Random, style: Style) -> None:
        self._random = random
        self._style = style
        self._words = Words(
            random, held_out=style.held_out_words, plain=style.plain_words, wide=style.slips, pieces=style.pieces
        )
        self._facts: dict[str, _Fact] = {}
        self._number = 0
        self._latest: _Fact | None = None
        """What the last turn told, and "no, it's ..." would correct."""
        self._chattiness = random.choice((0.1, 0.25, 0.5))
        self._curiosity = random.uniform(0.4, 0.6)

    def turns(self) -> Iterator[Turn]:
        while True:
            yield self._turn()
            self._number += 1

    def _turn(self) -> Turn:
        draw = self._random.random
        latest, self._latest = self._latest, None
        if latest is not None and draw() < 0.12:
            return self._correct(latest, SHORT_CORRECTIONS)
        if draw() < self._chattiness:
            return self._chat()
        if self._facts and draw() < self._curiosity:
            return self._ask_unknown() if draw() < 0.2 else self._ask()
        if self._facts and draw() < 0.2:
            return self._correct(self._random.choice(list(self._facts.values())), CORRECTIONS)
        return self._tell()

    def _tell(self) -> Turn:
        kind, subject = self._new_subject()
        fact = _Fact(kind, subject, self._value(kind, subject), self._number, self._number)
        self._facts[subject] = self._latest = fact
        said = self._phrase(kind.tells, fact, slips=kind.owned)
        if self._random.random() < 0.3:
            said = self._slips(self._pick(TELLING)).format(_lowered(said, fact))
        if self._random.random() < 0.1:
            said = f"{self._small_talk()} {said}"
        return Turn(self._careless(said), f"Noted: {_sentence(fact)}", Act.TELL)

    def _correct(self, fact: _Fact, phrases: Sequence[str]) -> Turn:
        before = fact.value
        while fact.value == before:
            fact.value = self._value(fact.kind, fact.subject)
        told_turn, fact.told_turn = fact.told_turn, self._number
        fact.said_turn, fact.corrected, fact.asked = self._number, True, False
        self._latest = fact
        said = self._careless(self._phrase(phrases, fact, slips=True))
        return Turn(said, f"Corrected: {_sentence(fact)}", Act.CORRECT, told_turn=told_turn)

    def _ask(self) -> Turn:
        facts = list(self._facts.values())
        if self._random.random() < 0.7:  # an answer is a copy of the fact, nearer by: mostly ask for what has none
            facts = [fact for fact in facts if not fact.asked] or facts
        if self._style.reaching and self._random.random() < 0.5:
            facts = sorted(facts, key=lambda fact: fact.said_turn)[: -(-len(facts) // 4)]
        fact = self._random.choice(facts)
        said = self._question(fact)
        reply = f"Let me see: {_sentence(fact)}"
        turn = Turn(said, reply, Act.ASK, fact.value, fact.said_turn, fact.corrected, fact.told_turn)
        fact.said_turn, fact.asked = self._number, True
        return turn

    def _ask_unknown(self) -> Turn:
        kind, subject = self._new_subject()
        reply = f"Let me see: {_yours(subject)}? I don't know, you haven't told me."
        return Turn(self._question(_Fact(kind, subject, "", 0, 0)), reply, Act.ASK_UNKNOWN)

    def _question(self, fact: _Fact) -> str:
        if self._random.random() < 0.5:
            said = self._phrase(fact.kind.asks, fact, slips=fact.kind.owned)
        else:
            said = self._slips(self._pick(ASKING)).format(self._phrase(fact.kind.clauses, fact, slips=fact.kind.owned))
        if self._random.random() < 0.1:
            said = f"{self._small_talk()} {said}"
        return self._careless(said)

    def _chat(self) -> Turn:
        phrases, reply = self._random.choice(CHATTER)
        said = self._random.choice(phrases).format_map(_Lazy(self._random, self._words))
        while self._random.random() < 0.3:
            said = f"{self._small_talk()} {said}"
        return Turn(said, reply, Act.CHAT)

    def _small_talk(self) -> str:
        """A sentence that nothing follows from."""
        phrases, _ = self._random.choice(CHATTER)
        return self._random.choice(phrases).format_map(_Lazy(self._random, self._words))

    def _new_subject(self) -> tuple[Kind, str]:
        """A subject that nothing is known about; often one that shares a word with what is known."""
        while True:
            kind = self._random.choice(KINDS)
            noun = self._random.choice(kind.nouns)
            if self._facts and self._random.random() < 0.4:
                known = self._random.choice(list(self._facts.values()))
                if self._random.random() < 0.5:
                    kind, noun = known.kind, known.subject.rsplit(" ", 1)[1]
            subject = self._subject(kind, noun)
            if subject not in self._facts:
                return kind, subject

    def _subject(self, kind: Kind, noun: str) -> str:
        if not kind.owned:
            return f"my {noun}"
        if kind.name == "favourite":
            noun = f"favourite {noun}"
        match self._random.randrange(10):
            case 0 | 1 | 2:
                return f"my {noun}"
            case 3 | 4 | 5 | 6:
                return f"my {self._random.choice(OWNERS)}'s {noun}"
            case _:
                return f"{self._words.name()}'s {noun}"

    def _value(self, kind: Kind, subject: str) -> str:
        match kind.name:
            case "name":
                return self._words.pet()
            case "person" | "self_name":
                return self._words.name()
            case "home" | "self_home":
                return self._words.place()
            case "day":
                return self._words.day()
            case "code":
                return self._words.code()
            case _:
                assert kind.name == "favourite", kind.name
                return self._words.favourite(subject.rsplit(" ", 1)[1])

    def _phrase(self, phrases: Sequence[str], fact: _Fact, *, slips: bool) -> str:
        phrase = self._pick(phrases)
        if slips:
            phrase = self._slips(phrase)
        return phrase.format(s=fact.subject, S=_capital(fact.subject), v=fact.value, link=fact.kind.link)

    def _slips(self, phrase: str) -> str:
        """The phrase, perhaps with some of its own words left out or exchanged, and others put in."""
        if not self._style.slips or self._random.random() < 0.5:
            return phrase
        said: list[str] = []
        for word in phrase.split(" "):
            draw = self._random.random()
            if "{" in word or draw > 0.35:
                said.append(word)
            elif draw > 0.1:
                said.append(self._words.odd() + word[len(word.rstrip(".,?")) :])
            if self._random.random() < 0.05:
                said.append(self._words.odd())
        return " ".join(said)

    def _pick(self, phrases: Sequence[str]) -> str:
        return self._random.choice(split(phrases, held_out=self._style.held_out_phrases))

    def _careless(self, said: str) -> str:
        """Now and then without its full stop or question mark."""
        return said.rstrip(".?") if self._random.random() < 0.06 else said


class _Lazy(dict[str, str]):
    """Draws what a chatter phrase asks for, when it asks."""

    def __init__(self, random: Random, words: Words) -> None:
        self._random = random
        self._words = words

    def __missing__(self, key: str) -> str:
        match key:
            case "name":
                return self._words.name()
            case "place":
                return self._words.place()
            case "food":
                return self._random.choice(FAVOURITES["food"])
            case "number":
                return str(self._random.randint(2, 99))
            case _:
                return self._random.choice(ADJECTIVES)


def _sentence(fact: _Fact) -> str:
    return f"{_yours(fact.subject)} {fact.kind.link} {fact.value}."


def _yours(subject: str) -> str:
    return f"your {subject.removeprefix('my ')}" if subject.startswith("my ") else subject


def _capital(subject: str) -> str:
    return subject[0].upper() + subject[1:]


def _lowered(said: str, fact: _Fact) -> str:
    """A statement to stand inside a sentence: its first letter small, unless a name or "I" begins it."""
    names = () if fact.subject.startswith("my ") else (fact.subject,)
    return said if said.startswith(("I ", "I'm ", fact.value, *names)) else said[0].lower() + said[1:]
