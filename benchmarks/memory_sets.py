"""Conversations with questions whose evidence is known: generated ones, and those of LoCoMo's JSON.

What is said in a turn is one thing to be remembered; a question names the turns that answer it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any, Final

from cache_store.errors import InvalidRequest
from models.dialogues import Act, Style, Turn, dialogue, rough_tokens

_EVIDENCE: Final = re.compile(r"D:?(\d+):(\d+)")
_SESSION: Final = re.compile(r"session_(\d+)")
_WHEN: Final = "%I:%M %p on %d %B, %Y"
_CATEGORIES: Final = {1: "multi-hop", 2: "temporal", 3: "open-domain", 4: "single-hop", 5: "adversarial"}
"""As LoCoMo's authors number them (Maharana et al. 2024)."""
_BEGIN: Final = datetime(2026, 1, 1, tzinfo=UTC)
_SECONDS_BETWEEN_TURNS: Final = 3600.0
"""On average: so that a dialogue of some hundred turns takes days, in which things are forgotten."""


@dataclass(frozen=True, slots=True)
class Said:
    """What was said in one turn."""

    name: str
    text: str
    at_ms: int
    corrects: str = ""
    """The name of what is no longer so; empty where nothing is known of that."""


@dataclass(frozen=True, slots=True)
class Question:
    text: str
    evidence: frozenset[str]
    """Names of what answers it."""
    category: str
    at_ms: int
    num_said: int
    """How much had been said when it was asked: the rest is not known yet."""


@dataclass(frozen=True, slots=True)
class Conversation:
    said: tuple[Said, ...]
    questions: tuple[Question, ...]
    """In the order in which they are asked."""


def generated(count: int, *, seed: int, max_tokens: int) -> list[Conversation]:
    """Dialogues in which facts are told, corrected and asked for among other talk; always the same for a seed.

    What is remembered is the exchange, as a session's episodes are. The evidence of a question is the turn in which
    the value that counts was told.
    """
    style = Style(held_out_words=True)
    conversations = []
    for index in range(count):
        random = Random(f"{seed}/{index}")
        turns = dialogue(random, style, max_tokens, rough_tokens).turns
        conversations.append(_conversation(turns, random))
    return conversations


def locomo(path: Path) -> list[Conversation]:
    """The conversations of LoCoMo's JSON. Questions without evidence in them are left out.

    Raises InvalidRequest for another file, OSError.
    """
    try:
        samples = json.loads(path.read_bytes())
        return [_of_sample(sample) for sample in (samples if isinstance(samples, list) else [samples])]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidRequest("locomo", f"{path} is not as LoCoMo's: {type(error).__name__}: {error}") from error


def _conversation(turns: Sequence[Turn], random: Random) -> Conversation:
    said: list[Said] = []
    questions: list[Question] = []
    at = _BEGIN
    for number, turn in enumerate(turns):
        at += timedelta(seconds=random.expovariate(1 / _SECONDS_BETWEEN_TURNS))
        at_ms = int(at.timestamp() * 1000)
        if turn.act in (Act.TELL, Act.CORRECT, Act.CHAT):
            corrects = "" if turn.told_turn is None else str(turn.told_turn)
            said.append(Said(str(number), f"user: {turn.user}\nassistant: {turn.reply}", at_ms, corrects))
        elif turn.act is Act.ASK:
            category = "corrected" if turn.corrected else "told"
            evidence = frozenset({str(turn.told_turn)})
            questions.append(Question(turn.user, evidence, category, at_ms, len(said)))
    return Conversation(tuple(said), tuple(questions))


def _of_sample(sample: Mapping[str, Any]) -> Conversation:
    content = sample["conversation"]
    sessions = sorted(int(match[1]) for key in content if (match := _SESSION.fullmatch(key)))
    said = [one for session in sessions for one in _of_session(content, session)]
    names = {one.name for one in said}
    after_ms = max((one.at_ms for one in said), default=0) + 1
    questions = []
    for asked in sample["qa"]:
        found = _EVIDENCE.findall(" ".join(asked.get("evidence") or []))
        evidence = frozenset(f"D{int(session)}:{int(turn)}" for session, turn in found) & names
        if evidence:
            category = _CATEGORIES.get(asked["category"], str(asked["category"]))
            questions.append(Question(asked["question"], evidence, category, after_ms, len(said)))
    return Conversation(tuple(said), tuple(questions))


def _of_session(content: Mapping[str, Any], session: int) -> list[Said]:
    began = datetime.strptime(content[f"session_{session}_date_time"], _WHEN).replace(tzinfo=UTC)
    said = []
    for number, turn in enumerate(content[f"session_{session}"]):
        text = f"{turn['speaker']}: {turn['text']}"
        if turn.get("blip_caption"):
            text += f" [shares a picture: {turn['blip_caption']}]"
        [(its_session, its_turn)] = _EVIDENCE.findall(turn["dia_id"])
        at_ms = int((began + timedelta(minutes=number)).timestamp() * 1000)
        said.append(Said(f"D{int(its_session)}:{int(its_turn)}", text, at_ms))
    return said
